"""Writing: the right bytes, whole or not at all, and never over another file unasked."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from lib_loramerge.errors import Cancelled, OutputError
from lib_loramerge.files import (
    LoraFolder,
    check_space,
    check_target,
    free_space,
    model_hash,
    open_file,
    place,
    write_again,
    write_file,
)
from tests.helpers.fixtures import SD1_LAYERS, lora_tensors

TENSORS = lora_tensors(SD1_LAYERS, alpha=2.0, dtype=torch.float16)
METADATA = {"ss_output_name": "x", "modelspec.title": '日本 "quoted"\n'}
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such names, limits or signals")


@pytest.fixture(params=["unnamed", "named", "unnamed without links", "named without links"])
def way(request, monkeypatch):
    """Each way that a system lets a file appear whole; the last is exFAT's."""
    if "unnamed" not in request.param:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if "without links" in request.param:

        def no_links(*_args, **_options):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", no_links)
    return request.param


def kohya_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """Both hashes as kohya's trainer defines them, on a file made by the safetensors library."""
    content = save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return (
        hashlib.sha256(content[start:]).hexdigest(),
        hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    )


def test_what_was_written_is_what_the_safetensors_library_reads(tmp_path, way):
    path = tmp_path / "a.safetensors"
    written = write_file(path, TENSORS, METADATA)
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    assert all(
        torch.equal(loaded[key], TENSORS[key]) and loaded[key].dtype == torch.float16 for key in TENSORS
    )
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        **METADATA,
        "sshs_model_hash": written.model_hash,
        "sshs_legacy_hash": written.legacy_hash,
    }
    assert written.path == path
    assert written.size == path.stat().st_size
    assert os.listdir(tmp_path) == ["a.safetensors"]


DTYPES = st.sampled_from(
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8]
)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12),
        st.tuples(DTYPES, st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.dictionaries(st.sampled_from(["ss_a", "ss_b\n", "x", "日本"]), st.text(max_size=9)),
)
def test_data_are_in_the_order_of_the_safetensors_library_and_both_hashes_are_kohyas(
    tmp_path_factory, kinds, metadata
):
    tensors = {key: torch.ones(shape, dtype=dtype) * 3 for key, (dtype, shape) in kinds.items()}
    path = tmp_path_factory.mktemp("order") / "a.safetensors"
    written = write_file(path, tensors, metadata)
    assert (written.model_hash, written.legacy_hash) == kohya_hashes(tensors, metadata)
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    assert start % 8 == 0
    assert hashlib.sha256(content[start:]).hexdigest() == written.model_hash == model_hash(path)


@pytest.mark.parametrize("note", ["", "x" * 70_000, "y" * 1_050_000, "z" * 1_200_000])
def test_the_legacy_hash_is_kohyas_wherever_its_window_falls(tmp_path, note):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{n}": torch.randn(70_000, generator=generator).to(torch.float16) for n in range(9)}
    metadata = {"ss_note": note, "other": "o" * 999}
    written = write_file(tmp_path / "a.safetensors", tensors, metadata)
    assert (written.model_hash, written.legacy_hash) == kohya_hashes(tensors, metadata)


def test_the_bytes_do_not_depend_on_the_order_of_tensors_and_metadata(tmp_path):
    for name, order in (("a", 1), ("b", -1)):
        write_file(
            tmp_path / f"{name}.safetensors",
            dict(list(TENSORS.items())[::order]),
            dict(list(METADATA.items())[::order]),
        )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tensors_of_any_layout_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.T,
        "slice": base[:, 1:3],
        "same": base,
        "also": base,
        "grad": base.clone().requires_grad_(),
    }
    write_file(tmp_path / "a.safetensors", tensors, {})
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[key], tensors[key].detach()) for key in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_no_nan_or_infinity_leaves(tmp_path, way, dtype, bad):
    tensor = torch.full((30,), torch.finfo(dtype).max, dtype=dtype)
    tensor[:15] *= -1
    write_file(tmp_path / "largest.safetensors", {"x": tensor}, {})
    tensor[11] = bad
    with pytest.raises(OutputError, match="'lora_x'"):
        write_file(tmp_path / "a.safetensors", {"a": torch.ones(9), "lora_x": tensor}, {})
    assert os.listdir(tmp_path) == ["largest.safetensors"]


def test_an_existing_file_is_kept_unless_overwriting_is_asked_for(tmp_path, way):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        write_file(path, TENSORS, METADATA)
    assert path.read_text() == "old"
    write_file(path, TENSORS, METADATA, overwrite=True)
    assert set(load_file(path)) == set(TENSORS)
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_merges_that_race_for_one_name_one_wins_and_its_file_is_whole(tmp_path, way, overwrite):
    path = tmp_path / "a.safetensors"
    gate = threading.Barrier(6)
    results: list[object] = []

    def work(number: int) -> None:
        tensors = {"x": torch.full((1000,), float(number))}
        try:
            results.append(write_file(path, tensors, {}, overwrite=overwrite, before_rename=gate.wait))
        except OutputError as error:
            results.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lost = [result for result in results if isinstance(result, OutputError)]
    assert len(results) == 6
    assert len(lost) == (0 if overwrite else 5)
    assert all("exists already" in str(error) for error in lost)
    assert len(set(load_file(path)["x"].tolist())) == 1
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopping_at_the_last_moment_leaves_everything_as_it_was(tmp_path, way, overwrite):
    path = tmp_path / "a.safetensors"
    if overwrite:
        path.write_text("old")

    def stop() -> None:
        raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        write_file(path, TENSORS, METADATA, overwrite=overwrite, before_rename=stop)
    assert os.listdir(tmp_path) == (["a.safetensors"] if overwrite else [])
    assert not overwrite or path.read_text() == "old"
    assert not [thread for thread in threading.enumerate() if "loramerge" in thread.name]


def test_stopping_between_two_tensors_leaves_everything_as_it_was(tmp_path, way):
    asked = []

    def stop() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        write_file(tmp_path / "a.safetensors", TENSORS, METADATA, stop=stop)
    assert len(asked) == 3
    assert os.listdir(tmp_path) == []


@POSIX
def test_stopping_does_not_wait_for_a_slow_disk(tmp_path, way, monkeypatch):
    flushing, disk = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        flushing.set()
        disk.wait(60)

    def stop() -> None:
        if flushing.is_set():
            raise Cancelled("Stopped.")

    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(Cancelled):
        write_file(tmp_path / "a.safetensors", TENSORS, METADATA, stop=stop)
    assert not disk.is_set()
    assert os.listdir(tmp_path) == []
    disk.set()


@POSIX
def test_a_disk_that_fails_at_the_end_is_reported_by_every_way_of_waiting(tmp_path, way, monkeypatch):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for stop in (None, lambda: None):
        with pytest.raises(OutputError, match="disk is full"):
            write_file(tmp_path / "a.safetensors", TENSORS, METADATA, stop=stop)
        assert os.listdir(tmp_path) == []


def test_what_is_written_again_under_another_name_is_what_would_have_been_written_there(tmp_path, way):
    """Scalars, half precision and whole layers; the bytes are those of a first writing."""
    tensors = {**TENSORS, "x.diff": torch.randn(3, 5), "x.alpha": torch.tensor(2.0, dtype=torch.bfloat16)}
    other = {**METADATA, "ss_output_name": "a much longer name than before"}
    first, direct = tmp_path / "first.safetensors", tmp_path / "direct.safetensors"
    write_file(first, tensors, METADATA)
    expected = write_file(direct, tensors, other)
    with open_file(first) as source:
        written = write_again(tmp_path / "again.safetensors", source, other)
        assert written.path.read_bytes() == direct.read_bytes()
        assert (written.size, written.model_hash, written.legacy_hash) == (
            expected.size, expected.model_hash, expected.legacy_hash,
        )  # fmt: skip
        with pytest.raises(OutputError, match="exists already"):
            write_again(direct, source, other)


def test_a_tensor_that_cannot_be_had_leaves_nothing(tmp_path, way):
    class Failing(dict):
        def __getitem__(self, key):
            raise RuntimeError("our bug")

    with pytest.raises(RuntimeError, match="our bug"):
        write_file(tmp_path / "a.safetensors", Failing(TENSORS), METADATA)
    assert os.listdir(tmp_path) == []


class Announced(dict):
    """Tensors of which one, when asked for, tells a pipe and never comes."""

    def __init__(self, tensors, pipe: int, key: str) -> None:
        super().__init__(tensors)
        self.pipe, self.key = pipe, key

    def __getitem__(self, key):
        if key == self.key:
            self.wait()
        return super().__getitem__(key)

    def wait(self) -> None:
        os.write(self.pipe, b"!")
        time.sleep(60)


@POSIX
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("middle", [True, False])
def test_a_kill_leaves_the_old_file_and_nothing_that_is_listed(tmp_path, way, middle):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    read, write = os.pipe()
    tensors = Announced({f"k{n}": torch.ones(700_000) for n in range(9)}, write, "k5" if middle else "")
    child = os.fork()  # Without starting another Python, whose import of torch takes seconds.
    if child == 0:
        try:
            write_file(path, tensors, {}, overwrite=True, before_rename=tensors.wait)
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"!"
    os.close(read)
    during = os.listdir(tmp_path)
    assert len(during) == (1 if way.startswith("unnamed") and hasattr(os, "O_TMPFILE") else 2)
    place._remove_stale(path.parent)  # A file in use is no stray, whoever writes the same name meanwhile.
    assert os.listdir(tmp_path) == during
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_text() == "old"
    assert LoraFolder([tmp_path]).names() == ["a"]
    write_file(path, TENSORS, METADATA, overwrite=True)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert set(load_file(path)) == set(TENSORS)


@POSIX
def test_a_stray_is_removed_while_locked_so_that_a_writer_which_only_made_it_notices(tmp_path, monkeypatch):
    import fcntl

    path = tmp_path / "a.safetensors"
    made = place.temporary_beside(path)
    removed = []
    with made.open("wb") as writer:  # Made, and just about to be locked.

        def watched(target):
            with pytest.raises(BlockingIOError):
                fcntl.flock(writer.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed.append(target)
            unlink(target)

        unlink = os.unlink
        monkeypatch.setattr(os, "unlink", watched)
        place._remove_stale(path.parent)
    assert removed == [str(made)]
    assert os.listdir(tmp_path) == []


@POSIX
def test_strays_of_any_target_in_the_folder_are_swept_unless_somebody_writes_them(tmp_path):
    import fcntl

    (tmp_path / "sub").mkdir()
    strays = [place.temporary_beside(tmp_path / name) for name in ("b.safetensors", "c.safetensors")]
    kept = [
        place.temporary_beside(tmp_path / "sub" / "a.safetensors"),
        tmp_path / ".another-tool.part",
        tmp_path / ".loramerge-notes",
    ]
    for path in (*strays, *kept):
        path.write_text("of another merge")
    with place.temporary_beside(tmp_path / "d.safetensors").open("wb") as writer:
        fcntl.flock(writer.fileno(), fcntl.LOCK_EX)
        write_file(tmp_path / "a.safetensors", TENSORS, METADATA)
        assert os.path.exists(writer.name)
    assert [path.exists() for path in (*strays, *kept)] == [False, False, True, True, True]


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_overwriting_keeps_mode_owner_and_group(tmp_path, way, mode, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    path.chmod(mode)
    old = path.stat()
    write_file(path, TENSORS, METADATA, overwrite=True)
    new = path.stat()
    assert (new.st_mode, new.st_uid, new.st_gid) == (old.st_mode, old.st_uid, old.st_gid)
    assert new.st_ino != old.st_ino

    def denied(*_):
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "fchown", denied)
    write_file(path, TENSORS, METADATA, overwrite=True)
    assert path.stat().st_mode == old.st_mode


@POSIX
def test_a_file_that_grows_too_large_for_its_disk_is_reported_and_nothing_is_left(tmp_path, way):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot hold files of that size"):
            write_file(tmp_path / "a.safetensors", {"x": torch.ones(900_000), "y": torch.ones(900_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_flushed_is_reported_and_nothing_is_left(tmp_path, way, monkeypatch, number):
    def full(_number):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_file(tmp_path / "a.safetensors", TENSORS, METADATA)
    assert os.listdir(tmp_path) == []


def test_a_file_larger_than_the_free_space_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    assert free_space(tmp_path) > 0
    check_space(tmp_path, 1)
    monkeypatch.setattr(place, "free_space", lambda _folder: 1_500)
    with pytest.raises(OutputError, match=r"too full: .* are needed, 1,500 bytes are free"):
        write_file(tmp_path / "a.safetensors", TENSORS, METADATA)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_reported_before_the_work(tmp_path, monkeypatch, number):
    original = os.open

    def protected(
        path, flags, *arguments, **options
    ):  # Root may write anywhere, so chmod would prove nothing.
        if flags & (os.O_CREAT | os.O_RDWR):
            raise OSError(number, os.strerror(number))
        return original(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", protected)
    with pytest.raises(OutputError, match="folder is protected"):
        check_target(tmp_path / "a.safetensors", False)
    with pytest.raises(OutputError, match="folder is protected"):
        write_file(tmp_path / "a.safetensors", TENSORS, METADATA)


def test_impossible_places_are_reported(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for path, told in [
        (tmp_path / "file" / "a.safetensors", "is a file|cannot be written"),
        (tmp_path / "missing" / "a.safetensors", "make the folder first"),
        (tmp_path / "folder.safetensors", "is a folder"),
        (tmp_path / "a.pt", r"must end in \.safetensors"),
        (tmp_path / f"{'n' * 300}.safetensors", "too long"),
        (tmp_path / "a\0.safetensors", "is not a file name"),
    ]:
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=told):
                check_target(path, overwrite)


NAMES = ["a b", "it's", "日本語のローラ", "ñ é", "a,b", "x" * 238, "日" * 81, "%s {0}", "-rf", ".hidden"]
if os.name != "nt":
    NAMES += ['say "hi"', "line\nbreak", "tab\t", "back\\slash", "a:b<c>", "*", "\udcff"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_that_the_disk_takes_can_be_written_read_and_found(tmp_path, monkeypatch, name):
    path = tmp_path / f"{name}.safetensors"
    metadata = {"ss_output_name": name, "modelspec.title": name}
    try:
        path.touch()
    except OSError:  # macOS refuses names that are not UTF-8.
        pytest.skip("this disk does not take the name")
    path.unlink()
    write_file(path, TENSORS, metadata)
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)  # So that a temporary name is needed too.
    write_file(path, TENSORS, metadata, overwrite=True)
    with open_file(path) as file:
        assert file.metadata["ss_output_name"] == name.replace("\udcff", "?")
    assert LoraFolder([tmp_path]).find(name) == path
    assert os.listdir(tmp_path) == [path.name]


@POSIX
def test_a_written_file_has_the_usual_permissions(tmp_path, way):
    (tmp_path / "usual").touch()
    write_file(tmp_path / "a.safetensors", TENSORS, METADATA)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_overwriting_a_link_replaces_the_link_and_not_what_it_points_to(tmp_path, way):
    (tmp_path / "elsewhere").write_text("precious")
    try:
        (tmp_path / "a.safetensors").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no links on this system")
    with pytest.raises(OutputError, match="exists already"):
        write_file(tmp_path / "a.safetensors", TENSORS, METADATA)
    write_file(tmp_path / "a.safetensors", TENSORS, METADATA, overwrite=True)
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_the_hash_of_a_pickle_is_of_the_whole_file_as_the_webui_takes_it(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    assert model_hash(tmp_path / "a.pt") == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()


@POSIX
def test_a_folder_that_a_killed_process_left_is_swept_up_and_a_living_one_is_not(tmp_path):
    script = (
        "import sys, time, pathlib; from lib_loramerge.files.place import folder_output\n"
        "with folder_output(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'unet').mkdir(); (folder / 'unet' / 'x.safetensors').write_bytes(b'half')\n"
        "    print('ready', flush=True); time.sleep(600)\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "new")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"ready"
        place.check_target(tmp_path / "other.safetensors", False)
        assert len(list(tmp_path.iterdir())) == 1
        process.kill()
    assert len(list(tmp_path.iterdir())) == 1
    place.check_target(tmp_path / "other.safetensors", False)
    assert list(tmp_path.iterdir()) == []
