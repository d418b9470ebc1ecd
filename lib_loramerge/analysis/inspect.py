"""What one LoRA file is: its spelling, base model, kinds, ranks, sizes, and what merging it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import dialects, models
from ..delta import Dense, decompose, decompose_dense, helpful_threads, norm, parallel_map
from ..errors import LoraMergeError
from ..hosts import HOSTS
from ..merge.base import BaseCheckpoint
from ..merge.base_model import model_id
from ..merge.input_notes import layer_notes
from ..merge.read import SourceReader
from ..merge.sources import Source, open_source
from ..models import ARCHITECTURES
from ..report import histogram_text, percent
from .hosts import hosts_that_load

# Ranks at which the share of the norm kept is reported.
CURVE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHOWN_METADATA = (
    "ss_output_name", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    "ss_sd_model_name", "modelspec.architecture", "modelspec.title", "modelspec.merged_from",
)  # fmt: skip


@dataclass(frozen=True)
class InspectReport:
    """Everything that ``inspect`` reports of a file.

    Attributes:
        reason: Why the base model is thought to be that one.
        kinds: Adapter kind to number of layers.
        ranks: Rank to number of layers.
        alphas: Stored alpha to number of layers; ``"none"`` where it is missing.
        needs: What merging takes beside the file itself.
        hosts: Program to what it makes of the file as it is.
        host_versions: Program to the version of its code that this was read from.
        written_as: A tensor name as the merge would write it.
        norm_by_block: Block id to the Frobenius norm of its delta weights.
        effective_rank_by_block: Block id to the mean over its layers of the exponential of the entropy of the
            singular values, taken as shares of their sum (Roy and Vetterli 2007, The effective rank).
        kept_at_rank: Rank to the share of the whole norm that it would keep.
        numerical_rank: Largest and mean numerical rank over the layers.
    """

    file: str
    size_bytes: int
    dialect: str
    architecture: str
    base_model: str
    base_models: Sequence[str]
    reason: str
    layers: int
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[str, int]
    dtypes: Mapping[str, int]
    unknown: Sequence[str]
    unsupported: Sequence[str]
    embeddings: Sequence[str]
    needs: Sequence[str]
    hosts: Mapping[str, str]
    host_versions: Mapping[str, str]
    written_as: str
    notes: Sequence[str]
    norm: float
    norm_by_block: Mapping[str, float]
    effective_rank_by_block: Mapping[str, float]
    kept_at_rank: Mapping[int, float]
    numerical_rank: Mapping[str, float]
    metadata: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)

    def to_text(self) -> str:
        rows = [
            ("File", f"{self.file} ({self.size_bytes / 1e6:,.2f} MB)"),
            ("Base model", f"{self.base_model}: {self.reason}"),
            ("Spelling", self.dialect),
            ("Layers", f"{self.layers}: " + _listed(f"{count} {kind}" for kind, count in self.kinds.items())),
            ("Ranks", histogram_text(self.ranks) or "none"),
            ("Alphas", ", ".join(f"{alpha} ({count})" for alpha, count in list(self.alphas.items())[:8])),
            ("Stored as", ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())),
            ("Norm", f"{self.norm:.4g}"),
            *(("", self._block_text(block)) for block in self.norm_by_block),
            ("Norm kept", _listed(f"{percent(v)} at rank {rank}" for rank, v in self.kept_at_rank.items())),
            ("True rank", "up to {largest:.0f}, {mean:.1f} on average".format(**self.numerical_rank)),
            ("Written as", self.written_as),
            ("Loads in", ""),
            *(("", f"{host} ({self.host_versions[host]}): {text}") for host, text in self.hosts.items()),
            *(("Needs", text) for text in self.needs),
            *(("Not known", key) for key in self.unknown[:10]),
            *(("Cannot merge", text) for text in self.unsupported[:10]),
            *(("Embedding", key) for key in self.embeddings[:10]),
            *(("Note", text) for text in self.notes),
            *((("Metadata" if not index else ""), f"{key}: {self.metadata[key][:200]}")
              for index, key in enumerate(k for k in _SHOWN_METADATA if k in self.metadata)),
        ]  # fmt: skip
        return "\n".join(f"{label:<13}{text}".rstrip() for label, text in rows)

    def _block_text(self, block: str) -> str:
        rank = self.effective_rank_by_block.get(block)
        more = "" if rank is None else f"   effective rank {rank:.1f}"
        return f"{block:<6}{self.norm_by_block[block]:10.4g}{more}"


def inspect(
    path: Path,
    *,
    base: Path | None = None,
    tensors: bool = True,
    base_model: str | None = None,
    cancel: Callable[[], bool] | None = None,
) -> InspectReport:
    """Describe a LoRA file.

    Args:
        base_model: Base model that overrules what the file looks like, by name.
        base: Base model checkpoint, to measure layers that change it in proportion.
        tensors: False looks at the header alone; norms and ranks are then left empty.
        cancel: Asked about every tenth of a second; True ends the work.

    Raises:
        FileError: Not readable, damaged, or not a LoRA.
    """
    source = open_source(path, model_id(base_model) if base_model is not None else None)
    measured = _measure(source, base, cancel) if tensors else _Measured({}, {}, {}, [], [], {})
    whole = sum(measured.norm_sq.values())
    return InspectReport(
        file=str(path),
        size_bytes=source.header.size,
        dialect=source.dialect,
        architecture=source.architecture.id,
        base_model=source.base_model,
        base_models=_candidates(source),
        reason=source.reason,
        layers=len(source.layers),
        kinds=source.kinds,
        ranks=source.ranks,
        alphas=measured.alphas,
        dtypes=source.dtypes,
        unknown=list(source.unknown),
        unsupported=list(source.unsupported),
        embeddings=sorted(source.embeddings),
        needs=_needs(source),
        hosts=hosts_that_load(source),
        host_versions={host.label: host.read_from for host in HOSTS.values()},
        written_as=_written_as(source),
        notes=sorted({*source.notes(), *layer_notes(measured.notes)}),
        norm=whole**0.5,
        norm_by_block={block: value**0.5 for block, value in sorted(measured.norm_sq.items())},
        effective_rank_by_block={
            block: sum(values) / len(values) for block, values in sorted(measured.effective.items())
        },
        kept_at_rank=_curve(measured),
        numerical_rank={
            "largest": float(max(measured.ranks, default=0)),
            "mean": sum(measured.ranks) / len(measured.ranks) if measured.ranks else 0.0,
        },
        metadata=dict(source.header.metadata),
    )


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(texts)


# Block, singular values, squared norm, and what is worth knowing of a layer, with its name.
_Look = tuple[str, torch.Tensor | None, float, tuple[tuple[str, str], ...]]


@dataclass
class _Measured:
    alphas: dict[str, int]
    norm_sq: dict[str, float]
    kept_sq: dict[int, float]
    ranks: list[int]
    notes: list[tuple[str, str]]
    effective: dict[str, list[float]]


def _measure(source: Source, base: Path | None, cancel: Callable[[], bool] | None) -> _Measured:
    checkpoint = BaseCheckpoint(base) if base is not None else None
    measured = _Measured({}, {}, {}, [], [], {})
    alphas: Counter[str] = Counter()
    try:
        with SourceReader(source, checkpoint) as reader:

            def look(layer: str) -> _Look:
                delta = reader.delta(layer)
                notes = tuple((layer, note) for note in delta.notes)
                weight, block = delta.weight, models.block(source.architecture.id, layer) or "other"
                if weight is None:
                    return block, None, 0.0, notes
                if isinstance(weight, Dense) and weight.weight.dim() == 1:
                    return block, None, norm(weight) ** 2, notes
                spectrum = (
                    decompose_dense(weight, vectors=False)
                    if isinstance(weight, Dense)
                    else decompose(weight, vectors=False)
                )
                return block, spectrum.values, spectrum.energy, notes

            layers = [
                layer
                for layer in source.layers
                if checkpoint is not None or not source.layer_needs_base(layer)
            ]
            stored = sum(math.prod(info.shape) for info in source.header.tensors.values())
            workers = helpful_threads(stored / max(1, len(layers))) if checkpoint is None else None
            for block, values, energy, notes in parallel_map(look, layers, workers=workers, cancel=cancel):
                measured.norm_sq[block] = measured.norm_sq.get(block, 0.0) + energy
                measured.notes += notes
                if values is not None:
                    _add_curve(measured, values, energy)
                    if len(values):
                        measured.effective.setdefault(block, []).append(_effective_rank(values))
            for part in (part for parts in source.layers.values() for part in parts):
                key = part.part.slots.get("alpha")
                alphas["none" if key is None else f"{float(reader.read(key).reshape(-1)[0]):g}"] += 1
    finally:
        if checkpoint is not None:
            checkpoint.close()
    measured.alphas = dict(alphas.most_common())
    return measured


def _add_curve(measured: _Measured, values: torch.Tensor, energy: float) -> None:
    squares = values.double() ** 2
    measured.ranks.append(len(values))
    for rank in CURVE_RANKS:
        kept = float(squares[:rank].sum()) if rank < len(squares) else energy
        measured.kept_sq[rank] = measured.kept_sq.get(rank, 0.0) + kept


def _effective_rank(values: torch.Tensor) -> float:
    shares = values.double() / values.double().sum()
    return float(torch.special.entr(shares).sum().exp())


def _curve(measured: _Measured) -> dict[int, float]:
    """Share of the norm kept at each rank, up to the first that keeps all."""
    top, energy = max(measured.ranks, default=0), max(measured.kept_sq.values(), default=0.0)
    shown = [rank for rank in CURVE_RANKS if rank < top]
    return {rank: (measured.kept_sq[rank] / energy) ** 0.5 for rank in shown if energy} | (
        {top: 1.0} if top else {}
    )


def _candidates(source: Source) -> list[str]:
    """What people call the base models that the file fits, the most likely one first."""
    labels = [f"{ARCHITECTURES[name].label} {size}".rstrip() for name, size in source.candidates]
    return labels or [source.base_model]


def _needs(source: Source) -> list[str]:
    needs = []
    if source.needs_base:
        needs.append("the base model checkpoint it was trained on (--base CHECKPOINT)")
    if source.unknown or source.unsupported:
        needs.append("--skip-unsupported, since some of it cannot be merged")
    if len({name for name, _ in source.candidates}) > 1:
        needs.append("--base-model NAME, or a file that says it, where the base model has to be known")
    return needs


def _written_as(source: Source) -> str:
    """One tensor name as a merge of this file would spell it, of a layer with factors if there is one."""
    style = source.style if source.architecture.opaque else None
    for layer in sorted(source.layers, key=lambda layer: _written_slot(source, layer) != "up"):
        try:
            prefix, _ = dialects.output_parts(source.architecture.id, layer, "auto")[0]
        except LoraMergeError as error:
            return str(error)
        chosen = dialects.output_style(source.architecture.id, "auto", style)
        return dialects.output_key(prefix, _written_slot(source, layer), "auto", chosen)
    return "nothing: no layer of it can be merged"


def _written_slot(source: Source, layer: str) -> str:
    kinds = {part.facts.kind for part in source.layers[layer]}
    if kinds <= {"norm", "bias"}:
        return "w_norm" if "norm" in kinds else "diff_b"
    return "diff" if source.rank(layer) is None else "up"
