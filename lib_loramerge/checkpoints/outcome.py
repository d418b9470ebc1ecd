"""What baking did and lost: its report, and what the file says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Sentence, counted, joined
from ..files import size_text
from ..metadata import RECIPE_KEY, RECIPE_LIMIT
from ..recipe import MergeRecipe, to_json
from ..recipe.stored import VERSION
from ..report import count_text, percent
from .summing import Sums

WELL_KEPT = 0.95
WORST = 5
_LONG_TEXT = 64 * 1024
_NOT_KEPT = ("modelspec.hash_sha256", "modelspec.thumbnail", "modelspec.date")


@dataclass(frozen=True)
class BakeReport:
    """The outcome of one bake; of a dry run what is foreseen.

    Attributes:
        outputs: The files written.
        survives: Share of the change that is in the file after rounding, 1 for all of it.
        error: Rounding noise against what was to be changed.
        noise: The same against the weights of the changed tensors.
        change: How large the change is against those weights.
        sha256: Of the file, as A1111 computes it for a checkpoint; its first ten digits are what it shows.
    """

    outputs: Sequence[str]
    size_bytes: int
    base: str
    base_model: str
    rounding: str
    dtypes: Mapping[str, int]
    layers: int
    tensors: int
    unchanged: int
    untouched_bytes: int
    survives: float | None
    error: float | None
    noise: float | None
    change: float | None
    worst: Sequence[Mapping[str, Any]]
    sha256: str | None
    warnings: Sequence[str]
    skipped: Sequence[str]
    seconds: float = 0.0
    dry_run: bool = False
    inputs: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self)

    def to_text(self) -> str:
        """The report as a table for a terminal."""
        rows = [
            ("Would write" if self.dry_run else "Written", ", ".join(self.outputs) or "nothing (no -o)"),
            ("Size", f"{self.size_bytes / 1e6:,.2f} MB"),
            ("Checkpoint", f"{self.base}, {self.base_model}"),
            *(("Baked in", text) for text in self.inputs),
            (
                "Changed",
                f"{count_text(self.layers, 'layer')} in {count_text(self.tensors, 'tensor')} "
                f"({_dtypes(self.dtypes)})",
            ),
        ]
        if self.survives is not None:
            rows += [
                ("Survives", f"{percent(self.survives)} of the change"),
                (
                    "Rounding",
                    f"{self.rounding}; its noise is {percent(self.noise or 0)} of the weights, the change "
                    f"{percent(self.change or 0)}, the error {percent(self.error or 0)} of the change",
                ),
                ("Worst tensors", ""),
                *(("", f"{percent(row['survives'])} survives  {row['tensor']}") for row in self.worst),
            ]
        if self.unchanged:
            rows.append(
                ("Unchanged", f"{count_text(self.unchanged, 'tensor')} with the same numbers after rounding")
            )
        if not self.dry_run:
            rows.append(("Untouched", f"{self.untouched_bytes / 1e6:,.2f} MB, byte for byte"))
        if self.sha256:
            rows.append(("Hash", f"{self.sha256[:10]} (sha256 {self.sha256})"))
        rows += [("Skipped", text) for text in self.skipped]
        rows += [("Warning", text) for text in self.warnings]
        return "\n".join(f"{label:<14}{text}".rstrip() for label, text in rows)


def _dtypes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.items()) or "none"


def total(sums: Mapping[str, Sums]) -> Sums:
    whole = Sums()
    for one in sums.values():
        whole += one
    return whole


def worst(sums: Mapping[str, Sums]) -> list[dict[str, Any]]:
    """The tensors of whose change least survives."""
    found = [(key, one) for key, one in sums.items() if one.added > 0]
    found.sort(key=lambda item: (item[1].survives, item[0]))
    return [{"tensor": key, "survives": one.survives, "error": one.error} for key, one in found[:WORST]]


def shortened(sentences: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    return [*sentences[:5], *([Sentence("{count} more", len(sentences) - 5)] if len(sentences) > 5 else [])]


def broken_copies(sums: Mapping[str, Sums]) -> list[str]:
    """A warning where a tensor that was copied as it is holds no ordinary numbers."""
    names = [key for key, one in sums.items() if not one.finite]
    if not names:
        return []
    return [
        counted(
            len(names),
            "{count} tensor holds NaN or infinity and was copied as it is: {tensor}.",
            "{count} tensors hold NaN or infinity and were copied as they are, such as {tensor}.",
            names[0],
        )
    ]


def remedy(
    survives: float, rounding: str, dtypes: Mapping[str, int], finer: Callable[[], tuple[str, int] | None]
) -> str | None:
    """A warning where too little of the LoRAs is left after rounding.

    Args:
        finer: Says which dtype holds more, and the size of the file then.
    """
    if survives >= WELL_KEPT:
        return None
    ways = [] if rounding == "stochastic" else [Sentence("--rounding stochastic keeps all of it on average")]
    if other := finer():
        ways.append(
            Sentence("--dtype {dtype} holds it more finely, in {size}", other[0], size_text(other[1]))
        )
    return Sentence(
        "Only {share} of the change survives rounding to {dtype}. {ways}.",
        percent(max(0.0, survives)),
        ", ".join(dtypes),
        joined("; ", ways),
    )


def kept_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What of a checkpoint's texts stays true of the baked one, and sentences on what does not."""
    kept, notes = {}, []
    for key, value in metadata.items():
        if key in _NOT_KEPT or key.startswith("sshs_"):
            if key == "modelspec.thumbnail":
                notes.append("The checkpoint's thumbnail was left out: it shows the model as it was.")
            continue
        if key in ("prompt", "workflow") and len(value.encode("utf-8", "replace")) > _LONG_TEXT:
            notes.append(
                Sentence(
                    "ComfyUI's {field} of {count} characters was left out of the metadata.",
                    key,
                    f"{len(value):,}",
                )
            )
            continue
        kept[key] = value
    return kept, notes


def baked_metadata(
    kept: Mapping[str, str],
    *,
    name: str,
    base: Path,
    base_sha256: str | None,
    legacy_hash: str,
    recipe: MergeRecipe | None,
    parents: Sequence[str],
    how: Mapping[str, Any],
) -> dict[str, str]:
    """The texts of a baked checkpoint: the base's, A1111's pair about merges, and our recipe.

    Args:
        how: Rounding, dtype, and what else makes the same tensors again.
    """
    texts = dict(kept)
    texts.setdefault("format", "pt")
    texts["modelspec.title"] = name
    texts["modelspec.merged_from"] = ", ".join([base.stem, *parents])[:2000]
    stored: dict[str, Any] = {"version": VERSION} if recipe is None else to_json(recipe)
    bake = {"base": base.name, "base_sha256": base_sha256, **how}
    text = json.dumps({**stored, "bake": bake}, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    for key in (RECIPE_KEY, OLD_BAKE_KEY):
        texts.pop(key, None)
    if len(text.encode("utf-8", "replace")) < RECIPE_LIMIT:
        texts[RECIPE_KEY] = text
    if base_sha256 is None:
        for key in ("sd_merge_recipe", "sd_merge_models"):
            texts.pop(key, None)
        return texts
    before = kept.get("sd_merge_recipe")
    models = _object(kept.get("sd_merge_models"))
    models[base_sha256] = {
        "name": base.name,
        "legacy_hash": legacy_hash,
        "sd_merge_recipe": _object(before) if before else None,
    }
    texts["sd_merge_recipe"] = json.dumps(
        {"type": "loramerge", "primary_model_hash": base_sha256, "custom_name": name, **bake}, sort_keys=True
    )
    texts["sd_merge_models"] = json.dumps(models)
    return texts


OLD_BAKE_KEY = "loramerge_bake"
"""Where checkpoints of before have what :func:`baked_metadata` writes as ``loramerge_recipe``."""


def stored_bake(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What a baked checkpoint says of its base and of ``how`` it was made; empty where it says nothing."""
    for key in (RECIPE_KEY, OLD_BAKE_KEY):
        bake = _object(metadata.get(key)).get("bake")
        if isinstance(bake, Mapping):
            return bake
    return {}


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
