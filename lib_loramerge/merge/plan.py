"""What a merge will do, decided from headers alone.

A plan reads no tensor and allocates nothing of size, so that a tab can make
one at every change of a form. Everything that can be refused before work is
refused here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .. import blocks, dialects, models
from ..errors import IncompatibleError, RecipeError, Sentence, UnsupportedError, joined
from ..files import LORA_SUFFIXES, model_hash
from ..recipe import LoraInput, MergeRecipe, check_params, nearest_hint
from .base_model import decide
from .host_notes import host_notes
from .host_target import for_the_host, spelling_for
from .input_notes import device_notes, input_notes, loudness_notes, rank_notes, unused_rank_notes
from .layout import LayerPlan, MergePlan, SourcePlan, predicted_bytes
from .plan_layers import base_checkpoint, plan_layers
from .sources import Source, open_source

if TYPE_CHECKING:
    from ..methods import MergeMethod


def plan_merge(
    recipe: MergeRecipe,
    *,
    find: Callable[[str], Path],
    presets: blocks.Presets,
    base: Path | None = None,
    check_hashes: bool = True,
    stop: Callable[[], None] | None = None,
) -> MergePlan:
    """Decide everything about a merge from the headers of its files.

    Args:
        find: LoRA name, as the recipe has it, to its file; raises when there is none.
        base: Base model checkpoint, for adapters that need one.
        check_hashes: Refuse a source whose bytes differ from the hash that the
            recipe states. Reads such sources whole.
        stop: Called often meanwhile; what it raises ends the planning.

    Raises:
        LoraMergeError: Whatever stops this merge, before any work.
    """
    method, params = check_method(recipe)
    sources = [open_source(find(entry.name)) for entry in recipe.inputs]
    if check_hashes:
        _check_hashes(recipe.inputs, sources, stop)
    found = decide(sources, recipe.base_model, recipe.dialect)
    sources, architecture = list(found.sources), found.architecture
    if found.dialect != models.COMFY:
        recipe = replace(recipe, dialect=found.dialect)
    skipped = _leftovers(sources, recipe.skip_unsupported)
    _refuse_two_spellings(sources)
    spelling = spelling_for(recipe.host, found.dialect, architecture, sources[0].style)
    _check_base(sources, base)
    reach: list[str] = []
    plans = tuple(
        SourcePlan(entry, source, block_weights(entry, source, presets, f"{recipe.seed}:{index}", reach))
        for index, (entry, source) in enumerate(zip(recipe.inputs, sources, strict=True))
    )
    with base_checkpoint(base, sources) as checkpoint:
        layers, left_out = plan_layers(plans, architecture.id, recipe, method, checkpoint)
    layers, nameless = _with_names(layers, architecture.id, recipe, spelling.dialect)
    skipped += nameless
    if not layers:
        raise RecipeError("Every layer has weight 0, so there is nothing to merge. Set a non-zero strength.")
    dtype, notes = _output_dtype(recipe, sources)
    embeddings, clashes = _embeddings(plans)
    layers, embeddings, dropped = for_the_host(recipe.host, spelling, architecture, layers, embeddings)
    plan = MergePlan(
        recipe=_resolved(recipe, plans),
        method=method,
        params=params,
        sources=plans,
        architecture=architecture,
        dialect=spelling.dialect,
        style=spelling.style,
        layers=layers,
        left_out=left_out,
        embeddings=embeddings,
        dtype=dtype,
        base=base,
        predicted_bytes=0,
        ranks_known=recipe.own_ranks is None,
        warnings=(
            *found.notes,
            *reach,
            *input_notes(plans),
            *rank_notes(plans, layers, recipe),
            *unused_rank_notes(recipe, method),
            *device_notes(recipe),
            *loudness_notes(recipe),
            *notes,
            *clashes,
            *host_notes(architecture, spelling, recipe.host, layers, len(embeddings)),
        ),
        skipped=(*skipped, *dropped),
        candidates=found.candidates,
    )
    return replace(plan, predicted_bytes=predicted_bytes(plan))


def check_method(recipe: MergeRecipe) -> tuple[MergeMethod, dict[str, Any]]:
    """The recipe's merge method with all of its parameters, checked.

    Raises:
        RecipeError: Unknown method or parameter, a value out of range, or a
            number of inputs that the method cannot take.
    """
    from ..methods import METHODS

    if recipe.mode not in METHODS:
        hint = nearest_hint(recipe.mode, METHODS)
        raise RecipeError(
            "There is no mode {mode}.{hint} Modes: {modes}.", repr(recipe.mode), hint, ", ".join(METHODS)
        )
    method = METHODS[recipe.mode]
    params = check_params(method.params, recipe.params, mode=method.name)
    count = len(recipe.inputs)
    if count < method.minimum or (method.maximum is not None and count > method.maximum):
        wanted = (
            Sentence("exactly {minimum}", method.minimum)
            if method.minimum == method.maximum
            else Sentence("at least {minimum}", method.minimum)
        )
        if method.maximum is not None and method.minimum != method.maximum:
            wanted = Sentence("{minimum} to {maximum}", method.minimum, method.maximum)
        raise RecipeError("Mode {mode} merges {wanted} LoRAs, got {count}.", method.name, wanted, count)
    if not method.uses_rank:
        for rule in ("retain", "size", "keep"):
            if getattr(recipe, rule) is not None:
                raise RecipeError(
                    "Mode {mode} keeps all ranks, so it cannot hold to a given {rule}. Leave that out, or "
                    "use mode svd.",
                    method.name,
                    rule,
                )
    if (recipe.keep is not None or recipe.fair) and not (method.exact and method.uses_rank):
        rule = "keep" if recipe.keep is not None else "fair"
        raise RecipeError(
            "{rule} shares out the exact sum, and mode {mode} makes something else. Leave it out, or use "
            "mode svd.",
            rule,
            method.name,
        )
    if recipe.normalize is not None and not method.exact:
        raise RecipeError(
            "normalize brings down the exact sum, and mode {mode} makes something else. Leave it out, or "
            "use mode svd.",
            method.name,
        )
    return method, params


def _check_hashes(
    inputs: Sequence[LoraInput], sources: Sequence[Source], stop: Callable[[], None] | None
) -> None:
    for entry, source in zip(inputs, sources, strict=True):
        # Hosts show the first 8 to 12 digits of a hash; a recipe written by hand may have those.
        if entry.hash and not model_hash(source.path, stop).startswith(entry.hash):
            raise RecipeError(
                "{file} is not the file this recipe was made with: its contents have changed. Find the "
                "original, or allow changed sources (--allow-changed-sources).",
                source.path.name,
            )


def _leftovers(sources: Sequence[Source], skip: bool) -> tuple[str, ...]:
    """Refuse what would be lost, or list it when the user allowed that."""
    if not skip:
        for source in sources:
            source.refuse_leftovers()
        return ()
    texts: list[str] = []
    for source in sources:
        texts += [
            Sentence("{file}: tensor {key} is not understood", source.path.name, key)
            for key in source.unknown
        ]
        texts += list(source.unsupported)
        if not source.layers:
            raise UnsupportedError(
                "{file}: nothing in it can be merged. {why}", source.path.name, texts[0] if texts else ""
            )
    return tuple(texts)


def _refuse_two_spellings(sources: Sequence[Source]) -> None:
    """Layers that no table knows must not meet under two spellings: hosts would keep one of them."""
    seen: dict[str, tuple[str, Source]] = {}
    for source in sources:
        for layer in source.layers:
            name, before = seen.setdefault(models.plain_path(layer), (layer, source))
            if name != layer:
                raise IncompatibleError(
                    "{first} has {layer} and {second} has {other_layer}, which look like two spellings of "
                    "one layer of a model that is not known. Load each in a file of its own.",
                    before.path.name,
                    name,
                    source.path.name,
                    layer,
                )


def _check_base(sources: Sequence[Source], base: Path | None) -> None:
    if base is not None:
        return
    for source in sources:
        for parts in source.layers.values():
            for part in parts:
                if part.facts.needs_base:
                    raise UnsupportedError(
                        "{file}: {layer} is {kind}, which changes the model in proportion to the base "
                        "weights. Name the checkpoint it was trained on (--base CHECKPOINT).",
                        source.path.name,
                        part.part.spelling,
                        part.facts.kind,
                    )


def block_map_of(source: Source) -> models.BlockMap:
    """The blocks and block lists of a file's base model."""
    name = source.architecture.id
    return models.block_map(name, source.size, [models.block(name, layer) for layer in source.layers])


def block_weights(
    entry: LoraInput, source: Source, presets: blocks.Presets, seed: str, notes: list[str]
) -> blocks.BlockWeights:
    """The block weights of one input for its base model; what they do not reach is added to ``notes``.

    Raises:
        RecipeError: They make no sense, or none of them is for this base model.
    """
    name = source.architecture.id
    layers = [(models.component(layer), models.block(name, layer), layer) for layer in source.layers]
    model = block_map_of(source)
    found = blocks.resolve(entry, presets, rng=random.Random(seed), model=model)
    notes += blocks.check_reach(found, layers, model, presets)
    return found


def _resolved(recipe: MergeRecipe, plans: Sequence[SourcePlan]) -> MergeRecipe:
    """The recipe with numbers for presets, and names for paths."""
    inputs = []
    for plan in plans:
        lbw, lbwe = plan.block_weights.as_input_fields()
        inputs.append(replace(plan.input, name=plain_name(plan.input.name), lbw=lbw, lbwe=lbwe, x=None))
    return replace(recipe, inputs=tuple(inputs))


def plain_name(name: str) -> str:
    """A LoRA's name for a stored recipe: what was given as a path keeps only its stem."""
    path = PureWindowsPath(name)
    return path.stem if path.suffix.lower() in LORA_SUFFIXES else name


def file_stem(name: str) -> str:
    """The name for a file of a LoRA's own: neither its folder nor its ending."""
    return plain_name(PureWindowsPath(name).name)


def _with_names(
    layers: tuple[LayerPlan, ...], architecture: str, recipe: MergeRecipe, dialect: str
) -> tuple[tuple[LayerPlan, ...], tuple[str, ...]]:
    """The layers that the dialect has names for, and sentences on those that it lacks.

    Norms and other vectors without a name are left out; so are weights, where the user allowed it.

    Raises:
        UnsupportedError: The dialect lacks names for weights.
    """
    lacking = []
    for layer in layers:
        try:
            dialects.output_parts(architecture, layer.layer, dialect)
        except UnsupportedError:
            lacking.append(layer)
    weights = [layer.layer for layer in lacking if not layer.vector]
    label = models.ARCHITECTURES[architecture].label
    if weights and not recipe.skip_unsupported:
        shown = [", ".join(weights[:5])]
        shown += [Sentence(" and {count} more", len(weights) - 5)] if len(weights) > 5 else []
        raise UnsupportedError(
            "The {dialect} dialect has no name for {layers} of {model}. Write another dialect, or leave "
            "them out (--skip-unsupported).",
            dialect,
            joined("", shown),
            label,
        )
    kept = tuple(layer for layer in layers if layer not in lacking)
    return kept, tuple(
        Sentence("{layer} left out: the {dialect} dialect has no name for it", layer.layer, dialect)
        for layer in lacking
    )


def _output_dtype(recipe: MergeRecipe, sources: Sequence[Source]) -> tuple[str, list[str]]:
    """The dtype to store, with a note where ``same`` had to widen."""
    if recipe.dtype != "same":
        return recipe.dtype, []
    kinds = {dtype for source in sources for dtype in source.weight_dtypes}
    if kinds <= {"F16", "F8_E4M3", "F8_E5M2"}:
        return "float16", []
    if kinds <= {"BF16", "F8_E4M3", "F8_E5M2"}:
        return "bfloat16", []
    if kinds <= {"F16", "BF16", "F8_E4M3", "F8_E5M2"}:
        return "float32", [
            "The inputs mix float16 and bfloat16; only float32 holds both, so the file is twice as large. "
            "Choose float16 for half the size."
        ]
    return "float32", []


def _embeddings(plans: Sequence[SourcePlan]) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Union of the embeddings in the files; of two with one name the first is kept, with all its tensors."""
    chosen: dict[str, tuple[int, str]] = {}
    owners: dict[str, int] = {}
    clashes: dict[tuple[str, str], list[str]] = {}
    for index, plan in enumerate(plans):
        for name, key in plan.source.embeddings.items():
            embedding = name.partition(".")[0]
            owner = owners.setdefault(embedding, index)
            if owner == index:
                chosen[name] = (index, key)
            elif plan.path != plans[owner].path:
                both = clashes.setdefault((plans[owner].path.name, plan.path.name), [])
                if embedding not in both:
                    both.append(embedding)
    return chosen, [
        Sentence(
            "Both {first} and {second} hold the embedding {name}; the first one is kept.",
            first,
            second,
            ", ".join(names),
        )
        for (first, second), names in clashes.items()
    ]
