"""A checkpoint as baking and extraction see it: what it is, where its layers lie, and their numbers."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .. import models
from ..dialects import is_adapters
from ..errors import FileError, IncompatibleError, Sentence, UnsupportedError
from ..files import LoraFile, TensorInfo, open_file
from ..files.decode import decode
from ..files.header import reading
from ..files.pickled import PICKLE_SUFFIXES
from ..merge.base import BaseCheckpoint
from ..models import CheckpointKey
from .numbers import ITEM

if TYPE_CHECKING:
    from torch import Tensor

DENOISERS = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
"""Where a denoiser stands in a file or folder with other parts; alone it has no prefix."""

EMA = "model_ema."
VAES = ("first_stage_model.", "vae.")
SCALES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant")
"""Ends of the names beside a float8 weight that is stored up to a factor."""

_ELSEWHERE = re.compile(
    r"(?:model_ema|first_stage_model|vae|cond_stage_model|conditioner|text_encoders?(?:_\d)?|text_model"
    r"|encoder|shared|logit_scale|text_projection|embed_tokens|lm_head|model\.layers|layers(?=\.\d+\.(?:self_attn|mlp)))\b"
)
_QUANTISED = (
    (
        re.compile(r"\.quant_state\.bitsandbytes__|\.quant_map$|\.absmax$"),
        "in 4 bits (bitsandbytes nf4 or fp4)",
    ),
    (re.compile(r"\.(?:qweight|qzeros|wscales|smooth_factor)$"), "in 4 bits (SVDQuant or GPTQ)"),
    (re.compile(r"\.weight_scale_2$"), "in 4 bits (nvfp4)"),
)
_WAY_OUT = (
    "too coarse to hold a LoRA. Take the bfloat16, float16 or float8 version and quantise the result, or use "
    "the LoRA in the prompt."
)
_NUMBERED = ("weight", "bias", "text_projection", "positional_embedding")
ASIDE = (EMA, *VAES)  # Copied as they are.
QUANTISATION = "_quantization_metadata"
"""Text in which ComfyUI's files name the format of each layer, where no tensor beside it does."""

_BLOCK_NUMBER = re.compile(r"\.(\d+)\.")
_MOST_BLOCKS = 200


@dataclass(frozen=True)
class Span:
    """Rows of a tensor that are rows of a layer: ``count`` from ``tensor`` on are those from ``layer`` on."""

    tensor: int
    layer: int
    count: int


class Checkpoint(BaseCheckpoint):
    """An open checkpoint: one file, shards with an index, or a folder in diffusers' layout.

    Attributes:
        architecture: What it is a checkpoint of.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        encoders: Iterable[str | os.PathLike[str]] = (),
        *,
        role: str = "a checkpoint",
    ) -> None:
        """Open it and see what it is.

        Args:
            path: As for ``BaseCheckpoint``, or the index of its shards.
            encoders: Files of text encoders that belong to it.
            role: What is expected here, for messages.

        Raises:
            FileError: It cannot be read, or lacks a part.
            UnsupportedError: A LoRA, a pickle, a quantised model, or one that is not known.
        """
        _refuse_other_formats(Path(path), role)
        super().__init__(path)
        try:
            _refuse_lora(self.path, self._keys, role)
            self.architecture, self.reason = self._recognised()
            for encoder in encoders:
                self._add_encoder(Path(encoder))
            self._refuse_quantised()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        """Return the checkpoint itself."""
        return self

    @property
    def files(self) -> list[LoraFile]:
        return self._files

    @property
    def keys(self) -> Collection[str]:
        """Names of its tensors; in a folder they begin with that of the part."""
        return self._keys.keys()

    def place(self, key: str) -> tuple[LoraFile, str]:
        """The file that holds a tensor, and its name there."""
        return self._keys[key]

    def info(self, key: str) -> TensorInfo:
        return self._info(key)

    def where(self, layer: str, *, bias: bool = False) -> tuple[CheckpointKey, ...]:
        """The tensors that hold a layer's weight or bias; () where it has none."""
        for source in models.checkpoint_keys(self.architecture.id, layer):
            if not all(place.key in self._keys for place in source):
                continue
            if not bias:
                return source
            places = [models.bias_place(place) for place in source]
            found = tuple(place for place in places if place is not None and place.key in self._keys)
            return found if len(found) == len(source) else ()
        return ()

    def spans(self, place: CheckpointKey) -> list[Span]:
        """Which rows of a tensor are which rows of the layer."""
        shape = self.info(place.key).shape[::-1] if place.transposed else self.info(place.key).shape
        rows = shape[0] if shape else 1
        if place.take is not None:
            start, found = 0, []
            for first, last in place.take.cut(rows):
                found.append(Span(first, start, last - first))
                start += last - first
            return found
        if place.rows is not None:
            start, found = 0, []
            for first, last in place.rows.spans(rows)[0]:
                found.append(Span(start, first, last - first))
                start += last - first
            return found
        return [Span(0, 0, rows)]

    @cached_property
    def layers(self) -> Mapping[str, tuple[CheckpointKey, ...]]:
        """Every layer of the base model that it has, and the tensors that hold its weight."""
        found = {}
        for layer in self._possible_layers():
            source = self.where(layer)
            if source:
                found[layer] = source
        return found

    def scale_key(self, key: str) -> str | None:
        """Name of the factor of a float8 weight, if it has one."""
        return self._scale_key(key)

    def scale(self, key: str) -> float:
        """The factor of a float8 weight; 1 for others."""
        return self._scale(key)

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows of a tensor, unfolded, with its scale: (rows, numbers of one) float32 or float64.

        Raises:
            FileError: The file became shorter.
        """
        file, name = self._keys[key]
        info = self.info(key)
        width = math.prod(info.shape[1:])
        size = width * ITEM[info.dtype]
        start = file.header.data_start + info.start + first * size
        shape = last - first, width
        tensor = decode(info.dtype, shape, lambda target: file.read_at(start, target), lambda: name)
        scale = self._scale(key)
        return tensor if scale == 1 else tensor.mul_(scale)

    def layer_rows(self, layer: str, *, bias: bool = False) -> LayerRows | None:
        """A layer's weight or bias to be read by rows; None where it has none."""
        places = self.where(layer, bias=bias)
        if not places:
            return None
        width = math.prod(self.info(places[0].key).shape[1:])
        if places[0].transposed:
            width = self.info(places[0].key).shape[0]
        return LayerRows(self, places, width)

    def _possible_layers(self) -> Iterator[str]:
        identity = self.architecture.id
        known = models.layers(identity)
        if known:
            yield from known
            return
        blocks = 1 + max((int(n) for key in self._keys for n in _BLOCK_NUMBER.findall(key)[:1]), default=0)
        yield from models.numbered_layers(identity, min(blocks, _MOST_BLOCKS))

    def _recognised(self) -> tuple[models.Architecture, str]:
        prefix = next((p for p in DENOISERS if any(key.startswith(p) for key in self._keys)), "")
        layers: dict[str, models.Measured] = {}
        for key in self._keys:
            shape = self._info(key).shape
            name = key.removeprefix(prefix).removesuffix(".weight")
            if not key.startswith(prefix) or len(shape) < 2 or not key.endswith(".weight"):
                continue
            if prefix or not _ELSEWHERE.match(key):
                measured = models.Measured(shape[0], shape[1], len(shape) == 4)
                layers["lora_unet_" + name.replace(".", "_").replace("-", "_")] = measured
        found = models.detect(layers, {}) if layers else None
        if found is None or found.architecture.id == "unknown":
            raise UnsupportedError(
                "{file} is not a base model that is known here: its layers are named as those of none. Give "
                "the checkpoint with the denoiser (U-Net or transformer) in it.",
                self.path.name,
            )
        return found.architecture, found.reason

    def _add_encoder(self, path: Path) -> None:
        """A text encoder's own file, under the names that a file of all parts has for it."""
        _refuse_other_formats(path, "a text encoder")
        file = open_file(path)
        self._files.append(file)
        _refuse_lora(path, file.tensors, "a text encoder")
        kind, width = _encoder_of(file.tensors)
        matching = [
            (part, encoder)
            for part, encoder in self.architecture.encoders.items()
            if encoder.kind == kind and (kind != "clip" or encoder.width == width)
        ]
        if not matching:
            raise IncompatibleError(
                "{file} is no text encoder of {model}; choose one that belongs to it.",
                path.name,
                self.architecture.label,
            )
        part, encoder = matching[0]
        prefix = f"text_encoders.{encoder.comfy}.transformer."
        added = {prefix + key: (file, key) for key in file.tensors}
        if both := next((key for key in added if key in self._keys), None):
            raise IncompatibleError(
                "{first} and {second} are the same text encoder, {encoder}. Give it once.",
                path.name,
                self._keys[both][0].path.name,
                encoder.comfy,
            )
        for layer in self._possible_layers():
            if models.component(layer) == part and self.where(layer):
                raise IncompatibleError(
                    "{file} has a text encoder {encoder} of its own, so {other} is no part of it. Leave it "
                    "out.",
                    self.path.name,
                    encoder.comfy,
                    path.name,
                )
        self._keys.update(added)

    def _refuse_quantised(self) -> None:
        for file in self._files:
            _refuse_header_formats(file)
        for key, (file, name) in self._keys.items():
            info, how = file.tensors[name], None
            for pattern, what in _QUANTISED:
                how = what if pattern.search(name) else how
            if info.dtype in ("F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"):
                how = Sentence("as {dtype}, with a scale for each group of them", info.dtype)
            if name.endswith((".scale_weight", ".weight_scale")) and math.prod(info.shape) != 1:
                how = "in 8 bits, with a scale for each row or group of them"
            if name.endswith(".weight") and len(info.shape) > 1 and info.dtype in ("I8", "U8"):
                how = "in 8 bits or fewer, as whole numbers"
            if how is None and name.endswith(".comfy_quant"):
                how = _other_comfy_format(bytes(file.data_bytes(name)))
            if how is not None:
                raise UnsupportedError(
                    "{file} stores its weights {how} ({key}): {way_out}",
                    file.path.name,
                    Sentence(how),
                    key,
                    Sentence(_WAY_OUT),
                )
            if key.endswith(_NUMBERED) and not key.startswith(ASIDE):
                self._check_stored_plainly(key)


@dataclass(frozen=True)
class LayerRows:
    """Rows of a layer, wherever its tensors lie.

    Attributes:
        width: Numbers of one row, unfolded.
    """

    checkpoint: Checkpoint
    places: tuple[CheckpointKey, ...]
    width: int

    @property
    def count(self) -> int:
        """Rows of the layer."""
        return max(span.layer + span.count for place in self.places for span in self.checkpoint.spans(place))

    def read(self, first: int, last: int) -> Tensor:
        """(last - first, width) float32 or float64."""
        import torch

        checkpoint, pieces = self.checkpoint, []
        for place in self.places:
            if place.transposed:
                whole = checkpoint.rows(place.key, 0, checkpoint.info(place.key).shape[0]).T
                return whole[first:last].contiguous()
            for span in checkpoint.spans(place):
                start, stop = max(first, span.layer), min(last, span.layer + span.count)
                if start < stop:
                    at = start - span.layer + span.tensor
                    pieces.append((start, checkpoint.rows(place.key, at, at + stop - start)))
        pieces.sort(key=lambda piece: piece[0])
        return pieces[0][1] if len(pieces) == 1 else torch.cat([rows for _, rows in pieces])


def vaes_differ(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether small tensors of the VAEs differ; those of another VAE all do."""
    keys = [key for key in second.keys if key.startswith(VAES)]
    for key in [key for key in keys if key in first.keys][:8]:
        infos = [checkpoint.info(key) for checkpoint in (first, second)]
        if infos[0].dtype != infos[1].dtype or infos[1].end - infos[1].start > 1 << 20:
            continue
        places = [checkpoint.place(key) for checkpoint in (first, second)]
        if places[0][0].data_bytes(places[0][1]) != places[1][0].data_bytes(places[1][1]):
            return True
    return False


def _other_comfy_format(data: bytes) -> str | None:
    try:
        name = json.loads(data.decode("utf-8").rstrip("\0"))["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = "unknown"
    return None if name == "float8_e4m3fn" else Sentence("in ComfyUI's format {name}", str(name)[:40])


def _refuse_header_formats(file: LoraFile) -> None:
    try:
        layers = json.loads(file.header.metadata.get(QUANTISATION, "{}"))["layers"]
        formats = {layer: str(entry["format"]) for layer, entry in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # Not what ComfyUI writes: what the tensors say stands.
    for layer, name in formats.items():
        if name != "float8_e4m3fn":
            raise UnsupportedError(
                "{file} stores its weights {how} ({key}): {way_out}",
                file.path.name,
                Sentence("in ComfyUI's format {name}", name[:40]),
                layer,
                Sentence(_WAY_OUT),
            )


def _refuse_other_formats(path: Path, role: str) -> None:
    """Stop at what is no safetensors file by its first bytes or its name."""
    if path.is_dir() or path.name.endswith(".json"):
        return
    with reading(path) as (file, _):
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        raise UnsupportedError(
            "{file} is a GGUF model: its weights are stored in groups of 4 to 8 bits, {way_out}",
            path.name,
            Sentence(_WAY_OUT),
        )
    if magic == b"PK\x03\x04" or path.suffix.lower() in (*PICKLE_SUFFIXES, ".pth", ".bin"):
        raise UnsupportedError(
            "{file} is a pickle, which would have to be loaded whole; convert it to .safetensors first.",
            path.name,
        )
    if path.suffix.lower() != ".safetensors":
        raise FileError("{file} is not {what}: a .safetensors file is needed.", path.name, Sentence(role))


def _refuse_lora(path: Path, keys: Iterable[str], role: str) -> None:
    names = list(keys)
    adapters = sum(is_adapters(key) for key in names)
    if not names:
        raise FileError("{file} holds no tensors.", path.name)
    if 2 * adapters > len(names):
        hint = Sentence(" bake takes the checkpoint first, then the LoRAs.") if role == "a checkpoint" else ""
        raise UnsupportedError(
            "{file} is a LoRA, where {what} is expected.{hint}", path.name, Sentence(role), hint
        )


def _encoder_of(tensors: Mapping[str, TensorInfo]) -> tuple[str, int]:
    """Kind and width of a text encoder's file."""
    for key, info in tensors.items():
        if "encoder.block.0." in key:
            return "t5", 0
        if key.endswith("final_layer_norm.weight") and "text_model" in key:
            return "clip", info.shape[0]
    return ("llama", 0) if any("layers.0.self_attn" in key for key in tensors) else ("", 0)
