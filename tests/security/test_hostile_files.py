"""Files that ask for more than they hold: each is one sentence, soon, and in little memory."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lib_loramerge.errors import LoraMergeError
from lib_loramerge.files import open_file, read_header

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 500


def saved(value: object, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def zipped(instructions: bytes, **storages: bytes) -> bytes:
    """A file as torch writes it, around a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", instructions)
        for name, content in storages.items():
            archive.writestr(f"archive/data/{name}", content)
    return buffer.getvalue()


def tensor(count: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """``{"x": tensor}`` over a float storage that is said to have ``count`` numbers."""

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpu\x8a\x08%st" % struct.pack(
        "<q", count
    )
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"Q\x8a\x08" + struct.pack("<q", offset)
    view += integers(shape) + integers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\2}X\1\0\0\0x" + view + b"s."


def header(entries: bytes) -> bytes:
    return struct.pack("<Q", len(entries)) + entries


def recursive() -> bytes:
    inside: dict[str, object] = {}
    inside["model"] = inside
    return saved(inside)


def deep(kind: bytes) -> bytes:
    return zipped(b"\x80\2" + kind * 300_000 + b".")


def laughing() -> bytes:
    value: object = ["ha"] * 10
    for _ in range(30):
        value = [value, value]
    return saved({"x": value})


ONE = struct.pack("<f", 1.0)
FILES = {
    "dictionary in itself": recursive(),
    "list in itself": zipped(b"\x80\2}X\1\0\0\0x]q\1h\1as."),
    "a place of memory far away": zipped(b"\x80\2}r\xff\xff\xff\x7f."),
    "deep lists": zipped(b"\x80\2" + b"]" * 300_000 + b"a" * 299_999 + b"."),
    "deep tuples": zipped(b"\x80\2)" + b"\x85" * 300_000 + b"."),
    "deep names": deep(b"}"),
    "one value many times": laughing(),
    "a huge integer": zipped(b"\x80\2}X\1\0\0\0x\x8b" + struct.pack("<i", 60_000) + b"\x7f" * 60_000 + b"s."),
    "a long decimal": zipped(b"\x80\2}X\1\0\0\0xL" + b"9" * 90_000 + b"L\ns."),
    "a text of which the length is a lie": zipped(b"\x80\2\x8d" + struct.pack("<Q", 2**60) + b"x."),
    "a storage of which the length is a lie": zipped(tensor(2**30, (1,), (1,)), **{"0": ONE}),
    "an endless view": zipped(tensor(1, (2**40,), (0,)), **{"0": ONE}),
    "a view beyond the end": zipped(tensor(1, (2,), (1,)), **{"0": ONE}),
    "a view from beyond the end": zipped(tensor(1, (1,), (1,), 5), **{"0": ONE}),
    "a negative side": zipped(tensor(1, (-1,), (1,)), **{"0": ONE}),
    "a negative stride": zipped(tensor(1, (1,), (-1,)), **{"0": ONE}),
    "a sparse tensor": saved({"x": torch.eye(3).to_sparse()}),
    "a nested tensor": saved({"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
    "a quantised tensor": saved({"x": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)}),
    "a complex tensor": saved({"x": torch.ones(2, dtype=torch.complex64)}),
    "a module": saved(torch.nn.Linear(2, 2)),
    "nothing to call": zipped(b"\x80\2)R."),
    "nothing": zipped(b""),
    "many instructions": zipped(b"\x80\2" + b"N0" * 3_000_000 + b"N."),
    "an old file with a lie": saved({"x": torch.ones(4)}, old=True).replace(
        struct.pack("<q", 4) + struct.pack("<f", 1.0), struct.pack("<q", 2**60) + struct.pack("<f", 1.0)
    ),
    "900,000 tensors": header(
        b"{%s}" % b",".join(
            b'"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (n, n, n + 1) for n in range(900_000)
        )
    ),
    "12 million numbers in the metadata": header(b'{"__metadata__":{"x":[%s0]}}' % (b"1.5," * 12_000_000)),
    "a name of 4 MB": header(b'{"%s":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}' % (b"k" * 4_000_000)),
    "a wide header": header(('{"__metadata__":{"x":"' + "é" + "a" * 60_000_000 + '"}}').encode()),
}  # fmt: skip

EMPTY = ("a place of memory far away", "deep names")
"""An empty dictionary is all that is there."""

CHILD = """
import resource, sys, time
from lib_loramerge.errors import LoraMergeError
from lib_loramerge.files import open_file

resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    with open_file(sys.argv[1]) as file:
        for key in file.tensors:
            file.data_bytes(key)
except LoraMergeError as error:
    print(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown // 1024, time.process_time() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
@pytest.mark.parametrize("what", FILES)
def test_a_hostile_file_is_one_sentence_in_little_memory(tmp_path, what):
    suffix = ".safetensors" if FILES[what][8:9] == b"{" else ".pt"
    path = tmp_path / f"hostile{suffix}"
    path.write_bytes(FILES[what])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *told, measured = done.stdout.splitlines()
    megabytes, seconds = map(float, measured.split())
    assert len(told) == (what not in EMPTY)
    assert all(text.startswith(("hostile", str(path))) and len(text) < 600 for text in told)
    assert megabytes < LIMIT_MB
    assert seconds < 60  # It rules out a hang, on a slow machine, too.


class _Touch:
    def __reduce__(self):
        return (open, ("touched", "w"))


@pytest.mark.parametrize("protocol", range(6))
def test_what_a_pickle_calls_is_not_even_looked_up(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps({"x": _Touch()}, protocol), zipped(pickle.dumps({"x": _Touch()}, protocol))):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(LoraMergeError):
            read_header(tmp_path / "x.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_views_are_read_as_torch_reads_them(tmp_path, old):
    whole = torch.randn(6, 5)
    views = {
        "whole": whole, "turned": whole.T, "part": whole[1:4, ::2], "one": whole[2, 3], "empty": whole[:0],
        "half": whole.half().T, "bool": whole > 0, "long": torch.arange(7)[::3],
        "parameter": torch.nn.Parameter(whole[:, 1]),
    }  # fmt: skip
    torch.save({"state_dict": views, "epoch": 3}, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    with open_file(tmp_path / "x.pt") as file:
        assert set(file.tensors) == set(views) or {f"state_dict.{key}" for key in views} < set(file.tensors)
        for key in file.tensors:
            if (view := views.get(key.removeprefix("state_dict."))) is not None:
                assert torch.equal(file.read(key), view.detach().float())


def test_a_header_may_have_many_tags(tmp_path):
    tags = json.dumps({"folder": {f"tag [{n}], {{x}}": n for n in range(300_000)}})
    entries = json.dumps({"__metadata__": {"ss_tag_frequency": tags}}).encode()
    (tmp_path / "a.safetensors").write_bytes(header(entries))
    assert read_header(tmp_path / "a.safetensors").metadata["ss_tag_frequency"] == tags
