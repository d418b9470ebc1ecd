"""Putting a finished file in its place: whole, only if asked over another, or not at all.

Where the system allows it (Linux), the file has no name until it is whole, so that even a
killed process leaves nothing behind. Elsewhere it has a temporary name that no host lists.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lib_loramerge.errors import OutputError
from lib_loramerge.files.recognise import size_text

TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".loramerge-", ".part"
BUFFER = 1 << 20
IN_PROCESS = threading.Lock()


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse, before any work is done, a place where a file could not be written.

    Raises:
        OutputError: If the folder is missing or may not be written to, the name is taken,
            too long or impossible.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise OutputError("{file} must end in .safetensors, as every WebUI expects.", repr(path.name))
    try:
        if path.is_dir():
            raise OutputError("{path} is a folder; give the name of a file in it.", path)
        if os.path.lexists(path) and not overwrite:
            raise OutputError(
                "{path} exists already; choose another name, or allow it to be overwritten.", path
            )
        os.stat(path.parent)
        if not path.parent.is_dir():
            raise OutputError("{folder} is a file, so nothing can be written into it.", path.parent)
        with suppress(FileNotFoundError):
            os.lstat(path)  # A name that is too long fails here.
        _remove_stale(path.parent)
        probe = temporary_beside(path)
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with suppress(FileNotFoundError):  # Another writer may have tidied it up already.
            os.unlink(probe)
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error


def refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse to replace a file that is being merged.

    Raises:
        OutputError: With its name.
    """
    for source in inputs:
        with suppress(OSError):
            if path == source or os.path.samefile(path, source):
                raise OutputError(
                    "{file} is one of the LoRAs being merged, so it cannot be overwritten. Choose another "
                    "name.",
                    path.name,
                )


def make_folder(folder: Path) -> None:
    """Make a folder, within one that exists, unless it exists too.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            "The folder {folder} cannot be made: {reason}.", folder, error.strerror or error
        ) from error


def check_space(folder: Path, needed: int) -> None:
    """Refuse if a folder's disk has fewer than ``needed`` free bytes.

    Raises:
        OutputError: With both numbers.
    """
    free = free_space(folder)
    if free is not None and free < needed:
        raise OutputError(
            "The disk of {folder} is too full: {needed} are needed, {free} are free.",
            folder,
            size_text(needed),
            size_text(free),
        )


def free_space(folder: Path) -> int | None:
    """Free bytes on a folder's disk; None if the system does not report them."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def unwritable(path: Path, error: OSError | ValueError) -> OutputError:
    """Why a file cannot be written, for people."""
    number = getattr(error, "errno", None)
    if isinstance(error, FileExistsError):
        return OutputError("{path} exists already; choose another name, or allow it to be overwritten.", path)
    if number == errno.EFBIG:
        return OutputError(
            "{file} was not written: this disk cannot hold files of that size (FAT32 ends at 4 GiB). Choose "
            "another disk.",
            path.name,
        )
    if number in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
        return OutputError("The disk is full, so {file} was not written; nothing is left of it.", path.name)
    if number == errno.ENAMETOOLONG:
        return OutputError(
            "The name {file}... is too long for this disk; choose a shorter one.", repr(path.name[:60])
        )
    if number == errno.EROFS or isinstance(error, PermissionError):
        return OutputError(
            "{path} may not be written: the folder is protected, or another program (such as a WebUI that "
            "has the file loaded) holds it. Choose another folder or name.",
            path,
        )
    if isinstance(error, FileNotFoundError):
        return OutputError("{parent} does not exist; make the folder first.", path.parent)
    if isinstance(error, OSError):
        return OutputError("{path} cannot be written: {what}.", path, error.strerror or error)
    return OutputError("{path} is not a file name: {error}.", repr(str(path)), error)


@contextmanager
def output(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """Yield a file to write; it gets its name only if the block ends well.

    Raises:
        OutputError: If anything goes wrong with the file; nothing is left then.
    """
    try:
        _remove_stale(path.parent)
        with _unnamed(path.parent) as unnamed:
            if unnamed is not None:
                yield unnamed
                if _name_unnamed(unnamed, path, overwrite):
                    _flush_folder(path.parent)
                    return
                with _named(path, overwrite) as named:  # /proc is missing: copy it, the rare way.
                    unnamed.seek(0)
                    shutil.copyfileobj(unnamed, named, BUFFER)
                    named.flush()
                    os.fsync(named.fileno())
                return
        with _named(path, overwrite) as named:
            yield named
    except OSError as error:
        raise unwritable(path, error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole, in the place of another of its name, and wait until it is durable.

    Raises:
        OutputError: If it cannot be written; what was there is left as it was.
    """
    with output(path, overwrite=True) as file:
        file.write(content)
        file.flush()
        to_disk(file.fileno())


def copy_whole(source: Path, target: Path, stop: Callable[[], None]) -> None:
    """Copy a file under a name that is not in use, and wait until the copy is durable.

    Args:
        stop: Called often meanwhile; what it raises ends the copying.

    Raises:
        OSError: Either of them.
    """
    with open(source, "rb") as old, open(target, "xb", buffering=0) as new:
        while data := old.read(BUFFER):
            stop()
            new.write(data)
        to_disk(new.fileno(), stop)


@contextmanager
def folder_output(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside a new one's place, which gets its name if the block ends well.

    Raises:
        OutputError: If anything goes wrong with it; nothing is left then.
    """
    temporary, number = temporary_beside(path), -1
    try:
        _remove_stale(path.parent)
        temporary.mkdir()
        if os.name != "nt":
            number = os.open(temporary, os.O_RDONLY)
            _lock(number)  # Says that its process lives.
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if number >= 0:
            os.close(number)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _unnamed(folder: Path) -> Iterator[BinaryIO | None]:
    """A file that vanishes with the process, where the system has such files (Linux)."""
    number = -1
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        with suppress(OSError):  # Not every file system has them.
            number = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    if number < 0:
        yield None
        return
    with os.fdopen(number, "w+b", buffering=BUFFER) as file:
        _lock(number)  # For the moment in which it has a temporary name.
        yield file


def _name_unnamed(file: BinaryIO, path: Path, overwrite: bool) -> bool:
    """Give a finished file its name; False if this system cannot.

    A link to an existing name fails, so of two merges that race for a name one loses. To
    replace, the link gets a temporary name first, as no link replaces.
    """
    target = temporary_beside(path) if overwrite and os.path.lexists(path) else path
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # With a folder given, Python follows the link in /proc to the file itself.
        os.link(f"/proc/self/fd/{file.fileno()}", target, src_dir_fd=folder)
        if target != path:
            _keep_owner(file.fileno(), path)
    except FileExistsError:
        if not overwrite:
            raise
        return _name_unnamed(file, path, overwrite)  # It appeared just now.
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    finally:
        os.close(folder)
    if target != path:
        try:
            os.replace(target, path)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return True


@contextmanager
def _named(path: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """A file of a temporary name beside its place, renamed if the block ends well."""
    temporary, number = _create_locked(path)
    try:
        with os.fdopen(number, "w+b", buffering=BUFFER) as file:
            yield file
            if overwrite:
                _keep_owner(file.fileno(), path)
            if os.name != "nt":  # Renamed while locked, so that nobody takes it for a stale one.
                _rename(temporary, path, overwrite)
        if os.name == "nt":  # Which renames no open file.
            _rename(temporary, path, overwrite)
        _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a finished file its name, replacing another only if that was asked for."""
    if overwrite:
        _patiently(lambda: os.replace(temporary, path))
    elif os.name == "nt":
        _patiently(lambda: os.rename(temporary, path))  # Fails there if the name is taken.
    else:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # A file system without links, such as exFAT.
            with IN_PROCESS:
                if os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
                os.replace(temporary, path)


def _keep_owner(number: int, path: Path) -> None:
    """Give an open file the mode, owner and group of the one that it replaces, where that is allowed."""
    if os.name == "nt":
        return
    try:
        old = os.lstat(path)
    except OSError:
        return
    if not stat.S_ISREG(old.st_mode):
        return
    for owner in (old.st_uid, -1):  # Only root gives files away; the group may be one of ours.
        with suppress(OSError):
            os.fchown(number, owner, old.st_gid)
            break
    with suppress(OSError):
        os.fchmod(number, stat.S_IMODE(old.st_mode) & 0o777)


def _patiently(rename: Callable[[], None]) -> None:
    """Try again for a second: on Windows a virus scanner may hold a new file for a moment."""
    for _ in range(10 if os.name == "nt" else 0):
        try:
            rename()
            return
        except FileExistsError:
            raise
        except PermissionError:
            time.sleep(0.1)
    rename()


def _temporary_stem(path: Path) -> str:
    """Start of the temporary names of a target: short, whatever the target is called."""
    return f"{TEMPORARY_PREFIX}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def temporary_beside(path: Path) -> Path:
    """A new name beside a file that no host lists as a LoRA, and short, whatever the file is called."""
    return path.with_name(f"{_temporary_stem(path)}{os.urandom(6).hex()}{TEMPORARY_SUFFIX}")


def _create_locked(path: Path) -> tuple[Path, int]:
    """Create a temporary file and hold a lock on it, which says that its process lives."""
    while True:
        temporary = temporary_beside(path)
        number = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        if os.name == "nt":
            return temporary, number  # An open file cannot be removed there.
        _lock(number)
        with suppress(OSError):  # Removed as stale before it was locked: take another.
            if os.stat(temporary).st_ino == os.fstat(number).st_ino:
                return temporary, number
        os.close(number)


def _lock(number: int) -> None:
    """Hold a lock on an open file, where the file system has locks."""
    import fcntl

    with suppress(OSError):
        fcntl.flock(number, fcntl.LOCK_EX)


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left in a folder, whatever they were to write."""
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            if entry.name.startswith(TEMPORARY_PREFIX) and entry.name.endswith(TEMPORARY_SUFFIX):
                with suppress(OSError):
                    _remove_abandoned(entry.path)


def _remove_abandoned(temporary: str) -> None:
    """Remove a temporary file or folder if no living process holds the lock on it.

    It is removed while locked here: one that was created but not yet locked by its writer
    is then gone when that writer gets the lock, and it takes another.
    """
    if os.name == "nt":
        os.unlink(temporary)  # Fails there while the file is in use.
        return
    import fcntl

    folder = os.path.isdir(temporary)
    number = os.open(temporary, os.O_RDONLY if folder else os.O_RDWR)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # A file system without locks: judge by age.
            if time.time() - os.fstat(number).st_mtime < 86_400:
                return
        shutil.rmtree(temporary) if folder else os.unlink(temporary)
    finally:
        os.close(number)


def to_disk(number: int, stop: Callable[[], None] | None = None) -> None:
    """Wait until the bytes of an open file are durable.

    Args:
        number: The file's descriptor.
        stop: Called often meanwhile, since a slow disk takes its time; what it raises ends the waiting.
    """
    if stop is None or os.name == "nt":  # Which removes no file that another thread still flushes.
        os.fsync(number)
        return
    copy, done = os.dup(number), threading.Event()
    failed: list[OSError] = []

    def flush() -> None:
        try:
            os.fsync(copy)
        except OSError as error:
            failed.append(error)
        finally:
            os.close(copy)
            done.set()

    threading.Thread(target=flush, name="loramerge-flush", daemon=True).start()
    while not done.wait(0.1):
        stop()
    if failed:
        raise failed[0]


def _flush_folder(folder: Path) -> None:
    """Make a new name durable; Windows and some network disks have no way to."""
    if os.name == "nt":
        return
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
