"""The plan of a merge: what is read, what each layer becomes, and how many bytes it takes in the file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import blocks, dialects, models, ranks
from ..errors import OutputError
from ..hosts import companions
from ..metadata import SourceMeta, build_metadata
from ..recipe import LoraInput, MergeRecipe
from .sources import Source

if TYPE_CHECKING:
    from ..delta import Spectrum
    from ..methods import MergeMethod
    from ..report import Smaller

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ALPHA_BYTES = 4
# One tensor's entry in the header beside its name and sizes: dtype, brackets, two long offsets.
ENTRY_BYTES = 75


@dataclass(frozen=True)
class SourcePlan:
    """One input of a merge: the recipe's words, the file, and what it is."""

    input: LoraInput
    source: Source
    block_weights: blocks.BlockWeights

    @property
    def path(self) -> Path:
        return self.source.path

    def to_json(self) -> dict[str, Any]:
        source = self.source
        return {
            "name": self.input.name,
            "path": str(source.path),
            "dialect": source.dialect,
            "base_model": source.base_model,
            "architecture": source.architecture.id,
            "reason": source.reason,
            "kinds": source.kinds,
            "ranks": {str(rank): count for rank, count in source.ranks.items()},
            "dtypes": source.dtypes,
            "layers": len(source.layers),
            "needs_base": source.needs_base,
            "unsupported": list(source.unsupported),
            "unknown": list(source.unknown),
            "te": self.input.te,
            "unet": self.input.unet,
        }


@dataclass(frozen=True)
class LayerPlan:
    """One layer of the result.

    Attributes:
        in_: Input channels; the unfolded width is ``in_`` times the kernel's size.
        kernel: (kh, kw) of a k x k convolution, else empty.
        inputs: (index of the source, strength, block weight) of each input that
            has this layer with a weight other than 0.
        ranks: Rank of each of those inputs; None where it is stored whole.
        rank: Rank foreseen, an upper bound where it depends on the singular
            values; None when the layer will be written whole.
        vector: A norm's weight, which has no rank and no rank rule.
        dense: Some input is no low-rank product, even if it was trained as one (DoRA, a residual ...).
    """

    layer: str
    component: str
    block: str | None
    out: int
    in_: int
    kernel: tuple[int, ...]
    inputs: tuple[tuple[int, float, float], ...]
    ranks: tuple[int | None, ...]
    rank: int | None
    vector: bool
    bias: bool
    dense: bool = False

    @property
    def width(self) -> int:
        """Columns of the unfolded weight."""
        return self.in_ * math.prod(self.kernel)

    @property
    def weights(self) -> tuple[float, ...]:
        """Strength times block weight, for each of ``inputs``."""
        return tuple(strength * block for _, strength, block in self.inputs)

    @property
    def same_rank(self) -> int | None:
        """The rank that ``rank="same"`` means: the largest of the inputs; None when one is stored whole."""
        known = [rank for rank in self.ranks if rank is not None]
        return max(known) if len(known) == len(self.ranks) else None

    def bounded(self, method: MergeMethod) -> bool:
        """Whether the inputs' ranks bound that of the layer's result."""
        return not (self.dense or method.elementwise)

    def largest_rank(self, method: MergeMethod) -> int:
        """A rank that certainly holds all of the layer's result; often a lower one does, too."""
        limit = min(self.out, self.width)
        if not self.bounded(method):
            return limit
        return min(limit, sum(rank for rank in self.ranks if rank is not None))

    def bytes_per_rank(self, item: int) -> int:
        """Bytes of one rank when a number takes ``item`` bytes."""
        return (self.out + self.width) * item

    def bytes_of_any_rank(self, item: int) -> int:
        """Bytes beside the factors that the layer takes as soon as it has a rank."""
        return ALPHA_BYTES + (self.out * item if self.bias else 0)

    def bytes(self, item: int) -> int:
        """Size of the layer's tensors when stored with ``item`` bytes a number."""
        if self.vector:
            return 2 * self.out * item
        if self.rank is None:
            return self.out * self.width * item + (self.out * item if self.bias else 0)
        # A bias never stands alone where the width is known: it gets factors, even if they do nothing.
        rank = max(self.rank, 1) if self.bias else self.rank
        return rank * self.bytes_per_rank(item) + self.bytes_of_any_rank(item)


@dataclass(frozen=True)
class MergePlan:
    """All decisions of a merge before any tensor is read.

    Attributes:
        recipe: With block weights resolved to numbers, so that it says all.
        dtype: What will be stored: float32, float16 or bfloat16.
        dialect: How names are spelled, chosen where the recipe names a host.
        style: How slots are spelled, where the dialect does not say it.
        predicted_bytes: Size of the file foreseen; an upper bound where ranks
            depend on the singular values.
        ranks_known: Ranks do not depend on the singular values, so ranks and size are not just upper bounds.
        left_out: Layers whose weights are all 0.
        skipped: What ``skip_unsupported`` leaves out, or what the host does not load, a sentence each.
        candidates: Labels of the base models that all files fit; one when it is sure.
    """

    recipe: MergeRecipe
    method: MergeMethod
    params: Mapping[str, Any]
    sources: tuple[SourcePlan, ...]
    architecture: models.Architecture
    dialect: str
    style: str | None
    layers: tuple[LayerPlan, ...]
    left_out: tuple[str, ...]
    embeddings: Mapping[str, tuple[int, str]]
    dtype: str
    base: Path | None
    predicted_bytes: int
    ranks_known: bool
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    candidates: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """Every file that is read."""
        base = [] if self.base is None else [self.base, *self.base.rglob("*.safetensors")]
        return [*(entry.path for entry in self.sources), *base]

    @property
    def needs_base(self) -> bool:
        return any(plan.source.needs_base for plan in self.sources)

    @property
    def layer_count(self) -> int:
        """Layers of the file."""
        return len(self.layers) + len(zero_layers(self))

    @property
    def rank_histogram(self) -> dict[int, int]:
        ranks = Counter(plan.rank for plan in self.layers if plan.rank and not plan.vector)
        return dict(sorted(ranks.items(), reverse=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "base_model": self.architecture.label,
            "base_models": list(self.candidates),
            "architecture": self.architecture.id,
            "mode": self.method.name,
            "params": dict(self.params),
            "dtype": self.dtype,
            "layers": self.layer_count,
            "layers_left_out": len(self.left_out),
            "ranks": {str(rank): count for rank, count in self.rank_histogram.items()},
            "predicted_bytes": self.predicted_bytes,
            "ranks_known": self.ranks_known,
            "smaller": smaller(self),
            "needs_base": self.needs_base,
            "inputs": [source.to_json() for source in self.sources],
            "warnings": list(self.warnings),
            "skipped": list(self.skipped),
        }


def needs_one_rank(plan: MergePlan) -> bool:
    """Whether all layers are written in one rank, the smaller ones filled up with zeros."""
    return dialects.needs_one_rank(plan.architecture.id, plan.dialect, plan.style)


def predicted_bytes(plan: MergePlan) -> int:
    """Size of the file, an upper bound by a few bytes a tensor."""
    item = ITEM_BYTES[plan.dtype]
    layers = (*plan.layers, *zero_layers(plan))
    if needs_one_rank(plan):
        largest = max((layer.rank or 0 for layer in layers), default=0)
        layers = tuple(replace(layer, rank=largest) if layer.rank else layer for layer in layers)
    tensors = sum(layer.bytes(item) + entries_bytes(plan, layer) for layer in layers)
    total = metadata_bytes(plan) + embeddings_bytes(plan) + tensors
    return total if plan.recipe.size is None else min(total, int(plan.recipe.size * 1_000_000))


WORTH = 0.9
"""Part of a file's size above which a smaller one is not worth a word."""


def smaller(plan: MergePlan) -> Smaller | None:
    """Rank of the largest input and the bytes of a file of that rank, where the plan keeps clearly more."""
    recipe = plan.recipe
    if recipe.rank not in ("auto", "full") or not plan.method.uses_rank or not plan.ranks_known:
        return None
    ranked = [layer for layer in plan.layers if layer.rank and not layer.vector]
    rank = max((layer.same_rank or 0 for layer in ranked), default=0)
    if not 0 < rank < max((layer.rank or 0 for layer in ranked), default=0):
        return None
    layers = tuple(
        replace(layer, rank=min(layer.rank, rank)) if layer.rank and not layer.vector else layer
        for layer in plan.layers
    )
    size = predicted_bytes(replace(plan, layers=layers))
    return {"rank": rank, "size_bytes": size} if size < WORTH * plan.predicted_bytes else None


@dataclass(frozen=True)
class FileCosts:
    """What a file's bytes go to, for rules that look at all layers at once.

    Attributes:
        fixed: Bytes that no rank changes: header, norms, layers written whole, embeddings.
        layers: The layers that a rank rule cuts, by name.
        one_rank: All of them are stored in one rank.
    """

    fixed: int
    layers: Mapping[str, ranks.LayerCost]
    one_rank: bool

    def budget(self, size: float, least: int) -> int:
        """Bytes that a file of ``size`` MB leaves for the layers, which take ``least`` of them or more.

        Raises:
            OutputError: Those are not left.
        """
        left = int(size * 1_000_000) - self.fixed
        if left < least:
            raise OutputError(
                "{size} MB is too small for any layer of this merge; it needs at least {least} MB.",
                f"{size:g}",
                f"{(self.fixed + least) / 1e6:.3f}",
            )
        return left


def file_costs(plan: MergePlan, spectra: Sequence[Spectrum | None], name: str = "x" * 32) -> FileCosts:
    """What each rank of each layer costs and is worth in the merged file.

    Args:
        spectra: Of ``plan.layers``; None for those that are written whole.
        name: Stem of the file, where it is known.
    """
    item = ITEM_BYTES[plan.dtype]
    fixed = metadata_bytes(plan, name) + embeddings_bytes(plan)
    fixed += sum(layer.bytes(item) + entries_bytes(plan, layer) for layer in zero_layers(plan))
    costs = {}
    for layer, spectrum in zip(plan.layers, spectra, strict=True):
        entry = entries_bytes(plan, layer)
        if spectrum is None:
            fixed += layer.bytes(item) + entry
            continue
        grouped = bool(companions(plan.architecture.id, layer.layer))
        if grouped and not spectrum.rank:
            fixed += zero_layer(layer, layer.layer).bytes(item) + entry  # the others may need it
        costs[layer.layer] = ranks.LayerCost(
            spectrum.values.numpy(),
            layer.bytes_per_rank(item),
            entry + layer.bytes_of_any_rank(item),
            least=1 if grouped and spectrum.rank else 0,
        )
    return FileCosts(fixed, costs, needs_one_rank(plan))


def zero_layers(plan: MergePlan) -> tuple[LayerPlan, ...]:
    """Layers that no input changes, written because a host takes them and planned ones only together."""
    planned = {layer.layer for layer in plan.layers}
    missing: dict[str, LayerPlan] = {}
    for layer in plan.layers:
        for name in companions(plan.architecture.id, layer.layer):
            if name not in planned:
                missing.setdefault(name, zero_layer(layer, name))
    return tuple(missing.values())


def zero_layer(like: LayerPlan, name: str) -> LayerPlan:
    """A layer of zeros, shaped like another layer, whose group it completes."""
    return LayerPlan(name, like.component, like.block, like.out, like.in_, (), (), (), 1, False, False)


def embeddings_bytes(plan: MergePlan) -> int:
    """Bytes of the bundled embeddings and of their entries in the header."""
    total = 0
    for name, (index, key) in plan.embeddings.items():
        info = plan.sources[index].source.header.tensors[key]
        total += info.end - info.start + len(name.encode()) + len(str(info.shape)) + ENTRY_BYTES
    return total


def entries_bytes(plan: MergePlan, layer: LayerPlan) -> int:
    """Bytes that a layer's tensors take in the header, with room for the longest offsets."""
    slots = ["up", "down", "alpha"]
    if layer.rank is None:
        slots = ["w_norm", "b_norm"] if layer.vector else ["diff"]
    if layer.bias and not layer.vector:
        slots.append("diff_b")
    total = 0
    style = dialects.output_style(plan.architecture.id, plan.dialect, plan.style)
    for prefix, _ in output_names(plan, layer.layer):
        for slot in slots:
            key = dialects.output_key(prefix, slot, plan.dialect, style)
            numbers = 1 if slot == "alpha" else len(f"{layer.rank or 1},{layer.out},{layer.in_}")
            total += len(key) + numbers + ENTRY_BYTES
    return total


def metadata_bytes(plan: MergePlan, name: str = "x" * 32) -> int:
    """Bytes that the metadata of this merge takes at most, padding included.

    Args:
        name: Stem of the file, where it is known.
    """
    hashes = ["0" * 64] * len(plan.sources)
    return len(json.dumps(merged_metadata(plan, name, hashes), ensure_ascii=False).encode()) + 256


def merged_metadata(
    plan: MergePlan,
    name: str,
    hashes: Sequence[str],
    *,
    linear: Sequence[tuple[int, float]] = (),
    conv: Sequence[tuple[int, float]] = (),
    whole: bool = False,
) -> dict[str, str]:
    """What the merged file will say of itself.

    Args:
        name: Stem of the file.
        hashes: ``sshs_model_hash`` of each source.
        linear, conv: (rank, alpha) of the layers written.
        whole: Some layers are not low rank.
    """
    inputs = zip(plan.recipe.inputs, hashes, strict=True)
    recipe = replace(
        plan.recipe,
        params=dict(plan.params),
        inputs=tuple(replace(entry, hash=value) for entry, value in inputs),
    )
    return build_metadata(
        name=name,
        architecture=plan.architecture,
        sources=[
            SourceMeta(entry.path.stem, entry.source.header.metadata, value)
            for entry, value in zip(plan.sources, hashes, strict=True)
        ],
        recipe=recipe,
        ranks=[rank for rank, _ in linear],
        alphas=[alpha for _, alpha in linear],
        conv_ranks=[rank for rank, _ in conv],
        conv_alphas=[alpha for _, alpha in conv],
        module="lycoris.kohya" if whole else "networks.lora",
    )


def output_names(plan: MergePlan, layer: str) -> tuple[tuple[str, models.Rows | None], ...]:
    """Names under which a layer is written, with the rows each of them holds."""
    return dialects.output_parts(plan.architecture.id, layer, plan.dialect)
