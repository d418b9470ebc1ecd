"""Our axes in the host's X/Y/Z plot: what each picture is made with, and what is left of it."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lib_loramerge.blocks import load_presets
from lib_loramerge.errors import RecipeError
from lib_loramerge.merge import plan_merge, run_merge
from lib_loramerge.methods import METHODS
from lib_loramerge.recipe import MergeRecipe, parse_prompt
from lib_loramerge.webui.filled import read_pasted
from lib_loramerge.webui.host.standalone import StandaloneHost
from lib_loramerge.webui.settings import Settings
from lib_loramerge.webui.xyz.infotext import recipe_of
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, make_lora
from tests.helpers.hosting import ROOT, FakeHost
from tests.helpers.inprocess import fake_modules

SMALL = dict(list(SD1_LAYERS.items())[1:4])
BOTH = "a cat <lora:a:0.8>, <lora:b:0.5> on a mat"
AXIS = "[LoRA Merge] "


class Page:
    """The txt2img page of the fake host in this process, with its X/Y/Z plot."""

    def __init__(self, host, data: Path) -> None:
        import gradio as gr

        self.host, self.data = host, data
        self.shared, self.processing = host.shared, host.processing
        self.scripts = importlib.import_module("modules.scripts")
        self.scripts.load_scripts()
        host.script_callbacks.call("before_ui")
        assert host.errors.records == []
        self.runner = self.scripts.scripts_txt2img
        with gr.Blocks():
            self.inputs = self.runner.setup_ui()
        self.grid = next(s for s in self.runner.selectable_scripts if s.title() == "X/Y/Z plot")

    def plot(self, prompt=BOTH, *axes, csv=True, during=None, **fields):
        """The cells of a plot whose axes are (name, values)."""
        args = [None] * len(self.inputs)
        args[0] = self.runner.selectable_scripts.index(self.grid) + 1
        labels = [option.label for option in self.grid.current_axis_options]
        values = [0, "", []] * 3 + [csv]
        for index, (name, text) in enumerate(axes):
            label = name if name in labels else AXIS + name
            values[3 * index] = labels.index(label)
            values[3 * index + 1 if csv else 3 * index + 2] = text
        args[self.grid.args_from : self.grid.args_to] = values
        kind = self.processing.StableDiffusionProcessingTxt2Img
        self.p = kind(prompt, self.runner, tuple(args), **fields)
        for name, value in (during or {}).items():
            setattr(self.p, name, value)
        try:
            return self.runner.run(self.p, *args).cells
        finally:
            self.p.close()

    def picture(self, prompt):
        """What the LoRAs of a prompt change, apart from their names."""
        p = self.processing.StableDiffusionProcessingTxt2Img(prompt, None)
        return applied(self.processing.process_images(p).images[0])

    def by_hand(self, name, tags, **settings):
        """The picture with a file that the library merges of the same tags."""
        return self.of_recipe(name, MergeRecipe(inputs=parse_prompt(tags), **settings))

    def of_recipe(self, name, recipe):
        """The picture with a file that the library merges by a recipe."""
        folder = self.data / "models" / "Lora"
        plan = plan_merge(
            recipe,
            find=lambda lora: folder / f"{lora}.safetensors",
            presets=load_presets([ROOT / "preset.txt"]),
        )
        run_merge(plan, folder / f"{name}.safetensors")
        return self.picture(f"<lora:{name}:1>")

    def left(self):
        """What is left of trials: files, and names that the host lists."""
        files = list(self.temporary.rglob("*.safetensors"))
        return files, [name for name in self.host.networks.available_networks if "loramerge" in name]


def applied(picture):
    return [(multiplier, digest.split()[0]) for _, multiplier, digest in picture]


def applied_of(cells):
    return [applied(cell["picture"]) for cell in cells]


@pytest.fixture(params=["a1111", "forge"])
def page(request, tmp_path, monkeypatch):
    from lib_loramerge.webui import extension

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    data = tmp_path / "data"
    for seed, name in enumerate(("a", "b", "c")):
        make_lora(data / "models" / "Lora" / f"{name}.safetensors", SMALL, seed=seed)
    make_lora(data / "models" / "Lora" / "xl.safetensors", SDXL_LAYERS, seed=9)
    monkeypatch.setattr(extension, "_services", None)
    monkeypatch.setattr(extension, "_plot", None)
    with fake_modules(data, "--extension", str(ROOT), forge=request.param == "forge") as host:
        made = Page(host, data)
        made.temporary = temporary
        yield made


@pytest.fixture
def merges(monkeypatch):
    """The recipes that were merged."""
    from lib_loramerge import merge

    made = []

    def counted(plan, *args, **kwargs):
        made.append(plan.recipe)
        return run_merge(plan, *args, **kwargs)

    monkeypatch.setattr(merge, "run_merge", counted)
    return made


def test_the_axes_are_there_once_after_a_reload_too(page):
    labels = [option.label for option in page.grid.current_axis_options]
    assert [label for label in labels if label.startswith(AXIS)] == [
        *(f"{AXIS}Strength of LoRA {number}" for number in (1, 2, 3, 4)),
        f"{AXIS}Mix of LoRA 1 and 2",
        f"{AXIS}Block weights of LoRA 1",
        f"{AXIS}Block weights of LoRA 2",
        f"{AXIS}Mode",
        f"{AXIS}Rank",
        f"{AXIS}Parameter of the mode",
        f"{AXIS}Leave out LoRA",
    ]
    page.host.script_callbacks.call("before_ui")
    data = next(d for d in page.scripts.scripts_data if d.script_class.__module__ == "xyz_grid.py")
    assert sum(option.label == f"{AXIS}Mode" for option in data.module.axis_options) == 1


def test_strengths_and_mixes_are_numbers_in_the_tags_and_nothing_is_merged(page, merges):
    cells = page.plot(BOTH, ("Strength of LoRA 1", "0.2..0.6/3"), ("Strength of LoRA 2", "0, 1"))
    assert [cell["infotext"].splitlines()[0] for cell in cells] == [
        f"a cat <lora:a:{a}>, <lora:b:{b}> on a mat" for a in ("0.2", "0.4", "0.6") for b in ("0", "1")
    ]
    assert cells[1]["labels"] == ["a 0.2", "b 1", ""]
    cells = page.plot(BOTH, ("Mix of LoRA 1 and 2", "0, 0.25, 1"))
    assert [cell["infotext"].splitlines()[0] for cell in cells] == [
        "a cat <lora:a:0.8>, <lora:b:0> on a mat",
        "a cat <lora:a:0.6>, <lora:b:0.125> on a mat",
        "a cat <lora:a:0>, <lora:b:0.5> on a mat",
    ]
    assert cells[1]["labels"][0] == "0.75 a + 0.25 b"
    assert merges == []


def test_what_else_is_in_a_tag_stays(page):
    prompt = "<lora:a:0:1> <lora:b:te=1:unet=0.5:lbw=MIDD:start=3> <lora:c:0.5:0.5:8> <lora:a:0.5:ALL:0.2>"
    (cell,) = page.plot(prompt, ("Strength of LoRA 1", "0.5"), ("Strength of LoRA 2", "0.8"))
    assert cell["infotext"].splitlines()[0] == (
        "<lora:a:0:0.5> <lora:b:1.6:0.8:lbw=MIDD:start=3> <lora:c:0.5:0.5:8> <lora:a:0.5:ALL:0.2>"
    )
    (cell,) = page.plot(prompt, ("Strength of LoRA 3", "0.25"), ("Strength of LoRA 4", "2"))
    assert cell["infotext"].splitlines()[0] == (
        "<lora:a:0:1> <lora:b:te=1:unet=0.5:lbw=MIDD:start=3> <lora:c:0.25:0.25:8> <lora:a:2:ALL:0.2>"
    )


def test_mode_and_strength_give_the_pictures_of_the_same_merges_by_hand(page, merges):
    cells = page.plot(BOTH, ("Mode", "svd, ties, TIES"), ("Strength of LoRA 1", "0.4, 1"))
    assert [cell["labels"][1] for cell in cells[:2]] == ["a 0.4", "a 1"]
    assert cells[0]["labels"][0] != cells[2]["labels"][0] == cells[4]["labels"][0]
    assert len(merges) == 4, "the same recipe again is the same merge"
    expected = [
        page.by_hand(f"hand{index}", f"<lora:a:{strength}><lora:b:0.5>", mode=mode, device="cpu")
        for index, (mode, strength) in enumerate((m, s) for m in ("svd", "ties") for s in ("0.4", "1"))
    ]
    assert applied_of(cells) == [*expected, *expected[2:]]
    assert len({str(picture) for picture in expected}) == 4
    assert cells[0]["infotext"].endswith('LoRA Merge: "a:0.4 + b:0.5, svd, rank auto"')
    assert cells[2]["infotext"].endswith('b:0.5, ties, rank auto"')
    assert page.left() == ([], [])
    assert "LoRA Merge" not in page.p.extra_generation_params


def test_block_weights_alone_cut_nothing(page):
    cells = page.plot(BOTH, ("Block weights of LoRA 1", '"1,0,0,0,1,0,0,0,0,0,0,0,0,0,0,0,0", MIDD'))
    blocks = ["1,0,0,0,1,0,0,0,0,0,0,0,0,0,0,0,0", "MIDD"]
    expected = [
        page.by_hand(f"hand{i}", f"<lora:a:0.8:lbw={lbw}><lora:b:0.5>", rank="full", device="cpu")
        for i, lbw in enumerate(blocks)
    ]
    assert applied_of(cells) == expected
    assert cells[1]["labels"][0] == "a: MIDD"
    assert cells[1]["infotext"].endswith('LoRA Merge: "a:0.8:lbw=MIDD + b:0.5, svd, rank full"')


def test_rank_and_parameter(page):
    cells = page.plot(BOTH, ("Rank", "2, full, retain 0.9"), ("Parameter of the mode", "density=0.3"))
    rules = [{"rank": 2}, {"rank": "full"}, {"retain": 0.9}]
    mode = next(iter(cells))["infotext"].split("b:0.5, ")[1].split(",")[0]
    expected = [
        page.by_hand(
            f"hand{i}", "<lora:a:0.8><lora:b:0.5>", mode=mode, params={"density": 0.3}, device="cpu", **rule
        )
        for i, rule in enumerate(rules)
    ]
    assert applied_of(cells) == expected
    assert [cell["labels"][0] for cell in cells] == ["rank 2", "rank full", "retain 0.9"]


def test_a_parameter_goes_to_the_modes_that_have_it(page):
    cells = page.plot(BOTH, ("Parameter of the mode", "density=0.3, density=0.9"), ("Mode", "svd, ties"))
    pictures = [str(picture) for picture in applied_of(cells)]
    assert pictures[0] == pictures[2]
    assert pictures[1] != pictures[3]
    assert "density 0.3" in cells[1]["infotext"]
    assert "density" not in cells[0]["infotext"]


def test_a_plot_that_python_forgets_late_takes_nothing_from_the_next_one(page, monkeypatch):
    """The host's object for a plot is in a circle, which Python collects at some time."""
    from lib_loramerge import merge

    gc.disable()
    try:
        page.plot(BOTH, ("Mode", "svd, ties"))
        page.p = None
        run, merged = merge.run_merge, []

        def in_between(*args, **kwargs):
            gc.collect()  # While the second plot is at work.
            merged.append(run(*args, **kwargs))
            return merged[-1]

        monkeypatch.setattr(merge, "run_merge", in_between)
        cells = page.plot(BOTH, ("Mode", "svd, ties"), ("Strength of LoRA 1", "0.4"))
    finally:
        gc.enable()
    assert len(merged) == 2
    assert [cell["infotext"].split("b:0.5, ")[1][:4] for cell in cells] == ["svd,", "ties"]
    assert page.left() == ([], [])


@pytest.mark.parametrize(
    "axes",
    [
        [("Mode", "svd, ties"), ("Strength of LoRA 1", "0.4, -1")],
        [("Block weights of LoRA 1", '"1,0,0,0,1,0,0,0,0,0,0,0,0,0,0,0,0", MIDD'), ("Rank", "2, retain 0.9")],
        [("Parameter of the mode", "density=0.3"), ("Mode", "ties, dare_linear")],
        [("Mix of LoRA 1 and 2", "0.25, 1")],
    ],
)
def test_the_infotext_of_a_picture_gives_the_recipe_of_its_file(page, axes):
    for index, cell in enumerate(page.plot(BOTH, *axes)):
        recipe = recipe_of(cell["infotext"], Settings())
        made = page.of_recipe(f"again{index}", recipe)
        if any(name == "Mix of LoRA 1 and 2" for name, _ in axes):  # Two LoRAs of a prompt are not one file.
            tags = cell["infotext"].splitlines()[0]
            assert recipe.inputs == parse_prompt(tags)
            assert made == page.by_hand(f"whole{index}", tags, rank="full", device="cpu")
        else:
            assert made == applied(cell["picture"])


def test_the_settings_of_a_picture_can_be_pasted_into_the_form(page):
    (cell,) = page.plot(BOTH, ("Mode", "ties"), ("Parameter of the mode", "density=0.3"))
    host = StandaloneHost([page.data / "models" / "Lora"])
    values, notes = read_pasted(cell["infotext"], host, METHODS)
    assert (values["mode"], values["param.ties.density"], values["row0.strength"]) == (
        METHODS["ties"].label,
        0.3,
        0.8,
    )
    assert notes == []
    values, _ = read_pasted(f"{BOTH}\nSteps: 2", host, METHODS)
    assert "mode" not in values


@pytest.mark.parametrize(
    ("infotext", "sentence"),
    [
        ("a <lora:a:1>\nSteps: 2, Script: X/Y/Z plot, X Type: [LoRA Merge] Mode", "whole grid"),
        ("a cat\nNegative prompt: <lora:a:1>\nSteps: 2", "without a LoRA"),
        ("", "without a LoRA"),
        ("a\nSteps: 2, LoRA Merge: what, Version: 1", "does not say a merge"),
        ('a\nSteps: 2, LoRA Merge: "a:1, ties, rank 4, nothing 3"', "nothing"),
        ('a\nSteps: 2, LoRA Merge: "a:1, svd, rank \\x"', "does not say a merge"),
        ('a\nSteps: 2, LoRA Merge: "a\nb", Version: 1', "does not say a merge"),
        ('a\nSteps: 2, LoRA Merge: "a:1, svd, rank 4, seed x"', "seed must be a whole number"),
        (f'a\nSteps: 2, LoRA Merge: "a:1, svd, rank 4, seed {"9" * 5000}"', "seed must be a whole number"),
    ],
)
def test_a_picture_whose_merge_is_not_known_is_refused(infotext, sentence):
    with pytest.raises(RecipeError, match=sentence):
        recipe_of(infotext, Settings())


def test_leaving_out(page, merges):
    cells = page.plot(BOTH, ("Leave out LoRA", "none, 1, 2, 1+2"))
    assert [cell["infotext"].splitlines()[0] for cell in cells] == [
        BOTH,
        "a cat , <lora:b:0.5> on a mat",
        "a cat <lora:a:0.8>,  on a mat",
        "a cat ,  on a mat",
    ]
    assert [cell["labels"][0] for cell in cells] == ["all LoRAs", "without a", "without b", "without a, b"]
    cells = page.plot(BOTH, ("Leave out LoRA", "1+2"), ("Mode", "ties"))
    assert applied_of(cells) == [[]]
    assert merges == []


def test_choices_without_text_mode(page):
    cells = page.plot(BOTH, ("Mode", ["ties"]), ("Block weights of LoRA 1", ["MIDD"]), csv=False)
    by_hand = page.by_hand("hand", "<lora:a:0.8:lbw=MIDD><lora:b:0.5>", mode="ties", device="cpu")
    assert applied_of(cells) == [by_hand]


def test_with_axes_of_the_host_each_recipe_is_merged_once(page, merges):
    prompt = BOTH + " in red"
    cells = page.plot(prompt, ("Seed", "1, 2"), ("Mode", "svd, ties"), ("Prompt S/R", "red, blue"))
    assert len(cells) == 8
    assert len(merges) == 2
    assert [("in blue" in cell["infotext"], "Seed: 2" in cell["infotext"]) for cell in cells[4:6]] == [
        (False, True),
        (True, True),
    ]


def test_a_hires_prompt_of_its_own_has_its_own_merge(page, merges):
    page.plot(BOTH, ("Mode", "ties"), during={"hr_prompt": "<lora:a:0.1><lora:b:0.2>"})
    assert [[given.te for given in recipe.inputs] for recipe in merges] == [[0.8, 0.5], [0.1, 0.2]]


def test_loras_that_a_style_brings_count(page, merges):
    (cell,) = page.plot("a dog <lora:a:0.8>", ("Strength of LoRA 2", "0.25"), during={"styles": ["with b"]})
    assert cell["infotext"].splitlines()[0] == "a dog <lora:a:0.8> <lora:b:0.25>"
    assert page.p.styles == ["with b"]
    page.plot("a dog <lora:a:0.8>", ("Mode", "ties"), ("Styles", "with b"))
    assert len(merges[0].inputs) == 2


@pytest.mark.parametrize(
    ("prompt", "axes", "sentence"),
    [
        (
            "a cat",
            [("Strength of LoRA 1", "1")],
            "LoRAs in the prompt: 0. [LoRA Merge] Strength of LoRA 1 needs at least 1.",
        ),
        (
            "<lora:a:1>",
            [("Mix of LoRA 1 and 2", "0.5")],
            "LoRAs in the prompt: 1. [LoRA Merge] Mix of LoRA 1 and 2 needs at least 2.",
        ),
        (BOTH, [("Leave out LoRA", "3")], "needs at least 3."),
        (BOTH, [("Strength of LoRA 1", "0.5, much")], "must be a number"),
        (BOTH, [("Mode", "tiess")], "Nearest: ties"),
        (BOTH, [("Block weights of LoRA 1", "MIDDD")], "Nearest: MIDD"),
        (BOTH, [("Rank", "8, big")], "rank must be"),
        (BOTH, [("Parameter of the mode", "densty=0.3")], "No mode has a parameter densty. Nearest: density"),
        (BOTH, [("Parameter of the mode", "density=3")], "density must be"),
        ("<lora:a:1><lora:xl:1>", [("Mode", "svd")], "xl"),
        ("<lora:a:1><lora:nothing:1>", [("Rank", "8")], "nothing"),
        ("<lora:a:1:start=3>", [("Rank", "2")], "sampling steps"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_picture(page, merges, monkeypatch, prompt, axes, sentence):
    started = []
    monkeypatch.setattr(page.processing, "process_images", lambda p: started.append(p))
    with pytest.raises(RuntimeError) as raised:
        page.plot(prompt, *axes)
    assert sentence in str(raised.value)
    assert started == []
    assert merges == []
    assert page.left() == ([], [])


def test_a_cell_that_fails_is_empty_and_says_why_and_the_others_are_made(page):
    prompt = "<lora:a:1> of red and <lora:b:1>"
    cells = page.plot(prompt, ("Mode", "ties"), ("Prompt S/R", "lora:b, lora:nothing, lora:c"))
    assert [cell["picture"] is None for cell in cells] == [False, True, False]
    assert any("nothing" in comment for comment in page.p.comments)
    assert page.left() == ([], [])


def test_the_first_cell_may_fail_and_the_grid_is_made(page):
    """The other axis puts a LoRA of another base model into the first picture alone."""
    cells = page.plot("<lora:a:1> x", ("Styles", "with xl, with b"), ("Mode", "ties"))
    assert [cell["picture"] is None for cell in cells] == [True, False]
    assert any("xl" in comment for comment in page.p.comments)


def test_nothing_is_left_after_an_interrupt_in_the_middle_of_a_merge(page, monkeypatch):
    from lib_loramerge import merge

    begun = []

    def interrupted(plan, output, **kwargs):
        begun.append(output)
        if len(begun) == 2:
            page.shared.state.interrupted = True
        return run_merge(plan, output, **kwargs)

    monkeypatch.setattr(merge, "run_merge", interrupted)
    try:
        cells = page.plot(BOTH, ("Mode", "svd, ties, dare_linear"))
    finally:
        page.shared.state.interrupted = False
    assert [cell["picture"] is None for cell in cells] == [False, True, True]
    assert len(begun) == 2
    assert page.left() == ([], [])
    assert list(page.temporary.iterdir()) == []


def test_nothing_is_left_where_the_host_closes_nothing(page, monkeypatch):
    monkeypatch.delattr(page.processing.StableDiffusionProcessing, "close")
    with pytest.raises(AttributeError):  # It is the page of these tests that closes it.
        page.plot(BOTH, ("Mode", "ties"))
    assert page.left()[0] != []
    page.p = None
    gc.collect()
    assert page.left() == ([], [])


def test_trials_of_the_tab_stay(page):
    from lib_loramerge.webui import extension
    from lib_loramerge.webui.merge_jobs import MergeRequest

    _, jobs = extension.services()
    job = jobs.submit(MergeRequest(MergeRecipe(parse_prompt("<lora:a:1>")), trial=True))
    jobs.wait(-1, 60)
    while not job.finished:
        jobs.wait(jobs.version, 60)
    page.plot(BOTH, ("Rank", ",".join(str(rank) for rank in range(1, 9))), ("Mode", "svd, ties"))
    assert jobs.trials.names() == [job.prompt_name]
    assert page.left()[1] == [job.prompt_name]
    jobs.close()
    jobs.trials.remove_all()


def test_a_picture_without_our_axes_is_left_alone(page, merges):
    p = page.processing.StableDiffusionProcessingTxt2Img(BOTH, page.runner, (0,))
    page.processing.process_images(p)
    assert p.prompt == BOTH
    assert merges == []
    assert p.extra_generation_params == {}


def test_sdnext_has_axes_of_another_signature(page):
    import types

    from lib_loramerge.webui.xyz import register

    class AxisOption:
        def __init__(self, label, tipe, apply, fmt=None, confirm=None, cost=0.0, choices=None):
            self.label, self.type, self.apply, self.format_value = label, tipe, apply, fmt
            self.confirm, self.cost, self.choices = confirm, cost, choices

    module = types.ModuleType("scripts.xyz.xyz_grid_classes")
    module.AxisOption, module.axis_options = AxisOption, []
    sys.modules[module.__name__] = module
    try:
        from lib_loramerge.webui import extension

        register.add_axes(extension.plot())
    finally:
        del sys.modules[module.__name__]
    mode = next(option for option in module.axis_options if option.label == f"{AXIS}Mode")
    assert "ties" in mode.choices()
    assert mode.cost == 0.5
    assert callable(mode.confirm)


def test_in_a_host_of_its_own(tmp_path):
    """From the script in scripts/ on: loaded, found by the plot, nothing in the log."""
    data = tmp_path / "data"
    for seed, name in enumerate(("a", "b")):
        make_lora(data / "models" / "Lora" / f"{name}.safetensors", SMALL, seed=seed)
    with FakeHost(data, "--api") as host:
        body = {"prompt": BOTH, "axes": [[f"{AXIS}Mode", "svd, ties"], [f"{AXIS}Strength of LoRA 1", "0.4"]]}
        cells = host.post("/fake/plot", body)["cells"]
        assert [cell["labels"][1] for cell in cells] == ["a 0.4", "a 0.4"]
        recipe = {"inputs": [{"name": "a", "te": 0.4, "unet": 0.4}, {"name": "b", "te": 0.5, "unet": 0.5}]}
        job = host.post("/loramerge/v1/merge", {"recipe": {**recipe, "mode": "ties"}, "name": "by-hand"})
        assert host.wait_for_job(job["id"])["state"] == "done"
        by_hand = host.picture("<lora:by-hand:1>")
        assert applied(cells[1]["picture"]) == applied(by_hand)
        assert not any("try" in lora["name"] for lora in host.get("/sdapi/v1/loras"))
        assert host.post("/fake/status")["errors"] == []


def test_tensors_are_compared_and_not_names(page):
    """The judge of these tests: equal tensors under other names are one picture."""
    folder = page.data / "models" / "Lora"
    tensors = load_file(folder / "a.safetensors")
    from safetensors.torch import save_file

    save_file(tensors, folder / "again.safetensors", {"ss_output_name": "again"})
    assert page.picture("<lora:again:1>") == page.picture("<lora:a:1>") != page.picture("<lora:b:1>")
