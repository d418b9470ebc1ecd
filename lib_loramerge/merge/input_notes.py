"""What a plan says of its inputs before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..adapters import ALPHA_ZERO
from ..delta.device import WITHOUT_DOUBLE
from ..errors import Sentence, counted
from ..recipe import MergeRecipe
from .noise import noise
from .sources import some_text

if TYPE_CHECKING:
    from ..methods import MergeMethod
    from .layout import LayerPlan, SourcePlan

# LoRAs that change how many steps sampling takes; their deltas are large and brittle.
_STEP_DISTILLED = ("lcm", "lightning", "turbo", "hyper-sd", "hypersd", "hyper_sd", "dmd2", "tcd")
# Kinds whose rank is a product of the ranks that they were trained at, and what people call a large one.
_PRODUCTS = frozenset({"loha", "loha_tucker", "lokr"})
_LARGE_RANK = 128
# Accelerators without float64, or with an emulated one.


def input_notes(plans: Sequence[SourcePlan]) -> list[str]:
    """Sentences on single files: few-step LoRAs, strength 0, what their adapters are, one file twice."""
    notes: list[str] = []
    for plan in plans:
        source = plan.source
        title = f"{source.path.stem} {source.header.metadata.get('ss_output_name', '')}".lower()
        if len(plans) > 1 and any(word in title for word in _STEP_DISTILLED):
            notes.append(
                Sentence(
                    "{file} looks like a few-step LoRA (LCM, Lightning ...). Merged, its strength can no "
                    "longer be set apart from the others; most people keep such a file separate.",
                    source.path.name,
                )
            )
        if plan.input.te == 0 and plan.input.unet == 0:
            notes.append(Sentence("{file} has strength 0 and changes nothing.", source.path.name))
        encoders = source.architecture.encoders
        notes += [
            Sentence(
                "{file}: {field} changes nothing, as {model} has no such text encoder.",
                source.path.name,
                part,
                source.base_model,
            )
            for part in ("te1", "te2", "te3")
            if getattr(plan.input, part) is not None
            and encoders
            and part not in encoders
            and not (part == "te1" and "te" in encoders)
        ]
        notes += [
            Sentence("{file}: {note}", source.path.name, Sentence(note)) for note in sorted(source.notes())
        ]
    notes += _noise_notes(plans)
    paths = Counter(plan.path for plan in plans)
    notes += [
        Sentence("{file} is in the recipe {count} times.", path.name, count)
        for path, count in paths.items()
        if count > 1
    ]
    return notes


def _noise_notes(plans: Sequence[SourcePlan]) -> list[str]:
    kinds: dict[str, str] = {}
    for plan in plans:
        kind = noise(plan.source)
        if kind is not None:
            kinds.setdefault(kind, plan.source.path.name)
    if len(kinds) < 2:
        return []
    return [
        Sentence(
            "{high} is for Wan 2.2's high-noise model and {low} for its low-noise model. One file of both "
            "suits neither: merge the high ones and the low ones each on their own.",
            kinds["high"],
            kinds["low"],
        )
    ]


def layer_notes(found: Iterable[tuple[str, str]]) -> list[str]:
    """What the numbers of layers showed, each sentence once; one on single layers names them.

    Args:
        found: Layer and sentence, the file's name before it or not.
    """
    layers: dict[str, list[str]] = {}
    for layer, note in found:
        layers.setdefault(note, []).append(layer)
    return sorted(_with_layers(Sentence(note), tuple(names)) for note, names in layers.items())


def _with_layers(note: Sentence, layers: tuple[str, ...]) -> Sentence:
    if note == ALPHA_ZERO:
        return _alpha_zero(layers)
    return Sentence(note.key, *(_alpha_zero(layers) if part == ALPHA_ZERO else part for part in note.parts))


def _alpha_zero(layers: tuple[str, ...]) -> Sentence:
    return Sentence(
        "alpha is 0 in {layers} ({some}), so nothing changes there: the WebUIs apply the stored number.",
        counted(len(layers), "{count} layer", "{count} layers"),
        some_text(layers),
    )


def rank_notes(plans: Sequence[SourcePlan], layers: Sequence[LayerPlan], recipe: MergeRecipe) -> list[str]:
    """LoHa and LoKr are exact at the product of their ranks, which nobody has in mind who asks for none."""
    if isinstance(recipe.rank, int) or recipe.own_ranks:
        return []
    expanded = [
        layer.rank
        for layer in layers
        if layer.rank is not None and any(_is_product(plans[index], layer) for index, _, _ in layer.inputs)
    ]
    largest = max(expanded, default=0)
    if largest <= _LARGE_RANK:
        return []
    return [
        Sentence(
            "LoHa and LoKr layers are exact only at large ranks, here up to {largest}, so the file becomes "
            "large. Ask for a rank (--rank 32), a share of the norm (--retain 0.95) or a size (--size) for "
            "a smaller one.",
            largest,
        )
    ]


def loudness_notes(recipe: MergeRecipe) -> list[str]:
    """What ``normalize`` will do to the strengths."""
    if recipe.normalize is None:
        return []
    return ["All strengths will be lowered until the sum is no stronger than its strongest LoRA."]


def unused_rank_notes(recipe: MergeRecipe, method: MergeMethod) -> list[str]:
    """A method that keeps all ranks passes over a rank, which its user should know."""
    if method.uses_rank or (isinstance(recipe.rank, str) and recipe.conv_rank is None):
        return []
    return [
        Sentence(
            "Mode {mode} keeps all ranks, so the rank that was given does not count. Mode svd cuts to it.",
            method.name,
        )
    ]


def device_notes(recipe: MergeRecipe) -> list[str]:
    """A device that cannot do the arithmetic."""
    if recipe.device.partition(":")[0] not in WITHOUT_DOUBLE:
        return []
    return [
        Sentence(
            "{device} has no 64-bit numbers, which exact sums need, so the CPU does the work.", recipe.device
        )
    ]


def _is_product(plan: SourcePlan, layer: LayerPlan) -> bool:
    return any(part.facts.kind in _PRODUCTS for part in plan.source.layers[layer.layer])
