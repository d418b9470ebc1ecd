"""The singular components of a merged layer, and what each of them holds of every input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..delta import (
    Dense,
    LowRank,
    Spectrum,
    added_by_components,
    added_to_parts,
    decompose,
    decompose_dense,
    is_counted,
    lost_of_inputs,
    truncate,
)
from .layer import Merger
from .layout import LayerPlan
from .merged import Given


@dataclass(frozen=True, eq=False)
class Components:
    """What is known of a layer before any rank is chosen.

    Attributes:
        spectrum: Its singular values, without vectors.
        sources: The source of each input that has a part in it.
        added: (n, k) inner product of each weighted input with each component, the strongest first.
        whole: (n,) the same with the plain sum of all inputs.
        own: (n,) squared norm of each weighted input.
    """

    spectrum: Spectrum
    sources: Sequence[int]
    added: np.ndarray
    whole: np.ndarray
    own: np.ndarray

    def lost(self, ranks: Sequence[int]) -> list[tuple[int, np.ndarray, float]]:
        """As ``Lost``, for each input, at several ranks; more than there are is all."""
        held = np.cumsum(np.pad(self.added, ((0, 0), (1, 0))), axis=1)
        places = np.minimum(np.asarray(ranks, dtype=np.int64), held.shape[1] - 1)
        rows = self.whole[:, None] - held[:, places]
        return [(source, row, float(own)) for source, row, own in zip(self.sources, rows, self.own)]


def components(merger: Merger, layer: LayerPlan) -> Components | None:
    """Read, merge and decompose a layer, with its singular vectors.

    Returns:
        None where that would cost more than the singular values by much: modes that choose single elements,
        whole matrices beside factors; and where there is nothing to decompose.
    """
    if layer.vector or merger.plan.method.elementwise:
        return None
    given = merger.given(layer)
    merged, _ = merger.combined(layer, given)
    if merged is None or (not isinstance(merged, Dense) and is_counted(merged)):
        return None
    sources = [layer.inputs[entry.place][0] for entry in given]
    spectrum = decompose_dense(merged) if isinstance(merged, Dense) else decompose(merged)
    if len(given) == 1 and merger.plan.method.exact:
        squares = spectrum.values.numpy()[None] ** 2
        energy = np.array([spectrum.energy])
        return Components(_values(spectrum), sources, squares, energy, energy)
    parts = isinstance(merged, LowRank) and len(merged.parts) == len(given) and merger.plan.method.exact
    found = added_to_parts(spectrum) if parts and spectrum.source is merged else None
    added, sizes = (part.numpy() for part in found or _by_vectors(given, spectrum))
    return Components(_values(spectrum), sources, added, sizes[:, 0], sizes[:, 1])


def _values(spectrum: Spectrum) -> Spectrum:
    """Without vectors, which hold the layer."""
    return replace(spectrum, source=None, mixing=None, small=None, solved=None)


def _by_vectors(given: Sequence[Given], spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """As :func:`added_to_parts`, from the singular vectors themselves."""
    deltas, weights = [entry.delta for entry in given], [entry.weight for entry in given]
    sizes = lost_of_inputs(deltas, weights, None)
    if not spectrum.rank:
        return sizes.new_zeros(len(given), 0), sizes
    return added_by_components(deltas, weights, truncate(spectrum, spectrum.rank)), sizes
