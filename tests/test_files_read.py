"""Tensors out of files: every dtype, every container, and what must be refused."""

from __future__ import annotations

import os
import pickle
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from lib_loramerge.errors import FileError, LoraMergeError, UnsupportedError
from lib_loramerge.files import open_file, read_header
from lib_loramerge.files.decode import float8_table
from lib_loramerge.merge import open_source
from tests.helpers.fixtures import SD1_LAYERS, lora_tensors
from tests.test_files_header import built

FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
# float8 came with torch 2.1, the wide unsigned integers with 2.3.
DTYPES = [getattr(torch, name) for name in (*FLOATS, *INTEGERS, "bool") if hasattr(torch, name)]


def numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return values.to(dtype) if dtype.is_floating_point else (values * 50).abs().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 3, 3), (1,), (), (0, 4)], ids=str)
def test_every_dtype_is_read_as_torch_converts_it(tmp_path, dtype, shape):
    stored = numbers(dtype, shape)
    save_file({"a": torch.ones(3, dtype=torch.int8), "x": stored}, tmp_path / "a.safetensors")
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    with open_file(tmp_path / "a.safetensors") as file:
        read = file.read("x")
        raw = file.data_bytes("x")
    assert read.dtype == wanted
    torch.testing.assert_close(read, stored.to(wanted), rtol=0, atol=0)
    assert bytes(raw) == stored.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("dtype", "theirs"),
    [("F8_E4M3", "e4m3fn"), ("F8_E5M2", "e5m2"), ("F8_E4M3FNUZ", "e4m3fnuz"), ("F8_E5M2FNUZ", "e5m2fnuz")],
)
def test_the_float8_tables_agree_with_torch_in_all_256_values(dtype, theirs):
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, f"float8_{theirs}")).to(torch.float32)
    ours = torch.from_numpy(float8_table(dtype))
    torch.testing.assert_close(ours, every, rtol=0, atol=0, equal_nan=True)


def test_a_tensor_larger_than_the_scratch_memory_is_read_right(tmp_path):
    large = torch.randn(3_000_000).to(torch.bfloat16)
    save_file({"x": large, "y": large[:7].clone()}, tmp_path / "a.safetensors")
    with open_file(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.read("x"), large.float())
        assert torch.equal(file.read("y"), large[:7].float())


def test_what_was_read_stays_when_the_next_tensor_is_read(tmp_path):
    tensors = {str(n): torch.full((50,), float(n), dtype=torch.float16) for n in range(5)}
    save_file(tensors, tmp_path / "a.safetensors")
    with open_file(tmp_path / "a.safetensors") as file:
        read = {key: file.read(key) for key in tensors}
    for key, tensor in tensors.items():
        assert torch.equal(read[key], tensor.float())


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_found_and_named(tmp_path, dtype, bad):
    tensor = torch.zeros(40, 40)
    tensor[17, 3] = float("nan") if "e4m3fn" in str(dtype) else bad  # It has no infinities.
    save_file({"lora_unet_x.lora_up.weight": tensor.to(dtype)}, tmp_path / "broken.safetensors")
    told = r"broken\.safetensors.*lora_unet_x\.lora_up\.weight.*1 of its 1,600 values"
    with open_file(tmp_path / "broken.safetensors") as file, pytest.raises(FileError, match=told):
        file.read("lora_unet_x.lora_up.weight")


def test_infinities_of_both_signs_and_sums_that_overflow_are_judged_right(tmp_path):
    both = torch.tensor([float("inf"), -float("inf")])
    huge = torch.full((4,), 3e38)
    save_file({"both": both, "huge": huge}, tmp_path / "a.safetensors")
    with open_file(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.read("huge"), huge)
        with pytest.raises(FileError, match="2 of its 2 values"):
            file.read("both")


@pytest.mark.parametrize(("dtype", "size"), [("F4", 4), ("F8_E8M0", 8), ("C64", 64)])
def test_a_dtype_of_no_ordinary_numbers_is_refused_by_name(tmp_path, dtype, size):
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        built({"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, size // 2]}}, bytes(size // 2))
    )
    with open_file(path) as file, pytest.raises(UnsupportedError, match=dtype):
        file.read("x")


@pytest.mark.parametrize("system", ["preadv", "seek"])
def test_a_file_that_is_shortened_while_open_is_an_error_and_no_crash(tmp_path, monkeypatch, system):
    if system == "seek":  # As on Windows.
        monkeypatch.delattr(os, "preadv")
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(100_000)}, path)
    with open_file(path) as file:
        assert torch.equal(file.read("x"), torch.ones(100_000))
        os.truncate(path, 5_000)
        with pytest.raises(FileError, match="became shorter"):
            file.read("x")


def test_an_open_file_still_reads_the_old_bytes_when_a_new_one_takes_its_name(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(10)}, path)
    with open_file(path) as file:
        save_file({"y": torch.zeros(9)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        assert torch.equal(file.read("x"), torch.ones(10))
    assert list(read_header(path).tensors) == ["y"]


def test_several_threads_read_one_file(tmp_path):
    tensors = {str(n): torch.full((999,), float(n), dtype=torch.float16) for n in range(60)}
    save_file(tensors, tmp_path / "a.safetensors")
    wrong = []
    with open_file(tmp_path / "a.safetensors") as file:

        def work():
            for key in tensors:
                if not torch.equal(file.read(key), tensors[key].float()):
                    wrong.append(key)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# .pt and .ckpt

TENSORS = {**lora_tensors(SD1_LAYERS, alpha=2.0, dtype=torch.float16), "x.alpha": torch.tensor(4)}


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".PT"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickled_lora_reads_as_its_safetensors_twin(tmp_path, suffix, wrapped, zipped):
    path = tmp_path / f"a{suffix}"
    torch.save(
        {"state_dict": TENSORS, "epoch": 3} if wrapped else TENSORS,
        path,
        _use_new_zipfile_serialization=zipped,
    )
    (tmp_path / "b.safetensors").write_bytes(save(TENSORS))
    with open_file(path) as file, open_file(tmp_path / "b.safetensors") as twin:
        assert set(file.tensors) == set(twin.tensors)
        for key, info in twin.tensors.items():
            assert (file.tensors[key].dtype, file.tensors[key].shape) == (info.dtype, info.shape)
            assert torch.equal(file.read(key), twin.read(key))
            assert file.data_bytes(key) == twin.data_bytes(key)


def test_the_bare_list_of_the_first_lora_tool_gets_the_names_of_its_later_files(tmp_path):
    pairs = [torch.ones(4, 1), torch.ones(1, 3), torch.ones(5, 1), torch.ones(1, 2)]
    torch.save(pairs, tmp_path / "a.pt")
    torch.save(pairs[:2], tmp_path / "a.text_encoder.pt")
    assert set(read_header(tmp_path / "a.pt").tensors) == {
        "unet:0:up",
        "unet:0:down",
        "unet:1:up",
        "unet:1:down",
    }
    assert read_header(tmp_path / "a.pt").tensors["unet:1:up"].shape == (5, 1)
    assert set(read_header(tmp_path / "a.text_encoder.pt").tensors) == {
        "text_encoder:0:up",
        "text_encoder:0:down",
    }
    torch.save(pairs[:3], tmp_path / "odd.pt")
    with pytest.raises(FileError, match="cannot be paired"):
        read_header(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            {
                "string_to_token": {"*": 265},
                "string_to_param": {"*": torch.ones(2, 768)},
                "name": "cat",
                "step": 5,
            },
            "embedding",
        ),
        (
            {768: ({"linear.0.weight": torch.ones(2)}, {"linear.0.weight": torch.ones(2)}), "step": 1},
            "hypernetwork",
        ),
        ({"state_dict": {"first_stage_model.encoder.conv_in.weight": torch.ones(2)}}, "checkpoint"),
        (5, "no LoRA"),
        ({}, "no tensors"),
    ],
    ids=["embedding", "hypernetwork", "checkpoint", "number", "empty"],
)
def test_other_pickles_are_called_what_they_are(tmp_path, content, told):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(LoraMergeError, match=told):
        open_source(path)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped):
    path = tmp_path / "a.pt"
    torch.save({"a": Evil(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileError, match="harmful"):
        open_file(path)
    plain = tmp_path / "b.ckpt"
    plain.write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    with pytest.raises(FileError):
        open_file(plain)
    assert not (tmp_path / "ran").exists()


def test_damaged_pickles_give_our_errors_and_keep_their_names(tmp_path, monkeypatch):
    """Forge wraps torch.load and renames each path that it fails on."""
    original = torch.load

    def wrapped(*arguments, **options):
        try:
            return original(*arguments, **options)
        except Exception:
            for value in [*arguments, *options.values()]:
                if isinstance(value, str) and os.path.exists(value):
                    os.replace(value, value + ".corrupted")
            raise

    monkeypatch.setattr(torch, "load", wrapped)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu").write_text("an argument that is also a file")
    torch.save(TENSORS, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    start = content.index(b"\x80\x02")  # of the pickle inside
    damaged = {
        "half.pt": content[: len(content) // 2],
        "flipped.pt": content[:start] + bytes(60) + content[start + 60 :],
        "pickle.pt": pickle.dumps(list(range(50)), protocol=4)[:-9],
        "page.pt": b"<!DOCTYPE html><html>",
        "empty.ckpt": b"",
        "text.ckpt": b"just text",
    }
    for name, bad in damaged.items():
        (tmp_path / name).write_bytes(bad)
    names = sorted(os.listdir())
    for name in damaged:
        with pytest.raises(LoraMergeError) as caught:
            open_file(Path(name)).read("nothing")
        assert name in str(caught.value)
    assert sorted(os.listdir()) == names
    assert set(read_header("whole.pt").tensors) == set(TENSORS)


def test_a_compressed_zip_is_refused_before_it_grows(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(5_000_000))
    with pytest.raises(FileError, match="compressed"):
        read_header(path)


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bytes_in_a_pickle_give_nothing_but_our_errors(tmp_path, seed):
    torch.save({"a.alpha": torch.tensor(1.0), "n": [1, 2.5, "x"]}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(0, len(content), (6,), generator=generator).tolist():
        content[place] ^= 1 << seed % 8
    (tmp_path / "a.pt").write_bytes(content)
    try:
        header = read_header(tmp_path / "a.pt")
    except LoraMergeError:
        return
    assert len(header.tensors) <= 3  # The damage hit what does not matter: padding, a name, a number.


def test_a_name_spelled_two_ways_in_a_pickle_hides_nothing(tmp_path):
    up = torch.ones(4, 2)
    torch.save({"unet.a": {"lora_up.weight": up}, "unet": {"a.lora_up.weight": 2 * up}}, tmp_path / "a.pt")
    with pytest.raises(FileError, match=r"a\.pt has two tensors of one name: unet\.a\.lora_up\.weight"):
        open_file(tmp_path / "a.pt")
