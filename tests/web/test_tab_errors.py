"""Whatever a person can do wrong in the tab is told beside it, and nothing that was typed is lost."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_loramerge import merge
from lib_loramerge.errors import LoraMergeError
from lib_loramerge.files import place
from lib_loramerge.webui import facts
from lib_loramerge.webui.host import StandaloneHost
from lib_loramerge.webui.standalone import Page
from tests.helpers.browser import Tab
from tests.helpers.fixtures import SD1_LAYERS, SDXL_LAYERS, lora_tensors, make_lora

RANDOM = ",".join(["R"] * 17)


class HostThatCannotTry(StandaloneHost):
    """Has the button, as a WebUI has, and the built-in Lora extension is switched off."""

    can_try = True

    def register_trial(self, name: str, path: Path) -> None:
        raise LoraMergeError("This WebUI has no LoRA support switched on.")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("errors")
    loras = folder / "loras"
    make_lora(loras / "style.safetensors", SD1_LAYERS, rank=4, seed=1)
    make_lora(loras / "large.safetensors", SDXL_LAYERS, rank=4, seed=2)
    make_lora(loras / "spoilt.safetensors", SD1_LAYERS, metadata={"loramerge_recipe": "{"}, seed=3)
    (loras / "damaged.safetensors").write_bytes(b"not a lora at all")
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)},
        loras / "model.safetensors",
    )
    tensors = lora_tensors(SD1_LAYERS)
    spoilt = next(key for key in tensors if "down" in key)
    save_file({**tensors, "whatever.is.this": torch.zeros(3)}, loras / "odd.safetensors")
    save_file(
        {**tensors, spoilt: tensors[spoilt] * torch.nan},
        loras / "nan.safetensors",
    )
    save_file({key: tensor for key, tensor in tensors.items() if "up" not in key}, loras / "half.safetensors")
    layer = next(iter(SD1_LAYERS))
    save_file(
        {f"{layer}.oft_blocks": torch.eye(80).repeat(4, 1, 1), f"{layer}.alpha": torch.tensor(1e-3)},
        loras / "oft.safetensors",
    )
    (folder / "preset.txt").write_text("# mine\nMINE:1,0,0,0,1,1,1,1,1,1,1,1,1,1,1,1,1\n", encoding="utf-8")
    served = Page(loras, host=HostThatCannotTry([loras], preset_path=folder / "preset.txt"))
    try:
        yield served
    finally:
        served.close()


@pytest.fixture(scope="module")
def window(chromium: object, page: Page) -> Iterator[Tab]:
    with Tab(chromium, page.entrance, title=None) as opened:
        yield opened


@pytest.fixture
def tab(window: Tab, page: Page) -> Iterator[Tab]:
    window.show_page("Merge")
    before = files(page)
    yield window
    assert window.errors == []
    assert files(page) == before, "an error writes nothing"


def files(page: Page) -> list[str]:
    folder = page.host.write_dir()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def row(**values: object) -> dict[str, object]:
    return {f"row0.{name}": value for name, value in {"lora": "style", **values}.items()}


def expect_error(tab: Tab, where: str, sentence: str) -> None:
    tab.expect_text(where, sentence)
    assert tab.page.locator(f"#loramerge_{where} [role=alert]").count() >= 1


# Values of a row, and what is said below it.
WRONG_ROWS = (
    ({"lora": "stile"}, "There is no LoRA called stile in the LoRA folder. Did you mean style?"),
    ({"lora": "damaged"}, "damaged.safetensors is a text file"),
    ({"lora": "model"}, "model.safetensors: this is a whole checkpoint"),
    ({"lora": "half"}, "this LoRA layer is incomplete"),
    ({"blocks": "MIDDD"}, "there is no preset 'MIDDD'"),
    ({"blocks": "1,0,1"}, "has 3 block weights"),
    ({"blocks": "1,0,Z" + ",0" * 14}, "got 'Z'"),
    ({"elements": "x:y"}, "an elemental rule is blocks:elements:ratio"),
    ({"elements": "NOPE"}, "there is no preset 'NOPE'"),
    ({"extra": "dyn"}, "Other options must look like dyn=8:te2=0.5"),
    ({"extra": "dyn=x"}, "'style': dyn must be a whole number from 1"),
    ({"extra": "foo=1"}, "'style': there is no field foo="),
    ({"strength": 5000}, "Strength must be a number from -1000 to 1000, got 5000"),
    ({"strength": None}, "Strength is empty"),
    ({"linked": False, "te": -1e9}, "Text encoder strength must be a number from -1000"),
)


def test_every_wrong_row_says_what_is_wrong_below_itself_and_stays_as_it_was_typed(tab: Tab) -> None:
    changes = {
        f"row{index}.{name}": value
        for index, (values, _) in enumerate(WRONG_ROWS)
        for name, value in {"lora": "style", **values}.items()
    }
    tab.set_form({"rows": len(WRONG_ROWS), **changes})
    for index, (_, sentence) in enumerate(WRONG_ROWS):
        expect_error(tab, f"row{index}_facts", sentence)
    tab.wait_for_facts("marked in red")
    tab.press("merge")
    tab.page.wait_for_selector("#loramerge_message [role=alert]")
    for index, (values, _) in enumerate(WRONG_ROWS):
        for name, value in values.items():
            if isinstance(value, str):
                assert tab.value(f"row{index}_{name}").startswith(value)


# Values of the form, where the sentence stands, and the sentence.
WRONG_FORMS = {
    "no LoRA is picked": ({}, "message", "Pick at least one LoRA first"),
    "two base models": (row() | {"row1.lora": "large"}, "facts", "different base models"),
    "a checkpoint is needed": (row(lora="oft"), "facts", "Base checkpoint"),
    "a checkpoint that is none": (
        row(lora="oft") | {"base": "nowhere"},
        "how_message",
        "no checkpoint called nowhere",
    ),
    "a part that is not understood": (row(lora="odd"), "facts", "Leave out what cannot be merged"),
    "nothing would be left": (row(strength=0), "facts", "nothing to merge"),
    "rank 0": (
        row() | {"rank_rule": "A number", "rank": 0},
        "how_message",
        "Rank must be a whole number from 1",
    ),
    "no rank": (row() | {"rank_rule": "A number", "rank": None}, "how_message", "Rank is empty"),
    "more than all": (row() | {"rank_rule": "Keep a share", "retain": 150}, "how_message", "to 100, got 150"),
    "a share of nothing": (
        row() | {"rank_rule": "Keep a share", "retain": 0},
        "how_message",
        "The share to keep must be",
    ),
    "a size below nothing": (
        row() | {"rank_rule": "Fit a size", "size": -1},
        "how_message",
        "The file size must be",
    ),
    "convolutions": (row() | {"conv_rank": "-1"}, "how_message", "Rank of convolutions must be"),
    "a negative seed": (
        row(blocks=RANDOM) | {"seed": -1},
        "how_message",
        "Seed must be a whole number from 0",
    ),
    "a name with folders": (row() | {"name": "a/../../b"}, "name_message", "holds '/'"),
    "a name of Windows": (row() | {"name": "con"}, "name_message", "a device on Windows"),
    "a name without end": (row() | {"name": "x" * 300}, "name_message", "too long"),
    "a name that is taken": (row() | {"name": "style"}, "message", "style.safetensors exists already"),
    "a subfolder that leads out": (
        row() | {"name": "n", "subfolder": "../up"},
        "name_message",
        "lead out of the folder",
    ),
}


@pytest.mark.parametrize("case", WRONG_FORMS)
def test_what_is_wrong_in_the_form_is_told_beside_it_and_again_beside_the_button(tab: Tab, case: str) -> None:
    changes, where, sentence = WRONG_FORMS[case]
    tab.set_form(changes)
    if where != "message":
        expect_error(tab, where, sentence)
    tab.press("merge")
    expect_error(tab, "message", sentence)
    for name, value in changes.items():
        if isinstance(value, str):
            assert tab.value(name.replace(".", "_")).startswith(value)


# What is typed and pressed, where the sentence stands, and the sentence.
WRONG_PRESSES: dict[str, tuple[Callable[[Tab], None], str, str]] = {
    "an empty prompt": (lambda tab: fill(tab, "text", ""), "rows_message", "Paste a prompt"),
    "a prompt without tags": (
        lambda tab: fill(tab, "text", "a cat"),
        "rows_message",
        "no <lora:name:strength> tag",
    ),
    "a strength that is no number": (
        lambda tab: fill(tab, "text", "<lora:style:much>"),
        "rows_message",
        "much",
    ),
    "more LoRAs than rows": (
        lambda tab: fill(tab, "text", "<lora:style:1>" * 17),
        "rows_message",
        "17 LoRAs",
    ),
    "a recipe that breaks off": (lambda tab: fill(tab, "text", '{"inputs": ['), "rows_message", "JSON"),
    "a recipe of nothing": (lambda tab: fill(tab, "text", '{"mode": "svd"}'), "rows_message", "inputs"),
    "a recipe of another version": (
        lambda tab: fill(tab, "text", '{"inputs": [{"name": "style"}], "mode": "magic"}'),
        "rows_message",
        "magic",
    ),
    "no merged file": (lambda tab: fill(tab, "file", ""), "rows_message", "Pick a merged file first"),
    "a file that was not merged": (
        lambda tab: fill(tab, "file", "style"),
        "rows_message",
        "does not say how it was made",
    ),
    "a file with a spoilt recipe": (lambda tab: fill(tab, "file", "spoilt"), "rows_message", "recipe"),
    "a file that is not there": (
        lambda tab: fill(tab, "file", "nobody"),
        "rows_message",
        "no LoRA called nobody",
    ),
    "nothing to copy": (lambda tab: copy(tab), "copy_message", "Pick at least one LoRA first"),
    "a preset without name": (lambda tab: preset(tab, "", "1"), "preset_message", "Give the preset a name"),
    "a preset with a bad name": (lambda tab: preset(tab, "a:b", RANDOM), "preset_message", "a:b"),
    "a preset that is too short": (lambda tab: preset(tab, "SHORT", "1,2,3"), "preset_message", "17"),
    "a preset that is not there": (lambda tab: delete(tab, "NOBODY"), "preset_message", "NOBODY"),
    "a row that is not there": (lambda tab: use(tab, 9), "preset_message", "2 rows"),
}


def fill(tab: Tab, kind: str, value: str) -> None:
    tab.open("fill")
    tab.fill("fill_source" if kind == "text" else "fill_name", value)
    tab.press("fill_" + kind)


def copy(tab: Tab) -> None:
    tab.open("copy")
    tab.press("copy_prompt")


def preset(tab: Tab, name: str, text: str) -> None:
    tab.show_page("Block presets")
    tab.fill("preset_text", text)
    tab.fill("preset_name", name)
    tab.press("preset_save")


def delete(tab: Tab, name: str) -> None:
    tab.show_page("Block presets")
    tab.fill("preset_name", name)
    tab.press("preset_delete")


def use(tab: Tab, number: int) -> None:
    tab.show_page("Block presets")
    tab.fill("preset_row", number)
    tab.press("preset_use")


@pytest.mark.parametrize("case", WRONG_PRESSES)
def test_what_cannot_be_done_is_told_beside_the_button_and_changes_nothing(
    tab: Tab, page: Page, case: str
) -> None:
    act, where, sentence = WRONG_PRESSES[case]
    presets = page.host.preset_path().read_bytes()
    tab.set_form({"name": "mine"})
    act(tab)
    expect_error(tab, where, sentence)
    tab.show_page("Merge")
    tab.expect_value("name", "mine")
    assert page.host.preset_path().read_bytes() == presets


def full_disk(patch: pytest.MonkeyPatch, page: Page) -> None:
    usage = place.shutil.disk_usage(page.host.write_dir())
    patch.setattr(place.shutil, "disk_usage", lambda _: usage._replace(free=1000))


def disk_that_fills_up(patch: pytest.MonkeyPatch, page: Page) -> None:
    def fsync(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fsync)


def protected_folder(patch: pytest.MonkeyPatch, page: Page) -> None:
    original = os.open

    def refuse(path: object, flags: int, *args: int, **options: object) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(page.host.write_dir())):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, flags, *args, **options)

    patch.setattr(os, "open", refuse)


def bug_of_ours(patch: pytest.MonkeyPatch, page: Page) -> None:
    patch.setattr(merge, "run_merge", lambda *_, **__: 1 / 0, raising=False)
    patch.setattr(page.host, "log", lambda *_: None)


def nothing_wrong(patch: pytest.MonkeyPatch, page: Page) -> None:
    pass


# What happens to a merge on its way, the button, further values of the form, and the sentence.
FAILURES: dict[str, tuple[Callable[..., None], str, dict[str, object], str]] = {
    "no space": (full_disk, "merge", {}, "too full"),
    "the disk fills up": (disk_that_fills_up, "merge", {}, "The disk is full"),
    "no right to write": (protected_folder, "merge", {}, "the folder is protected"),
    "a bug": (bug_of_ours, "merge", {}, "Unexpected error (ZeroDivisionError"),
    "a trial that no host takes": (nothing_wrong, "try", {}, "no LoRA support switched on"),
    "NaN in a file": (nothing_wrong, "merge", {"row1.lora": "nan"}, "NaN or infinity"),
    "a size that nothing fits": (
        nothing_wrong,
        "merge",
        {"rank_rule": "Fit a size", "size": 0.001},
        "is too small for any layer",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_merge_that_fails_says_why_leaves_nothing_and_keeps_the_form(
    tab: Tab, page: Page, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    break_it, button, changes, sentence = FAILURES[case]
    tab.set_form({**row(strength=0.75), **changes, "name": "failing"})
    tab.wait_for_facts("Base model")
    break_it(monkeypatch, page)
    before = tab.shown_job()
    tab.press(button)
    tab.page.wait_for_function(
        "old => { const r = document.querySelector('#loramerge_result [data-job]');"
        " return r && r.dataset.job !== old; }",
        arg=before,
    )
    expect_error(tab, "result", sentence)
    assert "Not merged" in tab.text("result")
    assert (tab.value("name"), tab.value("row0_strength")) == ("failing", "0.75")


@contextmanager
def facts_on_hold(patch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Facts of a form with a LoRA take until the end of this; the event tells that they were asked for."""
    asked, go = threading.Event(), threading.Event()
    gather = facts.gather

    def slow(values: Mapping[str, object], *others: object) -> facts.Facts:
        if values["row0.lora"]:
            asked.set()
            go.wait(60)
        return gather(values, *others)

    patch.setattr(facts, "gather", slow)
    try:
        yield asked
    finally:
        go.set()


def test_what_is_typed_while_the_facts_are_looked_for_stays(
    tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    tab.set_form({})
    tab.wait_for_facts("Pick a LoRA")
    with facts_on_hold(monkeypatch) as asked:
        tab.fill("row0_lora", "styl")
        assert asked.wait(60)
        tab.fill("name", "typed")
    tab.wait_for_facts("LoRAs 1")
    # The whole name of the LoRA is taken over, the name of the file is not.
    tab.expect_value("row0_lora", re.compile("^style · "))
    tab.expect_value("name", "typed")


def test_nothing_is_put_into_a_field_that_somebody_is_in(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    tab.set_form({})
    tab.wait_for_facts("Pick a LoRA")
    with facts_on_hold(monkeypatch) as asked:
        tab.fill("row0_lora", "style")
        assert asked.wait(60)
        tab.field("name").click()
    tab.wait_for_facts("LoRAs 1")
    tab.page.wait_for_timeout(1000)
    tab.page.keyboard.type("typed")
    tab.expect_value("name", "typed")
    tab.fill("name", "")
    tab.expect_value("name", "style-2")


@pytest.mark.parametrize("change", ["vanished", "broken"])
def test_a_file_that_changes_after_it_was_picked_is_told_beside_the_button(
    tab: Tab, page: Page, change: str
) -> None:
    path = page.host.write_dir() / f"{change}.safetensors"
    make_lora(path, SD1_LAYERS, seed=5)
    tab.set_form(row(lora=change))
    tab.wait_for_facts("LoRAs 1")
    if change == "vanished":
        path.unlink()
    else:
        path.write_bytes(b"<html>")
    tab.press("merge")
    path.unlink(missing_ok=True)
    expect_error(tab, "message", change)
    tab.expect_value("row0_lora", re.compile(f"^{change}"))
