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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...delta import (
    NOISE,
    Delta,
    Dense,
    Grams,
    LowRank,
    Mixed,
    Spectrum,
    as_double,
    check_same_shape,
    decompose,
    decompose_dense,
    gram,
    grams,
    scaled,
    stack,
    truncate,
)

RELATIVE = 1e-6  # Singular values below this part of the largest one count as 0.


@dataclass(frozen=True, eq=False)
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

    def delta(self, left: Tensor, right: Tensor) -> LowRank | Mixed:
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
        small, source = Grams(left_gram, right_gram), self.source
        return Mixed(
            source.up, source.down, self.left @ left, self.right @ right, small, self.lengths, source.kernel
        )

    def delta_of_rows(self, left: Tensor, rows: Tensor) -> LowRank | Mixed:
        """``U left @ rows``, of left (K, k) float64 and rows (k, in * kh * kw)."""
        if not rows.shape[0]:
            return nothing(self.source)
        of_rows = _gram(rows)
        small = Grams(left.mT @ self.gram_up @ left, of_rows)
        lengths = self.lengths[0], _roots(of_rows)
        eye = torch.eye(rows.shape[0], dtype=torch.float64)
        return Mixed(self.source.up, rows, self.left @ left, eye, small, lengths, self.source.kernel)

    def rows_of_inputs(self, mixing: Tensor) -> list[Tensor]:
        """For each input i, ``mixing_i^T V_i^T`` (k, in * kh * kw), where mixing_i are i's rows of (K, k).

        Made in float64: last bits that differ between factorisations could move an element over a threshold.
        """
        down = self.source.down
        rows = []
        for own, span in zip(self.columns, self.spans):
            mixed = (self.right[own, span] @ mixing[span]).mT.contiguous()
            rows.append((mixed.to(down.device) @ as_double(down[own])).float())
        return rows


def join(deltas: Sequence[Delta], weights: Sequence[float]) -> JointSpace:
    """The weighted deltas of one layer in common coordinates.

    Raises:
        IncompatibleError: The deltas are not of one shape.
    """
    given, source = _stacked(deltas, weights)
    small = grams(source)
    lefts, rights, values, present, columns = [], [], [], [], []
    places = _spans([delta.rank for _, delta in given])
    for (index, delta), own in zip(given, places):
        # Without its parts: what one file says in several pieces is not a sum that cancels.
        whole = replace(delta, parts=(), spectra=())
        spectrum = decompose(whole, small=Grams(small.up[own, own], small.down[own, own]))
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
        gram_up=_mixed_gram(small.up, lefts, places),
        gram_down=_mixed_gram(small.down, rights, places),
        left=left,
        right=right,
        columns=tuple(columns),
        lengths=(_roots(small.up), _roots(small.down)),
        source=source,
    )


def exact_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> LowRank:
    """``sum_i w_i delta_i``, low-rank also where an input is dense."""
    return _stacked(deltas, weights)[1]


def with_values(spectrum: Spectrum, values: Tensor, small: Grams) -> Mixed:
    """The delta with a spectrum's leading singular vectors, but with other singular values, all above 0.

    Args:
        small: The Gram matrices of the spectrum's source. Where inputs nearly cancel they hold more
            digits of the result than the new values do.
    """
    source = spectrum.source
    assert source is not None
    assert spectrum.mixing is not None
    left, right = spectrum.mixing(values.shape[0])
    root = (values / spectrum.values[: values.shape[0]]).sqrt()
    left, right = left * root, right * root
    lengths = _roots(small.up), _roots(small.down)
    own = Grams(left.mT @ small.up @ left, right.mT @ small.down @ right)
    return Mixed(source.up, source.down, left, right, own, lengths, source.kernel)


def nothing(like: Delta) -> LowRank:
    """A delta of this shape that changes nothing."""
    whole = like.up if isinstance(like, LowRank) else like.weight
    up = torch.zeros((like.out, 1), dtype=torch.float32, device=whole.device)
    return LowRank(up, up.new_zeros((1, like.in_)), 1.0, like.kernel)


def numerical_rank(values: Tensor) -> int:
    """Number of singular values, given in falling order, that are not negligible beside the largest."""
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


def _gram(rows: Tensor) -> Tensor:
    return gram(rows).cpu()


def _roots(square: Tensor) -> Tensor:
    """Lengths of vectors with this Gram matrix."""
    return square.diagonal().clamp(min=0).sqrt()


def _mixed_gram(square: Tensor, blocks: Sequence[Tensor], places: Sequence[slice]) -> Tensor:
    """``M^T square M`` (K, K) for a block-diagonal M; its blocks and the places of their rows."""
    spans = _spans([block.shape[1] for block in blocks])
    result = square.new_zeros((spans[-1].stop,) * 2) if spans else square.new_zeros((0, 0))
    for i, j in itertools.combinations_with_replacement(range(len(blocks)), 2):
        part = blocks[i].mT @ (square[places[i], places[j]] @ blocks[j])
        result[spans[i], spans[j]] = part
        if i != j:
            result[spans[j], spans[i]] = part.mT
    return result


def _no_columns(rows: int) -> Tensor:
    return torch.zeros((rows, 0), dtype=torch.float64)


def _spans(lengths: Sequence[int]) -> tuple[slice, ...]:
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    return tuple(slice(start, stop) for start, stop in bounds)
