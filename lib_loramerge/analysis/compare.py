"""How LoRAs get on with each other: where they agree, overlap, and fight.

Everything comes from the factors. Deltas count with the strengths and block
weights of the recipe, so what is compared is what would be added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch

from ..blocks import BLOCK_IDS
from ..delta import Delta, Dense, conflict_of, overlaps, sampled_rows
from ..errors import Sentence, joined
from ..merge.layer import open_merger
from ..merge.layout import LayerPlan, MergePlan
from ..merge.loudness import PARTS, Sizes, normalized, quieter, ratios, sizes_of
from ..merge.work import Progress, Work
from ..report import count_text, percent

# Cosines beyond which two LoRAs are called the same, agreeing, unrelated, or opposed.
SAME, AGREE, UNRELATED, OPPOSED = 0.9, 0.3, 0.05, -0.1
# From this ratio of norms on, one is called much stronger.
LOUD = 3.0
# Part by which a sum may be stronger than its strongest LoRA without a word.
_AS_LOUD = 0.005
# Lists of block weights of each architecture, the shortest first; those of others are too long to show.
_LISTS = {"sd1": (17, 26), "sd2": (17, 26), "sdxl": (12, 20, 26)}
_LOWERED = "0.5"
# The first sentence of a verdict: the same, agreeing, opposed, unrelated, a little related, neither by block.
AGREEMENTS = (
    "Nearly the same change, as from one training run: average them, or the sum is twice as strong.",
    "They agree in much: the sum is louder than either. Lower the strengths, or use mode average.",
    "They pull against each other: part of both is lost in a sum. Try mode np, ties or block weights.",
    "Nearly orthogonal: a plain sum keeps all of both.",
    "A little related: a plain sum is a good choice.",
    "Little related as a whole, but not in every block.",
)


@dataclass(frozen=True)
class Relation:
    """How two deltas stand to each other.

    Attributes:
        cosine: Of the angle between them, -1 to 1; 0 is unrelated.
        inputs: Overlap of their input spaces, 0 to 1; None for dense deltas.
        outputs: The same of their output spaces.
        sign_conflict: Share of the elements, weighted by their product, in which the signs differ;
            0.5 is what unrelated deltas give.
        norms: Frobenius norms of both, strengths included.
    """

    cosine: float
    inputs: float | None
    outputs: float | None
    sign_conflict: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class PairReport:
    """Two LoRAs compared, as a whole, by block and by layer.

    Attributes:
        shared: Number of layers that both change.
        blocks: Block id to relation.
        layers: Layer name to relation, shared layers only.
        layer_blocks: Layer name to block id, for the same layers.
        verdict: What it means, in plain words.
    """

    names: tuple[str, str]
    shared: int
    whole: Relation
    blocks: Mapping[str, Relation]
    layers: Mapping[str, Relation]
    layer_blocks: Mapping[str, str]
    verdict: str

    @property
    def conflict(self) -> bool:
        """Whether they pull against each other in some block."""
        return any(relation.cosine <= OPPOSED for relation in (self.whole, *self.blocks.values()))


@dataclass(frozen=True)
class CompareReport:
    """All pairs of a recipe's inputs.

    Attributes:
        norms: For each input, block id to the norm of its delta, strength included.
        sum_norms: The same of their plain sum: less than the inputs' where they fight.
        louder: Block id to the norm of the sum as a multiple of that of its strongest LoRA there, at the
            strength that this was given before ``normalize``.
        louder_in: The same for ``"unet"`` and ``"te"`` as a whole.
        quieter: For each input the strengths, ``name``, ``te`` and ``unet``, at which the sum is as strong as
            its strongest LoRA is now; empty where it is no stronger, and after ``normalize``.
    """

    base_model: str
    names: Sequence[str]
    pairs: Sequence[PairReport]
    norms: Sequence[Mapping[str, float]] = ()
    sum_norms: Mapping[str, float] = field(default_factory=dict)
    louder: Mapping[str, float] = field(default_factory=dict)
    louder_in: Mapping[str, float] = field(default_factory=dict)
    quieter: Sequence[Mapping[str, Any]] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        legend = [
            "cosine: 1 is the same change, 0 unrelated, -1 the opposite. inputs, outputs: share of the",
            "directions that both read and write. signs: share of the elements that they push opposite",
            "ways, 50 % is chance. norms: how strong each is, strengths and block weights included.",
        ]
        pairs = [_pair_text(pair) for pair in self.pairs]
        together = _together_text(self)
        return "\n\n".join([f"Base model   {self.base_model}", *pairs, *together, "\n".join(legend)])

    @property
    def loudest(self) -> tuple[str, float] | None:
        """The block in which the sum is strongest beside its strongest LoRA, and by how much."""
        return max(self.louder.items(), key=lambda entry: entry[1], default=None)


@dataclass(frozen=True)
class _Sizes:
    """Squared norms in one layer: of each input, 0 where it has no part in it, and of LoRAs and their sum."""

    layer: LayerPlan
    inputs: Sequence[float]
    loras: Sizes


@dataclass(frozen=True)
class _Seen:
    """One layer of one pair: products that can be added up over layers."""

    layer: LayerPlan
    pair: tuple[int, int]
    product: float
    norms_sq: tuple[float, float]
    conflict: float | None
    spaces: tuple[float, float] | None


def compare(
    plan: MergePlan,
    *,
    progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> CompareReport:
    """Compare every pair of a plan's inputs, layer by layer.

    Args:
        cancel: Asked about every tenth of a second; True ends the work.

    Raises:
        LoraMergeError: What a merge would refuse, too.
    """
    lowered = plan.recipe.normalize is not None
    plan = normalized(plan, progress=progress, cancel=cancel)
    pairs = list(combinations(range(len(plan.sources)), 2))
    with open_merger(plan) as merger:

        def look(layer: LayerPlan) -> tuple[_Sizes | None, list[_Seen]]:
            present = merger.present(layer)
            return _look(layer, pairs, present, merger.loras) if present else (None, [])

        by_layer = Work(progress, cancel).each_layer(plan, look, "compare")
    seen = [entry for _, entries in by_layer for entry in entries]
    sizes = [entry for entry, _ in by_layer if entry is not None]
    names = [entry.name for entry in plan.recipe.inputs]
    louder_in = ratios((entry.loras for entry in sizes), lambda size: size.part)
    loud = any(ratio > 1 + _AS_LOUD for ratio in louder_in.values()) and not lowered
    louder = ratios((entry.loras for entry in sizes), lambda size: size.layer.block or "other")
    if lowered:
        parts = {entry.layer.block or "other": entry.loras.part for entry in sizes}
        louder = {block: ratio / max(1.0, louder_in[parts[block]]) for block, ratio in louder.items()}
        louder_in = {part: min(1.0, ratio) for part, ratio in louder_in.items()}
    return CompareReport(
        base_model=plan.architecture.label,
        names=names,
        pairs=[
            _pair(names, pair, [entry for entry in seen if entry.pair == pair], plan.architecture.id)
            for pair in pairs
        ],
        norms=[
            norms_by_block((entry.layer, entry.inputs[index]) for entry in sizes)
            for index in range(len(plan.sources))
        ],
        sum_norms=norms_by_block((entry.layer, entry.loras.total) for entry in sizes),
        louder=louder,
        louder_in=louder_in,
        quieter=[
            {"name": given.name, "te": given.te, "unet": given.unet}
            for given in (quieter(entry, louder_in) for entry in plan.recipe.inputs)
            if loud
        ],
    )


def norms_by_block(squares: Iterable[tuple[LayerPlan, float]]) -> dict[str, float]:
    """Norms of blocks from the squared norms of layers."""
    sums: dict[str, float] = {}
    for layer, square in squares:
        block = layer.block or "other"
        sums[block] = sums.get(block, 0.0) + square
    return {block: square**0.5 for block, square in sorted(sums.items())}


def most_opposed_first(pairs: Sequence[PairReport]) -> list[PairReport]:
    """The pairs by the block in which each conflicts most, so that the first few matter."""
    return sorted(pairs, key=lambda pair: min((r.cosine for r in pair.blocks.values()), default=0.0))


def _look(
    layer: LayerPlan,
    pairs: Sequence[tuple[int, int]],
    present: Sequence[tuple[int, float, Delta]],
    loras: Sequence[int],
) -> tuple[_Sizes, list[_Seen]]:
    """What each pair has to do with each other in one layer; pairs without content there are left out.

    Args:
        present: Index, weight and delta of each input that has the layer.
        loras: The LoRA of each input of the plan.
    """
    deltas = [delta for _, _, delta in present]
    places = {index: place for place, (index, _, _) in enumerate(present)}
    weights = torch.tensor([weight for _, weight, _ in present], dtype=torch.float64)
    common = overlaps(deltas)
    products = common.products * weights[:, None] * weights
    vector = any(isinstance(delta, Dense) and delta.weight.dim() == 1 for delta in deltas)
    squares = [0.0] * len(loras)
    for index, place in places.items():
        squares[index] = max(0.0, float(products[place, place]))
    owners = [loras[index] for index, _, _ in present]
    sizes = _Sizes(layer, squares, sizes_of(layer, products, owners, len(set(loras))))
    rows = [] if vector or len(deltas) < 2 else [sampled_rows(delta) for delta in deltas]
    seen = []
    for pair in pairs:
        first, second = (places.get(index) for index in pair)
        norms_sq = tuple(squares[index] for index in pair)
        if not any(norms_sq):
            continue
        if first is None or second is None:
            seen.append(_Seen(layer, pair, 0.0, (norms_sq[0], norms_sq[1]), None, None))
            continue
        spaces = float(common.inputs[first, second]), float(common.outputs[first, second])
        conflict = conflict_of(rows[first], rows[second]) if rows else None
        if conflict is not None and weights[first] * weights[second] <= 0:
            conflict = 1 - conflict
        product = float(products[first, second])
        known = None if math.isnan(spaces[0]) else spaces
        seen.append(_Seen(layer, pair, product, (norms_sq[0], norms_sq[1]), conflict, known))
    return sizes, seen


def _pair(
    names: Sequence[str], pair: tuple[int, int], seen: Sequence[_Seen], architecture: str
) -> PairReport:
    blocks: dict[str, list[_Seen]] = {}
    for entry in seen:
        blocks.setdefault(entry.layer.block or "other", []).append(entry)
    shared = [entry for entry in seen if all(entry.norms_sq)]
    whole = _relation(seen)
    by_block = {block: _relation(entries) for block, entries in sorted(blocks.items())}
    return PairReport(
        names=(names[pair[0]], names[pair[1]]),
        shared=len(shared),
        whole=whole,
        blocks=by_block,
        layers={entry.layer.layer: _relation([entry]) for entry in shared},
        layer_blocks={entry.layer.layer: entry.layer.block or "other" for entry in shared},
        verdict=_verdict((names[pair[0]], names[pair[1]]), whole, by_block, len(shared), architecture),
    )


def _relation(seen: Sequence[_Seen]) -> Relation:
    """Sum of several layers; overlaps and conflicts are means, weighted by what both put in."""
    first, second = (sum(entry.norms_sq[side] for entry in seen) for side in (0, 1))
    product = sum(entry.product for entry in seen)
    size = (first * second) ** 0.5
    inputs, outputs = (
        _mean((entry.spaces[side], _common(entry)) for entry in seen if entry.spaces) for side in (0, 1)
    )
    conflict = _mean((entry.conflict, _common(entry)) for entry in seen if entry.conflict is not None)
    return Relation(
        cosine=max(-1.0, min(1.0, product / size)) if size else 0.0,
        inputs=inputs,
        outputs=outputs,
        sign_conflict=conflict if conflict is not None else 0.0,
        norms=(first**0.5, second**0.5),
    )


def _common(entry: _Seen) -> float:
    return (entry.norms_sq[0] * entry.norms_sq[1]) ** 0.5


def _mean(pairs: Iterable[tuple[float, float]]) -> float | None:
    values = list(pairs)
    weight = sum(w for _, w in values)
    return sum(value * w for value, w in values) / weight if weight else None


def _verdict(
    names: tuple[str, str],
    whole: Relation,
    blocks: Mapping[str, Relation],
    shared: int,
    architecture: str,
) -> str:
    a, b = names
    if not shared:
        return Sentence(
            "{first} and {second} change no layer in common: a plain sum is exact for both.", a, b
        )
    fighting = [block for block, relation in blocks.items() if relation.cosine <= OPPOSED < whole.cosine]
    agreeing = [block for block, relation in blocks.items() if relation.cosine >= AGREE > whole.cosine]
    sentences = [Sentence(_agreement(whole, everywhere=not (fighting or agreeing)))]
    if fighting:
        sentences.append(
            Sentence(
                "They pull against each other in {blocks}: lower one of them there with block weights "
                "(lbw={weights}), or let one go first with mode np.",
                ", ".join(fighting),
                _lowering(fighting, blocks, architecture),
            )
        )
    if agreeing:
        sentences.append(
            Sentence("They agree in {blocks}: there the sum is louder than either.", ", ".join(agreeing))
        )
    return joined(" ", [*sentences, *_loudness(names, whole, blocks)])


def _lowering(fighting: Sequence[str], blocks: Iterable[str], architecture: str) -> str:
    """Block weights that halve a LoRA where it fights and leave it as it is elsewhere; empty if too long."""
    for count in _LISTS.get(architecture, ()):
        if set(blocks) - {"other"} <= set(BLOCK_IDS[count]):
            return ",".join(_LOWERED if block in fighting else "1" for block in BLOCK_IDS[count])
    return ""


def _loudness(names: tuple[str, str], whole: Relation, blocks: Mapping[str, Relation]) -> list[str]:
    """Which LoRA dominates, overall or per block."""
    for side in (0, 1):
        if _drowns(whole, side):
            return [
                Sentence(
                    "{name} is more than three times as strong as the other at these strengths.", names[side]
                )
            ]
    loud = [[block for block, relation in blocks.items() if _drowns(relation, side)] for side in (0, 1)]
    return [
        Sentence(
            "{name} is more than three times as strong as the other in {blocks}.", name, ", ".join(where)
        )
        for name, where in zip(names, loud)
        if where
    ]


def _drowns(relation: Relation, side: int) -> bool:
    return relation.norms[side] > LOUD * relation.norms[1 - side] > 0


def _agreement(whole: Relation, everywhere: bool) -> str:
    same, agree, opposed, unrelated, little, by_block = AGREEMENTS
    if whole.cosine >= SAME:
        return same
    if whole.cosine >= AGREE:
        return agree
    if whole.cosine <= OPPOSED:
        return opposed
    if not everywhere:
        return by_block
    return unrelated if abs(whole.cosine) <= UNRELATED else little


def _pair_text(pair: PairReport) -> str:
    whole = pair.whole
    rows = [
        f"{pair.names[0]}  and  {pair.names[1]}: {count_text(pair.shared, 'layer')} in common",
        f"  {pair.verdict}",
        f"  {'block':<8}{'cosine':>8}{'inputs':>9}{'outputs':>9}{'signs':>9}{'norms':>18}",
        _row("all", whole),
        *(_row(block, relation) for block, relation in pair.blocks.items()),
    ]
    return "\n".join(rows)


def _together_text(report: CompareReport) -> list[str]:
    """How strong the sum is beside its strongest LoRA."""
    if len(report.names) < 2 or not report.louder_in:
        return []
    parts = ", ".join(f"{ratio:.2f} times ({PARTS[part]})" for part, ratio in report.louder_in.items())
    rows = [f"Together     {parts} as strong as the strongest LoRA"]
    if report.loudest is not None:
        rows.append(f"             most in {report.loudest[0]}: {report.loudest[1]:.2f} times")
    if report.quieter:
        inputs = " ".join(f"{row['name']}:{row['te']:g}:{row['unet']:g}" for row in report.quieter)
        rows.append(f"             no stronger at {inputs} (--normalize strongest)")
    return ["\n".join(rows)]


def _rounded(cosine: float) -> float:
    """To the three digits that are shown; never a minus before zeros."""
    return round(cosine, 3) + 0.0


def _row(title: str, relation: Relation) -> str:
    spaces = "".join(
        f" {'-' if value is None else percent(value):>8}" for value in (relation.inputs, relation.outputs)
    )
    norms = f"{relation.norms[0]:.3g} : {relation.norms[1]:.3g}"
    signs = percent(relation.sign_conflict)
    return f"  {title:<8}{_rounded(relation.cosine):>8.3f}{spaces} {signs:>8} {norms:>17}"
