"""Headers: what is read, what is refused, and how the refusal is worded."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lib_loramerge.errors import FileError, LoraMergeError, UnsupportedError
from lib_loramerge.files import open_file, read_header
from lib_loramerge.files.header import HEADERS, parse_header
from tests.helpers.fixtures import SD1_LAYERS, lora_tensors, sample_data

QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLACE = Path("a.safetensors")


def built(entries: object, data: bytes = b"", raw: bytes | None = None) -> bytes:
    """A file of any header; nothing checks it."""
    header = json.dumps(entries).encode() if raw is None else raw
    return struct.pack("<Q", len(header)) + header + data


def refusal(folder: Path, content: bytes, name: str = "a.safetensors") -> str:
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(LoraMergeError) as caught:
        read_header(path)
    message = str(caught.value)
    assert name in message
    assert message.endswith(".")
    return message


def one(dtype: str = "F32", shape: object = (2,), place: object = (0, 8)) -> dict:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": place}}


GOOD = save({"a.lora_up.weight": torch.ones(2, 3), "a.alpha": torch.tensor(1.0)}, {"ss_x": "ü"})


def test_a_header_shows_dtype_shape_place_and_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    header = read_header(path)
    theirs = dict(safetensors.deserialize(GOOD))
    assert {key: (info.dtype, list(info.shape)) for key, info in header.tensors.items()} == {
        key: (entry["dtype"], entry["shape"]) for key, entry in theirs.items()
    }
    for key, info in header.tensors.items():
        assert GOOD[header.data_start + info.start : header.data_start + info.end] == theirs[key]["data"]
    assert header.metadata == {"ss_x": "ü"}
    assert header.size == len(GOOD)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><title>Sign in</title></html>" * 20, "web page"),
        (b"\n  <html lang=en>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "git-lfs pointer"),
        (b'{"error": "Access to model is restricted"}', "JSON"),
        (b"Access to this resource is denied, please log in.", "text file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"),
        (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (bytes(5000), "zeros"),
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
        (GOOD[:4], "too short"),
        (os.urandom(8)[:7] + b"\xff" + bytes(500), "not a safetensors file"),
        (GOOD[:40], "cut off inside its header"),
        (GOOD[:-5], "cut off: 5 of its 28 bytes of tensors are missing"),
        (GOOD + b"123", "3 bytes after its last tensor"),
        (built([]), "not a safetensors file"),
        (built(None, raw=b"{nonsense}"), "not valid JSON"),
        (built(None, raw=b'{"\xff": 1}'), "not valid JSON"),
        (built(None, raw=b'{"a": ' + b"[" * 100_000), "not valid JSON"),
        (built(None, raw=b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
        (built({"__metadata__": {"a": 1}}), "metadata"),
        (built({"__metadata__": "a"}), "metadata"),
        (built({"t": 5}), "not a description"),
        (built(one("F99"), bytes(8)), "unknown dtype"),
        (built(one(shape=[-2]), bytes(8)), "impossible shape"),
        (built(one(shape=[2.0]), bytes(8)), "impossible shape"),
        (built(one(shape=[True, 2]), bytes(8)), "impossible shape"),
        (built(one(shape=[1] * 40), bytes(4)), "impossible shape"),
        (built(one(shape=[2**62, 2**62])), "impossible shape"),
        (built(one(shape=[0, 2**62, 2**62], place=[0, 0])), "impossible shape"),
        (built(one(place=[8, 0]), bytes(8)), "impossible place"),
        (built(one(place=[0, 2**70]), bytes(8)), "impossible place"),
        (built(one(place=[0]), bytes(8)), "impossible place"),
        (built(one(shape=[3]), bytes(8)), "needs 12 bytes"),
        (built(one(place=[4, 12]), bytes(12)), "belong to no tensor"),
        (built({**one(), "u": one()["t"]}, bytes(8)), "overlaps"),
        (
            built(None, bytes(16), raw=b'{"t":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"t":{}}'),
            "twice",
        ),
        (
            built(None, bytes(8), raw=b'{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'),
            "broken text",
        ),
        (struct.pack("<Q", 100_000_001) + b'{"a":' + os.urandom(99), "header of 100.0 MB"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_file_that_is_no_adapter_is_called_what_it_is(tmp_path, content, told):
    assert told in refusal(tmp_path, content)


def test_a_zip_with_the_wrong_name_is_distinguished_from_a_pytorch_file(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer)
    assert "rename it to .pt" in refusal(tmp_path, buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip archive; unpack" in refusal(tmp_path, buffer.getvalue())
    assert "rename it to .safetensors" in refusal(tmp_path, GOOD, "a.pt")


def test_a_folder_a_missing_file_and_a_pipe_are_reported(tmp_path):
    with pytest.raises(FileError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        read_header(tmp_path / "no.safetensors")
    with pytest.raises(FileError, match="is not a file name"):
        read_header("a\0b.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(FileError, match="not an ordinary file"):
            open_file(tmp_path / "pipe.safetensors")


def test_a_file_that_may_not_be_read_is_reported(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)

    def denied(*_args, **_options):
        raise PermissionError(13, "denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(FileError, match="permission denied"):
        read_header(path)


def test_a_huge_list_in_a_header_is_refused_before_it_is_parsed(tmp_path):
    content = built(None, raw=b'{"a": [' + b"[]," * 3_100_000 + b"[]]}")
    start = time.process_time()
    assert "more than any adapter file holds" in refusal(tmp_path, content)
    assert (
        time.process_time() - start < 60
    )  # Parsing it takes no time to speak of; this only rules out a hang.


def test_a_header_is_read_again_only_when_its_file_changed(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    first = read_header(path)
    assert read_header(path) is first
    other = save({"b.alpha": torch.tensor(1.0)})
    replacement = tmp_path / "new"
    replacement.write_bytes(other)
    os.utime(replacement, ns=(0, path.stat().st_mtime_ns))
    os.replace(replacement, path)
    assert list(read_header(path).tensors) == ["b.alpha"]


def test_remembered_headers_are_bounded(tmp_path):
    header = read_header(_saved(tmp_path / "0.safetensors", 20))
    limit = HEADERS.limit
    HEADERS.clear()
    HEADERS.limit = 60_000
    try:
        for number in range(30):
            read_header(_saved(tmp_path / f"{number}.safetensors", 20))
        assert 1 < len(HEADERS.entries) < 10
        assert read_header(tmp_path / "0.safetensors").tensors == header.tensors
    finally:
        HEADERS.limit = limit


def _saved(path: Path, count: int) -> Path:
    path.write_bytes(save({f"{number}.alpha": torch.tensor(1.0) for number in range(count)}))
    return path


@QUIET
@given(st.binary(max_size=300))
def test_random_bytes_give_nothing_but_our_errors(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraMergeError):
        read_header(path)


def accepted_by_safetensors(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except Exception:
        return False
    return True


def real_header() -> bytes:
    """A header without its data, so that no edit of it makes a whole file."""
    folder = sample_data()
    if folder is None:
        content = save(lora_tensors(SD1_LAYERS, alpha=1.0), {"ss_output_name": "x"})
    else:
        content = (folder / "disney_sd15_kohya.safetensors").read_bytes()
    return content[: 8 + struct.unpack("<Q", content[:8])[0]]


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(
            [b"0", b"9", b"-", b'"', b"{", b"[", b"]", b",", b"\\u", b"\xff", b" ", b"null", b"1e9", b"NaN"]
        ),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list) -> bytes:
    for kind, where, new in edits:
        place = 8 + int(where * (len(content) - 8))
        if kind == "replace":
            content = content[:place] + new + content[place + len(new) :]
        elif kind == "insert":
            content = content[:place] + new + content[place:]
        elif kind == "delete":
            content = content[:place] + content[place + len(new) :]
        else:
            content = content[:place] + content[place : place + 60] * 2 + content[place + 60 :]
    return content


@QUIET
@given(EDITS, st.booleans())
def test_what_we_accept_of_a_damaged_file_the_safetensors_library_accepts_too(edits, mend):
    header_length = struct.unpack("<Q", GOOD[:8])[0]
    content = edited(GOOD, edits)
    raw, data = content[8 : 8 + header_length], GOOD[8 + header_length :]
    if mend:  # The length fits again, so that the damage inside is what is judged.
        raw = content[8 : len(content) - len(data)]
    content = struct.pack("<Q", len(raw)) + raw + data
    try:
        header = parse_header(raw, len(content), PLACE)
    except FileError:
        return
    assert accepted_by_safetensors(content)
    assert {key: list(info.shape) for key, info in header.tensors.items()} == {
        key: entry["shape"] for key, entry in safetensors.deserialize(content)
    }


@settings(QUIET, max_examples=40)
@given(EDITS)
def test_mutated_real_headers_give_nothing_but_our_errors(tmp_path, edits):
    path = tmp_path / "a.safetensors"
    path.write_bytes(edited(real_header(), edits))
    with pytest.raises((FileError, UnsupportedError)):
        read_header(path)


@QUIET
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20), st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5
    ),
    st.dictionaries(st.text(max_size=10), st.text(max_size=20), max_size=3),
)
def test_every_header_of_the_safetensors_library_is_understood(shapes, metadata):
    content = save({key: torch.zeros(shape) for key, shape in shapes.items()}, metadata)
    raw = content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
    header = parse_header(raw, len(content), PLACE)
    assert {key: list(info.shape) for key, info in header.tensors.items()} == shapes
    assert header.metadata == metadata
