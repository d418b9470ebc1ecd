"""LoRAs, or the difference of two checkpoints, baked into a checkpoint."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..delta import raise_if
from ..errors import OutputError, Sentence
from ..files import LoraFile, check_target
from ..files.hashes import CHUNK as HASH_CHUNK
from ..files.hashes import LEGACY_END, LEGACY_START, hash_from
from ..files.place import copy_whole, folder_output
from ..merge import MergePlan, Progress
from .beside import INDEX, check_folder, copied_weights, copy_settings, folder_files, folder_of, index_of
from .changes import Change
from .numbers import FLOAT8_LARGEST, FORMATS, encode
from .outcome import BakeReport, baked_metadata, broken_copies, kept_metadata, remedy, total, worst
from .reading import EMA, QUANTISATION, SCALES, Checkpoint
from .rewriting import Rewritten, check_room, rewrite, written_bytes
from .summing import Entry, Rounding, Sums, is_copy, largest

ROUNDINGS = ("auto", "nearest", "stochastic")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class BakeSettings:
    """How to bake.

    Attributes:
        rounding: Of ``ROUNDINGS``; auto rounds float8 by chance and all else to the nearest number.
        dtype: ``"same"`` or what the matrices of denoiser and text encoders become.
        drop_ema: Leave the averaged copy of the weights out that no WebUI uses.
        hashed: Hash base and result for A1111's record of merges.
        encoders: Files of text encoders that belong to the checkpoint.
        base_sha256: Of the checkpoint's file, where it is known already; then it is not read for that.
    """

    rounding: str = "auto"
    dtype: str = "same"
    drop_ema: bool = False
    hashed: bool = True
    encoders: tuple[Path, ...] = ()
    base_sha256: str = ""


@dataclass
class Bake:
    """A bake that was checked from headers alone and is ready to run; its files are open.

    Attributes:
        changes: Name of a tensor to what is added to it.
        plan: Of the LoRAs; None for a difference of checkpoints.
        inputs, parents: Sentences on what goes in, and their names.
        adapter_notes: Filled while the LoRAs are read.
        others: Further files that are read.
        unchanged: Raises where another program wrote to any of the inputs meanwhile.
    """

    checkpoint: Checkpoint
    settings: BakeSettings
    seed: int
    changes: Mapping[str, Change]
    layers: int
    plan: MergePlan | None
    inputs: Sequence[str]
    parents: Sequence[str]
    warnings: list[str]
    skipped: list[str]
    adapter_notes: set[str] = field(default_factory=set)
    others: Sequence[Path] = ()
    unchanged: Callable[[], None] = lambda: None

    def files(self) -> list[Path]:
        """Every file that is read."""
        loras = [] if self.plan is None else [entry.path for entry in self.plan.sources]
        return [*(file.path for file in self.checkpoint.files), *loras, *self.others]

    @property
    def single(self) -> bool:
        """One file is written, and those of touched text encoders beside it; otherwise a folder."""
        return not self.checkpoint.path.is_dir() and len(self.checkpoint.files) == 1 + len(
            self.settings.encoders
        )

    @property
    def dtypes(self) -> dict[str, int]:
        """dtype to number of changed tensors, as they will be written."""
        counts = Counter(self._dtype(key) for key in self.changes)
        return dict(counts.most_common())

    def size(self) -> int:
        """Bytes of the files that are written, headers aside."""
        return sum(written_bytes(file, entries) for file, entries in self._files_to_write())

    def report(self, output: Path | None) -> BakeReport:
        """What can be told before any work."""
        return self._report([] if output is None else [output], self.size(), {}, None, 0.0, dry=True)

    def run(
        self,
        output: Path,
        *,
        overwrite: bool = False,
        progress: Callable[[Progress], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> BakeReport:
        """Write it.

        Raises:
            LoraMergeError: Anything a user can cause; nothing was written then.
        """
        start = time.perf_counter()
        self.check(output, overwrite)
        if not self.single:
            return self._run_folder(output, start, progress, cancel)
        jobs = self._jobs(output)
        check_room(output, sum(written_bytes(file, entries) for file, _, entries in jobs))
        sums: dict[str, Sums] = {}
        done: list[Rewritten] = []
        complete = False
        new = [target for _, target, _ in jobs if not os.path.lexists(target)]

        def stopped() -> bool:
            return not complete and cancel is not None and cancel()

        def write(index: int) -> None:
            nonlocal complete
            if index == len(jobs):
                self.unchanged()
                complete = True
                return
            file, target, entries = jobs[index]
            # A file takes its name only when those behind it are on the disk as well.
            written = self._write(
                file, target, entries, target.stem, overwrite, progress, stopped, lambda: write(index + 1)
            )
            done.append(written)
            sums.update(written.sums)

        try:
            write(0)
        except BaseException:
            for target in new:  # They belong together: all of them or none.
                with suppress(OSError):
                    target.unlink(missing_ok=True)
            raise
        self.warnings += copy_settings(self.checkpoint.path, output, overwrite)
        size = sum(os.stat(target).st_size for _, target, _ in jobs)
        sha256 = done[0].sha256 if len(jobs) == 1 else None
        return self._report(
            [target for _, target, _ in jobs], size, sums, sha256, time.perf_counter() - start
        )

    def check(self, output: Path, overwrite: bool = False) -> None:
        """Refuse a place where it could not be written.

        Raises:
            OutputError: A name is taken, impossible, that of an input, or that of two results.
        """
        if not self.single:
            check_folder(self.checkpoint, folder_of(output))
            self._folder_files()
            return
        seen: dict[str, LoraFile] = {}
        for file, target, _ in self._jobs(output):
            check_target(target, overwrite)
            self.refuse_inputs(target)
            other = seen.setdefault(target.name.lower(), file)
            if other is not file:
                raise OutputError(
                    "{first} and {second} would both be written to {file}. Rename one.",
                    other.path,
                    file.path,
                    target.name,
                )

    def _jobs(self, output: Path) -> list[tuple[LoraFile, Path, list[Entry]]]:
        """What is read, where it is written, and its tensors."""
        return [
            (file, _target(output, file, index), entries)
            for index, (file, entries) in enumerate(self._files_to_write())
        ]

    def _run_folder(
        self,
        output: Path,
        start: float,
        progress: Callable[[Progress], None] | None,
        cancel: Callable[[], bool] | None,
    ) -> BakeReport:
        """A new folder: changed shards written, all else copied; it appears when complete."""
        output, found = folder_of(output), self._folder_files()
        check_room(output, sum(path.stat().st_size for path in found.values()))
        wanted = {file.path: (file, entries) for file, entries in self._files_to_write()}
        sums: dict[str, Sums] = {}
        with folder_output(output) as temporary:
            for name, path in found.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.name.endswith(INDEX) and (text := index_of(path, wanted.values())) is not None:
                    target.write_bytes(text)
                    continue
                if path not in wanted:
                    copy_whole(path, target, lambda: raise_if(cancel))  # A link would share its fate.
                    continue
                file, entries = wanted[path]
                written = self._write(
                    file, target, entries, output.name, False, progress, cancel, self.unchanged
                )
                sums |= written.sums
        return self._report([output], self.size(), sums, None, time.perf_counter() - start)

    def _folder_files(self) -> dict[Path, Path]:
        return folder_files(self.checkpoint, self.settings.encoders)

    def _write(
        self,
        file: LoraFile,
        target: Path,
        entries: list[Entry],
        name: str,
        overwrite: bool,
        progress: Callable[[Progress], None] | None,
        cancel: Callable[[], bool] | None,
        before_rename: Callable[[], None],
    ) -> Rewritten:
        def stop() -> None:
            raise_if(cancel)

        hashed = self.settings.hashed and self.single
        sha256 = None
        if hashed:
            known = self.settings.base_sha256 if file is self.checkpoint.files[0] else ""
            sha256 = known or hash_of(file, progress, stop)
        entries = self._rescaled(file, entries)
        kept, notes = kept_metadata(file.header.metadata)
        if self.settings.dtype != "same":
            kept.pop(QUANTISATION, None)
        self.warnings += [note for note in notes if note not in self.warnings]
        metadata = baked_metadata(
            kept,
            name=name,
            base=file.path,
            base_sha256=sha256,
            legacy_hash=legacy_hash(file),
            recipe=None if self.plan is None else self.plan.recipe,
            parents=self.parents,
            how={
                "rounding": self.settings.rounding,
                "dtype": self.settings.dtype,
                "inputs": list(self.inputs),
            },
        )
        size = written_bytes(file, entries)
        begin = time.perf_counter()

        def show(done: int) -> None:
            if progress is not None:
                spent = time.perf_counter() - begin
                eta = spent / done * (size - done) if done > size / 50 else None
                progress(Progress("write", min(done, size), size, eta=eta))

        return rewrite(
            file,
            target,
            entries,
            metadata,
            Rounding(self.settings.rounding, self.seed),
            overwrite=overwrite,
            hashed=hashed,
            progress=show,
            cancel=cancel,
            before_rename=before_rename,
        )

    def _files_to_write(self) -> list[tuple[LoraFile, list[Entry]]]:
        """The checkpoint itself, and each further file in which something changes."""
        found = []
        for index, file in enumerate(self.checkpoint.files):
            entries = self._entries(file)
            changes = any(entry.change is not None for entry in entries)
            if changes or (self.single and index == 0) or self._differs(file, entries):
                found.append((file, entries))
        return found

    def _differs(self, file: LoraFile, entries: list[Entry]) -> bool:
        return written_bytes(file, entries) != file.header.size - file.header.data_start

    def _entries(self, file: LoraFile) -> list[Entry]:
        names = self._names[id(file)]
        entries = []
        for name in file.tensors:
            key = names[name]
            if self.settings.drop_ema and name.startswith(EMA):
                continue
            if self._is_left_out(key, name):
                continue
            dtype = self._dtype(key)
            change = self.changes.get(key)
            scale = (
                self.checkpoint.scale(key) if change is not None or dtype != file.tensors[name].dtype else 1.0
            )
            kept = scale if dtype in FLOAT8_LARGEST else 1.0
            entries.append(Entry(name, dtype, change, scale, kept, None, key))
        return entries

    @property
    def _names(self) -> dict[int, dict[str, str]]:
        """For each file, its tensors' names to ours."""
        found: dict[int, dict[str, str]] = {id(file): {} for file in self.checkpoint.files}
        for key in self.checkpoint.keys:
            file, name = self.checkpoint.place(key)
            found[id(file)][name] = key
        return found

    def _is_left_out(self, key: str, name: str) -> bool:
        """A scale of a weight that is no longer float8."""
        if self.settings.dtype == "same":
            return False
        if name.rpartition(".")[2] == "scaled_fp8" or name == "scaled_fp8":
            return True
        stem, _, end = key.rpartition(".")
        return end in SCALES and f"{stem}.weight" in self.checkpoint.keys

    def _dtype(self, key: str) -> str:
        own = self.checkpoint.info(key).dtype
        if self.settings.dtype == "same" or own not in (*FORMATS, "F32", "F64"):
            return own
        scaled = self.checkpoint.scale_key(key) is not None
        return DTYPES[self.settings.dtype] if scaled or key in self._matrices else own

    def _untouched(self) -> int:
        """Bytes that are copied as they are."""
        return sum(
            file.tensors[entry.key].end - file.tensors[entry.key].start
            for file, entries in self._files_to_write()
            for entry in entries
            if is_copy(file, entry)
        )

    def _finer(self) -> tuple[str, int] | None:
        """The next dtype that holds more digits of what changes, and the size that it gives."""
        if not {*self.dtypes} - {"F32", "F64"}:
            return None
        dtype = "float32" if "F16" in self.dtypes else "float16"
        return dtype, replace(self, settings=replace(self.settings, dtype=dtype)).size()

    @property
    def _matrices(self) -> set[str]:
        """Names of the matrices of denoiser and text encoders."""
        if not hasattr(self, "_matrix_keys"):
            self._matrix_keys = {
                place.key
                for places in self.checkpoint.layers.values()
                for place in places
                if len(self.checkpoint.info(place.key).shape) > 1
            }
        return self._matrix_keys

    def _rescaled(self, file: LoraFile, entries: list[Entry]) -> list[Entry]:
        """A new factor for scaled float8 weights whose sum does not fit the old one."""
        scales: dict[str, float] = {}
        for index, entry in enumerate(entries):
            name = self.checkpoint.scale_key(entry.title)
            if entry.change is None or name is None or entry.dtype not in FLOAT8_LARGEST:
                continue
            most = largest(file, entry) / FLOAT8_LARGEST[entry.dtype]
            if most > entry.scale:
                # As the tensor of the factor will hold it.
                held = float(
                    encode(torch.tensor([most * (1 + 2**-20)]), self.checkpoint.info(name).dtype).double()
                )
                scales[self.checkpoint.place(name)[1]] = held
                entries[index] = replace(entry, new_scale=held)
        return [
            replace(entry, value=_bytes_of(scales[entry.key], entry.dtype)) if entry.key in scales else entry
            for entry in entries
        ]

    def refuse_inputs(self, output: Path) -> None:
        """Refuse to write over what is read.

        Raises:
            OutputError: With its name.
        """
        for path in self.files():
            try:
                same = output == path or os.path.samefile(output, path)
            except OSError:
                same = False
            if same:
                what = "the base itself" if path == self.checkpoint.files[0].path else "one of the inputs"
                raise OutputError(
                    "{file} is {what}, so it cannot be overwritten. Choose another name.",
                    output.name,
                    Sentence(what),
                )

    def _report(
        self,
        outputs: Sequence[Path],
        size: int,
        sums: dict[str, Sums],
        sha256: str | None,
        seconds: float,
        *,
        dry: bool = False,
    ) -> BakeReport:
        broken = broken_copies(sums)
        sums = {key: one for key, one in sums.items() if one.added > 0 or one.before > 0}
        whole = total(sums)
        rounding = self.settings.rounding
        if rounding == "auto":
            rounding = "stochastic" if any(dtype in FLOAT8_LARGEST for dtype in self.dtypes) else "nearest"
        copied = [] if self.single else copied_weights(self.checkpoint, self._folder_files())
        found = [*self.warnings, *copied, *sorted(self.adapter_notes), *broken]
        warnings = list(dict.fromkeys(found))
        if not dry:
            warning = remedy(whole.survives, rounding, self.dtypes, self._finer)
            warnings += [warning] if warning else []
            if not whole.added:
                warnings.append("Nothing changed: what was to be added is zero in every layer.")
        known = not dry and whole.added > 0
        return BakeReport(
            outputs=[str(path) for path in outputs],
            size_bytes=size,
            base=self.checkpoint.path.name,
            base_model=self.checkpoint.architecture.label,
            rounding=rounding,
            dtypes=self.dtypes,
            layers=self.layers,
            tensors=len(self.changes),
            unchanged=sum(not one.changed for one in sums.values()),
            untouched_bytes=self._untouched(),
            survives=whole.survives if known else None,
            error=whole.error if known else None,
            noise=(whole.lost / whole.before) ** 0.5 if known and whole.before > 0 else None,
            change=(whole.added / whole.before) ** 0.5 if known and whole.before > 0 else None,
            worst=worst(sums),
            sha256=sha256,
            warnings=warnings,
            skipped=self.skipped,
            seconds=round(seconds, 3),
            dry_run=dry,
            inputs=self.inputs,
        )


def _target(output: Path, file: LoraFile, index: int) -> Path:
    return output if index == 0 else output.with_name(f"{output.stem}.{file.path.stem}.safetensors")


def _bytes_of(value: float, dtype: str) -> bytes:
    if dtype == "F32":
        return struct.pack("<f", value)
    codes = encode(torch.tensor([value]), dtype)
    return bytes(codes.view(torch.uint8).numpy().tobytes())


def hash_of(file: LoraFile, progress: Callable[[Progress], None] | None, stop: Callable[[], None]) -> str:
    """Hex SHA-256 of a checkpoint's file, as A1111 has it; progress is in bytes."""
    size, done = file.header.size, 0

    def show() -> None:
        nonlocal done
        stop()
        done = min(size, done + HASH_CHUNK)
        if progress is not None:
            progress(Progress("hash", done, size))

    return hash_from(file.read_at, size, show)


def legacy_hash(file: LoraFile) -> str:
    """A1111's old hash of a checkpoint: of 64 KiB behind the first MiB."""
    end = min(LEGACY_END, file.header.size)
    data = bytearray(max(0, end - LEGACY_START))
    if data:
        file.read_at(LEGACY_START, memoryview(data))
    return hashlib.sha256(data).hexdigest()[:8]
