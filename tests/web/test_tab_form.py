"""The form as data: control tables, layout, recipe fields, words. No browser."""

from __future__ import annotations

import ast
import html
import json
import random
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_loramerge import cli
from lib_loramerge.errors import RecipeError, Sentence
from lib_loramerge.files import header
from lib_loramerge.methods import METHODS
from lib_loramerge.recipe import LoraInput, MergeRecipe
from lib_loramerge.webui import baking as bakes
from lib_loramerge.webui import extracting, facts, filled, form, render, render_jobs, tab
from lib_loramerge.webui.checkpoint_jobs import BakeRequest
from lib_loramerge.webui.host import LoraEntry, StandaloneHost
from lib_loramerge.webui.jobs import JobQueue
from lib_loramerge.webui.merge_jobs import MergeRequest
from lib_loramerge.webui.origins import stamp_of
from lib_loramerge.webui.standalone import shared_file
from lib_loramerge.webui.tab import baking, layout
from lib_loramerge.webui.tab import extracting as extract_page
from lib_loramerge.webui.tab.controls import BUTTONS, CONTROLS, ROW_BUTTONS, ROW_CONTROLS, param_control
from lib_loramerge.webui.tab.wiring import FORM_NAMES
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, lora_tensors, make_lora

WEBUI = Path(render.__file__).parent


@pytest.fixture
def host(tmp_path: Path) -> Iterator[StandaloneHost]:
    for name, seed in (("style", 1), ("face", 2)):
        make_lora(tmp_path / f"{name}.safetensors", SD1_LAYERS, rank=4, seed=seed)
    make_lora(tmp_path / "sub" / "large.safetensors", SDXL_LAYERS, rank=4, seed=3)
    made = StandaloneHost([tmp_path])
    yield made
    made.close()


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The configuration of every component of the tab, as the browser gets it."""
    folder = tmp_path_factory.mktemp("loras")
    host = StandaloneHost([folder], checkpoint_dir=folder)
    blocks = tab.build_tab(host, JobQueue(host))
    return [{"kind": type(block).__name__, **block.get_config()} for block in blocks.blocks.values()]


def default_form(**changes: object) -> dict[str, object]:
    """The form as a fresh page has it."""
    controls = (*CONTROLS, *baking.CONTROLS)
    values: dict[str, object] = {control.name: control.options.get("value") for control in controls}
    for index in range(form.MAX_ROWS):
        values |= {f"row{index}.{name}": value for name, value in form.EMPTY_ROW.items()}
    values |= {"mode": METHODS["svd"].label, "device": "CPU"}
    return {**values, **{name.replace("__", "."): value for name, value in changes.items()}}


def test_every_field_of_a_recipe_has_a_control_and_every_control_fills_a_field() -> None:
    filled = {field for control in (*ROW_CONTROLS, *CONTROLS, *baking.CONTROLS) for field in control.fills}
    kinds = {"input": LoraInput, "recipe": MergeRecipe, "request": MergeRequest, "bake": BakeRequest}
    known = {f"{prefix}.{field.name}" for prefix, kind in kinds.items() for field in fields(kind)}
    assert filled <= known
    # The rows; the parameters' own controls; the two buttons; REST's own; the tab's own; the command line's.
    without = {
        "recipe.inputs",
        "recipe.params",
        "request.recipe",
        "request.trial",
        "request.strict",
        "request.changed_sources",
        "bake.recipe",
        "bake.name",
        "bake.overwrite",
        "bake.hashed",
        "bake.strict",
        "bake.changed_sources",
    }
    assert known - filled == without


def test_table_and_layout_have_the_same_controls(components: list[dict]) -> None:
    ids = [component["elem_id"] for component in components if component.get("elem_id")]
    assert len(ids) == len(set(ids)), "element ids are unique"
    assert all(name.startswith("loramerge_") for name in ids)
    wanted = {tab.element_id(name) for name in (*FORM_NAMES, *BUTTONS) if name != "preset_load"}
    wanted |= {f"loramerge_row{index}_{name}" for index in range(form.MAX_ROWS) for name in ROW_BUTTONS}
    assert wanted <= set(ids)


def test_every_parameter_of_every_method_gets_a_control_with_its_default_and_limits() -> None:
    for method in METHODS.values():
        for param in method.params:
            control = param_control(method.name, param)
            assert control.name in FORM_NAMES
            assert control.options["value"] == param.default
            if control.kind == "Slider":
                assert (control.options["minimum"], control.options["maximum"]) == (
                    param.minimum,
                    param.maximum,
                )
            if control.kind == "Dropdown":
                assert control.options["choices"] == list(param.choices)


def test_a_recipe_survives_the_form(host: StandaloneHost) -> None:
    chance = random.Random(7)
    modes = list(METHODS)
    for _ in range(200):
        inputs = tuple(
            LoraInput(
                chance.choice(["style", "face", "large", "gone"]),
                te=chance.choice([1.0, 0.5, -2.25]),
                unet=chance.choice([1.0, 0.3, 7.0]),
                te2=chance.choice([None, 0.125]),
                dyn=chance.choice([None, 3]),
                x=chance.choice([None, 0.5]),
                lbw=chance.choice([None, "MIDD", "1,0,0,0,R,0,0,0,0,0,0,X,0,0,0,0,0"]),
                lbwe=chance.choice([None, "IN04-OUT04:attn:0.5"]),
                hash=chance.choice([None, "0123456789abcdef"]),
            )
            for _ in range(chance.randint(1, 4))
        )
        mode = chance.choice(modes)
        ranked = METHODS[mode].uses_rank
        rule = (
            chance.choice([{}, {"rank": 8}, {"rank": "full"}, {"retain": 0.5}, {"size": 12.5}])
            if ranked
            else {}
        )
        recipe = MergeRecipe(
            inputs,
            mode=mode,
            params={param.name: param.default for param in METHODS[mode].params},
            dtype=chance.choice(["same", "bfloat16"]),
            device="cpu",
            seed=chance.choice([0, 5]),
            dialect=chance.choice(["auto", "diffusers"]),
            skip_unsupported=chance.choice([True, False]),
            **rule,
        )
        values = {**default_form(), **filled.form_of(recipe, host, METHODS)}
        reading = form.read_form(values, host, METHODS)
        assert reading.problems == {}
        assert reading.recipe == recipe


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"row0__strength": None}, "row0", "Strength"),
        ({"row0__strength": float("nan")}, "row0", "Strength"),
        ({"row0__strength": "much"}, "row0", "much"),
        ({"row0__linked": False, "row0__te": None}, "row0", "Text encoder"),
        ({"row0__extra": "start=5"}, "row0", "start"),
        ({"row0__extra": "whatever"}, "row0", "dyn=8"),
        ({"row0__lora": "stile"}, "row0", "style"),
        ({"row0__blocks": "MIDDD"}, "row0", "MIDD"),
        ({"row0__blocks": "1,2,3"}, "row0", "17"),
        ({"rank_rule": form.RANK_RULES["number"], "rank": 0}, "rank_rule", "Rank"),
        ({"rank_rule": form.RANK_RULES["number"], "rank": 2.5}, "rank_rule", "whole"),
        ({"rank_rule": form.RANK_RULES["retain"], "retain": 130}, "rank_rule", "to 100, got 130"),
        ({"rank_rule": form.RANK_RULES["size"], "size": None}, "rank_rule", "empty"),
        ({"seed": -1}, "seed", "Seed"),
        ({"name": "a/../../b"}, "name", "b"),
    ],
)
def test_every_mistake_is_told_at_its_place(
    host: StandaloneHost, changes: dict[str, object], place: str, words: str
) -> None:
    values = default_form(**{"row0__lora": "style", **changes})
    found = facts.gather(values, host, METHODS)
    assert words in found.problems[place]
    assert not found.ready
    if place.startswith("row"):
        assert 'role="alert"' in found.rows[0]


def test_a_name_that_is_taken_is_no_mistake_and_hides_nothing(host: StandaloneHost) -> None:
    taken = default_form(row0__lora="style", name="face")
    found = facts.gather(taken, host, METHODS)
    assert "exists" in found.taken
    assert not found.problems
    assert "File size" in found.plan
    assert not found.ready
    allowed = facts.gather({**taken, "overwrite": True, "overwrite_for": '["style"]'}, host, METHODS)
    assert allowed.ready
    assert not allowed.taken
    assert allowed.replaced == ("face.safetensors",)


@pytest.mark.parametrize(
    "ticked_for", ["", "[]", '["face"]', '["style", "face"]', "null", "{", '{"style": 1}']
)
def test_a_tick_for_other_loras_replaces_nothing(host: StandaloneHost, ticked_for: str) -> None:
    values = default_form(row0__lora="style", name="face", overwrite=True, overwrite_for=ticked_for)
    found = facts.gather(values, host, METHODS)
    assert "exists" in found.taken
    assert not found.ready
    assert found.replaced == ()


def test_what_lies_beside_a_lora_is_told_before_it_is_replaced(host: StandaloneHost) -> None:
    folder = host.write_dir()
    (folder / "new.json").write_text("{}", encoding="utf-8")
    values = default_form(row0__lora="style", name="new", notes="a note")
    assert "new.json exists" in facts.gather(values, host, METHODS).taken
    values |= {"overwrite": True, "overwrite_for": '["style"]'}
    assert facts.gather(values, host, METHODS).replaced == ("new.json",)


def test_no_lora_is_written_over_itself(host: StandaloneHost) -> None:
    values = default_form(row0__lora="style", name="style", overwrite=True, overwrite_for='["style"]')
    found = facts.gather(values, host, METHODS)
    assert "one of the LoRAs being merged" in found.taken
    assert found.replaced == ()


def test_files_of_two_base_models_are_told_apart_in_their_rows(host: StandaloneHost) -> None:
    found = facts.gather(default_form(row0__lora="style", row1__lora="large"), host, METHODS)
    assert "different base models" in found.problems["plan"]
    assert "lm-other" not in found.rows[0]
    assert "lm-other" in found.rows[1]


def test_the_seed_is_asked_for_when_a_list_or_a_preset_draws(tmp_path: Path) -> None:
    presets = tmp_path / "preset.txt"
    presets.write_text("DICE:1,R" + ",0" * 15 + "\nPLAIN:1,1" + ",0" * 15 + "\n", encoding="utf-8")
    make_lora(tmp_path / "style.safetensors", SD1_LAYERS, rank=2)
    host = StandaloneHost([tmp_path], preset_path=presets)
    try:
        for blocks, wanted in (("DICE", True), ("PLAIN", False), ("1,U" + ",0" * 15, True), ("", False)):
            found = facts.gather(default_form(row0__lora="style", row0__blocks=blocks), host, METHODS)
            assert found.ready
            assert found.random is wanted
    finally:
        host.close()


def test_rows_that_are_off_or_empty_do_not_count(host: StandaloneHost) -> None:
    values = default_form(rows=3, row0__lora="style", row1__lora="", row2__lora="face", row2__on=False)
    assert [given.name for given in form.read_form(values, host, METHODS).inputs] == ["style"]


def test_more_inputs_than_rows_are_refused_and_not_cut_off(host: StandaloneHost) -> None:
    with pytest.raises(RecipeError, match="17 LoRAs"):
        filled.rows_of([LoraInput("style")] * 17, host.loras())


def test_a_label_a_name_and_a_unique_part_of_a_name_mean_the_same_lora() -> None:
    def entry(name: str, base: str) -> LoraEntry:
        return LoraEntry(name, Path(f"{name}.safetensors"), "", name, base, "8")

    entries = [entry("ink · wash", "SDXL"), entry("ink", "SD 1"), entry("portrait", "SD 1")]
    assert form.lora_name("ink", entries) == "ink"
    assert form.lora_name("ink · SD 1 · rank 8", entries) == "ink"
    assert form.lora_name("ink · wash · SDXL · rank 8", entries) == "ink · wash"
    assert form.lora_name("portrait · SD 1", entries) == "portrait"
    assert form.lora_name("PORT", entries) == "portrait"
    assert form.lora_name("in", entries) == "in"
    assert form.lora_name("none of them", entries) == "none of them"


def test_texts_from_files_and_people_are_escaped(host: StandaloneHost) -> None:
    nasty = "<img src=x onerror=alert(1)>\"'&"
    values = default_form(row0__lora=nasty, name=nasty)
    found = facts.gather(values, host, METHODS)
    for text in (*found.rows.values(), found.plan, render.error_box(nasty), render.note_box([nasty])):
        assert "<img" not in text
    words = re.search('data-words="([^"]*)"', render.page_words({"a": nasty}, ()))
    assert json.loads(html.unescape(words[1]))["hints"] == {"a": nasty}


def test_a_source_that_is_not_the_recipes_any_more_is_told_until_another_lora_is_picked(
    host: StandaloneHost, tmp_path: Path
) -> None:
    told = "told.safetensors is not the file this recipe was made with"
    path = make_lora(
        tmp_path / "told.safetensors", SD1_LAYERS, metadata={"sshs_model_hash": "a" * 64}, seed=5
    )
    host.refresh()
    recipe = MergeRecipe((LoraInput("told", hash="b" * 64), LoraInput("face")), mode="concat")
    values = {**default_form(), **filled.form_of(recipe, host, METHODS)}
    found = facts.gather(values, host, METHODS)
    assert found.ready
    assert told in found.plan
    same = MergeRecipe((LoraInput("told", hash="a" * 64), LoraInput("face")), mode="concat")
    values_of_same = {**default_form(), **filled.form_of(same, host, METHODS)}
    assert told not in facts.gather(values_of_same, host, METHODS).plan
    # Another LoRA in that row has no hash to differ from.
    values["row0.lora"] = "style"
    assert form.read_form(values, host, METHODS).inputs[0].hash is None
    assert "made with" not in facts.gather(values, host, METHODS).plan
    # What a merge has computed counts more than what the file says of itself.
    host.source_hashes.remember(path, stamp_of(path), "b" * 64)
    assert told not in facts.gather({**values, "row0.lora": "told"}, host, METHODS).plan
    assert told in facts.gather(values_of_same, host, METHODS).plan


def make_oft(path: Path) -> Path:
    """An adapter that needs the base checkpoint."""
    layer = next(iter(SD1_LAYERS))
    blocks = torch.randn(4, 80, 80, generator=torch.Generator().manual_seed(1)) * 0.01
    save_file({f"{layer}.oft_blocks": blocks, f"{layer}.alpha": torch.tensor(1e-3)}, str(path))
    return path


def make_odd(path: Path) -> Path:
    """A LoRA with a tensor that nothing claims."""
    save_file({**lora_tensors(SD1_LAYERS), "whatever.is.this": torch.zeros(3)}, str(path))
    return path


def seen(page: str) -> str:
    """HTML without what the page's script translates."""
    return re.sub(' data-said="[^"]*"', "", page)


def test_sentences_name_the_controls_of_the_page_and_no_option_of_the_command_line(
    host: StandaloneHost, tmp_path: Path
) -> None:
    make_oft(tmp_path / "oft.safetensors")
    make_odd(tmp_path / "odd.safetensors")
    host.refresh()
    for name, flag, control in (
        ("oft", "--base", "Base checkpoint"),
        ("odd", "--skip-unsupported", "Leave out what cannot be merged"),
    ):
        found = facts.gather(default_form(row0__lora="style", row1__lora=name), host, METHODS)
        assert flag in found.problems["plan"]
        assert "--" not in seen(found.plan)
        assert f"<b>{render.say(control)}</b>" in found.plan
        # The same sentence beside the buttons, and as the end of a job.
        assert render.error_box(found.problems["plan"]) == found.plan
    changed = "Find the original, or allow changed sources (--allow-changed-sources)."
    for text in (changed, "It exists (--overwrite).", "Ask for a rank (--rank 32) or `--rank full`."):
        for shown in (render.error_box(text), render.note_box([text])):
            assert "--" not in seen(shown)


def test_every_control_that_stands_for_an_option_is_on_the_page(components: list[dict]) -> None:
    labels = {component.get("label") for component in components} | set(form.RANK_RULES.values())
    translations = json.loads((shared_file("localizations") / "ja_JP.json").read_text(encoding="utf-8"))
    for flag, words in render.CONTROL_OF_FLAG.items():
        assert words in translations
        assert words in labels or flag in ("allow-changed-sources", "lora-dir")


def test_a_name_that_looks_like_an_option_stays_a_name() -> None:
    for name in ("my--base.safetensors", "x--rank", "--base-model", "a --sizes"):
        assert render.sentence(name) == name
    made = Sentence("{file} is empty, and --rank {rank} as {error}.", "--rank 4", 8, Sentence("no --size"))
    assert render.sentence(made) == (
        f"--rank 4 is empty, and <b>{render.say('Rank')}</b>: 8 as no <b>{render.say('Fit a size')}</b>."
    )


def test_facts_for_files_seen_before_read_none_of_them_again(
    host: StandaloneHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes them quick: the rest is arithmetic on what is remembered."""
    opened: list[str] = []
    open_regular = header.open_regular

    def opening(path: Path) -> object:
        opened.append(path.stem)
        return open_regular(path)

    monkeypatch.setattr(header, "open_regular", opening)
    for name in ("one", "two"):
        make_lora(tmp_path / f"{name}.safetensors", SDXL_LAYERS, rank=2, seed=4)
    host.refresh()
    values = default_form(row0__lora="one", row1__lora="two")
    assert facts.gather(values, host, METHODS).ready
    assert {"one", "two"} <= set(opened)
    assert host.wait_for_labels(60), "the list reads headers, too"
    opened.clear()
    assert facts.gather(values, host, METHODS).ready
    assert opened == []


def said(path: Path) -> Iterator[str]:
    """Literal texts that a file says through :func:`render.say`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(
            node.args[0] if node.args else None, ast.Constant
        ):
            continue
        if getattr(node.func, "id", getattr(node.func, "attr", "")) == "say":
            yield node.args[0].value


def shown_words(components: list[dict]) -> set[str]:
    """Every text of ours that the tab can show."""
    kept = (*(control.name for control in CONTROLS if control.hidden), *layout.SCRIPT_FIELDS)
    hidden = {"loramerge_" + name for name in kept}
    hidden |= {f"loramerge_row{index}_origin" for index in range(form.MAX_ROWS)}
    words: set[str] = set(layout.hints().values())
    for component in components:
        name = component.get("elem_id") or ""
        if name in hidden or name.startswith("loramerge_do_"):
            continue
        words |= {component[key] for key in ("label", "placeholder") if isinstance(component.get(key), str)}
        if component["kind"] == "Button":
            words.add(component["value"])
    for path in WEBUI.rglob("*.py"):
        words |= {render.MEANT.get(word, word) for word in said(path)}
    words |= {*form.RANK_RULES.values(), form.NO_PREVIEW}
    words |= {label for entry in form.PLAIN.values() for label in entry.labels.values()}
    words |= {
        *render_jobs.STATES.values(),
        *render_jobs.PHASES.values(),
        *layout.PRESET_KINDS,
        *layout.PRESET_LAYOUTS,
    }
    words |= set(render.CONTROL_OF_FLAG.values())
    words |= {"LoRAs", "How", "Result", "What will come out", "Block presets", "Experimental"}
    for method in METHODS.values():
        words |= {method.label, method.summary, method.avoid}
    return {
        word
        for word in words
        if re.search("[A-Za-z]{2}", word) and "<lora:" not in word and "=" not in word[:5]
    }


def test_the_japanese_file_translates_every_string_that_the_tab_shows(components: list[dict]) -> None:
    path = shared_file("localizations") / "ja_JP.json"
    translations = json.loads(path.read_text(encoding="utf-8"))
    missing = sorted(shown_words(components) - set(translations) - {"1,0.5,R,U,X,X+0.1 …"})
    assert missing == []
    assert all(isinstance(text, str) and text.strip() for text in translations.values())


def test_a_base_model_that_the_layers_leave_open_can_be_chosen(host: StandaloneHost, tmp_path: Path) -> None:
    # One matrix of a double block: Flux.1, Chroma and others have it alike.
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file(
        {f"{name}.lora_down.weight": torch.zeros(4, 3072), f"{name}.lora_up.weight": torch.zeros(3072, 4)},
        tmp_path / "open.safetensors",
    )
    host.refresh()
    found = facts.gather(default_form(row0__lora="open"), host, METHODS)
    assert {"Flux.1", "Chroma"} <= set(found.base_models)
    assert all(label in found.rows[0] for label in ("Flux.1", "Chroma"))
    chosen = default_form(row0__lora="open", base_model="Chroma")
    assert form.read_form(chosen, host, METHODS).check().base_model == "Chroma"
    named = facts.gather(chosen, host, METHODS)
    assert not named.base_models
    assert "Chroma" in named.rows[0]
    assert "Flux.1" not in named.rows[0]
    wrong = facts.gather(default_form(row0__lora="open", base_model="Chrome"), host, METHODS)
    assert "There is no base model 'Chrome'" in wrong.problems["base_model"]


def test_a_file_is_written_for_the_webui_that_the_page_is_in_unless_another_is_chosen(
    host: StandaloneHost,
) -> None:
    read = {entry: form.read_form(default_form(row0__lora="style", host=entry), host, METHODS) for entry in
            ("Any program", "Forge Neo", "")}  # fmt: skip
    assert [reading.check().host for reading in read.values()] == [None, "neo", None]

    class InForge(StandaloneHost):
        record = "forge"

    inside = InForge([host.write_dir()])
    page = tab.build_tab(inside, JobQueue(inside))
    (shown,) = (b for b in page.blocks.values() if getattr(b, "elem_id", None) == "loramerge_host")
    inside.close()
    assert shown.value == "Forge"


def test_a_row_offers_the_presets_that_fit_its_base_model(host: StandaloneHost, tmp_path: Path) -> None:
    layers = {f"layers.{index}.attention.qkv": (11520, 3840) for index in range(30)}
    tensors = {}
    for path, (rows, columns) in layers.items():
        tensors[f"diffusion_model.{path}.lora_A.weight"] = torch.zeros(1, columns)
        tensors[f"diffusion_model.{path}.lora_B.weight"] = torch.zeros(rows, 1)
    save_file(tensors, tmp_path / "z.safetensors")
    host.refresh()
    found = facts.gather(default_form(row0__lora="style", row1__lora="z"), host, METHODS)
    assert "MIDD" in found.presets[0]
    assert "MIDD" not in found.presets[1]
    assert any(text.startswith("@") for text in map(host.presets().weights.get, found.presets[1]))

    page = tab.asking.Asking({}, host, JobQueue(host))
    shown = page.preset_lists(default_form(row0__lora="style", row1__lora="z", fitted=""), found.presets)
    assert shown["row1.blocks"]["choices"] == ["", *found.presets[1]]
    again = page.preset_lists(default_form(fitted=shown["fitted"]), found.presets)
    assert set(again) == {"fitted"}, "a list that fits already is not sent again"


@pytest.mark.parametrize("rule", [{}, {"retain": 0.98}, {"rank": 4, "device": "cuda"}])
def test_the_command_line_of_a_bake_is_one_that_the_command_takes(
    tmp_path: Path, rule: dict[str, object]
) -> None:
    for folder in ("loras", "models"):
        (tmp_path / folder).mkdir()
    make_lora(tmp_path / "loras" / "style.safetensors", SD1_LAYERS)
    (tmp_path / "models" / "base.safetensors").write_bytes(b"")
    host = StandaloneHost([tmp_path / "loras"], checkpoint_dir=tmp_path / "models")
    values = {"bake_base": "base.safetensors", "name": "out"}
    words = bakes.command(values, MergeRecipe((LoraInput("style"),), mode="ties", **rule), host)
    given = cli.build_parser(words[1:]).parse_args(words[1:])
    assert Path(given.output) == tmp_path / "models" / "out.safetensors"
    assert (given.mode, given.loras) == ("ties", ["style:1"])
    host.close()


def test_rules_for_each_lora_s_share_survive_the_form(host: StandaloneHost) -> None:
    inputs = (LoraInput("style"), LoraInput("face"))
    for how in (
        {"keep": 0.98},
        {"rank": 4, "fair": True},
        {"size": 3.5, "fair": True},
        {"rank": "same", "fair": True},
    ):
        recipe = MergeRecipe(inputs, **how)
        values = default_form(**filled.form_of(recipe, host, METHODS))
        read = form.read_form(values, host, METHODS).check()
        assert (read.keep, read.fair, read.rank, read.size) == (
            recipe.keep, recipe.fair, recipe.rank if recipe.keep is None else read.rank, recipe.size,
        )  # fmt: skip
    # A tick stays on the form but means nothing where it is hidden.
    for changes in ({"rank_rule": form.RANK_RULES["full"]}, {"mode": METHODS["ties"].label}):
        values = default_form(row0__lora="style", fair=True, **changes)
        assert form.read_form(values, host, METHODS).check().fair is False


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"rank": 64}),
        ({"extract_conv_rank": ""}, {"rank": 64}),
        ({"extract_conv_rank": " 0"}, {"rank": 64, "conv_rank": 0}),  # Convolutions are left out.
        ({"extract_conv_rank": "16"}, {"rank": 64, "conv_rank": 16}),
        ({"extract_rule": extracting.RULES["auto"]}, {"rank": "auto", "max_rank": 128}),
        ({"extract_rule": extracting.RULES["retain"]}, {"retain": 0.95, "max_rank": 128}),
        ({"extract_rule": extracting.RULES["size"]}, {"size": 150, "max_rank": 128}),
    ],
)
def test_the_rank_of_an_extraction_and_an_empty_one_of_convolutions(host, changes, expected):
    values = {control.name: control.options.get("value") for control in extract_page.CONTROLS}
    settings = dict(extracting.request_of({**values, "extract_name": "x", **changes}, host).settings)
    rules = {name: value for name, value in settings.items() if "rank" in name or name in ("retain", "size")}
    assert rules == expected


def test_a_rank_of_convolutions_below_zero_is_refused(host):
    values = {control.name: control.options.get("value") for control in extract_page.CONTROLS}
    with pytest.raises(RecipeError, match="Rank of convolutions"):
        extracting.request_of({**values, "extract_name": "x", "extract_conv_rank": "-1"}, host)
