"""Elemental rules: ``blocks:elements:ratio``, which layers they pick and how they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lib_loramerge.block_lists import TEXT_ENCODERS
from lib_loramerge.blocks.elements import WORDS
from lib_loramerge.blocks.ids import FLUX, OTHER, SD_FULL
from lib_loramerge.errors import RecipeError, Sentence
from lib_loramerge.recipe import STRENGTH_LIMIT, nearest_hint
from lib_loramerge.recipe.check import check_number, plain, shown

_WORD_LIKE = re.compile(r"[A-Z][A-Z-]{3,}")  # parts of layers' names have small letters
# A token in this spelling is meant as a block; others may be parts of layer names.
_BLOCK_LIKE = re.compile(r"[A-Z]+[0-9]*")


@dataclass(frozen=True)
class ElementRule:
    """One elemental rule, ``blocks:elements:ratio``: layers it picks get ``ratio``.

    A token picks a layer when it is a part of the layer's name with the block id
    put behind it, so ``attn`` picks attn1 and attn2, and ``IN0`` the blocks IN00 to
    IN09. Of the elements, a word of :data:`WORDS` picks the layers that it stands for.
    Several tokens mean any of them; none means every layer.

    Attributes:
        blocks: Tokens of the first part, ranges spelled out.
        not_blocks: Whether the first part began with ``NOT``.
        elements: Tokens of the second part.
        not_elements: Whether the second part began with ``NOT``.
        ratio: Takes the place of the block weight.
    """

    blocks: tuple[str, ...]
    not_blocks: bool
    elements: tuple[str, ...]
    not_elements: bool
    ratio: float

    def hits(self, searched: str, words: frozenset[str] = frozenset()) -> bool:
        """Whether the rule picks the layer whose host name and block id are ``searched``.

        Args:
            words: Those that stand for the layer.
        """
        if not _picks(self.blocks, self.not_blocks, searched):
            return False
        if not self.elements:
            return True
        found = any(token in words if token in WORDS else token in searched for token in self.elements)
        return found is not self.not_elements

    def text(self) -> str:
        """The rule as text; :func:`parse_rules` reads it back."""
        blocks = " ".join(["NOT"] * self.not_blocks + list(self.blocks))
        elements = " ".join(["NOT"] * self.not_elements + list(self.elements))
        return f"{blocks}:{elements}:{plain(self.ratio)}"


def _picks(tokens: tuple[str, ...], negated: bool, searched: str) -> bool:
    if not tokens:
        return True  # also for NOT alone: not nothing is everything
    return any(token in searched for token in tokens) is not negated


def host_name(component: str, block: str | None, layer: str) -> str:
    """The name under which the WebUI keeps a layer: what elemental rules search.

    Only parts of it matter (``attn1``, ``ff_net``, ``input_blocks_4_``). The second text
    encoder of SDXL is searched by its OpenCLIP names, as in the WebUI.
    """
    path = layer.removeprefix(f"lora_{component}_")
    if component == "unet":
        return f"diffusion_model_{path}"
    if block == "T5" or component == "te3":
        return f"t5xxl_transformer_{path}"
    if block == "CLIP":
        return f"clip_l_transformer_{path}"
    layers = re.fullmatch(r"text_model_encoder_layers_([0-9]+)_(.+)", path)
    if component == "te2" and layers:
        part = layers[2].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
        return f"1_model_transformer_resblocks_{layers[1]}_{part.replace('self_attn', 'attn')}"
    return f"0_transformer_{path}" if component == "te1" else f"transformer_{path}"


def parse_rules(
    text: str, ids: tuple[str, ...] | None, *, where: str, own: tuple[str, ...] = ()
) -> tuple[ElementRule, ...]:
    """Elemental rules from ``blocks:elements:ratio[,blocks:elements:ratio...]``.

    Args:
        text: The rules; line ends count as commas, empty parts are skipped.
        ids: Blocks that ranges may name; ``None`` for those of any base model.
        where: Begins each message.
        own: Blocks of the base model, known beside those of ``ids`` or of any model.

    Raises:
        RecipeError: A rule without exactly two colons, an unknown block, a range
            across base models, a ratio that is no number.
    """
    parts = [part.strip() for part in re.split(r"[,\r\n]", text)]
    return tuple(_rule(part, ids, where, own) for part in parts if part)


def _rule(text: str, ids: tuple[str, ...] | None, where: str, own: tuple[str, ...]) -> ElementRule:
    parts = text.split(":")
    if len(parts) != 3:
        raise RecipeError(
            "{where}: an elemental rule is blocks:elements:ratio, got {text}.", where, shown(text)
        )
    blocks, not_blocks = _tokens(parts[0])
    elements, not_elements = _tokens(parts[1])
    for token in elements:
        if _WORD_LIKE.fullmatch(token) and token not in (*WORDS, *TEXT_ENCODERS):
            raise RecipeError(
                "{where}: there is no word {token} for elements: {words}.",
                where,
                shown(token),
                ", ".join(WORDS),
            )
    ratio = check_number(
        Sentence("{where}: the ratio of {rule}", where, shown(text)),
        parts[2],
        -STRENGTH_LIMIT,
        STRENGTH_LIMIT,
        text=True,
    )
    expanded = tuple(block for token in blocks for block in _expand(token, ids, where, own))
    if ids and expanded and not not_blocks and not any(_may_hit(token, ids) for token in expanded):
        raise RecipeError(
            "{where}: {rule} picks nothing, the block weights are for {first} to {last}.",
            where,
            shown(text),
            ids[0],
            ids[-1],
        )
    return ElementRule(expanded, not_blocks, elements, not_elements, ratio)


def _tokens(text: str) -> tuple[tuple[str, ...], bool]:
    tokens = tuple(text.split())
    return (tokens[1:], True) if tokens[:1] == ("NOT",) else (tokens, False)


def _expand(token: str, ids: tuple[str, ...] | None, where: str, own: tuple[str, ...]) -> tuple[str, ...]:
    """One token of the blocks part: a range in either order, a block, or a part of a name."""
    lists = (SD_FULL, FLUX, OTHER) if ids is None else (ids,)
    if own and all(end in own for end in token.split("-")):
        lists = (own,)
    known = [block for blocks in lists for block in blocks]
    if "-" in token:
        first, _, last = token.partition("-")
        found: dict[str, None] = {}
        for blocks in lists:
            if first in blocks and last in blocks:
                low, high = sorted((blocks.index(first), blocks.index(last)))
                found |= dict.fromkeys(blocks[low : high + 1])
        if found:
            return tuple(found)
        unknown = next((end for end in (first, last) if end not in known), token)
        raise RecipeError(
            "{where}: {token} is no range of blocks.{hint}", where, shown(token), nearest_hint(unknown, known)
        )
    if _BLOCK_LIKE.fullmatch(token) and not _in_a_block(token, SD_FULL + FLUX + OTHER + own):
        hint = (
            Sentence(" The middle block is M00.") if token.startswith("MID") else nearest_hint(token, known)
        )
        raise RecipeError("{where}: there is no block {token}.{hint}", where, shown(token), hint)
    return (token,)


def _in_a_block(token: str, ids: tuple[str, ...]) -> bool:
    return any(token in block for block in ids)


def _may_hit(token: str, ids: tuple[str, ...]) -> bool:
    """Whether a token of the blocks part can pick a layer: parts of names may, other models' blocks not."""
    return not _BLOCK_LIKE.fullmatch(token) or _in_a_block(token, ids)
