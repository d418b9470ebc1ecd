"""How much stronger a sum of LoRAs is than its strongest LoRA, and strengths at which it is not.

With ``D_i = w_i d_i`` the sum has the norm ``|sum_i D_i| = (sum_ij <D_i, D_j>)^0.5``: of n unrelated LoRAs of
one size n^0.5 times that of each, of n alike ones n times. All strengths times

    min(1, max_i |D_i| / |sum_i D_i|)

bring it to the norm of the strongest of them, for the denoiser and for the text encoders each. One factor for
all keeps their balance, and that of the blocks. LoRAs that cancel in part are not made stronger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..delta import inner_products
from ..errors import Sentence
from ..recipe import LoraInput
from .input_notes import loudness_notes
from .layer import Merger, open_merger
from .layout import LayerPlan, MergePlan, predicted_bytes
from .work import Progress, Work

PARTS = {"unet": "denoiser", "te": "text encoder"}
_DIGITS = 4  # Of a strength that was computed.


@dataclass(frozen=True)
class Sizes:
    """Squared norms in one layer: of each LoRA, 0 where it has no part in it, and of their sum."""

    layer: LayerPlan
    loras: Sequence[float]
    total: float

    @property
    def part(self) -> str:
        return "unet" if self.layer.component == "unet" else "te"


def sizes_of(layer: LayerPlan, products: Tensor, owners: Sequence[int], count: int) -> Sizes:
    """From the inner products (n, n) of the weighted inputs of a layer.

    Args:
        owners: The LoRA of each of them; one that was given twice counts once.
        count: Number of LoRAs.
    """
    squares = [0.0] * count
    for owner in set(owners):
        places = [place for place, other in enumerate(owners) if other == owner]
        squares[owner] = max(0.0, float(products[places][:, places].sum()))
    return Sizes(layer, squares, max(0.0, float(products.sum())))


def ratios(sizes: Iterable[Sizes], name: Callable[[Sizes], str]) -> dict[str, float]:
    """By block or by part: the norm of the sum as a multiple of that of its strongest LoRA there."""
    sums: dict[str, list[float]] = {}
    for size in sizes:
        row = sums.setdefault(name(size), [0.0] * (len(size.loras) + 1))
        for place, square in enumerate((*size.loras, size.total)):
            row[place] += square
    return {key: (row[-1] / max(row[:-1])) ** 0.5 for key, row in sorted(sums.items()) if max(row[:-1]) > 0}


def quieter(given: LoraInput, louder: Mapping[str, float]) -> LoraInput:
    """An input at strengths that bring the sum to the norm of its strongest LoRA.

    Args:
        louder: ``ratios`` by part.
    """

    def times(strength: float | None, part: str) -> float | None:
        factor = min(1.0, 1 / max(louder.get(part, 1.0), 1e-9))
        return strength if strength is None or factor == 1 else float(f"{strength * factor:.{_DIGITS}g}")

    te1, te2, te3 = (times(one, "te") for one in (given.te1, given.te2, given.te3))
    te, unet = times(given.te, "te"), times(given.unet, "unet")
    assert te is not None
    assert unet is not None
    return replace(given, te=te, unet=unet, te1=te1, te2=te2, te3=te3)


def normalized(
    plan: MergePlan,
    *,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> MergePlan:
    """The plan at the strengths that its recipe's ``normalize`` asks for, with numbers in its place."""
    if plan.recipe.normalize is None:
        return plan
    with open_merger(plan) as merger:
        sizes = Work(progress, cancel).each_layer(plan, partial(_look, merger), "look")
    louder = ratios((size for size in sizes if size is not None), lambda size: size.part)
    inputs = [quieter(entry.input, louder) for entry in plan.sources]
    layers = tuple(
        replace(
            layer,
            inputs=tuple(
                (index, inputs[index].strength(layer.component), block) for index, _, block in layer.inputs
            ),
        )
        for layer in plan.layers
    )
    recipe = replace(
        plan.recipe,
        inputs=tuple(quieter(given, louder) for given in plan.recipe.inputs),
        normalize=None,
    )
    changed = replace(
        plan,
        recipe=recipe,
        layers=layers,
        sources=tuple(replace(entry, input=given) for entry, given in zip(plan.sources, inputs, strict=True)),
        warnings=(
            *(text for text in plan.warnings if text not in loudness_notes(plan.recipe)),
            *_notes(louder),
        ),
    )
    return replace(changed, predicted_bytes=predicted_bytes(changed))


def _look(merger: Merger, layer: LayerPlan) -> Sizes | None:
    found = merger.present(layer)
    if not found:
        return None
    weights = torch.tensor([weight for _, weight, _ in found], dtype=torch.float64)
    products = inner_products([delta for _, _, delta in found]) * weights[:, None] * weights
    return sizes_of(layer, products, [merger.loras[index] for index, _, _ in found], len(set(merger.loras)))


def _notes(louder: Mapping[str, float]) -> list[str]:
    """What was done to the strengths."""
    notes: list[str] = [
        Sentence(
            "All strengths for the {part} were multiplied by {factor}: the sum is no stronger than its "
            "strongest LoRA.",
            Sentence(PARTS[part]),
            f"{1 / ratio:.3g}",
        )
        for part, ratio in louder.items()
        if ratio > 1
    ]
    return notes or ["The sum is no stronger than its strongest LoRA, so the strengths stay as they are."]
