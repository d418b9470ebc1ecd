"""What an adapter does to one layer, as plain data: a low-rank product or a whole matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch
from torch import Tensor

from ..errors import IncompatibleError
from .kronecker import Kronecker, Structure, Terms, terms_of


@final
@dataclass(frozen=True, eq=False)
class LowRank:
    """A delta weight held as two factors: ``alpha / rank * up @ down``.

    Attributes:
        up: (out, rank), any float dtype; factors read from a file may stay in the dtype they are stored in.
        down: (rank, in * kh * kw), any float dtype.
        alpha: Numerator of the scale.
        kernel: (kh, kw) of a k x k convolution, else (). 1 x 1 convolutions are plain matrices here.
        parts: Ranks of the summands that were stacked into this one, in order; () when it is one piece.
            They show how large the inputs were, which decides what is noise in the sum.
        gains: (rank,) float64 factor of each component, or None for ones: the delta is then
            ``alpha / rank * up @ diag(gains) @ down``. Only :func:`stack` makes them, so that a sum
            keeps the factors as they are stored and nothing is rounded before the arithmetic.
        spectra: For each part (for a delta in one piece, one) the singular values of its ``up @ down``,
            falling, where its components are the singular vectors and both factors share the roots; None for
            a part of which that is not known. Empty: it is known of no part.
        name: What the numbers of both factors are known as, where several merges share what is computed of
            them; see :func:`named`. ``dataclasses.replace`` loses it.
        structure: What takes the place of factors that are large, until one of them is asked for; see
            :func:`structured`. ``dataclasses.replace`` loses it, :func:`changed` does not.
    """

    up: Tensor
    down: Tensor
    alpha: float
    kernel: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    gains: Tensor | None = None
    spectra: tuple[Tensor | None, ...] = ()
    name: Hashable = field(default=None, init=False)
    structure: Structure | None = field(default=None, init=False)

    if not TYPE_CHECKING:  # or any name would be an attribute

        def __getattr__(self, name: str) -> Tensor:
            if name not in ("up", "down") or self.structure is None:
                raise AttributeError(name)
            made = self.structure.factor(name)
            object.__setattr__(self, name, made)
            return made

    @property
    def rank(self) -> int:
        return self.down.shape[0] if self.structure is None else self.structure.shape[1]

    @property
    def out(self) -> int:
        return self.up.shape[0] if self.structure is None else self.structure.shape[0]

    @property
    def in_(self) -> int:
        """Columns of the unfolded matrix: in * kh * kw."""
        return self.down.shape[1] if self.structure is None else self.structure.shape[2]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0

    def component_gains(self) -> Tensor:
        """(rank,) float64 on the CPU: the factor of each component, scale included."""
        if self.gains is None:
            return torch.full((self.rank,), self.scale, dtype=torch.float64)
        return self.gains * self.scale

    @property
    def gain(self) -> float:
        """The factor of a delta of one piece, whose components all count the same."""
        return float(self.component_gains()[0])

    def dense(self) -> Tensor:
        """The delta weight itself, (out, in * kh * kw) float64. For tests and methods that need elements."""
        if isinstance(self.structure, Kronecker):
            return torch.kron(self.structure.a * self.gain, self.structure.b)
        if self.structure is not None:
            whole = self.structure.terms[0].dense()
            for term in self.structure.terms[1:]:
                whole += term.dense()
            return whole
        gains = self.component_gains().to(self.up.device)
        return (self.up.double() * gains) @ self.down.double()


@final
@dataclass(frozen=True, eq=False)
class Dense:
    """A delta weight held whole.

    Attributes:
        weight: (out, in * kh * kw), or (n,) for a norm layer; float32 or float64.
        kernel: (kh, kw) of a k x k convolution, else ().
        start: (in * kh * kw, c) columns that span the inputs' joint row space; a good start for truncation.
        doubt: Norm, at most, of what float64 rounded off when the weight was added up from larger ones.
    """

    weight: Tensor
    kernel: tuple[int, ...] = ()
    start: Tensor | None = None
    doubt: float = 0.0

    @property
    def out(self) -> int:
        return self.weight.shape[0]

    @property
    def in_(self) -> int:
        return self.weight.shape[1] if self.weight.dim() > 1 else 1

    def dense(self) -> Tensor:
        """The delta weight in float64, in its own shape."""
        return self.weight.double()


@dataclass(frozen=True, eq=False)
class Grams:
    """The Gram matrices of a low-rank delta's factors: both (R, R) float64, on the CPU."""

    up: Tensor
    down: Tensor


@final
@dataclass(frozen=True, eq=False)
class Mixed:
    """A delta weight in the components of the inputs: ``up @ left @ right^T @ down``.

    What the subspace methods give: nothing large has been multiplied yet, and what storing it asks of the
    large factors is known.

    Attributes:
        up: (out, r), any float dtype.
        down: (s, in * kh * kw), any float dtype.
        left, right: (r, k) and (s, k) float64 on the CPU.
        small: Gram matrices of the k columns of ``up @ left`` and of the k rows of ``right^T @ down``.
        lengths: Of the columns of up, (r,), and of the rows of down, (s,): float64 on the CPU.
        kernel: (kh, kw) of a k x k convolution, else ().
    """

    up: Tensor
    down: Tensor
    left: Tensor
    right: Tensor
    small: Grams
    lengths: tuple[Tensor, Tensor]
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def out(self) -> int:
        return self.up.shape[0]

    @property
    def in_(self) -> int:
        return self.down.shape[1]

    def dense(self) -> Tensor:
        """The delta weight itself, (out, in * kh * kw) float64."""
        left, right = self.left.to(self.up.device), self.right.to(self.up.device)
        return (self.up.double() @ left) @ (right.mT @ self.down.double())


Delta = LowRank | Dense
Merged = LowRank | Mixed | Dense
_D = TypeVar("_D", LowRank, Dense)


@dataclass(frozen=True, eq=False)
class LayerDelta:
    """All that one adapter changes in one layer.

    Attributes:
        weight: Change of the weight, or None.
        bias: (out,) change of the bias, or None.
        notes: Sentences for the report, such as an alpha of 0.
    """

    weight: Delta | None
    bias: Tensor | None = None
    notes: tuple[str, ...] = ()


def named(delta: LowRank, name: Hashable) -> LowRank:
    """The delta with a name for its factors: of two with equal names, ``up`` and ``down`` are equal too."""
    return changed(delta, name=name)


def changed(delta: LowRank, **fields: Any) -> LowRank:
    """As ``dataclasses.replace`` of what are no factors, but a structure stays."""
    result = copy.copy(delta)
    if "structure" in fields:  # and not the factors that were made of the former one
        vars(result).pop("up", None)
        vars(result).pop("down", None)
    for field_name, value in {"name": None, **fields}.items():
        object.__setattr__(result, field_name, value)
    return result


def structured(structure: Structure, alpha: float, **fields: Any) -> LowRank:
    """A delta whose factors are made when they are first asked for.

    Args:
        fields: As of :class:`LowRank`.
    """
    result: LowRank = object.__new__(LowRank)
    for field_name, value in {"structure": structure, "alpha": alpha, **fields}.items():
        object.__setattr__(result, field_name, value)
    return result


def moved(delta: Delta, device: torch.device) -> Delta:
    """The delta with its factors, or its weight, on a device."""
    if isinstance(delta, LowRank):
        if delta.structure is not None and device.type == "cpu":
            return delta
        there = replace(delta, up=delta.up.to(device), down=delta.down.to(device))
        return named(there, delta.name)
    start = None if delta.start is None else delta.start.to(device)
    return replace(delta, weight=delta.weight.to(device), start=start)


def place_rows(delta: Delta, spans: Sequence[tuple[int, int]], total: int) -> Delta:
    """Put a split layer (q of a fused qkv, say) into its rows of the fused one; other rows are zero.

    Args:
        delta: A delta whose rows go, in order, to ``spans``.
        spans: (start, stop) destination row ranges.
        total: Rows of the fused layer.
    """
    if isinstance(delta, LowRank):
        return replace(delta, up=_placed(delta.up, spans, total))
    return replace(delta, weight=_placed(delta.weight, spans, total))


def take_rows(delta: Delta, spans: Sequence[tuple[int, int]]) -> Delta:
    """Rows ``spans`` of a fused layer's delta, in that order, as the delta of the split layer."""
    if isinstance(delta, LowRank):
        return replace(delta, up=_taken(delta.up, spans), spectra=())
    return replace(delta, weight=_taken(delta.weight, spans))


def _placed(source: Tensor, spans: Sequence[tuple[int, int]], total: int) -> Tensor:
    placed = source.new_zeros((total, *source.shape[1:]))
    row = 0
    for start, stop in spans:
        placed[start:stop] = source[row : row + stop - start]
        row += stop - start
    return placed


def _taken(source: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([source[start:stop] for start, stop in spans])


def stack(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The exact weighted sum ``sum_i weights[i] * deltas[i]`` as one low-rank delta.

    Nothing is multiplied yet: the factors are put side by side as they are, and what each component
    counts is kept in ``gains``. The rank is the sum of the ranks, alpha is that of the first delta.

    Args:
        deltas: At least one; all of one (out, in) and kernel.
        weights: One strength per delta; negative ones are ordinary.

    Raises:
        IncompatibleError: The deltas are not of one shape.
    """
    check_same_shape(deltas)
    first = deltas[0]
    rank = sum(delta.rank for delta in deltas)
    alpha = _writable(abs(first.alpha)) or float(rank)
    gains = torch.cat(
        [delta.component_gains() * (weight * rank / alpha) for delta, weight in zip(deltas, weights)]
    )
    parts = tuple(part for delta in deltas for part in (delta.parts or (delta.rank,)))
    known: dict[str, Any] = {
        "kernel": first.kernel,
        "parts": parts,
        "gains": gains,
        "spectra": _spectra(deltas),
    }
    if any(delta.structure is not None for delta in deltas):
        result = structured(
            Terms([scaled(term, w) for delta, w in zip(deltas, weights) for term in terms_of(delta)]),
            alpha,
            **known,
        )
    else:
        result = LowRank(
            _joined([delta.up for delta in deltas], dim=1),
            _joined([delta.down for delta in deltas], dim=0),
            alpha,
            **known,
        )
    names = tuple(delta.name for delta in deltas)
    return result if None in names else named(result, names)


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """``sum_i weights[i] * deltas[i]``: from :func:`stack` where all are low-rank, else whole in float64.

    Raises:
        IncompatibleError: The deltas are not of one shape.
    """
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low) == len(deltas):
        return stack(low, weights)
    check_same_shape(deltas)
    total, doubt = torch.zeros((), dtype=torch.float64), 0.0
    for place, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        term = weight * delta.dense()
        rank = delta.rank if isinstance(delta, LowRank) else 0
        doubt += last_digits(float(torch.linalg.vector_norm(term)), rank)
        doubt += abs(weight) * delta.doubt if isinstance(delta, Dense) else 0.0
        total = total + term if place else term
    return Dense(total, deltas[0].kernel, doubt=doubt if math.isfinite(doubt) else 0.0)


def last_digits(size: float, rank: int) -> float:
    """Norm, at most, of what float64 rounds off a sum of this size, or of products of ``rank`` components."""
    return (2 + rank**0.5) * torch.finfo(torch.float64).eps * size


def _spectra(deltas: Sequence[LowRank]) -> tuple[Tensor | None, ...]:
    known = [delta.spectra or (None,) * max(1, len(delta.parts)) for delta in deltas]
    return tuple(part for own in known for part in own) if any(delta.spectra for delta in deltas) else ()


def _writable(alpha: float) -> float:
    """The number as an alpha tensor holds it, float32; 0 for one so far from 1 that gains would suffer."""
    return float(torch.tensor(alpha, dtype=torch.float32)) if 1e-15 < alpha < 1e15 else 0.0


def _joined(factors: Sequence[Tensor], dim: int) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(list(factors), dim=dim)


def scaled(delta: _D, weight: float) -> _D:
    """``weight * delta``."""
    if isinstance(delta, LowRank):
        result = changed(delta, alpha=delta.alpha * weight)
        if isinstance(delta.structure, Terms):
            terms = [scaled(term, weight) for term in delta.structure.terms]
            object.__setattr__(result, "structure", Terms(terms))
        return result
    return replace(delta, weight=delta.weight * weight, doubt=delta.doubt * abs(weight))


def check_same_shape(deltas: Sequence[Delta]) -> None:
    """Refuse deltas that do not fit one layer.

    Raises:
        IncompatibleError: Two deltas differ in rows, columns or kernel.
    """
    first = deltas[0]
    for delta in deltas[1:]:
        if (delta.out, delta.in_, delta.kernel) != (first.out, first.in_, first.kernel):
            raise IncompatibleError(
                "The deltas of one layer differ in shape: {first} and {second}. The files are made for "
                "different base models.",
                _shape(first),
                _shape(delta),
            )


def _shape(delta: Delta) -> str:
    kernel = " kernel " + "x".join(map(str, delta.kernel)) if delta.kernel else ""
    return f"{delta.out} x {delta.in_}{kernel}"
