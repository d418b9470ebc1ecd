"""Where the weight of a layer lies in a checkpoint of its base model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from .base import Rows, component, layer_name, layer_path
from .dit import diffusers_members, dotted_paths, flatten, is_parameter, joined_names
from .records import ARCHITECTURES
from .text_encoders import CLIP_EDGES, CLIP_LEAVES, paths
from .unet import UNETS, by_ldm


@dataclass(frozen=True)
class CheckpointKey:
    """One tensor of a checkpoint that holds a layer's weight or a part of it.

    Attributes:
        key: Name of the tensor, shape (out, in[, kh, kw]).
        rows: The rows of the layer that this tensor fills, when the checkpoint splits the layer
            (use ``rows.spans``); None for all.
        take: The rows of this tensor that are the layer, when the checkpoint fuses it with others
            (use ``take.cut``); None for all.
        transposed: The tensor is (in, out).
    """

    key: str
    rows: Rows | None = None
    take: Rows | None = None
    transposed: bool = False


Source = tuple[CheckpointKey, ...]

# Where a checkpoint keeps the denoiser; a file of the denoiser alone has no prefix.
_DENOISER = ("model.diffusion_model.", "diffusion_model.", "")
_IN_PROJ = {f"self_attn.{name}_proj": Rows(((n, n + 1),), 3) for n, name in enumerate("qkv")}


def checkpoint_keys(architecture_id: str, layer: str) -> tuple[Source, ...]:
    """Where a layer's weight may lie, best known place first.

    Each alternative is a tuple of tensors that are needed together: one, or the
    members of a layer that this checkpoint splits. The empty tuple means that
    we do not know this layer's place in any checkpoint.
    """
    part = component(layer)
    path = layer_path(layer)
    if part != "unet":
        return tuple(_text_encoder(architecture_id, part, path))
    if architecture_id in UNETS:
        return tuple(_unet(architecture_id, path))
    return tuple(_transformer(architecture_id, path))


def bias_place(place: CheckpointKey) -> CheckpointKey | None:
    """Where the bias of a layer lies whose weight lies there; None for what has no bias."""
    if not place.key.endswith("weight"):
        return None
    return replace(place, key=place.key.removesuffix("weight") + "bias", transposed=False)


def _unet(architecture_id: str, path: str) -> Iterator[Source]:
    known = by_ldm(architecture_id).get(path)
    if known is None:
        return
    for prefix in _DENOISER:
        yield (CheckpointKey(f"{prefix}{known.ldm}.weight"),)
    for prefix in ("", "unet."):
        yield (CheckpointKey(f"{prefix}{known.diffusers}.weight"),)


def _transformer(architecture_id: str, path: str) -> Iterator[Source]:
    if is_parameter(architecture_id, path):
        for prefix in _DENOISER:
            yield (CheckpointKey(f"{prefix}{dotted_paths(architecture_id, path)[0]}"),)
        return
    for dotted in dotted_paths(architecture_id, path):
        # The scales of query and key norms are the one tensor that is not called weight.
        names = ("scale", "weight") if dotted.endswith(("query_norm", "key_norm")) else ("weight",)
        for name in names:
            for prefix in _DENOISER:
                yield (CheckpointKey(f"{prefix}{dotted}.{name}"),)
    members = diffusers_members(architecture_id, path)
    if members:
        for prefix in ("", "transformer."):
            yield tuple(CheckpointKey(f"{prefix}{member}.weight", rows) for member, rows in members)
    for joined, take in joined_names(architecture_id, path):
        for prefix in ("", "transformer."):
            yield (CheckpointKey(f"{prefix}{joined}.weight", take=take),)


def _text_encoder(architecture_id: str, part: str, path: str) -> Iterator[Source]:
    dotted = paths(architecture_id).get(part, {}).get(path)
    if dotted is None:
        return
    encoder = ARCHITECTURES[architecture_id].encoders[part]
    for prefix in encoder.open_clip:
        yield from _open_clip(prefix, dotted)
    model = "model." if encoder.kind == "llama" else ""
    for prefix in (f"text_encoders.{encoder.comfy}.transformer.{model}", *encoder.places, model, ""):
        yield (CheckpointKey(f"{prefix}{dotted}.weight"),)
        if dotted.startswith("text_model."):
            yield (CheckpointKey(f"{prefix}{dotted.removeprefix('text_model.')}.weight"),)


def _open_clip(prefix: str, dotted: str) -> Iterator[Source]:
    if dotted == "text_projection":
        # A bare parameter that OpenCLIP multiplies from the right.
        yield (CheckpointKey(f"{prefix}text_projection", transposed=True),)
        return
    if dotted == "text_model.embeddings.position_embedding":
        yield (CheckpointKey(f"{prefix}positional_embedding"),)
        return
    if dotted in CLIP_EDGES:
        yield (CheckpointKey(f"{prefix}{CLIP_EDGES[dotted]}.weight"),)
        return
    number, _, leaf = dotted.removeprefix("text_model.encoder.layers.").partition(".")
    block = f"{prefix}transformer.resblocks.{number}"
    if leaf in _IN_PROJ:
        yield (CheckpointKey(f"{block}.attn.in_proj_weight", take=_IN_PROJ[leaf]),)
    else:
        yield (CheckpointKey(f"{block}.{CLIP_LEAVES[leaf]}.weight"),)


def numbered_layers(architecture_id: str, blocks: int) -> Iterator[str]:
    """Every layer that a transformer of so many blocks, and its text encoders, can have."""
    record = ARCHITECTURES[architecture_id]
    for template in record.names.layers if record.names is not None else ():
        count = template.count("{}")
        for numbers in product(range(blocks), repeat=count) if count < 2 else product(range(40), range(12)):
            yield layer_name("unet", flatten(template.format(*numbers)))
    for part, known in paths(architecture_id).items():
        yield from (layer_name(part, path) for path in known)
