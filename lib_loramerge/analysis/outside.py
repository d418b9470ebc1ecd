"""Whether LoRAs were ever merged into another one, before they are taken out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..delta import Dense, norms_outside
from ..merge.layer import open_merger
from ..merge.layout import LayerPlan, MergePlan
from ..merge.work import Progress, Work
from ..report import percent, relative

_NOT_IN_IT = 0.5  # Share from which on a LoRA was hardly ever merged in.


@dataclass(frozen=True)
class OutsideReport:
    """How much of each LoRA lies outside what a merged one holds.

    Attributes:
        merged: Name of the merged LoRA.
        shares: Name of each other one to ``|B outside| / |B|`` over all its matrices, strengths included;
            those of no matrix that counts are not in it.
    """

    merged: str
    shares: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"outside": self.shares}

    def to_text(self) -> str:
        """As rows below a merge's report."""
        rows = []
        for name, share in self.shares.items():
            rows.append(f"{'Left over':<13}{percent(share)} of {name} lies outside {self.merged}")
            if share > _NOT_IN_IT:
                rows.append(f"{'Warning':<13}{name} seems not to have been merged into {self.merged}")
        return "\n".join(rows)


def outside_of(
    plan: MergePlan,
    *,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> OutsideReport:
    """How much of all LoRAs of a plan but the first lies outside the first.

    Raises:
        LoraMergeError: What a merge would refuse, too.
    """
    count = len(plan.sources)
    with open_merger(plan) as merger:

        def look(layer: LayerPlan) -> list[tuple[float, float]]:
            found = [(0.0, 0.0)] * count
            present = merger.present(layer)
            whole = next((delta for index, _, delta in present if index == 0), None)
            for index, weight, part in present:
                if index and not (isinstance(part, Dense) and part.weight.dim() == 1):
                    out, size = norms_outside(whole, part)
                    found[index] = weight**2 * out, weight**2 * size
            return found

        layers = Work(progress, cancel).each_layer(plan, look, "compare")
    names = [source.path.name for source in plan.sources]
    sums = [[sum(layer[index][side] for layer in layers) for side in (0, 1)] for index in range(count)]
    return OutsideReport(
        merged=names[0],
        shares={names[index]: relative(*sums[index]) for index in range(1, count) if sums[index][1] > 0},
    )
