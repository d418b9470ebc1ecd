"""What two checkpoints differ by that no LoRA holds: embeddings, and bare parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import Sentence, counted
from .differing import both_rows, equal_when_rounded, stored_as
from .noise import coarser
from .numbers import ITEM
from .reading import ASIDE, SCALES, vaes_differ

if TYPE_CHECKING:
    from .differing import Pair

_SMALL = 1 << 20  # Bytes; parameters that belong to no layer are vectors.


def left_out(pair: Pair) -> list[str]:
    """One entry for each embedding, and one for all parameters that belong to no layer."""
    found: list[str] = [
        Sentence("{layer}: an embedding, which no LoRA holds", name) for name in _embeddings(pair)
    ]
    if others := list(_parameters(pair)):
        found.append(
            counted(
                len(others),
                "{count} parameter that no LoRA holds: {name}",
                "{count} parameters that no LoRA holds, such as {name}",
                others[0],
            )
        )
    return found


def reasons(pair: Pair) -> list[str]:
    """Sentences on what differs where no layer does."""
    found: list[str] = []
    if names := list(_embeddings(pair)):
        found.append(Sentence("Their embeddings differ, which no LoRA holds: {names}.", ", ".join(names)))
    if others := list(_parameters(pair)):
        found.append(
            counted(
                len(others),
                "{count} parameter differs that no LoRA holds: {name}.",
                "{count} parameters differ that no LoRA holds, such as {name}.",
                others[0],
            )
        )
    if vaes_differ(pair.tuned, pair.base):
        found.append(Sentence("Their VAEs differ."))
    return found


def _embeddings(pair: Pair) -> Iterator[str]:
    """Layers that are embeddings of words and places."""
    for layer in pair.tuned.layers:
        if layer not in pair.base.layers or not pair.is_embedding(layer) or not pair.is_of_part(layer):
            continue
        if pair.tuned.shape(pair.identity, layer) != pair.base.shape(pair.identity, layer):
            continue
        rows = pair.rows(layer)
        coarse = coarser(*(stored_as(side, layer)[0] for side in (pair.tuned, pair.base)))
        if rows is not None and not all(
            equal_when_rounded(tuned, base, coarse)
            for _, _, tuned, base in both_rows(rows, rows[0].count, rows[0].width)
        ):
            yield layer


def _parameters(pair: Pair) -> Iterator[str]:
    """Tensors of denoiser and text encoders that no layer's weight or bias is, as Flux's ``norm.scale``."""
    if pair.settings.parts:
        return
    of_layers = {
        place.key
        for layer in pair.base.layers
        if pair.is_asked(layer) or pair.is_embedding(layer)
        for bias in (False, True)
        for place in pair.base.where(layer, bias=bias)
    }
    for key in pair.base.keys:
        if key in of_layers or key not in pair.tuned.keys or key.startswith(ASIDE):
            continue
        infos = [side.info(key) for side in (pair.tuned, pair.base)]
        dtypes = [info.dtype for info in infos]
        if infos[0].shape != infos[1].shape or not all(dtype in ITEM for dtype in dtypes):
            continue
        if key.rpartition(".")[2] in SCALES or max(info.end - info.start for info in infos) > _SMALL:
            continue
        count = infos[0].shape[0] if infos[0].shape else 1
        tuned, base = (side.rows(key, 0, count) for side in (pair.tuned, pair.base))
        if not equal_when_rounded(tuned, base, coarser(*dtypes)):
            yield key
