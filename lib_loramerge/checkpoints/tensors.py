"""The tensors of an extracted LoRA, under the names that hosts read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import torch
from torch import Tensor

from .. import dialects, models
from ..delta import LowRank, Stored, take_rows
from ..errors import OutputError
from ..files.decode import tensor_bytes
from ..hosts import companions
from .differing import Found, Pair
from .reading import LayerRows


class Spill(Mapping[str, Tensor]):
    """Tensors that wait on the disk for the file to be written; a mapping of them by name."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        data = tensor_bytes(tensor.contiguous())
        try:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"The disk has no room for the LoRA while it is made ({error.strerror or error}); nothing "
                "was written. Free some space, or choose a lower rank."
            ) from error
        self._places[key] = (place, len(data), tensor.dtype, tuple(tensor.shape))

    def __getitem__(self, key: str) -> Tensor:
        place, size, dtype, shape = self._places[key]
        self._file.seek(place)
        data = bytearray(self._file.read(size))
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write_layer(pair: Pair, layer: Found, tensors: Spill) -> None:
    """The tensors of one layer under the names of the LoRA."""
    if layer.stored is None and layer.whole is None:
        return
    settings = pair.settings
    conv = models.is_conv(pair.identity, layer.name)
    shape = pair.base.shape(pair.identity, layer.name)
    style = dialects.output_style(pair.identity, settings.dialect)
    for prefix, rows in dialects.output_parts(pair.identity, layer.name, settings.dialect):

        def key(slot: str, prefix: str = prefix) -> str:
            return dialects.output_key(prefix, slot, settings.dialect, style)

        if layer.whole is not None:
            tensors.add(key("diff"), layer.whole)
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
        tensors.add(key("up"), up)
        tensors.add(key("down"), down)
        if dialects.has_alpha(pair.identity, settings.dialect):
            tensors.add(key("alpha"), torch.tensor(float(piece.alpha), dtype=torch.float32))


def complete_groups(pair: Pair, found: list[Found], tensors: Spill) -> None:
    """Zeros where a host takes q, k, v and out of an attention only together."""
    written = {layer.name for layer in found if layer.rank}
    dtype = getattr(torch, pair.settings.dtype)
    for name in sorted(written):
        for other in companions(pair.identity, name):
            if other in written:
                continue
            written.add(other)
            out, width = pair.base.shape(pair.identity, name)[:2]
            zeros = Stored(
                torch.zeros(out, 1, dtype=dtype), torch.zeros(1, width, dtype=dtype), 1.0, (), 0.0, 0.0
            )
            write_layer(pair, Found(other, 0, 0, 0, 0, 0, False, stored=zeros), tensors)


def write_vectors(pair: Pair, found: Sequence[Found], tensors: Spill) -> list[str]:
    """The denoiser's biases and norms; sentences on what no host takes from a LoRA."""
    settings, skipped = pair.settings, []
    unet = models.layers(pair.identity)  # A complete list there is for the U-Nets alone.
    dtype = getattr(torch, settings.dtype)
    matrices = {layer.name for layer in found if layer.rank}
    left: Counter[str] = Counter()
    for layer in found:
        name, part = layer.name, models.component(layer.name)
        vector = len(pair.base.shape(pair.identity, name)) == 1
        rows = pair.rows(name, bias=True)
        bias = None if rows is None else _vector(rows)
        weight = _vector(pair.rows(name)) if vector else None
        if bias is None and weight is None:
            continue
        if settings.vectors == "none" or part != "unet" or not unet or not (vector or name in matrices):
            left[part] += 1
            continue
        for prefix, _ in dialects.output_parts(pair.identity, name, settings.dialect):
            slots = {"diff_b": bias} if not vector else {"w_norm": weight, "b_norm": bias}
            size = pair.base.shape(pair.identity, name)[0]
            for slot, value in slots.items():
                tensor = torch.zeros(size) if value is None else value
                tensors.add(dialects.output_key(prefix, slot, settings.dialect), tensor.to(dtype))
        if vector:
            layer.lost = 0.0
    for part, count in sorted(left.items()):
        skipped.append(f"{count} norms and biases of {part}, which are no part of a low-rank LoRA")
    return skipped


def _vector(rows: tuple[LayerRows, LayerRows] | None) -> Tensor | None:
    """Difference of two vectors; None where they are equal."""
    if rows is None:
        return None
    size = 1 << 40
    first, second = (part.read(0, min(size, _length(part))).reshape(-1) for part in rows)
    difference = first.double() - second.double()
    return difference.float() if bool(difference.any()) else None


def _length(rows: LayerRows) -> int:
    return max(span.layer + span.count for place in rows.places for span in rows.checkpoint.spans(place))
