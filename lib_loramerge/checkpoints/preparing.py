"""What has to be true before a bake: everything is checked from headers, and nothing is written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..blocks import Presets
from ..errors import IncompatibleError, RecipeError, Sentence, UnsupportedError, counted
from ..files import size_text
from ..merge import LayerPlan, MergePlan, open_source, plan_merge
from ..merge.host_target import some_layers
from ..merge.input_notes import input_notes
from ..merge.layer import open_merger
from ..merge.loudness import normalized
from ..models import CheckpointKey, component
from ..recipe import STRENGTH_LIMIT, MergeRecipe
from ..recipe.check import check_number
from ..recipe.rank_rules import with_rank
from .baking import Bake, BakeSettings
from .changes import Change, Difference, LayerChange, Piece
from .outcome import shortened
from .reading import EMA, Checkpoint, LayerRows, Span, vaes_differ

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def prepare_bake(
    recipe: MergeRecipe,
    base: Path,
    *,
    find: Callable[[str], Path],
    presets: Presets,
    settings: BakeSettings | None = None,
    check_hashes: bool = True,
    stop: Callable[[], None] | None = None,
) -> Iterator[Bake]:
    """Check from headers that a recipe can be baked into a checkpoint.

    Args:
        check_hashes: Compare the LoRAs with the hashes of a stored recipe, which reads them whole.
        stop: Called often meanwhile; what it raises ends that.

    Raises:
        LoraMergeError: Whatever stops it, before any work.
    """
    settings = settings or BakeSettings()
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(base, settings.encoders))
        recipe = _for_checkpoint(recipe, checkpoint, find)
        plan = plan_merge(recipe, find=find, presets=presets, base=base, check_hashes=check_hashes, stop=stop)
        plan = normalized(plan, cancel=_asking(stop))
        merger = stack.enter_context(open_merger(plan))
        for reader in merger.readers:
            reader.base = checkpoint  # It has the separate text encoders, too.
        notes: set[str] = set()
        parts, skipped = _parts(checkpoint, plan, recipe.skip_unsupported)
        changes: dict[str, Change] = {
            key: LayerChange(merger, checkpoint, checkpoint.info(key).shape, entries, notes)
            for key, entries in parts.items()
        }
        warnings = [*input_notes(plan.sources), *_ema_note(checkpoint, settings)]
        if any(entry.input.te < 0 or entry.input.unet < 0 for entry in plan.sources) and any(
            checkpoint.info(key).dtype not in ("F32", "F64") for key in changes
        ):
            warnings.append("A checkpoint that was baked in less than float32 does not come back exactly.")
        if plan.embeddings:
            names = ", ".join(sorted({name.partition(".")[0] for name in plan.embeddings}))
            warnings.append(
                Sentence("Textual inversion {name} stays in its LoRA; a checkpoint cannot hold it.", names)
            )
        yield Bake(
            checkpoint,
            settings,
            recipe.seed,
            changes,
            len({layer.layer for entries in parts.values() for layer, _, _ in entries}),
            plan,
            [
                Sentence(
                    "{file}: text encoder {te}, denoiser {unet}",
                    e.path.name,
                    f"{e.input.te:g}",
                    f"{e.input.unet:g}",
                )
                for e in plan.sources
            ],
            [entry.path.stem for entry in plan.sources],
            warnings,
            [*plan.skipped, *skipped],
            notes,
            unchanged=merger.check_unchanged,
        )


def _asking(stop: Callable[[], None] | None) -> Callable[[], bool] | None:
    """``stop`` for work that asks: it raises by itself."""
    return stop and (lambda: bool(stop()))


def _ema_note(checkpoint: Checkpoint, settings: BakeSettings) -> list[str]:
    infos = [checkpoint.info(key) for key in checkpoint.keys if key.startswith(EMA)]
    size = sum(info.end - info.start for info in infos)
    if settings.drop_ema or size < 1_000_000:
        return []
    return [
        Sentence(
            "{size} of EMA weights are in it, which no WebUI uses; --drop-ema leaves them out.",
            size_text(size),
        )
    ]


def _for_checkpoint(recipe: MergeRecipe, checkpoint: Checkpoint, find: Callable[[str], Path]) -> MergeRecipe:
    """The recipe for the checkpoint's base model, at full rank: nothing is cut.

    Raises:
        IncompatibleError: A LoRA is for another base model.
    """
    from ..methods import METHODS

    identity, label = checkpoint.architecture.id, checkpoint.architecture.label
    named = False
    for entry in recipe.inputs:
        source = open_source(find(entry.name))
        ids = {source.architecture.id, *(name for name, _ in source.candidates)}
        if identity not in ids and source.architecture.id != "unknown":
            raise IncompatibleError(
                "{lora} is for {model}, {file} is {other_model}. Choose a {wanted} checkpoint.",
                source.path.name,
                source.base_model,
                checkpoint.path.name,
                label,
                source.architecture.label,
            )
        named |= source.architecture.id != identity or len({name for name, _ in source.candidates}) > 1
    method = METHODS.get(recipe.mode)
    return replace(
        with_rank(recipe, "full" if method is not None and method.uses_rank else "same"),
        host=None,
        base_model=identity if named else recipe.base_model,
    )


def _parts(
    checkpoint: Checkpoint, plan: MergePlan, skip: bool
) -> tuple[dict[str, list[tuple[LayerPlan, CheckpointKey, bool]]], list[str]]:
    """Which layers change each tensor, and sentences on what the checkpoint lacks."""
    found: dict[str, list[tuple[LayerPlan, CheckpointKey, bool]]] = {}
    missing: list[LayerPlan] = []
    without_bias: list[str] = []
    for layer in plan.layers:
        parts = [p for i, _, _ in layer.inputs for p in plan.sources[i].source.layers[layer.layer]]
        source = checkpoint.where(layer.layer)
        if not source:
            missing.append(layer)
            continue
        if any(part.facts.kind != "bias" for part in parts):
            _check_shape(checkpoint, layer)
            for place in source:
                found.setdefault(place.key, []).append((layer, place, False))
        if layer.bias:
            places = checkpoint.where(layer.layer, bias=True)
            if not places:
                without_bias.append(layer.layer)
            for place in places:
                found.setdefault(place.key, []).append((layer, place, True))
    skipped = _missing(checkpoint, plan, missing, skip)
    if without_bias and not skip:
        raise UnsupportedError(
            "{file} has no bias in {layer}{more}, and the LoRA changes one. --skip-unsupported leaves "
            "that out.",
            checkpoint.path.name,
            without_bias[0],
            counted(len(without_bias) - 1, " and {count} more layer", " and {count} more layers")
            if len(without_bias) > 1
            else "",
        )
    skipped += [Sentence("{layer}: the checkpoint has no bias there", name) for name in without_bias]
    if not found:
        raise RecipeError("Nothing would change: the checkpoint has none of the layers with a strength.")
    return found, skipped


def _missing(checkpoint: Checkpoint, plan: MergePlan, layers: Sequence[LayerPlan], skip: bool) -> list[str]:
    if not layers:
        return []
    name = checkpoint.path.name
    if skip:
        return [Sentence("{layer}: not in {file}", layer.layer, name) for layer in layers]
    first = layers[0]
    source = plan.sources[first.inputs[0][0]].path.name
    parts = {component(layer.layer) for layer in layers}
    of_part = [layer for layer in plan.layers if component(layer.layer) in parts]
    if "unet" not in parts and len(of_part) == len(layers):
        encoders = plan.architecture.encoders
        names = ", ".join(sorted({encoders[part].comfy for part in parts if part in encoders})) or Sentence(
            "text encoders"
        )
        raise IncompatibleError(
            "{file} has no text encoder, and {lora} has {layers} for {encoders}. Set that strength to 0 "
            "({tag}:te=0), or bake on the command line with --base-te FILE.",
            name,
            source,
            counted(len(layers), "{count} layer", "{count} layers"),
            names,
            Path(source).stem,
        )
    raise IncompatibleError(
        "{file} lacks {layers} that {lora} changes. Choose another checkpoint of {model}, or leave them out "
        "(--skip-unsupported)."
        if "unet" in parts
        else "{file} lacks {layers} that {lora} changes. Choose another checkpoint of {model}, set that "
        "part's strength to 0 (te=0), or leave them out (--skip-unsupported).",
        name,
        some_layers([layer.layer for layer in layers]),
        source,
        checkpoint.architecture.label,
    )


def _check_shape(checkpoint: Checkpoint, layer: LayerPlan) -> None:
    shape = checkpoint.shape(checkpoint.architecture.id, layer.layer)
    numbers = layer.out if layer.vector else layer.out * layer.width
    wider = len(shape) == 4 and shape[0] == layer.out and shape[1] > layer.in_ and shape[2:] == layer.kernel
    if math.prod(shape) != numbers and not (wider and layer.in_ == 4):
        raise IncompatibleError(
            "{layer} is {shape} in {file}, and the LoRAs are for {other_shape}. Choose their own base model.",
            layer.layer,
            " x ".join(map(str, shape)),
            checkpoint.path.name,
            " x ".join(map(str, (layer.out, layer.in_, *layer.kernel))),
        )


@contextmanager
def prepare_difference(
    base: Path,
    tuned: Path,
    minus: Path,
    strength: float,
    *,
    settings: BakeSettings | None = None,
    seed: int = 0,
) -> Iterator[Bake]:
    """Check that what one checkpoint is more than another can be added to a third, in one pass.

    Raises:
        LoraMergeError: Whatever stops it, before any work.
    """
    settings = settings or BakeSettings()
    check_number("strength", strength, -STRENGTH_LIMIT, STRENGTH_LIMIT)
    if strength == 0:
        raise RecipeError("The strength is 0, so nothing would change. Set another one.")
    if os.path.exists(tuned) and os.path.exists(minus) and os.path.samefile(tuned, minus):
        raise RecipeError("--add and --minus are the same file, so nothing would change.")
    with (
        Checkpoint(base, settings.encoders) as checkpoint,
        Checkpoint(tuned) as more,
        Checkpoint(minus) as less,
    ):
        for other in (more, less):
            if other.architecture.id != checkpoint.architecture.id:
                raise IncompatibleError(
                    "{file} is {model}, {other} is {other_model}. All three must be of one base model.",
                    other.path.name,
                    other.architecture.label,
                    checkpoint.path.name,
                    checkpoint.architecture.label,
                )
        changes, layers, skipped = _differences(checkpoint, more, less, strength)
        if not changes:
            raise IncompatibleError("The three checkpoints have no layer in common.")

        def unchanged() -> None:
            more.check_unchanged()
            less.check_unchanged()

        warnings = _ema_note(checkpoint, settings)
        if vaes_differ(more, less):
            warnings.append(
                "The VAEs differ, and no VAE is changed: choose that VAE in the WebUI to get the same "
                "colours."
            )
        yield Bake(
            checkpoint,
            settings,
            seed,
            changes,
            layers,
            None,
            [f"{tuned.name} minus {minus.name}, times {strength:g}"],
            [tuned.stem, minus.stem],
            warnings,
            shortened(skipped),
            set(),
            [file.path for other in (more, less) for file in other.files],
            unchanged,
        )


def _differences(
    checkpoint: Checkpoint, more: Checkpoint, less: Checkpoint, strength: float
) -> tuple[dict[str, Change], int, list[str]]:
    """What is added to each tensor, how many layers that changes, and sentences on what is left out."""
    pieces: dict[str, list[Piece]] = {}
    layers, skipped = 0, list[str]()
    shared = [layer for layer in more.layers if layer in less.layers]
    for layer in dict.fromkeys([*checkpoint.layers, *shared]):
        for bias in (False, True):
            own, *others = (one.layer_rows(layer, bias=bias) for one in (checkpoint, more, less))
            if own is None or others[0] is None or others[1] is None:
                skipped += [] if bias else [Sentence("{layer}: not in all three checkpoints", layer)]
                continue
            if not _is_alike(layer, own, others[0], others[1]):
                text = "{layer}: of another shape in the other checkpoints"
                skipped += [] if bias else [Sentence(text, layer)]
                continue
            for place in own.places:
                tuned, base = (_tensor_rows(part, place, own.width) for part in (others[0], others[1]))
                # A layer that is stored turned is a whole tensor.
                rows = checkpoint.info(place.key).shape[0] if place.transposed else 0
                spans = [Span(0, 0, rows)] if place.transposed else checkpoint.spans(place)
                pieces.setdefault(place.key, []).extend((span, tuned, base) for span in spans)
            layers += not bias
    changes: dict[str, Change] = {
        key: Difference(parts, strength, math.prod(checkpoint.info(key).shape[1:]))
        for key, parts in pieces.items()
    }
    return changes, layers, skipped


def _is_alike(layer: str, own: LayerRows, more: LayerRows, less: LayerRows) -> bool:
    """Whether a difference of two layers has the rows of a third one, and all or the first of its columns."""
    if not own.count == more.count == less.count or more.width != less.width:
        return False
    if own.width == more.width:
        return True
    # An inpainting model's first convolution reads the picture's channels first, as A1111 has it.
    shapes = [one.checkpoint.shape(one.checkpoint.architecture.id, layer) for one in (own, more, less)]
    return (
        own.width > more.width
        and len({(len(shape), shape[2:]) for shape in shapes}) == 1
        and (len(shapes[0]) == 4 and shapes[1][1] == 4)
    )


def _tensor_rows(layer: LayerRows, place: CheckpointKey, width: int) -> Callable[[int, int], Tensor]:
    """Reads a layer as the rows of a tensor that holds it with rows of ``width`` numbers."""
    if place.transposed:
        return lambda first, last: layer.read(0, layer.count).T[first:last]
    if layer.width == width:
        return layer.read
    from torch.nn.functional import pad

    return lambda first, last: pad(layer.read(first, last), (0, width - layer.width))
