"""Delta weights: low-rank and dense ones, their sums, sizes, truncations, and what storing them costs."""

from __future__ import annotations

from .cache import Cache
from .core import NOISE, Spectrum, added_to_parts, decompose, truncate
from .counted import all_values, is_counted
from .dense import decompose_dense
from .fair import directions
from .kronecker import Kronecker
from .measure import (
    Overlaps,
    added_by_components,
    conflict_of,
    inner,
    inner_products,
    lost_of_inputs,
    norm,
    norms_outside,
    overlaps,
    relative_error,
    sampled_rows,
)
from .reach import NEAR, largest, near_one, times_two_to
from .rounding import realize
from .settings import full_precision, own_settings
from .small import as_double, gram, grams
from .storing import Stored, cut_layer, cut_layers, round_cut, round_uncut
from .threads import available_cores, helpful_threads, in_turn, parallel_map, raise_if
from .types import (
    Delta,
    Dense,
    Grams,
    LayerDelta,
    LowRank,
    Merged,
    Mixed,
    changed,
    check_same_shape,
    last_digits,
    moved,
    named,
    place_rows,
    scaled,
    stack,
    structured,
    take_rows,
    weighted_sum,
)

__all__ = [
    "NEAR",
    "NOISE",
    "Cache",
    "Delta",
    "Dense",
    "Grams",
    "Kronecker",
    "LayerDelta",
    "LowRank",
    "Merged",
    "Mixed",
    "Overlaps",
    "Spectrum",
    "Stored",
    "added_by_components",
    "added_to_parts",
    "all_values",
    "as_double",
    "available_cores",
    "changed",
    "check_same_shape",
    "conflict_of",
    "cut_layer",
    "cut_layers",
    "decompose",
    "decompose_dense",
    "directions",
    "full_precision",
    "gram",
    "grams",
    "helpful_threads",
    "in_turn",
    "inner",
    "inner_products",
    "is_counted",
    "largest",
    "last_digits",
    "lost_of_inputs",
    "moved",
    "named",
    "near_one",
    "norm",
    "norms_outside",
    "overlaps",
    "own_settings",
    "parallel_map",
    "place_rows",
    "raise_if",
    "realize",
    "relative_error",
    "round_cut",
    "round_uncut",
    "sampled_rows",
    "scaled",
    "stack",
    "structured",
    "take_rows",
    "times_two_to",
    "truncate",
    "weighted_sum",
]
