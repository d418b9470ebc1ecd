"""What a merged file says of itself in its header.

Enough for every WebUI to list it under the right base model and for this tool to make
it again; nothing of the parents' training that their makers did not mean to pass on:
no dataset folders, session ids, times, thumbnails, hashes or paths.
"""

from __future__ import annotations

import json
import ntpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lib_loramerge.models import Architecture
from lib_loramerge.recipe import MergeRecipe, from_json, to_json

RECIPE_KEY = "loramerge_recipe"
"""Does not start with ``ss_``, as it would enter the legacy hash then."""

RECIPE_LIMIT = 64 * 1024
TAGS_LIMIT = 64 * 1024
TEXT_LIMIT = 2_000
"""Longest values, in bytes and in characters: hosts keep every header in their cache."""

PARENT_LIMIT = 20_000_000
"""A parent's value that is longer, in characters, is not read."""

DYNAMIC = "Dynamic"
"""kohya's word for ranks or alphas that differ from layer to layer."""

SHARED = ("ss_sd_model_name", "ss_clip_skip", "ss_resolution")
"""Kept if all parents say the same."""


@dataclass(frozen=True)
class SourceMeta:
    """What is known of one parent.

    Attributes:
        name: Its file name without suffix.
        metadata: Its header's string map.
        hash: Its ``sshs_model_hash`` as computed, or None.
    """

    name: str
    metadata: Mapping[str, str]
    hash: str | None = None


def build_metadata(
    *,
    name: str,
    architecture: Architecture,
    sources: Sequence[SourceMeta],
    recipe: MergeRecipe,
    ranks: Sequence[int] = (),
    alphas: Sequence[float] = (),
    conv_ranks: Sequence[int] = (),
    conv_alphas: Sequence[float] = (),
    module: str = "networks.lora",
    date: str | None = None,
) -> dict[str, str]:
    """The string map of a merged file, but for the hashes, which need its bytes.

    Args:
        name: Its file name without suffix.
        architecture: Base model of all sources.
        sources: The parents, in the order of the recipe's inputs.
        recipe: Resolved: what it says makes the same tensors again.
        ranks: Of each linear layer; one number if they are equal.
        alphas: Of each linear layer.
        conv_ranks: Of each convolution.
        conv_alphas: Of each convolution.
        module: What trained such a file: ``"lycoris.kohya"`` if it holds more than LoRA.
        date: Time of the merge, ISO 8601. Without it equal recipes give equal bytes.

    Returns:
        Sorted by key; every value is a text.
    """
    stem = output_name(name)
    found: dict[str, str | None] = {
        "ss_output_name": stem,
        "ss_base_model_version": _base_model_version(architecture, sources),
        "ss_v2": str(architecture.v2),
        "ss_network_module": module,
        "ss_network_dim": _uniform(ranks or conv_ranks),
        "ss_network_alpha": _uniform(alphas or conv_alphas),
        "ss_network_args": _network_args(conv_ranks, conv_alphas),
        "ss_tag_frequency": _tag_frequency(sources),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture.modelspec}/lora" if architecture.modelspec else None,
        "modelspec.implementation": architecture.implementation,
        "modelspec.title": stem,
        "modelspec.resolution": architecture.resolution,
        "modelspec.prediction_type": architecture.prediction_type,
        "modelspec.merged_from": _joined([source.name for source in sources]),
        "modelspec.tags": _union("modelspec.tags", sources),
        "modelspec.trigger_phrase": _union("modelspec.trigger_phrase", sources),
        "modelspec.date": date,
        **{key: _agreed(key, sources) for key in SHARED},
        **_recipe_text(recipe, sources),
    }
    return {key: _valid(value) for key, value in sorted(found.items()) if value}


def renamed(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """What a merged file says of itself under another name, but for the hashes.

    Args:
        metadata: As :func:`build_metadata` made it.
        name: The new file name without suffix.
    """
    stem = output_name(name)
    kept = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}
    return {**kept, "ss_output_name": stem, "modelspec.title": stem}


def read_recipe(metadata: Mapping[str, str]) -> MergeRecipe | None:
    """The recipe that a merged file keeps, or None if it keeps none.

    Raises:
        RecipeError: If what it keeps is no valid recipe.
    """
    text = metadata.get(RECIPE_KEY)
    return None if text is None else from_json(text)


def output_name(name: str) -> str:
    """A name that can stand in a prompt's tag: A1111 uses it as the LoRA's alias."""
    return re.sub(r"[:,<>\x00-\x1f\x7f]+", "_", _valid(name)).strip() or "merged"


def _base_model_version(architecture: Architecture, sources: Sequence[SourceMeta]) -> str | None:
    """The detected base model; in the parents' words if they agree with it and one another."""
    if not architecture.base_model_version and architecture.names is not None:
        return None  # several models fit, and none is claimed
    stated = _agreed("ss_base_model_version", sources)
    if stated and stated.startswith(architecture.base_model_version):
        return stated
    return architecture.base_model_version or None


def _uniform(values: Sequence[float]) -> str | None:
    """The number that all values are, ``Dynamic`` if they differ, None without any."""
    if not values:
        return None
    return f"{values[0]:.9g}" if len(set(values)) == 1 else DYNAMIC


def _network_args(ranks: Sequence[int], alphas: Sequence[float]) -> str | None:
    """kohya's note of the convolutions' rank and alpha."""
    args = {"conv_dim": _uniform(ranks), "conv_alpha": _uniform(alphas)}
    return json.dumps(args, sort_keys=True) if ranks else None


def _agreed(key: str, sources: Sequence[SourceMeta]) -> str | None:
    """A value that every parent has, cut to a file name where it is a path."""
    values = {source.metadata.get(key) for source in sources}
    value = values.pop() if len(values) == 1 else None
    if value is None or len(value) > TEXT_LIMIT:
        return None
    return ntpath.basename(value) if key == "ss_sd_model_name" else value


def _tag_frequency(sources: Sequence[SourceMeta]) -> str | None:
    """How often each tag occurred in training, per parent.

    A parent's dataset folders are added up under the parent's name: the folders' own names
    are often private, and two parents may have used the same. The rarest tags go first
    where all would be too long.
    """
    counts = [
        (source.name, tag, count) for source in sources for tag, count in _tags(source.metadata).items()
    ]
    counts.sort(key=lambda entry: (-entry[2], entry[0], entry[1]))
    kept: dict[str, dict[str, int]] = {}
    room = TAGS_LIMIT
    for name, tag, count in counts:
        room -= len(json.dumps(tag)) + 12 + (0 if name in kept else len(json.dumps(name)) + 6)
        if room < 0:
            break
        kept.setdefault(name, {})[tag] = count
    return json.dumps(kept, sort_keys=True) if kept else None


def _tags(metadata: Mapping[str, str]) -> Counter[str]:
    """Tag to count over all dataset folders; what is not such a table counts as none."""
    text = metadata.get("ss_tag_frequency", "")
    found: Counter[str] = Counter()
    if not text or len(text) > PARENT_LIMIT:
        return found
    try:
        folders = json.loads(text)
    except (ValueError, RecursionError):
        return found
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int and 0 < count < 10**9:
                found[tag] += count
    return found


def _union(key: str, sources: Sequence[SourceMeta]) -> str | None:
    """The comma-separated parts that any parent has, each once, in their order."""
    texts = [source.metadata.get(key, "")[:PARENT_LIMIT] for source in sources]
    parts = [part.strip() for text in texts for part in text.split(",")]
    return _joined([part for part in dict.fromkeys(parts) if part])


def _joined(parts: Sequence[str]) -> str | None:
    """As many parts as fit, joined as the ModelSpec standard joins."""
    text = ""
    for part in parts:
        longer = f"{text}, {part}" if text else part
        if len(longer) > TEXT_LIMIT:
            break
        text = longer
    return text or None


def _recipe_text(recipe: MergeRecipe, sources: Sequence[SourceMeta]) -> dict[str, str]:
    """The recipe as JSON, with names in place of paths; a note if it is too long to keep."""
    names = [source.name for source in sources]
    inputs = tuple(
        replace(entry, name=_without_path(entry.name, names[place] if place < len(names) else entry.name))
        for place, entry in enumerate(recipe.inputs)
    )
    base = None if recipe.base is None else ntpath.basename(recipe.base.rstrip("/\\")) or None
    stored = replace(recipe, inputs=inputs, base=base)
    text = json.dumps(to_json(stored), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    if len(text.encode("utf-8", "replace")) >= RECIPE_LIMIT:
        return {"loramerge_note": f"The recipe of {len(recipe.inputs)} LoRAs was too long to be kept."}
    return {RECIPE_KEY: text}


def _without_path(name: str, stem: str) -> str:
    """A LoRA's name; only the file name of a path, which would reveal the owner's folders."""
    is_path = ntpath.isabs(name) or ntpath.splitdrive(name)[0] or name.startswith((".", "~", "/"))
    return stem if is_path or name.lower().endswith((".safetensors", ".pt", ".ckpt")) else name


def _valid(text: str) -> str:
    """Text that UTF-8 can hold; names of files may hold broken characters."""
    return text.encode("utf-8", "replace").decode("utf-8")
