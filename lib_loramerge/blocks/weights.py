"""Block weights of one LoRA: the text a person writes -> a factor for every layer.

Source:
    hako-mikan, sd-webui-lora-block-weight. The same lists, letters and rules;
    what it passes over in silence (an unknown preset, a wrong count, a rule it
    cannot read) is an error here, and random entries come from the recipe's seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from lib_loramerge.block_lists import EDGES, TEXT_ENCODERS, in_ranges
from lib_loramerge.blocks.elements import elements_of, words_of
from lib_loramerge.blocks.ids import BLOCK_IDS, FLUX, OTHER, SD_FULL, all_blocks, counts_text
from lib_loramerge.blocks.named import by_name, fits, is_named, split_named
from lib_loramerge.blocks.rules import ElementRule, host_name, parse_rules
from lib_loramerge.errors import RecipeError, Sentence, counted
from lib_loramerge.recipe import STRENGTH_LIMIT, LoraInput, nearest_hint
from lib_loramerge.recipe.check import check_number, plain, shown

if TYPE_CHECKING:
    from lib_loramerge.blocks.presets import Presets
    from lib_loramerge.models import BlockMap

_X = re.compile(r"X(?:([+-])([0-9.]+))?")

# Blocks that only SD or only Flux has. IN and OUT are not: other transformers have them too, and of a list
# for SD such a model takes BASE alone.
_ONLY_THEIRS = frozenset(SD_FULL + FLUX) - frozenset(OTHER)


@dataclass(frozen=True)
class BlockWeights:
    """What block weights and elemental rules do to each layer of one LoRA.

    Attributes:
        ids: Blocks of the list: the 26 of SD and SDXL, the 61 of Flux, or none when
            no list was given.
        values: Block id to weight, for all of ``ids``.
        elements: Elemental rules, in order; the last one that picks a layer wins.
        name: The LoRA's name, for messages.
        named: The blocks that the list has an entry for, or sets to 0.
        absent: The blocks that have 0 because the list has no entry for them.
        entries: What an entry by name is called, and its blocks.
        architecture: Id of the base model, which says what words for elements mean.
    """

    ids: tuple[str, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict, hash=False)
    elements: tuple[ElementRule, ...] = ()
    name: str = ""
    named: frozenset[str] = frozenset()
    absent: frozenset[str] = field(default=frozenset(), compare=False)
    entries: tuple[tuple[str, tuple[str, ...]], ...] = ()
    architecture: str = "unknown"

    def weight(self, component: str, block: str | None, layer: str) -> float:
        """The factor of one layer.

        A rule's ratio takes the place of the block weight, it does not multiply it.
        A layer of no block has 1 unless a rule picks it, and so has every denoiser
        layer of a base model that is neither SD, SDXL nor Flux.

        Args:
            component: ``"unet"``, ``"te"``, ``"te1"``, ``"te2"`` or ``"te3"``.
            block: The layer's block id, or ``None``.
            layer: Its canonical name, ``lora_unet_input_blocks_1_1_proj_in``.

        Raises:
            RecipeError: A list for another base model: it has no entry for the block.
        """
        value = 1.0
        if block is not None and self.ids:
            if block not in self.values and (block in _ONLY_THEIRS or self.ids == FLUX):
                raise self._wrong_list(block)
            value = self.values.get(block, 1.0)
        if self.elements:
            for rule in self.elements:
                if self.picks(rule, component, block, layer):
                    value = rule.ratio
        return value

    def picks(self, rule: ElementRule, component: str, block: str | None, layer: str) -> bool:
        """Whether a rule picks a layer; arguments as of :meth:`weight`."""
        searched = host_name(component, block, layer) + (block or "")
        return rule.hits(searched, words_of(self.architecture, block, layer))

    def as_input_fields(self) -> tuple[str | None, str | None]:
        """(lbw, lbwe) in numbers alone, as a stored recipe keeps them."""
        lbw = ",".join(plain(self.values[block]) for block in self.ids) if self.ids else None
        lbwe = ",".join(rule.text() for rule in self.elements) if self.elements else None
        return lbw, lbwe

    def _wrong_list(self, block: str) -> RecipeError:
        fitting = "61 weights (Flux)" if block in FLUX else "12, 17, 20 or 26 weights (SD and SDXL)"
        return RecipeError(
            "{name}: the block weights are for {first} to {last} and have no entry for block {block} of "
            "this LoRA. Give {list}, or leave lbw= out.",
            shown(self.name),
            self.ids[0],
            self.ids[-1],
            block,
            Sentence(fitting),
        )


def resolve(
    input: LoraInput, presets: Presets, *, rng: random.Random, model: BlockMap | None = None
) -> BlockWeights:
    """The block weights of one LoRA, presets looked up and random entries drawn.

    Args:
        input: The LoRA with its ``lbw``, ``lbwe`` and ``x``.
        presets: Where names are looked up.
        rng: Draws the ``R`` and ``U`` entries, in their order.
        model: The blocks of its base model; without them, lists of SD, SDXL and Flux alone are read.

    Raises:
        RecipeError: An unknown preset (with the nearest names), a list that the base model does not have
            (with those that it has, and the presets that fit), an entry or a rule that makes no sense.
    """

    def about(field: str) -> Sentence:
        return Sentence("{name}: {field}", shown(input.name), field)

    ids: tuple[str, ...] = ()
    values: dict[str, float] = {}
    named = absent = frozenset[str]()
    by_names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    if input.lbw is not None:
        text = _look_up(input.lbw, presets.weights, ",", about("lbw"))
        what = about(_named("lbw", input.lbw, text))
        base = 1.0 if input.x is None else input.x
        if is_named(text):
            _check_reading(input.lbw, presets, what)
            ids = _all_ids(text, model, what)
            assert model is not None
            chosen = by_name(text, model, what)
            by_names = tuple((entry.text, entry.blocks) for entry in chosen)
            weights = {block: entry.weight for entry in chosen for block in entry.blocks}
            order, rest = tuple(block for block in ids if block in weights), dict.fromkeys(ids, 1.0)
            entries = [weights[block] for block in order]
        else:
            entries = _entries(_by_place(text, model, what) if text.startswith("@") else text)
            order, ids, rest = _list_of(len(entries), model, what, presets)
        numbers = [_entry(entry, base, rng, what) for entry in entries]
        values = rest | dict(zip(order, numbers, strict=True))
        absent = frozenset(block for block, weight in rest.items() if weight == 0).difference(order)
        named = frozenset(order) | absent
    rules: tuple[ElementRule, ...] = ()
    if input.lbwe is not None:
        text = _look_up(input.lbwe, presets.elements, ":", about("lbwe"))
        own = model.all if model is not None else ()
        rules = parse_rules(text, ids or None, where=about(_named("lbwe", input.lbwe, text)), own=own)
    architecture = model.architecture if model is not None else "unknown"
    return BlockWeights(ids, values, rules, input.name, named, absent, by_names, architecture)


def _check_reading(written: str, presets: Presets, what: str) -> None:
    """Refuse ``lbw=OUT:0.8`` where ``OUT`` is a preset too, so that 0.8 may be a strength."""
    name, colon, rest = written.partition(":")
    if written not in presets.weights and colon and "," not in rest and name.strip() in presets.weights:
        raise RecipeError(
            "{what}: {written} may mean the block or the preset {name}. Write lbw={name}={weights} for the "
            "block; for the preset, give the strength before lbw=.",
            what,
            shown(written),
            name.strip(),
            rest.strip(),
        )


_PLACE = re.compile(r"@\s*([0-9]*\.?[0-9]+)\s*-\s*([0-9]*\.?[0-9]+)")


def check_place(text: str, what: str) -> tuple[float, float]:
    """The two ends of ``@0-0.33``.

    Raises:
        RecipeError: It is no such part of a model.
    """
    match = _PLACE.fullmatch(text)
    if match is None or not 0 <= float(match[1]) < float(match[2]) <= 1:
        raise RecipeError(
            "{what}: a part of the model is written @FROM-TO with fractions from 0 to 1, such as @0-0.33, "
            "got {text}.",
            what,
            shown(text),
        )
    return float(match[1]), float(match[2])


def _by_place(text: str, model: BlockMap | None, what: str) -> str:
    """``@0-0.33`` as a list of the model: 1 for the blocks in that part of it, 0 for the others.

    Block i of n is at (i + 0.5) / n, IN at 0 and OUT at 1; text encoders keep 1.
    """
    first, last = check_place(text, what)
    ids = _all_ids(text, model, what)
    assert model is not None
    stack = [block for block in model.ids if block not in TEXT_ENCODERS | EDGES]
    place = {block: (index + 0.5) / len(stack) for index, block in enumerate(stack)} | {"IN": 0.0, "OUT": 1.0}
    return ",".join(
        "1"
        if block in TEXT_ENCODERS or first <= place.get(block, -1) < last or place.get(block) == last == 1
        else "0"
        for block in ids
    )


def _all_ids(text: str, model: BlockMap | None, what: str) -> tuple[str, ...]:
    """The list of a base model that has an entry for each of its blocks: the one that is stored."""
    if model is None:
        raise RecipeError("{what}: {text} needs a LoRA whose base model is known.", what, shown(text))
    return next((entry.ids for entry in model.lists if set(model.ids) <= set(entry.ids)), model.ids)


def _list_of(
    count: int, model: BlockMap | None, what: str, presets: Presets
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, float]]:
    """The blocks of a list's entries, the blocks that it is stored with, and what these have without it."""
    if model is None:
        if count not in BLOCK_IDS:
            raise _wrong_count(count, what)
        return BLOCK_IDS[count], all_blocks(count), dict.fromkeys(all_blocks(count), 0.0)
    found = [entry for entry in model.lists if len(entry.ids) == count]
    if not found:
        raise RecipeError(
            "{what} has {weights}, and {model} has lists of {counts}.{presets}",
            what,
            _weights(count),
            model.label,
            model.counts_text(),
            presets_text(fitting(presets, model)),
        )
    if len(found) > 1:
        readings = " or ".join(in_ranges(entry.ids) for entry in found)
        raise RecipeError(
            "{what} has {weights}, which may mean {readings} of {model}. Give a longer or shorter list: "
            "{counts}.",
            what,
            _weights(count),
            readings,
            model.label,
            model.counts_text(),
        )
    chosen = found[0]
    stored = SD_FULL if chosen.rest == 0 else chosen.ids
    if not set(chosen.ids) & {"BASE", "IN", "OUT"} and chosen.rest:
        stored = next(entry.ids for entry in model.lists if set(chosen.ids) < set(entry.ids))
    return chosen.ids, stored, dict.fromkeys(stored, chosen.rest)


def fitting(presets: Presets, model: BlockMap) -> list[str]:
    """Names of the presets of block weights that a base model has a list for."""
    counts = {len(entry.ids) for entry in model.lists}
    return [
        name
        for name, text in presets.weights.items()
        if text.startswith("@") or (fits(text, model) if is_named(text) else len(_entries(text)) in counts)
    ]


def presets_text(names: list[str], most: int = 12) -> str:
    """A sentence that lists presets, for the end of a message."""
    if not names:
        return Sentence(" No preset fits it.")
    more = Sentence(" and {count} more", len(names) - most) if len(names) > most else ""
    return Sentence(" Presets that fit: {presets}{more}.", ", ".join(names[:most]), more)


def check_reach(
    found: BlockWeights, layers: Iterable[tuple[str, str | None, str]], model: BlockMap, presets: Presets
) -> list[str]:
    """Sentences on what block weights and rules do not reach in one LoRA.

    Args:
        layers: (component, block, canonical name) of each layer of the LoRA.

    Raises:
        RecipeError: The list, or all rules together, govern none of the layers.
    """
    known, name = list(layers), shown(found.name)
    present = {block for _, block, _ in known}
    has = in_ranges(block for block in model.all if block in present) or "no block"
    notes = []
    for entry, blocks in found.entries:
        if present.isdisjoint(blocks):
            raise RecipeError(
                "{name}: {entry} governs no layer of this LoRA, which has layers of {has} of {model}.",
                name,
                shown(entry),
                has,
                model.label,
            )
    if found.ids:
        left = [layer for _, block, layer in known if block not in found.named]
        if len(left) == len(known):
            raise RecipeError(
                "{name}: the block weights govern no layer of this LoRA, which has layers of {has} of "
                "{model}. The lists are {counts}.{presets}",
                name,
                has,
                model.label,
                model.counts_text(),
                presets_text(fitting(presets, model)),
            )
        if left:
            more = Sentence(" and {count} more", len(left) - 3) if len(left) > 3 else ""
            notes.append(
                Sentence(
                    "{name}: the block weights leave {count} of {total} layers at 1: {layers}{more}.",
                    name,
                    len(left),
                    len(known),
                    ", ".join(left[:3]),
                    more,
                )
            )
    lacking = [block for _, block, _ in known if block in found.absent]
    if lacking:
        where = in_ranges(block for block in model.all if block in lacking)
        notes.append(
            Sentence(
                "{name}: the list of block weights has no entry for {blocks}, so {count} of {total} layers "
                "have weight 0.",
                name,
                where,
                len(lacking),
                len(known),
            )
        )
    notes += [
        Sentence(
            "{name}: {token} in an elemental rule is a part of 'diffusion_model', as the WebUI calls the "
            "denoiser, so it picks all of the denoiser. Write more of the element's name, such as ff_net.",
            name,
            shown(token),
        )
        for rule in found.elements
        for token in rule.elements
        if token in "diffusion_model"
    ]
    idle = [rule.text() for rule in found.elements if not any(found.picks(rule, *layer) for layer in known)]
    if found.elements and len(idle) == len(found.elements):
        words = elements_of(model.architecture)
        raise RecipeError(
            "{name}: the elemental rules govern no layer of this LoRA: {rules}. It has layers of {has} of "
            "{model}. Words for its elements: {words}.",
            name,
            shown(",".join(idle)),
            has,
            model.label,
            ", ".join(words) or "none",
        )
    return [
        *notes,
        *(
            Sentence("{name}: the elemental rule {text} reaches no layer.", name, shown(text))
            for text in idle
        ),
    ]


def _named(field_name: str, written: str, text: str) -> str:
    """``lbw`` for a literal, ``preset MIDD`` for what came from a preset."""
    return field_name if written == text else Sentence("preset {written}", written)


def _look_up(written: str, presets: Mapping[str, str], literal_mark: str, what: str) -> str:
    if written in presets:
        return presets[written]
    if literal_mark in written or (literal_mark == "," and (written.startswith("@") or is_named(written))):
        return written
    hint = nearest_hint(written, presets)
    raise RecipeError("{what}: there is no preset {written}.{hint}", what, shown(written), hint)


def split_weights(text: str, what: str) -> list[str]:
    """The entries of a list of block weights, as written.

    Raises:
        RecipeError: Their number is not that of a block list.
    """
    if text.startswith("@"):
        check_place(text, what)
        return []
    if is_named(text):
        return [weight for _, weight in split_named(text, what)]
    entries = _entries(text)
    if len(entries) not in BLOCK_IDS and len(entries) not in _known_counts():
        raise _wrong_count(len(entries), what)
    return entries


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",")]


def _weights(count: int) -> Sentence:
    return counted(count, "{count} block weight", "{count} block weights")


def _wrong_count(count: int, what: str) -> RecipeError:
    return RecipeError(
        "{what} has {weights}; a list has {counts}.", what, _weights(count), Sentence(counts_text())
    )


@cache
def _known_counts() -> frozenset[int]:
    """Lengths of the lists of every base model in every size."""
    from lib_loramerge.models import ARCHITECTURES, block_map  # not at a WebUI's start

    return frozenset(
        len(entry.ids)
        for name, record in ARCHITECTURES.items()
        if name != "unknown"
        for size in (None, *record.sizes)
        for entry in block_map(name, size).lists
    )


def check_entry(entry: str, what: str) -> None:
    """Raise :class:`RecipeError` unless ``entry`` may stand in a list of block weights."""
    _entry(entry, 1.0, random.Random(0), what)


def _entry(entry: str, base: float, rng: random.Random, what: str) -> float:
    """The number of one entry; R and U are rounded to three places, as LBW does."""
    if entry == "R":
        return round(rng.random(), 3)
    if entry == "U":
        return round(rng.uniform(-0.5, 1.5), 3)
    match = _X.fullmatch(entry)
    if match:
        offset = (
            check_number(Sentence("{what}: the offset of X", what), match[2], 0, STRENGTH_LIMIT, text=True)
            if match[1]
            else 0.0
        )
        value = base - offset if match[1] == "-" else base + offset
        return check_number(Sentence("{name}: {field}", what, entry), value, -STRENGTH_LIMIT, STRENGTH_LIMIT)
    if re.fullmatch(r"[A-Za-z].*", entry) and not re.fullmatch(r"(?i)nan|inf(inity)?", entry):
        raise RecipeError(
            "{what}: a block weight is a number, R, U, X, X+0.1 or X-0.1, got {entry}.", what, shown(entry)
        )
    return check_number(
        Sentence("{what}: a block weight", what), entry, -STRENGTH_LIMIT, STRENGTH_LIMIT, text=True
    )
