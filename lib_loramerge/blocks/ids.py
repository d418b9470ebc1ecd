"""The five block lists that sd-webui-lora-block-weight knows, and what they are for."""

from __future__ import annotations

from lib_loramerge.block_lists import SD_FULL, UNET_LISTS, in_ranges

FLUX = ("CLIP", "T5", "IN", *(f"D{n:02}" for n in range(19)), *(f"S{n:02}" for n in range(38)), "OUT")
# Other transformers have no list in sd-webui-lora-block-weight; only rules can name their blocks.
OTHER = ("IN", *(f"B{n:02}" for n in range(100)), "OUT")

#: Number of weights in a list -> the blocks they belong to, in order. What 12, 17
#: and 20 leave out of the 26 blocks has weight 0.
BLOCK_IDS: dict[int, tuple[str, ...]] = {
    **{len(entry.ids): entry.ids for entry in UNET_LISTS},
    61: FLUX,
}

USES: dict[int, str] = {
    **{len(entry.ids): entry.use for entry in UNET_LISTS},
    61: "Flux",
}


def counts_text() -> str:
    """The list lengths with their use, for messages: ``12 (SDXL, ...), 17 (...) ... or 61 (Flux)``."""
    parts = [f"{count} ({USES[count]})" for count in BLOCK_IDS]
    return f"{', '.join(parts[:-1])} or {parts[-1]}"


def all_blocks(count: int) -> tuple[str, ...]:
    """The blocks that a list of ``count`` weights speaks of, those it sets to 0 included."""
    return FLUX if count == 61 else SD_FULL


def blocks_help() -> str:
    """A short table of the block lists, for the command line and the tab."""
    lines = ["weights  for                             blocks in order"]
    for count, ids in BLOCK_IDS.items():
        lines.append(f"{count:7}  {USES[count]:30}  {in_ranges(ids)}")
    lines.append(
        "BASE is the text encoders (CLIP and T5 for Flux), M00 the middle block, D and S the double and"
    )
    lines.append(
        "single blocks of Flux. Blocks that 12, 17 and 20 weights leave out get 0; layers that belong to"
    )
    lines.append("no block (time and label embeddings, the last convolution) get 1.")
    lines.append(
        "An entry is a number, R (random from 0 to 1), U (random from -0.5 to 1.5), X (the x= of the LoRA,"
    )
    lines.append("else 1), X+0.1 or X-0.1.")
    return "\n".join(lines)
