"""Preset files: what ships, reading of all three formats, and editing that touches nothing else."""

from __future__ import annotations

import os
import random
import re
import stat
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge import models
from lib_loramerge.blocks import (
    BLOCK_IDS,
    Presets,
    bundled_preset_path,
    delete_preset,
    load_presets,
    resolve,
    save_preset,
)
from lib_loramerge.errors import LoraMergeError, OutputError, RecipeError
from lib_loramerge.recipe import LoraInput

SHIPPED = load_presets([bundled_preset_path()])
USUAL = ["NONE", "ALL", "INS", "IND", "INALL", "MIDD", "OUTD", "OUTS", "OUTALL", "ALL0.5"]
TWELVE = ",".join(["1"] * 12)
ZEROS = ",".join(["0"] * 12)


def blocks_at_1(name: str) -> set[str]:
    found = resolve(LoraInput("a", lbw=name), SHIPPED, rng=random.Random(0))
    assert set(found.values.values()) <= {0, 1}
    return {block for block, value in found.values.items() if value == 1}


def test_the_shipped_file_is_understood_to_the_last_line():
    assert SHIPPED.problems == ()
    assert set(SHIPPED.weight_files.values()) == {bundled_preset_path()}


@pytest.mark.parametrize("name", sorted(SHIPPED.weights))
def test_every_shipped_preset_resolves(name):
    by_list = re.fullmatch(r"[-.0-9,]+", SHIPPED.weights[name])
    model = None if by_list else models.block_map("flux1")
    found = resolve(LoraInput("a", lbw=name), SHIPPED, rng=random.Random(0), model=model)
    assert found.ids in (BLOCK_IDS[26], BLOCK_IDS[61])


@pytest.mark.parametrize("name", sorted(SHIPPED.elements))
@pytest.mark.parametrize("lbw", [None, "ALL", "XL-ALL"])
def test_every_shipped_rule_resolves(name, lbw):
    assert resolve(LoraInput("a", lbw=lbw, lbwe=name), SHIPPED, rng=random.Random(0)).elements


@pytest.mark.parametrize(
    ("prefix", "count"), [("", 17), ("26-", 26), ("XL-", 12), ("XL20-", 20), ("FLUX-", 61)]
)
def test_the_usual_presets_exist_for_every_list(prefix, count):
    for name in USUAL:
        assert len(SHIPPED.weights[prefix + name].split(",")) == count
    texts = {"BASE"} if count < 61 else {"CLIP", "T5"}
    assert blocks_at_1(f"{prefix}NONE") == set()
    assert blocks_at_1(f"{prefix}ALL") == set(BLOCK_IDS[count])
    assert blocks_at_1(f"{prefix}INS") | blocks_at_1(f"{prefix}IND") == blocks_at_1(f"{prefix}INALL")
    assert blocks_at_1(f"{prefix}INS") & blocks_at_1(f"{prefix}IND") == texts
    assert blocks_at_1(f"{prefix}OUTD") | blocks_at_1(f"{prefix}OUTS") == blocks_at_1(f"{prefix}OUTALL")
    assert blocks_at_1(f"{prefix}OUTD") & blocks_at_1(f"{prefix}OUTS") == texts
    middle = {"M00"} if count < 61 else set()
    assert blocks_at_1(f"{prefix}MIDD") == blocks_at_1(f"{prefix}IND") | middle | blocks_at_1(f"{prefix}OUTD")
    assert blocks_at_1(f"{prefix}INALL") | middle | blocks_at_1(f"{prefix}OUTALL") == blocks_at_1(
        f"{prefix}ALL"
    )


def test_presets_that_others_published_keep_their_blocks():
    assert blocks_at_1("MIDD") == set("BASE IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06".split())  # noqa: SIM905
    assert blocks_at_1("INALLXL") == set(BLOCK_IDS[20][:10])
    assert blocks_at_1("XL-BLORA-CONTENT") == {"OUT00"}
    assert blocks_at_1("XL-BLORA-STYLE") == {"OUT01"}


# --- reading ------------------------------------------------------------------------------------


def written(folder, name: str, text: str | bytes):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def test_our_format_has_both_kinds_comments_and_a_later_line_wins(tmp_path):
    path = written(
        tmp_path,
        "preset.txt",
        f"# NONE:{ZEROS}\n\n A :{TWELVE}\nA:{ZEROS} # the one in force\n猫 b: 1,{TWELVE[2:]}\r\n"
        "E:IN05 OUT00:attn:0,M00::2 # rules\nX:::1\n",
    )
    found = load_presets([path])
    assert found.weights == {"A": ZEROS, "猫 b": f"1,{TWELVE[2:]}"}
    assert found.elements == {"E": "IN05 OUT00:attn:0,M00::2", "X": "::1"}
    assert found.problems == ()


def test_a_line_that_is_no_preset_is_reported_and_stops_nothing(tmp_path):
    path = written(tmp_path, "preset.txt", f"A:{TWELVE}\nnonsense\n:1,2\nB:\n")
    found = load_presets([path])
    assert found.weights == {"A": TWELVE}
    assert [p.split(":")[0] for p in found.problems] == [f"preset.txt, line {n}" for n in (2, 3, 4)]


def test_the_presets_of_lora_block_weight_are_read_as_it_reads_them(tmp_path):
    weights = written(
        tmp_path,
        "lbwpresets.txt",
        f"A:{TWELVE}\n#B:{TWELVE}\nC:{TWELVE} # no\nD:1,1,1\nno colon{TWELVE}\n E : {ZEROS}\nA:{ZEROS}\n",
    )
    elements = written(
        tmp_path,
        "elempresets.txt",
        "ON:IN05-OUT05:attn:1\n\nTWO:IN05:attn:0\nOUT00:proj:0.5\n\n\n\nXYZ:::1\n\nBAD:attn:1\n\nno colon",
    )
    found = load_presets([weights, elements])
    assert found.weights == {"A": ZEROS, "E": ZEROS}
    assert found.elements == {"ON": "IN05-OUT05:attn:1", "TWO": "IN05:attn:0,OUT00:proj:0.5", "XYZ": "::1"}


def test_of_equal_names_the_earlier_file_wins(tmp_path):
    ours = written(tmp_path, "preset.txt", f"A:{TWELVE}\n")
    theirs = written(tmp_path, "lbwpresets.txt", f"A:{ZEROS}\nB:{ZEROS}\n")
    found = load_presets([ours, theirs])
    assert found.weights == {"A": TWELVE, "B": ZEROS}
    assert found.weight_files == {"A": ours, "B": theirs}


@pytest.mark.parametrize(
    "data",
    [b"\xef\xbb\xbfA:" + TWELVE.encode(), f"A:{TWELVE}\r\nB:x".encode(), f"\nA:{TWELVE}\rB:x".encode()],
)
def test_a_byte_order_mark_and_any_line_end_are_read(tmp_path, data):
    assert load_presets([written(tmp_path, "preset.txt", data)]).weights["A"] == TWELVE


@pytest.mark.parametrize("data", ["猫".encode("cp932"), "A".encode("utf-16"), b"#" * 1_000_001])
def test_a_file_that_is_no_text_of_ours_is_reported_and_skipped(tmp_path, data):
    found = load_presets([written(tmp_path, "preset.txt", data), written(tmp_path, "p2.txt", f"A:{TWELVE}")])
    assert found.weights == {"A": TWELVE}
    assert len(found.problems) == 1
    assert found.problems[0].startswith("preset.txt: ")


def test_a_missing_file_is_skipped_and_a_folder_is_reported(tmp_path):
    assert load_presets([tmp_path / "none.txt"]) == Presets()
    assert len(load_presets([tmp_path]).problems) == 1


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_without_a_crash(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    for name in ("preset.txt", "lbwpresets.txt", "elempresets.txt"):
        found = load_presets([written(folder, name, data)])
        for preset in found.weights:
            try:
                resolve(
                    LoraInput("a", lbw="x"),
                    Presets(weights={"x": found.weights[preset]}),
                    rng=random.Random(0),
                )
            except LoraMergeError:
                continue


# --- editing ------------------------------------------------------------------------------------

BEFORE = f"\ufeff# mine\r\nA:{ZEROS}\r\n\r\n  A:{TWELVE}   # keep me\r\nE:IN05:attn:0\nodd line\r\nB:{TWELVE}"


def test_changing_a_preset_changes_its_line_alone(tmp_path):
    path = written(tmp_path, "preset.txt", BEFORE)
    save_preset(path, "A", " " + ", ".join(["2"] * 12) + " ")
    new = "A:" + ",".join(["2"] * 12) + " # keep me"
    assert path.read_bytes().decode() == BEFORE.replace(f"  A:{TWELVE}   # keep me", new)
    assert load_presets([path]).weights["A"] == ",".join(["2"] * 12)


def test_a_new_preset_goes_to_the_end_with_the_line_end_of_the_file(tmp_path):
    path = written(tmp_path, "preset.txt", BEFORE)
    save_preset(path, "N 新", "IN05-OUT05 : attn :0\nM00::1,")
    assert path.read_bytes().decode() == BEFORE + "\r\nN 新:IN05-OUT05 : attn :0,M00::1\r\n"


def test_weights_and_rules_of_one_name_are_two_presets(tmp_path):
    path = written(tmp_path, "preset.txt", f"A:{TWELVE}\n")
    save_preset(path, "A", "IN05:attn:0")
    save_preset(path, "A", ZEROS)
    assert path.read_text() == f"A:{ZEROS}\nA:IN05:attn:0\n"
    delete_preset(path, "A")
    assert path.read_text() == ""


def test_deleting_takes_every_line_of_the_name_and_nothing_else(tmp_path):
    path = written(tmp_path, "preset.txt", BEFORE)
    delete_preset(path, "A")
    assert path.read_bytes().decode() == f"\ufeff# mine\r\n\r\nE:IN05:attn:0\nodd line\r\nB:{TWELVE}"
    with pytest.raises(RecipeError, match=r"preset\.txt has no preset 'A'"):
        delete_preset(path, "A")


def test_a_file_that_is_not_there_is_made(tmp_path):
    save_preset(tmp_path / "new.txt", "A", TWELVE)
    assert (tmp_path / "new.txt").read_bytes() == f"A:{TWELVE}\n".encode()


@pytest.mark.parametrize(
    "name",
    ["", " ", "a:b", "a,b", "#a", "a#", "a>b", "<a", "a=b", "a@b", "a\nb", "a\0", "x" * 101, "1", "0.5", "-"],
)
def test_a_name_that_no_prompt_could_hold_is_refused(tmp_path, name):
    with pytest.raises(RecipeError, match="name"):
        save_preset(tmp_path / "preset.txt", name, TWELVE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,1,1",
        TWELVE + ",1",
        TWELVE[:-1] + "nan",
        TWELVE + "#",
        "a:b",
        "IN05:attn:x",
        "IN99:attn:1",
        TWELVE + "\nB",
    ],
)
def test_a_text_that_would_not_resolve_is_refused(tmp_path, text):
    path = written(tmp_path, "preset.txt", BEFORE)
    with pytest.raises(RecipeError):
        save_preset(path, "A", text)
    assert path.read_bytes().decode() == BEFORE


def test_a_failed_write_leaves_the_old_file_and_no_stray(tmp_path, monkeypatch):
    path = written(tmp_path, "preset.txt", BEFORE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"disk is full, so preset.txt was not written"):
        save_preset(path, "B", ZEROS)
    assert path.read_bytes().decode() == BEFORE
    assert [p.name for p in tmp_path.iterdir()] == ["preset.txt"]


def test_a_file_that_is_not_utf_8_is_not_rewritten(tmp_path):
    path = written(tmp_path, "preset.txt", "猫".encode("cp932"))
    with pytest.raises(RecipeError, match="UTF-8"):
        save_preset(path, "A", TWELVE)
    assert path.read_bytes() == "猫".encode("cp932")


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither mode bits nor links for everyone")
def test_mode_bits_and_links_stay(tmp_path):
    real = written(tmp_path, "real.txt", "")
    real.chmod(0o640)
    link = tmp_path / "preset.txt"
    link.symlink_to(real)
    save_preset(link, "A", TWELVE)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert real.read_text() == f"A:{TWELVE}\n"


def test_two_changes_at_once_are_both_kept(tmp_path):
    path = written(tmp_path, "preset.txt", "# mine\n")
    threads = [threading.Thread(target=save_preset, args=(path, f"P{n}", TWELVE)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(load_presets([path]).weights) == {f"P{n}" for n in range(16)}


lines = st.sampled_from(
    ["# note", "", "odd", f"A:{TWELVE}", f"B:{ZEROS} # b", "A:IN05:attn:0", "\t", "C:1,2"]
)


@settings(deadline=None)
@given(st.lists(st.tuples(lines, st.sampled_from(["\n", "\r\n", "\r"])), max_size=8), st.booleans())
def test_saving_and_deleting_a_new_preset_gives_the_file_back(tmp_path_factory, content, ended):
    text = "".join(line + end for line, end in content)
    text = text if ended or not content else text + "# last"
    path = written(tmp_path_factory.getbasetemp(), "roundtrip.txt", text)
    save_preset(path, "NEW", TWELVE)
    delete_preset(path, "NEW")
    after = path.read_bytes().decode()
    assert after == text or (not text.endswith(("\n", "\r")) and after.rstrip("\r\n") == text)
