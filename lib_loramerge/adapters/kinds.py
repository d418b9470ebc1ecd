"""What an adapter kind is: its slots, its formula and what it needs, each in one place.

A kind works on the slots of one layer. ``describe`` looks at shapes alone, so
that a file can be judged from its header; ``build`` makes the delta weight at a
scale of 1. The scale itself is applied in :mod:`~lib_loramerge.adapters.scaling`
and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import IncompatibleError, Sentence

if TYPE_CHECKING:
    from torch import Tensor

    from ..delta import Delta

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class LayerFacts:
    """What a header alone shows of one layer.

    Attributes:
        kind: Name of the adapter kind in :data:`ADAPTERS`, or ``"orphan"`` when
            only an alpha or another companion is left and there is nothing to
            merge.
        out: Output channels of the layer; None when only the base weight has them.
        in_: Input channels, not unfolded; None when only the base weight has them,
            0 for the vectors of normalisation layers.
        kernel: Kernel of a k x k convolution; ``()`` for everything that is a
            plain matrix, 1 x 1 convolutions included.
        rank: Rank of the exact low-rank form, an upper bound where the values
            decide; None for a delta that has none.
        bias: Whether the layer's bias changes too.
        needs_base: Whether the delta needs the base model's own weight.
        notes: Sentences for the report, the same text for every layer they
            apply to.
    """

    kind: str
    out: int | None
    in_: int | None
    kernel: Shape = ()
    rank: int | None = None
    bias: bool = False
    needs_base: bool = False
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """True when nothing of this layer can be merged, and nothing is lost."""
        return self.kind == ORPHAN

    @property
    def columns(self) -> int | None:
        """Input size with the kernel unfolded: the width of the delta matrix."""
        return None if self.in_ is None else self.in_ * math.prod(self.kernel)


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer of one file, ready for a kind's formula.

    Attributes:
        slots: Slot name to tensor, float32 or float64, shaped as stored.
        where: File and layer, for messages.
        facts: What ``describe`` found; its sizes hold.
        base: Base weight (out, in[, kh, kw]), for the kinds that need it.
        dyn: Use only the first ``dyn`` ranks, as the WebUI's ``dyn=`` does.
        fold_scalar: Multiply by a stored ``scalar``, which the hosts ignore.
    """

    slots: Mapping[str, Tensor]
    where: str
    facts: LayerFacts
    base: Tensor | None = None
    dyn: int | None = None
    fold_scalar: bool = False


@dataclass(frozen=True)
class AdapterKind:
    """One way of storing the change of a layer.

    Attributes:
        name: Short name, used in reports.
        label: The name people know.
        forms: The sets of slots that make a complete layer; any one will do.
        optional: Slots that may come along and belong to this kind alone.
        needs_base: Whether the delta needs the base model's own weight.
        exact_low_rank: Whether the delta is an exact low-rank product.
        keys: The tensor names people meet in files, for the table.
        does: One sentence for the table: what becomes of it.
        source: Where the formula comes from.
        describe: (shapes, where, kernel) to facts, from shapes alone.
        build: The delta weight at scale 1; None for a kind without one.
        scale_rank: Rank that alpha is divided by; None where alpha is no scale.
        scales_itself: ``build`` applies the scale too, because its result is not
            linear in it.
        endings: Slot to the endings of keys that spell it, the one that is written first; a slot that is
            not here is spelled as it is called.
        family: Kinds that share slots; a layer holds one family. Empty for what comes with other slots.
    """

    name: str
    label: str
    forms: tuple[frozenset[str], ...]
    needs_base: bool
    exact_low_rank: bool
    keys: str
    does: str
    source: str
    describe: Callable[[Shapes, str, Shape | None], LayerFacts]
    build: Callable[[Layer], Delta | None]
    optional: frozenset[str] = frozenset()
    scale_rank: Callable[[Shapes], int | None] = field(default=lambda shapes: None)
    scales_itself: bool = False
    endings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    family: str = ""

    @cached_property
    def slots(self) -> frozenset[str]:
        """Every slot that belongs to this kind."""
        return self.optional.union(*self.forms)


ORPHAN = "orphan"
ADAPTERS: dict[str, AdapterKind] = {}


def register(kind: AdapterKind) -> AdapterKind:
    """Add a kind to :data:`ADAPTERS`."""
    kind = replace(kind, label=Sentence(kind.label))  # It stands in errors, where ours is told from names.
    ADAPTERS[kind.name] = kind
    return kind


def shapes_of(slots: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Shapes of tensors, as a header has them."""
    return {slot: tuple(tensor.shape) for slot, tensor in slots.items()}


def matrix(shape: Shape, slot: str, where: str) -> tuple[int, int]:
    """(rows, columns) of a factor that may carry trailing 1 x 1 kernel axes."""
    if len(shape) < 2 or math.prod(shape[2:]) != 1:
        raise IncompatibleError(
            "{where}: {slot} has the shape {shape} where a matrix is needed.", where, slot, tuple(shape)
        )
    return shape[0], shape[1]


def split_kernel(shape: Shape, slot: str, where: str, kernel: Shape | None) -> tuple[int, int, Shape]:
    """Read a factor (rows, in[, kh, kw]) as (rows, in, kernel).

    A factor stored flat, (rows, in * kh * kw), is read with the ``kernel`` that
    the base model's layer is known to have.
    """
    if len(shape) < 2:
        raise IncompatibleError(
            "{where}: {slot} has the shape {shape} where a matrix is needed.", where, slot, tuple(shape)
        )
    known = plain_kernel(kernel or ())
    stored = plain_kernel(shape[2:])
    if len(shape) > 2:
        if kernel and stored != known:
            raise IncompatibleError(
                "{where}: {slot} has the shape {shape}, but this layer of the base model is a {kernel} "
                "convolution.",
                where,
                slot,
                tuple(shape),
                " x ".join(map(str, kernel)),
            )
        return shape[0], shape[1], stored
    if shape[1] % math.prod(known):
        raise IncompatibleError(
            "{where}: {slot} has the shape {shape}, which does not divide into the {kernel} kernel of this "
            "layer.",
            where,
            slot,
            tuple(shape),
            " x ".join(map(str, known)),
        )
    return shape[0], shape[1] // math.prod(known), known


def plain_kernel(kernel: Shape) -> Shape:
    """The kernel of a k x k convolution; ``()`` for 1 x 1."""
    return tuple(kernel) if math.prod(kernel) > 1 else ()


def misfit(where: str, shapes: Shapes, *slots: str) -> IncompatibleError:
    """The error for slots of one layer whose shapes contradict each other."""
    listed = " and ".join(f"{slot} {tuple(shapes[slot])}" for slot in slots if slot in shapes)
    return IncompatibleError("{where}: the shapes of {slots} do not fit each other.", where, listed)


def require(fits: bool, where: str, shapes: Shapes, *slots: str) -> None:
    """Raise :func:`misfit` unless ``fits``."""
    if not fits:
        raise misfit(where, shapes, *slots)
