"""What float64 itself rounds off where inputs cancel, and what is left of a layer that is not written."""

from __future__ import annotations

from dataclasses import replace

from ..delta import Dense, Merged, all_values, last_digits, norm
from ..report import LayerResult

_COUNTS = 1e-8  # Part of a layer above which the report states what float64 loses of it.


def doubt_of(delta: Merged | None) -> float:
    """Norm, at most, of what float64 rounded off; written sums of factors are large enough to be known."""
    return delta.doubt if isinstance(delta, Dense) else 0.0


def all_doubt(delta: Merged | None) -> bool:
    """Whether nothing but rounding is left of the inputs of a whole difference."""
    return isinstance(delta, Dense) and delta.doubt > 0 and norm(delta) <= delta.doubt


def doubted(result: LayerResult, doubt: float) -> LayerResult:
    """The result with its doubt, where that is large enough to count."""
    return replace(result, doubt=doubt) if doubt > _COUNTS * result.exact_sq**0.5 else result


def not_written(delta: Merged | None) -> tuple[float, float]:
    """Squared norm of a delta that is not written, and the norm of its doubt."""
    if delta is None:
        return 0.0, 0.0
    if isinstance(delta, Dense):
        return norm(delta) ** 2, delta.doubt
    spectrum = all_values(delta)
    return spectrum.energy, last_digits(spectrum.size, delta.rank)
