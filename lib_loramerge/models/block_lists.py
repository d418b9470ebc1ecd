"""The blocks of every base model in order, and the lists of block weights that people write for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from ..block_lists import EDGES, SD_FULL, TEXT_ENCODERS, UNET_LISTS, BlockList, in_ranges
from .base import Architecture, Size
from .records import ARCHITECTURES
from .unet import UNETS, unet_layers


@dataclass(frozen=True)
class Stack:
    """Numbered blocks of one kind: the root of their layers, their letters, and how many there may be."""

    root: str
    letters: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class BlockMap:
    """The blocks of one base model, of its size where the file shows that.

    Attributes:
        label: What people call the model.
        ids: Every block in order, text encoders first.
        lists: The lists of block weights that it has. Several have one length where the size is open.
        side: Blocks without a place in lists, such as those of an added control branch.
        architecture: Id of the base model.
    """

    label: str
    ids: tuple[str, ...]
    lists: tuple[BlockList, ...]
    side: tuple[str, ...] = ()
    architecture: str = "unknown"

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.ids, *self.side)

    def counts_text(self) -> str:
        """``37 (BASE IN ... OUT) or 30 (B00-B29)``."""
        texts = dict.fromkeys(f"{len(entry.ids)} ({in_ranges(entry.ids)})" for entry in self.lists)
        parts = list(texts)
        return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


@cache
def stacks(architecture_id: str) -> tuple[Stack, ...]:
    """The numbered blocks of a diffusion transformer, with the counts of all of its sizes."""
    record = ARCHITECTURES[architecture_id]
    found = []
    for word in record.blocks.replace("+", " ").split():
        root, colon, rest = word.partition(":")
        if colon:
            letters, _, more = rest.partition("|")
            counts = dict.fromkeys(_count(record, size, root) for size in record.sizes)
            known = [count for count in counts if count is not None]
            found.append(Stack(root, letters, (*known, *([int(more)] if more else []))))
    return tuple(found)


def _count(record: Architecture, size: Size, root: str) -> int | None:
    text = record.names.counts.get(root) if record.names is not None else None
    if text is None:
        given = re.search(rf"(?:^| ){re.escape(root)}:[A-Z]+\|(\d+)", record.blocks)
        return int(given[1]) if given is not None else None
    return int(text) if text.isdigit() else size.dims[text]


def block_map(architecture_id: str, size: Size | None = None, blocks: Iterable[str | None] = ()) -> BlockMap:
    """The blocks of a base model, and the lists of block weights that fit it.

    Args:
        size: Of the base model, where it is known.
        blocks: The blocks that a file has layers of. A file with more blocks than the table of its model
            gives the count.
    """
    record = ARCHITECTURES[architecture_id]
    label = f"{record.label} {size.label}".rstrip() if size is not None else record.label
    present = [block for block in blocks if block]
    deepest = _deepest(present)
    if architecture_id in UNETS:
        return _unet_map(architecture_id, label)
    if not record.blocks:
        return _unknown_map(label, present, deepest)
    readings = list(_readings(record, size, deepest))
    lists: dict[tuple[str, ...], BlockList] = {}
    for ids in readings:
        lists.setdefault(ids, BlockList("all blocks", ids))
    for ids in readings:
        bare = tuple(block for block in ids if block not in TEXT_ENCODERS | EDGES and _is_main(block))
        lists.setdefault(bare, BlockList("numbered blocks alone", bare))
    side = tuple(
        f"{stack.letters}{n:02}"
        for stack in stacks(architecture_id)
        if f" {stack.root}:" in record.blocks.partition("+")[2]
        for n in range(max(*stack.counts, deepest.get(stack.letters, 0)))
    )
    return BlockMap(label, readings[0], tuple(lists.values()), tuple(dict.fromkeys(side)), architecture_id)


def _is_main(block: str) -> bool:
    return block.rstrip("0123456789") in ("B", "D", "S", "U")


def _deepest(blocks: Iterable[str]) -> dict[str, int]:
    """Letters to the number of blocks that a file shows there are at least."""
    found: dict[str, int] = {}
    for block in blocks:
        letters = block.rstrip("0123456789")
        if block != letters and block not in TEXT_ENCODERS:
            found[letters] = max(found.get(letters, 0), int(block[len(letters) :]) + 1)
    return found


def _readings(
    record: Architecture, size: Size | None, deepest: Mapping[str, int]
) -> Iterator[tuple[str, ...]]:
    """All blocks in order, once for each count that may be meant; the usual one first."""
    words = record.blocks.partition("+")[0].split()
    sizes = [size] if size is not None else list(record.sizes)
    known = {stack.root: stack for stack in stacks(record.id)}
    for entry in sizes:
        counts = {root: _count(record, entry, root) for root in known}
        extra = {
            root: stack.counts[-1] for root, stack in known.items() if f"{stack.letters}|" in record.blocks
        }
        for choice in dict.fromkeys([tuple(counts.items()), tuple((counts | extra).items())]):
            chosen = dict(choice)
            ids = [
                _numbered(known[w.partition(":")[0]], chosen, deepest) if ":" in w else (w,) for w in words
            ]
            short = any(
                deepest.get(stack.letters, 0) > (chosen[root] or 0)
                for root, stack in known.items()
                if any(word.startswith(f"{root}:") for word in words)
            )
            if short and (choice, entry) != (tuple((counts | extra).items()), sizes[-1]):
                continue  # the file has more blocks than this size
            yield tuple(block for part in ids for block in part)


def _numbered(stack: Stack, counts: Mapping[str, int | None], deepest: Mapping[str, int]) -> tuple[str, ...]:
    count = max(counts[stack.root] or 0, deepest.get(stack.letters, 0))
    return tuple(f"{stack.letters}{n:02}" for n in range(count))


def _unet_map(architecture_id: str, label: str) -> BlockMap:
    used = {layer.block for layer in unet_layers(architecture_id)} | {"BASE"}
    return BlockMap(
        label, tuple(block for block in SD_FULL if block in used), UNET_LISTS, (), architecture_id
    )


def _unknown_map(label: str, blocks: list[str], deepest: Mapping[str, int]) -> BlockMap:
    """Of a model that no table knows: what its file has."""
    if any(re.fullmatch(r"(?:IN|OUT|M)\d\d", block) for block in blocks):
        return BlockMap(label, SD_FULL, UNET_LISTS)
    ids = (
        "BASE",
        "IN",
        *(f"{letters}{n:02}" for letters in sorted(deepest) for n in range(deepest[letters])),
        "OUT",
    )
    return BlockMap(label, ids, (BlockList("all blocks", ids),))
