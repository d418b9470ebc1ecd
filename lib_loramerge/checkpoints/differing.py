"""Two checkpoints of one base model, layer by layer: what they differ by, and what of it a rank holds."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import dialects, models
from ..delta import LowRank, Spectrum, Stored, truncate
from ..delta.krylov import leading
from ..delta.storing import round_cut
from ..errors import FileError, IncompatibleError, OutputError, RecipeError, Sentence, joined
from ..merge.host_target import some_layers
from ..merge.memory import return_free_memory
from ..ranks import retaining
from ..recipe.check import check_whole
from ..recipe.model import check_size
from .noise import CLEAR, ROUNDING_ONLY, coarser, edge, variance
from .numbers import encode
from .reading import Checkpoint, LayerRows
from .summing import CHUNK

MOST_RANKS = 4096
MAX_RANK = 128
_LARGE = 1 << 22  # Numbers of a large layer.
_FEW = 0.05  # Share of the layers that may be in one file alone, where the user allows it.
_EMBEDDINGS = (
    "token_embedding",
    "position_embedding",
    "positional_embedding",
    "embed_tokens",
    "shared.weight",
)
VECTORS = ("unet", "none", "all")
ONE_RULE = "rank, retain and size exclude each other: give one rule for the rank."
PARTS = ("unet", "te", "te1", "te2", "te3")


@dataclass(frozen=True)
class ExtractSettings:
    """What to extract.

    Attributes:
        rank: A number, or ``"auto"``: as many singular values as stand out of the rounding.
        conv_rank: Of k x k convolutions; None for the rank, at most 32; 0 leaves them out.
        retain: Instead of a rank: the share of each layer's norm to keep.
        size: Instead of a rank: MB (1,000,000 bytes) that the file may have; ranks are the best for that.
        max_rank: Limit of ``auto``, ``retain`` and ``size``; None for ``MAX_RANK``.
        parts: Of ``PARTS``; () for all there are.
        vectors: Biases and norms that are written: those of a U-Net, ``"none"``, or ``"all"``.
        dtype: Of the LoRA.
        tuned_sha256, base_sha256: As ``BakeSettings.base_sha256``.
    """

    rank: int | str = 64
    conv_rank: int | None = None
    retain: float | None = None
    size: float | None = None
    max_rank: int | None = None
    parts: tuple[str, ...] = ()
    vectors: str = "unet"
    dtype: str = "float16"
    dialect: str = "auto"
    skip_unsupported: bool = False
    hashed: bool = True
    tuned_sha256: str = ""
    base_sha256: str = ""

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if self.rank != "auto" and not (whole and 1 <= int(self.rank) <= MOST_RANKS):
            raise RecipeError(
                "rank must be a whole number from 1 to {most}, or auto, got {value}.",
                MOST_RANKS,
                repr(self.rank),
            )
        if self.retain is not None and not 0 < self.retain <= 1:
            raise RecipeError("retain must be above 0 and at most 1, got {value}.", f"{self.retain:g}")
        if self.size is not None:
            check_size(self.size)
        if (self.rank == "auto") + (self.retain is not None) + (self.size is not None) > 1:
            raise RecipeError(ONE_RULE)
        if self.max_rank is not None:
            check_whole("max_rank", self.max_rank, 1, MOST_RANKS)
            if not self.measured:
                raise RecipeError(
                    "max_rank limits the rank auto, retain and size; here the rank is {rank}. Leave one of "
                    "them out.",
                    self.rank,
                )
        if self.conv_rank is not None:
            check_whole("conv_rank", self.conv_rank, 0, MOST_RANKS)
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise RecipeError("There is no part {name}. Parts: {parts}.", repr(unknown[0]), ", ".join(PARTS))

    @property
    def measured(self) -> bool:
        """Ranks depend on the difference, up to ``max_rank``."""
        return self.rank == "auto" or self.retain is not None or self.size is not None

    def limit(self, conv: bool) -> int:
        """Most ranks of a layer; of a k x k convolution with ``conv``."""
        wanted = (self.max_rank or MAX_RANK) if self.measured else int(self.rank)
        if not conv:
            return wanted
        if self.conv_rank is None:
            return min(wanted, 32)
        return self.conv_rank if self.max_rank is None else min(wanted, self.conv_rank)

    @property
    def most_advised(self) -> int:
        """The largest rank that a dry run tells of."""
        return (self.max_rank or MAX_RANK) if self.measured else max(int(self.rank), MAX_RANK)

    def at(self, rank: int) -> ExtractSettings:
        """The same with one rank for all layers."""
        return replace(self, rank=rank, retain=None, size=None, max_rank=None)


@dataclass
class Found:
    """What was found of one layer.

    Attributes:
        exact, lost, noise, size: Squared norms of the difference, of what is not in the LoRA, of the rounding
            and of the base's weights.
        inner: Inner product of the two weights; ``tuned`` is the squared norm of the other.
        trained: It differs by more than rounding.
        best: For a file of limited size: the difference at the largest rank that it may get.
        values: Singular values of that, which stay when the factors are laid aside.
        leading: Of a dry run: the largest singular values, as many as the advice looks at.
        above: How many of them rounding alone does not reach.
    """

    name: str
    exact: float
    noise: float
    size: float
    tuned: float
    inner: float
    trained: bool
    rank: int = 0
    alpha: float = 0.0
    lost: float = 0.0
    capped: bool = False
    stored: Stored | None = None
    whole: Tensor | None = None
    best: LowRank | None = None
    values: Tensor | None = None
    leading: Tensor | None = None
    above: int = 0

    def take_numbers(self) -> None:
        """Rank, alpha and error of what is stored."""
        if self.stored is not None:
            self.rank, self.alpha, self.lost = self.stored.rank, self.stored.alpha, self.stored.error_sq


@dataclass
class Pair:
    """Two checkpoints of one base model, and the layers that both have."""

    tuned: Checkpoint
    base: Checkpoint
    settings: ExtractSettings
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def identity(self) -> str:
        return self.base.architecture.id

    def shape(self, layer: str) -> tuple[int, ...]:
        """Of a layer, in whichever checkpoint has it; () where none does."""
        side = next((side for side in (self.base, self.tuned) if layer in side.layers), None)
        return () if side is None else tuple(side.shape(self.identity, layer))

    def has_kernel(self, layer: str) -> bool:
        """Whether it is a convolution of more than one pixel."""
        return self.shape(layer)[2:] not in ((), (1, 1))

    def check_unchanged(self) -> None:
        """Refuse what was read of files that another program wrote to meanwhile."""
        self.tuned.check_unchanged()
        self.base.check_unchanged()

    def refuse_inputs(self, output: Path) -> None:
        """Refuse to write over what is read.

        Raises:
            OutputError: With its name.
        """
        for file in (*self.tuned.files, *self.base.files):
            if output.exists() and os.path.samefile(output, file.path):
                raise OutputError("{file} is one of the inputs. Choose another name.", output.name)

    def stored_bytes(self, layer: str) -> int:
        """Bytes of a layer's weight in both."""
        total = 0
        for side in (self.tuned, self.base):
            info = side.info(side.layers[layer][0].key)
            numbers = math.prod(side.shape(self.identity, layer))
            total += numbers * (info.end - info.start) // max(1, math.prod(info.shape))
        return total

    def layers(self) -> list[str]:
        """Matrices of the parts asked for that both have, in a fixed order.

        Raises:
            IncompatibleError: They are not base and fine-tune of one another.
        """
        found = []
        alone: dict[str, list[str]] = {self.tuned.path.name: [], self.base.path.name: []}
        without = self._parts_of_one()
        for layer in sorted({*self.tuned.layers, *self.base.layers}):
            if not self.is_asked(layer) or models.component(layer) in without:
                continue
            if layer not in self.tuned.layers or layer not in self.base.layers:
                owner = self.tuned if layer in self.tuned.layers else self.base
                alone[owner.path.name].append(layer)
            elif self._fits(layer):
                found.append(layer)
        total = len(found) + sum(map(len, alone.values()))
        for name, only in alone.items():
            other = next((entry for entry in alone if entry != name), name)
            if only and not (self.settings.skip_unsupported and len(only) <= _FEW * total):
                few = Sentence(" --skip-unsupported leaves them out.") if len(only) <= _FEW * total else ""
                raise IncompatibleError(
                    "{file} has {layers} that {other} lacks: not a fine-tune of it. Choose the base that it "
                    "was trained from.{hint}",
                    name,
                    some_layers(only),
                    other,
                    few,
                )
            self.skipped += [Sentence("{layer}: only in {file}", layer, name) for layer in only]
        if not found:
            why = [Sentence("The two checkpoints have no layer of these parts in common."), *self.notes]
            both = {models.component(layer) for layer in self.tuned.layers if layer in self.base.layers}
            if both:
                why.append(Sentence("Parts of both: {parts}.", ", ".join(sorted(both))))
            raise IncompatibleError(joined(" ", why))
        return found

    def _parts_of_one(self) -> set[str]:
        """Parts that one of the two lacks altogether, as a file without text encoders does; noted."""
        parts = [
            {models.component(layer) for layer in side.layers if self.is_asked(layer)}
            for side in (self.tuned, self.base)
        ]
        for side, missing in ((self.tuned, parts[1] - parts[0]), (self.base, parts[0] - parts[1])):
            if missing:
                self.notes.append(
                    Sentence(
                        "{file} has no {part}, so the LoRA holds nothing of it.",
                        side.path.name,
                        ", ".join(sorted(missing)),
                    )
                )
        return parts[0] ^ parts[1]

    def is_embedding(self, layer: str) -> bool:
        places = self.base.layers.get(layer) or self.tuned.layers[layer]
        return any(word in places[0].key for word in _EMBEDDINGS)

    def is_asked(self, layer: str) -> bool:
        places = self.base.layers.get(layer) or self.tuned.layers[layer]
        # Embeddings and other bare parameters are nothing that a host's LoRA changes.
        if not places[0].key.endswith(("weight", "text_projection")) or self.is_embedding(layer):
            return False
        return self.is_of_part(layer)

    def is_of_part(self, layer: str) -> bool:
        part = models.component(layer)
        if not self.settings.parts:
            return True
        return part in self.settings.parts or (part.startswith("te") and "te" in self.settings.parts)

    def _fits(self, layer: str) -> bool:
        shapes = [file.shape(self.identity, layer) for file in (self.tuned, self.base)]
        if shapes[0] == shapes[1]:
            return True
        if not self.settings.skip_unsupported:
            if len(shapes[0]) == 4 and len(shapes[1]) == 4 and shapes[0][0] == shapes[1][0]:
                raise IncompatibleError(
                    "{file} reads {channels} channels, {other} {others}: the first convolution cannot be in "
                    "a LoRA. --skip-unsupported leaves it out.",
                    self.tuned.path.name,
                    shapes[0][1],
                    self.base.path.name,
                    shapes[1][1],
                )
            raise IncompatibleError(
                "{layer} is {shape} in {file} and {other_shape} in {other}. --skip-unsupported leaves it "
                "out.",
                layer,
                _text(shapes[0]),
                self.tuned.path.name,
                _text(shapes[1]),
                self.base.path.name,
            )
        self.skipped.append(Sentence("{layer}: of different shapes", layer))
        return False

    def rows(self, layer: str, *, bias: bool = False) -> tuple[LayerRows, LayerRows] | None:
        first, second = self.tuned.layer_rows(layer, bias=bias), self.base.layer_rows(layer, bias=bias)
        return (first, second) if first is not None and second is not None else None


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def measure(pair: Pair, name: str, *, advised: bool = False) -> Found:
    """Difference of one layer, its best approximation, and how much of it is rounding.

    Args:
        advised: Find what :mod:`.advising` tells of other ranks as well.
    """
    rows = pair.rows(name)
    assert rows is not None
    shape = pair.base.shape(pair.identity, name)
    dtypes = [stored_as(checkpoint, name) for checkpoint in (pair.tuned, pair.base)]
    coarse = coarser(dtypes[0][0], dtypes[1][0])
    width = rows[0].width
    if len(shape) == 1:
        _, layer = _difference(name, rows, shape[0], 1, dtypes, coarse)
        layer.lost = layer.exact
        return layer
    kept = pair.settings.rank != "auto" and not advised
    difference, layer = _difference(name, rows, shape[0], width, dtypes, coarse, kept=kept)
    _check_finite(pair, layer)
    if layer.exact == 0:
        layer.trained = False
        return layer
    settings = pair.settings
    wide_kernel = tuple(shape[2:]) if pair.has_kernel(name) else ()
    limit = settings.limit(bool(wide_kernel))
    ratio = layer.exact / layer.noise if layer.noise > 0 else float("inf")
    threshold = None
    if not kept or ratio < CLEAR:
        del difference  # Read anew: of the largest layers memory holds one matrix at a time.
        _make_room(shape[0] * width)
        threshold = edge(_variances(rows, shape[0], width, dtypes), len(name))
        difference, _ = _difference(name, rows, shape[0], width)
    _make_room(shape[0] * width)
    most = max(limit, settings.at(settings.most_advised).limit(bool(wide_kernel))) if advised else limit
    spectrum = leading(difference, max(1, most), name, wide_kernel, energy=layer.exact)
    above = spectrum.rank if threshold is None else int((spectrum.values > threshold).sum())
    layer.trained &= ratio > ROUNDING_ONLY or above > 0
    if advised and layer.trained:
        layer.leading, layer.above = spectrum.values[:most], above
    rank = _rank(settings, spectrum, limit, above) if layer.trained else 0
    layer.capped = settings.measured and rank >= limit
    layer.lost = layer.exact
    if not rank:
        return layer
    if settings.size is not None:
        best = truncate(spectrum, rank, torch.float32)
        layer.values = spectrum.values[: best.rank]
        layer.best = replace(best, spectra=(layer.values,))
        return layer
    if rank * (shape[0] + width) >= shape[0] * width and models.layers(pair.identity):
        layer.whole = difference.reshape(shape).to(getattr(torch, settings.dtype))
        layer.lost = float((layer.whole.double() - difference.reshape(shape).double()).square().sum())
        return layer
    fixed = not dialects.has_alpha(pair.identity, settings.dialect)
    layer.stored = round_cut(spectrum, rank, getattr(torch, settings.dtype), fixed_alpha=fixed)
    layer.take_numbers()
    return layer


def _make_room(numbers: int) -> None:
    """Before work on so many numbers that what is kept for later would count beside them."""
    if numbers >= _LARGE:
        return_free_memory()


def _check_finite(pair: Pair, layer: Found) -> None:
    if math.isfinite(layer.exact):
        return
    owner = pair.tuned if math.isfinite(layer.size) else pair.base
    raise FileError(
        "{file} holds NaN or infinity in {layer}, so no difference can be taken. Take an undamaged copy.",
        owner.path.name,
        layer.name,
    )


def _rank(settings: ExtractSettings, spectrum: Spectrum, limit: int, above: int) -> int:
    if limit == 0:
        return 0
    if settings.retain is not None:
        kept = spectrum.values.square().cumsum(0)
        wanted = settings.retain**2 * spectrum.energy
        if not len(kept) or float(kept[-1]) < wanted:
            return min(limit, spectrum.rank)
        return min(limit, retaining(spectrum, min(1.0, (wanted / float(kept[-1])) ** 0.5)))
    return min(limit, above if settings.rank == "auto" else spectrum.rank)


def stored_as(checkpoint: Checkpoint, layer: str) -> tuple[str, float]:
    key = checkpoint.layers[layer][0].key
    return checkpoint.info(key).dtype, checkpoint.scale(key)


def _difference(
    name: str,
    rows: tuple[LayerRows, LayerRows],
    out: int,
    width: int,
    dtypes: Sequence[tuple[str, float]] = (),
    coarse: str = "",
    *,
    kept: bool = True,
) -> tuple[Tensor, Found]:
    """(out, width) float32 difference, where it is ``kept``, and its sums where the ``dtypes`` are given."""
    whole = torch.empty(out if kept else 0, width)
    layer = Found(name, 0.0, 0.0, 0.0, 0.0, 0.0, False)
    same = True
    for first, last, tuned, base in both_rows(rows, out, width):
        part = (tuned.double() - base.double() if tuned.dtype != base.dtype else tuned - base).float()
        if kept:
            whole[first:last] = part
        if not dtypes:
            continue
        layer.exact += float(part.double().square().sum())
        layer.noise += float(_variance(tuned, base, dtypes).sum(dtype=torch.float64))
        layer.size += float(base.double().square().sum())
        layer.tuned += float(tuned.double().square().sum())
        layer.inner += float((tuned.double() * base.double()).sum())
        if same:
            same = equal_when_rounded(tuned, base, coarse)
    layer.trained = not same
    return whole, layer


def _variances(
    rows: tuple[LayerRows, LayerRows], out: int, width: int, dtypes: Sequence[tuple[str, float]]
) -> Tensor:
    """(out, width) of the rounding in both."""
    whole = torch.empty(out, width)
    for first, last, tuned, base in both_rows(rows, out, width):
        whole[first:last] = _variance(tuned, base, dtypes)
    return whole


def _variance(tuned: Tensor, base: Tensor, dtypes: Sequence[tuple[str, float]]) -> Tensor:
    return variance(tuned, *dtypes[0]) + variance(base, *dtypes[1])


def both_rows(
    rows: tuple[LayerRows, LayerRows], out: int, width: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Some rows of both at a time, and which they are."""
    step = max(1, CHUNK // max(1, width))
    for first in range(0, out, step):
        last = min(out, first + step)
        tuned, base = (part.read(first, last).reshape(last - first, width) for part in rows)
        yield first, last, tuned, base


def equal_when_rounded(first: Tensor, second: Tensor, dtype: str) -> bool:
    codes = [encode(one if dtype in ("F64",) else one.float(), dtype) for one in (first, second)]
    return bool(torch.equal(*codes))
