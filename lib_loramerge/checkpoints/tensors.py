"""The tensors of an extracted LoRA, under the names that hosts read."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .. import dialects, models
from ..delta import LowRank, Stored, take_rows
from ..errors import OutputError, counted
from ..files.decode import tensor_bytes
from ..hosts import companions
from ..merge.run import filled, largest_ranks
from .differing import Found, Pair
from .reading import LayerRows


@contextmanager
def spill_file(folder: Path | None) -> Iterator[IO[bytes]]:
    """A file without a name, gone with the block; on the disk of ``folder`` or where the system has such.

    Raises:
        OutputError: There is no place for one.
    """
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed below)
    except OSError as error:
        raise _no_room(error) from error
    try:
        yield file
    finally:
        with suppress(OSError):  # Of a full disk it complains a second time.
            file.close()


def _no_room(error: OSError) -> OutputError:
    return OutputError(
        "The disk has no room for the LoRA while it is made ({what}); nothing was written. Free "
        "some space, or choose a lower rank.",
        error.strerror or error,
    )


class Spill(Mapping[str, Tensor]):
    """Tensors that wait on the disk for the file to be written; a mapping of them by name.

    Args:
        file: Where they are; None only counts what would be there.
    """

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        if self._file is None:
            self._places[key] = (0, 0, tensor.dtype, tuple(tensor.shape))
            return
        data = tensor_bytes(tensor.contiguous())
        try:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from error
        self._places[key] = (place, len(data), tensor.dtype, tuple(tensor.shape))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        return {key: shape for key, (_, _, _, shape) in self._places.items()}

    def __getitem__(self, key: str) -> Tensor:
        assert self._file is not None
        place, size, dtype, shape = self._places[key]
        self._file.seek(place)
        data = bytearray(self._file.read(size))
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class OneRank(Mapping[str, Tensor]):
    """The same tensors, the factors of each component in one rank; see ``merge.run.one_rank``."""

    def __init__(self, tensors: Spill) -> None:
        self._tensors, self._ranks = tensors, largest_ranks(tensors.shapes())

    def __getitem__(self, key: str) -> Tensor:
        return filled(key, self._tensors[key], self._ranks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def write_layer(pair: Pair, layer: Found, tensors: Spill) -> None:
    """The tensors of one layer under the names of the LoRA."""
    for key, tensor in layer_tensors(pair, layer):
        tensors.add(key, tensor)


def layer_tensors(pair: Pair, layer: Found) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that one layer has in the LoRA."""
    if layer.stored is None and layer.whole is None:
        return
    settings = pair.settings
    conv = models.is_conv(pair.identity, layer.name)
    shape = pair.shape(layer.name)
    style = dialects.output_style(pair.identity, settings.dialect)
    for prefix, rows in dialects.output_parts(pair.identity, layer.name, settings.dialect):

        def key(slot: str, prefix: str = prefix) -> str:
            return dialects.output_key(prefix, slot, settings.dialect, style)

        if layer.whole is not None:
            yield key("diff"), layer.whole
            continue
        assert layer.stored is not None
        delta = layer.stored.delta()
        piece = delta if rows is None else take_rows(delta, rows.cut(delta.out))
        assert isinstance(piece, LowRank)
        up, down = piece.up, piece.down
        if conv or len(shape) > 2:
            kernel = tuple(shape[2:]) or (1, 1)
            up = up.reshape(*up.shape, 1, 1)
            down = down.reshape(down.shape[0], -1, *kernel)
        yield key("up"), up
        yield key("down"), down
        if dialects.has_alpha(pair.identity, settings.dialect):
            yield key("alpha"), torch.tensor(float(piece.alpha), dtype=torch.float32)


def complete_groups(pair: Pair, found: list[Found], tensors: Spill) -> None:
    """Zeros where a host takes q, k, v and out of an attention only together."""
    written = {layer.name for layer in found if layer.rank}
    for name in sorted(written):
        for other in companions(pair.identity, name):
            if other not in written:
                written.add(other)
                write_layer(pair, zero_layer(pair, other, name), tensors)


def zero_layer(pair: Pair, name: str, like: str) -> Found:
    """A layer of rank 1 without a change; ``like`` is another one of its attention, which has its shape."""
    out, *inner = pair.base.shape(pair.identity, like)
    width = math.prod(inner)
    dtype = getattr(torch, pair.settings.dtype)
    zeros = Stored(torch.zeros(out, 1, dtype=dtype), torch.zeros(1, width, dtype=dtype), 1.0, (), 0.0, 0.0)
    return Found(name, 0, 0, 0, 0, 0, False, stored=zeros)


def read_vectors(pair: Pair, found: Sequence[Found]) -> dict[str, dict[str, Tensor] | None]:
    """Layer to its bias and norm under the names of the LoRA; None where no host takes them from one.

    Layers whose vectors are equal in both checkpoints are not in it.
    """
    settings = pair.settings
    dtype = getattr(torch, settings.dtype)
    result: dict[str, dict[str, Tensor] | None] = {}
    for layer in found:
        name = layer.name
        vector = _is_vector(pair, name)
        rows = pair.rows(name, bias=True)
        bias = None if rows is None else _vector(rows)
        weight = _vector(pair.rows(name)) if vector else None
        if bias is None and weight is None:
            continue
        if not takes_vectors(pair, name):
            result[name] = None
            continue
        slots = {"diff_b": bias} if not vector else {"w_norm": weight, "b_norm": bias}
        size = pair.base.shape(pair.identity, name)[0]
        result[name] = {
            dialects.output_key(prefix, slot, settings.dialect): (
                torch.zeros(size) if value is None else value
            ).to(dtype)
            for prefix, _ in dialects.output_parts(pair.identity, name, settings.dialect)
            for slot, value in slots.items()
        }
    return result


def takes_vectors(pair: Pair, name: str) -> bool:
    """Whether a layer's bias or norm is to be written."""
    wanted = pair.settings.vectors
    return wanted == "all" or (wanted == "unet" and every_host_reads_vectors(pair, name))


def every_host_reads_vectors(pair: Pair, name: str) -> bool:
    """Whether no host refuses a LoRA over a layer's bias or norm."""
    unet = models.layers(pair.identity)  # A complete list there is for the U-Nets alone.
    return models.component(name) == "unet" and bool(unet)


def write_vectors(
    pair: Pair, found: Sequence[Found], vectors: Mapping[str, Mapping[str, Tensor] | None], tensors: Spill
) -> tuple[list[str], list[str]]:
    """Biases and norms; sentences on what is left out, and warnings of what a host may not read."""
    left: Counter[str] = Counter()
    risky = 0
    for layer in found:
        if layer.name not in vectors:
            continue
        own = vectors[layer.name]
        vector = _is_vector(pair, layer.name)
        written = vector or layer.rank or layer.lost < layer.exact
        if own is None or not (written or takes_zeros(pair, layer.name)):
            left[models.component(layer.name)] += 1
            continue
        if not written:  # A1111 refuses a file with a bias that stands alone.
            write_layer(pair, zero_layer(pair, layer.name, layer.name), tensors)
        for key, tensor in own.items():
            tensors.add(key, tensor)
        if not every_host_reads_vectors(pair, layer.name):
            risky += len(own)
        if vector:
            layer.lost = 0.0
    warning = counted(
        risky,
        "{count} tensor is a norm or bias that not every host knows: A1111 and ComfyUI skip those that they "
        "do not know, Forge refuses a LoRA with more than 12 of them. Leave out --vectors all for a file "
        "that every host loads.",
        "{count} tensors are norms and biases that not every host knows: A1111 and ComfyUI skip those that "
        "they do not know, Forge refuses a LoRA with more than 12 of them. Leave out --vectors all for a "
        "file that every host loads.",
    )
    skipped: list[str] = [
        counted(
            count,
            "{count} norm or bias of {part}, which is no part of a low-rank LoRA",
            "{count} norms and biases of {part}, which are no part of a low-rank LoRA",
            part,
        )
        for part, count in sorted(left.items())
    ]
    return skipped, [warning] if risky else []


def takes_zeros(pair: Pair, name: str) -> bool:
    """Whether a layer whose bias alone changed is written; a file of limited size has no room for it."""
    return pair.settings.size is None and pair.settings.limit(pair.has_kernel(name)) > 0


def _is_vector(pair: Pair, layer: str) -> bool:
    return len(pair.base.shape(pair.identity, layer)) == 1


def _vector(rows: tuple[LayerRows, LayerRows] | None) -> Tensor | None:
    """Difference of two vectors; None where they are equal."""
    if rows is None:
        return None
    first, second = (part.read(0, part.count).reshape(-1) for part in rows)
    difference = first.double() - second.double()
    return difference.float() if bool(difference.any()) else None
