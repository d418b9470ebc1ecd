"""Weights of a base model, one layer at a time, for adapters whose delta depends on them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import FileError, IncompatibleError, UnsupportedError
from ..files import LoraFile, TensorInfo, open_file
from ..models import ARCHITECTURES, CheckpointKey, checkpoint_keys, plain_path

if TYPE_CHECKING:
    from torch import Tensor

COMPONENT_FOLDERS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders of a model in diffusers' layout; their names are the prefixes of their keys here."""

SHARD = re.compile(r"-\d{5}-of-\d{5}")
NUMBERS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")


class BaseCheckpoint:
    """A base model whose layers can be read: a checkpoint, one part of one, or a diffusers folder.

    Only headers are read when it is opened. Use it in a ``with`` statement.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a checkpoint.

        Args:
            path: A ``.safetensors`` file in the ldm, BFL or diffusers layout, or a folder that
                holds ``unet`` or ``transformer`` and the text encoders.

        Raises:
            FileError: If it cannot be read.
            UnsupportedError: If it is a pickle, which would have to be loaded whole.
        """
        self.path = Path(path)
        self._files: list[LoraFile] = []
        self._keys: dict[str, tuple[LoraFile, str]] = {}
        self._paths: dict[str, list[str]] | None = None
        try:
            for prefix, file in _parts(self.path):
                if file.suffix.lower() != ".safetensors":
                    raise UnsupportedError(
                        "The base model {file} is not a .safetensors file; convert it, or take its "
                        ".safetensors version.",
                        file.name,
                    )
                opened = open_file(file)
                self._files.append(opened)
                self._keys.update({prefix + key: (opened, key) for key in opened.tensors})
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> tuple[tuple[Path, object], ...]:
        """Path and stamp of the files that are read here."""
        return tuple((file.path, file.header.stamp) for file in self._files)

    def check_unchanged(self) -> None:
        """Refuse what was read of a checkpoint that another program wrote to meanwhile."""
        for file in self._files:
            file.check_unchanged()

    def shape(self, architecture_id: str, layer: str) -> tuple[int, ...]:
        """Shape of a layer's weight, (out, in[, kh, kw]), from the header alone.

        Raises:
            IncompatibleError: If the checkpoint does not have the layer.
        """
        sources = self._sources(architecture_id, layer)
        return _whole_shape(sources, self._shapes(sources), f"{self.path.name}: {layer}")

    def check_readable(self, architecture_id: str, layer: str) -> tuple[int, ...]:
        """Shape of a layer's weight, as ``shape`` gives it, once it is sure that it can be read.

        Raises:
            IncompatibleError: If the checkpoint does not have the layer.
            UnsupportedError: If the layer is stored quantised.
        """
        for source in self._sources(architecture_id, layer):
            self._check_stored_plainly(source.key)
        return self.shape(architecture_id, layer)

    def weight(self, architecture_id: str, layer: str) -> Tensor:
        """A layer's weight, whatever way the checkpoint keeps it.

        Args:
            architecture_id: Base model of the adapter.
            layer: Canonical layer name.

        Returns:
            (out, in[, kh, kw]) float32; (n,) for a norm. It owns its memory.

        Raises:
            IncompatibleError: If the checkpoint does not have the layer.
            UnsupportedError: If the layer is stored quantised.
        """
        import torch

        where = f"{self.path.name}: {layer}"
        sources = self._sources(architecture_id, layer)
        pieces = [self._read(source) for source in sources]
        shape = _whole_shape(sources, [tuple(piece.shape) for piece in pieces], where)
        if len(sources) == 1 and sources[0].rows is None:
            return pieces[0]
        whole = torch.empty(shape, dtype=torch.float32)
        for source, piece in zip(sources, pieces, strict=True):
            start = 0
            assert source.rows is not None
            for first, last in source.rows.spans(piece.shape[0])[0]:
                whole[first:last] = piece[start : start + last - first]
                start += last - first
        return whole

    def _sources(self, architecture_id: str, layer: str) -> tuple[CheckpointKey, ...]:
        """The first place of the layer that this checkpoint has."""
        places = checkpoint_keys(architecture_id, layer)
        for place in places:
            if all(source.key in self._keys for source in place):
                return place
        label = ARCHITECTURES[architecture_id].label if architecture_id in ARCHITECTURES else architecture_id
        if not places:
            # A layer that is in no table is where the model's own code says, under the adapter's name of it.
            named = self._by_path().get(plain_path(layer), [])
            if len(named) == 1:
                return (CheckpointKey(named[0]),)
            raise IncompatibleError(
                "The base model {file} has no layer of the name {layer}, and no other name of it is known. "
                "Give the checkpoint that the LoRA was trained on, in its trainer's layout.",
                self.path.name,
                layer,
            )
        looked = places[0][0].key
        raise IncompatibleError(
            "The base model {file} has no layer {layer} (looked for {looked}; its spellings: {count}). "
            "Give a checkpoint of {model} that holds this part of it.",
            self.path.name,
            layer,
            looked,
            len(places),
            label,
        )

    def _by_path(self) -> dict[str, list[str]]:
        """Flattened path of each weight to its keys."""
        if self._paths is None:
            self._paths = {}
            for key in self._keys:
                if key.endswith(".weight"):
                    self._paths.setdefault(plain_path(key.removesuffix(".weight")), []).append(key)
        return self._paths

    def _shapes(self, sources: Iterable[CheckpointKey]) -> list[tuple[int, ...]]:
        """Shape of each source after its rows were taken, without reading it."""
        shapes = []
        for source in sources:
            shape = self._info(source.key).shape
            if source.transposed:
                shape = shape[::-1]
            if source.take is not None:
                shape = (sum(stop - start for start, stop in source.take.cut(shape[0])), *shape[1:])
            shapes.append(shape)
        return shapes

    def _info(self, key: str) -> TensorInfo:
        file, name = self._keys[key]
        return file.tensors[name]

    def _read(self, source: CheckpointKey) -> Tensor:
        """The rows of one tensor that belong to the layer, float32."""
        import torch

        self._check_stored_plainly(source.key)
        file, name = self._keys[source.key]
        tensor = file.read(name).to(torch.float32)
        scale = self._scale(source.key)
        if scale != 1:
            tensor *= scale
        if source.transposed:
            tensor = tensor.T
        if source.take is not None:
            tensor = torch.cat([tensor[start:stop] for start, stop in source.take.cut(tensor.shape[0])])
        return tensor.contiguous()

    def _check_stored_plainly(self, key: str) -> None:
        """Stop at a tensor whose numbers are not the weight itself, or not up to one scale."""
        dtype = self._info(key).dtype
        if dtype not in NUMBERS:
            raise UnsupportedError(
                "{file}: {key} is stored as {dtype}, that is quantised; give the float16, bfloat16 or "
                "float8 version of the base model.",
                self.path.name,
                self._keys[key][1],
                dtype,
            )
        scale = self._scale_key(key)
        if scale is not None and math.prod(self._info(scale).shape) != 1:
            raise UnsupportedError(
                "{file}: {key} has a scale per row; give the float16 or bfloat16 version.",
                self.path.name,
                key,
            )

    def _scale_key(self, key: str) -> str | None:
        """Where the factor of a float8 weight is that was scaled to use its range, as in ComfyUI's files."""
        names = (f"{key.removesuffix('weight')}scale_weight", f"{key}_scale")
        return next((name for name in names if name in self._keys), None)

    def _scale(self, key: str) -> float:
        name = self._scale_key(key)
        if name is None:
            return 1.0
        file, stored = self._keys[name]
        return float(file.read(stored).reshape(-1)[0])

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> BaseCheckpoint:
        """Return the checkpoint itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _whole_shape(
    sources: tuple[CheckpointKey, ...], shapes: list[tuple[int, ...]], where: str
) -> tuple[int, ...]:
    """Shape of a layer that several tensors make up; every row must come from one of them.

    Raises:
        IncompatibleError: If they do not fit together.
    """
    if len(sources) == 1 and sources[0].rows is None:
        return shapes[0]
    wholes: set[tuple[int, ...]] = set()
    covered: list[tuple[int, int]] = []
    for source, shape in zip(sources, shapes, strict=True):
        assert source.rows is not None
        spans, total = source.rows.spans(shape[0])
        covered += spans
        wholes.add((total, *shape[1:]))
    end = 0
    for start, stop in sorted(covered):
        if start != end:
            break
        end = stop
    if len(wholes) != 1 or end != max(wholes)[0]:
        raise IncompatibleError(
            "{layer} is split into parts whose shapes do not fit together: {shapes}.", where, shapes
        )
    return wholes.pop()


def _parts(path: Path) -> list[tuple[str, Path]]:
    """Files of a model, each with the prefix that its keys get."""
    if path.name.endswith(".safetensors.index.json"):
        return [("", file) for file in indexed_files(path)]
    if not path.is_dir():
        return [("", path)]
    parts = [
        (f"{folder}.", file) for folder in COMPONENT_FOLDERS for file in _component_files(path / folder)
    ] or [("", file) for file in _component_files(path)]
    if not parts:
        raise FileError(
            "{path} is a folder without a model: it has no unet, transformer or text_encoder with "
            ".safetensors files in it.",
            path,
        )
    return parts


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, in order.

    Raises:
        FileError: The index cannot be read, or a shard is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(
            "{index} cannot be read as an index of shards; download it again.", index.name
        ) from error
    files = [index.parent / Path(str(name)).name for name in names]
    for file in files:
        if not file.is_file():
            raise FileError(
                "{index} names the shard {file}, which is missing; download it.", index.name, file.name
            )
    return files


def _component_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: whole or in shards, full precision before fp16."""
    indexes = sorted(
        folder.glob("*.safetensors.index.json"), key=lambda path: (path.name.count("."), path.name)
    )
    if indexes:
        return indexed_files(indexes[0])
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    variants: dict[str, list[Path]] = {}
    for file in found:
        variants.setdefault(SHARD.sub("", file.stem), []).append(file)
    return variants[min(variants, key=lambda stem: (stem.count("."), stem))] if variants else []
