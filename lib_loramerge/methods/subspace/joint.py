"""The deltas of one layer in small common coordinates, without a dense matrix.

Each weighted delta is brought to its own singular value decomposition first, so that nothing depends on how a
file happens to factor it. With U all the left singular vectors side by side, and V all the right ones::

    w_i delta_i = U_i diag(s_i) V_i^T      U = X left,  V = Y^T right
    result      = U A B^T V^T              for small A and B

X are the given ups side by side, Y the downs stacked. All that a method needs to know of U and V are the
K x K matrices U^T U and V^T V, which come from the Gram matrices of X and Y.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...delta import (
    NOISE,
    Delta,
    Dense,
    Grams,
    LowRank,
    check_same_shape,
    decompose,
    decompose_dense,
    full_precision,
    gram,
    scaled,
    stack,
    truncate,
)

RELATIVE = 1e-6  # Singular values below this part of the largest one are not there.
_LOSS = 64.0  # float32 products whose terms are this much larger than their sum are made in float64 instead.


@dataclass(frozen=True)
class JointSpace:
    """The weighted deltas of one layer, each as its singular value decomposition.

    Inputs of weight 0, or without content, are left out.

    Attributes:
        values: (K,) float64, the singular values, one input after the other, each falling. Strengths are in
            them; the sign of a negative one is in its left vectors.
        spans: For each input, its place among the K.
        present: For each input, its place among the deltas given.
        gram_up, gram_down: (K, K) float64, ``U^T U`` and ``V^T V``.
        left, right: (R, K) float64, ``U = source.up @ left`` and ``V = source.down^T @ right``.
        columns: For each input, its place among the R.
        lengths: (R,) float64 each, the lengths of the columns of source.up and of the rows of source.down.
        source: The factors as they were given, side by side.
    """

    values: Tensor
    spans: tuple[slice, ...]
    present: tuple[int, ...]
    gram_up: Tensor
    gram_down: Tensor
    left: Tensor
    right: Tensor
    columns: tuple[slice, ...]
    lengths: tuple[Tensor, Tensor]
    source: LowRank

    @property
    def rank(self) -> int:
        """K, the ranks of all inputs together."""
        return self.values.shape[0]

    def delta(self, left: Tensor, right: Tensor) -> LowRank:
        """``U left right^T V^T``.

        Args:
            left, right: (K, k) float64.

        Returns:
            A delta of rank k; a zero one where no more is left than the rounding noise of a cancellation.
        """
        left_gram, right_gram = left.mT @ self.gram_up @ left, right.mT @ self.gram_down @ right
        size = sum(float(torch.linalg.vector_norm(self.values[span])) for span in self.spans)
        if float((left_gram * right_gram).sum()) <= (NOISE * size) ** 2:
            return nothing(self.source)
        up_lengths, down_lengths = self.lengths
        up = _product(self.source.up, self.left @ left, lengths=up_lengths, wanted=_roots(left_gram))
        down = _product(
            self.source.down, self.right @ right, rows=True, lengths=down_lengths, wanted=_roots(right_gram)
        )
        return LowRank(up, down, float(left.shape[1]), self.source.kernel)

    def delta_of_rows(self, left: Tensor, rows: Tensor) -> LowRank:
        """``U left @ rows``, of left (K, k) float64 and rows (k, in * kh * kw)."""
        if not rows.shape[0]:
            return nothing(self.source)
        wanted = _roots(left.mT @ self.gram_up @ left)
        up = _product(self.source.up, self.left @ left, lengths=self.lengths[0], wanted=wanted)
        return LowRank(up, rows, float(rows.shape[0]), self.source.kernel)

    def rows_of_inputs(self, mixing: Tensor) -> list[Tensor]:
        """For each input i, ``mixing_i^T V_i^T`` (k, in * kh * kw), where mixing_i are i's rows of (K, k).

        Made in float64: last bits that differ between factorisations could move an element over a threshold.
        """
        precise = _double if _has_double(self.source.down.device) else Tensor.float
        return [
            _product(precise(self.source.down[own]), self.right[own, span] @ mixing[span], rows=True).float()
            for own, span in zip(self.columns, self.spans)
        ]


def join(deltas: Sequence[Delta], weights: Sequence[float]) -> JointSpace:
    """The weighted deltas of one layer in common coordinates.

    Raises:
        IncompatibleError: The deltas are not of one shape.
    """
    given, source = _stacked(deltas, weights)
    small = _grams(source)
    lefts, rights, values, present, columns = [], [], [], [], []
    for (index, delta), own in zip(given, _spans([delta.rank for _, delta in given])):
        spectrum = decompose(delta, small=Grams(small.up[own, own], small.down[own, own]))
        rank = numerical_rank(spectrum.values)
        left, right = spectrum.mixing(rank) if rank and spectrum.mixing else (_no_columns(delta.rank),) * 2
        root = spectrum.values[:rank].sqrt()
        lefts.append(left / root)
        rights.append(right / root)
        if rank:
            values.append(spectrum.values[:rank])
            present.append(index)
            columns.append(own)
    left = torch.block_diag(*lefts) if lefts else _no_columns(source.rank)
    right = torch.block_diag(*rights) if rights else _no_columns(source.rank)
    return JointSpace(
        values=torch.cat(values) if values else torch.zeros(0, dtype=torch.float64),
        spans=_spans([part.shape[0] for part in values]),
        present=tuple(present),
        gram_up=left.mT @ small.up @ left,
        gram_down=right.mT @ small.down @ right,
        left=left,
        right=right,
        columns=tuple(columns),
        lengths=(_roots(small.up), _roots(small.down)),
        source=source,
    )


def exact_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> LowRank:
    """``sum_i w_i delta_i``, low-rank also where an input is dense."""
    return _stacked(deltas, weights)[1]


def multiplied(source: LowRank, left: Tensor, right: Tensor) -> LowRank:
    """``source.up @ left @ right^T @ source.down``, without the source's gains; left and right (R, k)."""
    up, down = _product(source.up, left), _product(source.down, right, rows=True)
    return LowRank(up, down, float(left.shape[1]), source.kernel)


def nothing(like: Delta) -> LowRank:
    """A delta of this shape that changes nothing."""
    whole = like.up if isinstance(like, LowRank) else like.weight
    up = torch.zeros((like.out, 1), dtype=torch.float32, device=whole.device)
    return LowRank(up, up.new_zeros((1, like.in_)), 1.0, like.kernel)


def numerical_rank(values: Tensor) -> int:
    """How many of some falling singular values are there, judged by the largest."""
    return int((values > RELATIVE * values[:1]).sum())


def falling_eigh(square: Tensor, least: float = RELATIVE**2) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,), falling, and eigenvectors (K, k) of a positive semidefinite matrix.

    Args:
        square: (K, K) float64.
        least: Part of the largest eigenvalue below which directions are left out.
    """
    values, vectors = torch.linalg.eigh(square)
    kept = values > least * values[-1:].clamp(min=0)
    return values[kept].flip(0), vectors[:, kept].flip(1)


def _stacked(deltas: Sequence[Delta], weights: Sequence[float]) -> tuple[list[tuple[int, LowRank]], LowRank]:
    """The weighted deltas with their places, without those of weight 0, and their sum."""
    check_same_shape(deltas)
    weighted = [(i, scaled(_low_rank(deltas[i]), w)) for i, w in enumerate(weights) if w != 0]
    weighted = [(i, delta) for i, delta in weighted if delta.rank]
    if not weighted:
        return [], nothing(deltas[0])
    return weighted, stack([delta for _, delta in weighted], [1.0] * len(weighted))


def _low_rank(delta: Delta) -> LowRank:
    """A delta with no more components than its shorter side; dense ones come with all they have."""
    if isinstance(delta, Dense):
        spectrum = decompose_dense(delta)
    elif delta.rank > min(delta.out, delta.in_):
        spectrum = decompose(delta)
    else:
        return delta
    return truncate(spectrum, numerical_rank(spectrum.values))


def _grams(delta: LowRank) -> Grams:
    """Gram matrices on the CPU; devices without float64 leave the work to it."""
    up, down = delta.up, delta.down
    if not _has_double(up.device):
        up, down = up.cpu(), down.cpu()
    return Grams(gram(up.mT).cpu(), gram(down).cpu())


def _product(
    factor: Tensor,
    mixing: Tensor,
    *,
    rows: bool = False,
    lengths: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """``factor @ mixing`` of (n, r) in any float dtype and (r, k) float64 on the CPU.

    In float32, unless a factor is float64 or its columns nearly cancel in the result.

    Args:
        rows: ``factor`` is (r, n), and the result (k, n) ``mixing^T @ factor``.
        lengths: (r,) of the columns of ``factor``, where they are known.
        wanted: (k,) lengths of the columns of the result, where they are known.
    """
    if factor.dtype != torch.float64:
        wide = factor.float()
        with full_precision():
            product = _multiplied(wide, mixing, rows)
        lengths = _lengths(wide, rows) if lengths is None else lengths
        wanted = _lengths(product, rows) if wanted is None else wanted
        if bool((lengths @ mixing.abs() <= _LOSS * wanted).all()):
            return product
    if not _has_double(factor.device):
        return _multiplied(factor.cpu().double(), mixing, rows).float().to(factor.device)
    return _multiplied(_double(factor), mixing, rows)


def _multiplied(factor: Tensor, mixing: Tensor, rows: bool) -> Tensor:
    mixing = mixing.to(factor)
    return mixing.mT.contiguous() @ factor if rows else factor @ mixing


def _lengths(factor: Tensor, rows: bool) -> Tensor:
    return torch.linalg.vector_norm(factor, dim=1 if rows else 0).cpu().double()


def _roots(square: Tensor) -> Tensor:
    """Lengths of vectors with this Gram matrix."""
    return square.diagonal().clamp(min=0).sqrt()


def _double(tensor: Tensor) -> Tensor:
    """In float64. Half precision goes by way of float32, which torch does three times as fast."""
    return tensor.double() if tensor.element_size() >= 4 else tensor.float().double()


def _has_double(device: torch.device) -> bool:
    return device.type not in ("mps", "xpu")


def _no_columns(rows: int) -> Tensor:
    return torch.zeros((rows, 0), dtype=torch.float64)


def _spans(lengths: Sequence[int]) -> tuple[slice, ...]:
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    return tuple(slice(start, stop) for start, stop in bounds)
