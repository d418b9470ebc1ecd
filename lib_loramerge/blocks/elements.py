"""Words for the elements of a denoiser's blocks: what ``lbwe=:MLP:0`` means for each base model."""

from __future__ import annotations

import re
from functools import cache

#: Word -> what it stands for. ATTENTION has all layers of the words that end in it.
WORDS: dict[str, str] = {
    "ATTENTION": "attention of any kind",
    "SELF-ATTENTION": "attention within one stream, beside cross-attention",
    "CROSS-ATTENTION": "attention to the prompt or another stream",
    "IMAGE-ATTENTION": "projections of the image, where the text has its own",
    "TEXT-ATTENTION": "projections of the text, where the image has its own",
    "MLP": "feed-forward layers",
    "FUSED": "layers that hold attention and MLP in one, of single blocks",
    "MODULATION": "scale, shift and gate",
    "NORM": "norms",
}

_TWO_STREAMS = (
    ("TEXT-ATTENTION", r"txt_attn|context_block_attn|add_[qkv]_proj|to_add_out|attn1_to_\w+_t$"),
    ("TEXT-ATTENTION", r"attn_(?:qkv|proj)_y$|^double_layers_\d+_attn_w1|^context_refiner_\d+_att"),
    ("TEXT-ATTENTION", r"^text_transformer_blocks_\d+_self_att"),
    ("IMAGE-ATTENTION", r"img_attn|x_block_attn|^double_stream_blocks_\d+_block_attn1|attn_(?:qkv|proj)_x$"),
    ("IMAGE-ATTENTION", r"^double_layers_\d+_attn_w2|^(?:noise_refiner|ref_image_refiner)_\d+_att"),
)
# The first that is found in a layer's path counts.
_PATTERNS = tuple(
    (word, re.compile(pattern, re.IGNORECASE))
    for word, pattern in (
        ("NORM", r"adaln_(?:sa|mlp)_ln$"),
        ("MODULATION", r"adaln|adain|modulation|_mod(?:c|x|cx|f|_x|_y)?(?:_\d|_lin|$)|scale_shift_table"),
        ("MODULATION", r"norm1_linear$|_mapper(?:_crp|_sca)?$"),
        ("NORM", r"norm|_ln_[kq]$"),
        ("FUSED", r"^single_blocks_\d+_linear[12]$"),
        ("CROSS-ATTENTION", r"cross_att|(?<!x_block_)attn2|audio_to_video_attn|video_to_audio_attn"),
        ("CROSS-ATTENTION", r"^audio_injector_injector_\d+_[qkvo]$|fuser_blocks_\d+_linear"),
        *_TWO_STREAMS,
        ("SELF-ATTENTION", r"self_att|(?<!block_)attn1|^blocks_\d+_attn_(?:qkv|proj)$"),
        ("ATTENTION", r"attn|attention|kv_mapper"),
        ("MLP", r"mlp|feed_forward|_ff[n_]|channelwise"),
    )
)
# Names that mean one thing in one model and another elsewhere.
_OWN = {"qwen_image": ("IMAGE-ATTENTION", "attn_to_"), "ace_step": ("SELF-ATTENTION", "_attn_to_")}


def words_of(architecture_id: str, block: str | None, layer: str) -> frozenset[str]:
    """The words that stand for a layer; none for text encoders, nor outside of numbered blocks.

    Modulation may stand outside of them, since some models have one for all blocks.

    Args:
        architecture_id: Id of the base model.
        block: The layer's block id.
        layer: Its canonical name.
    """
    path = layer.replace(".", "_")
    if re.match(r"lora_te\d?_", path) or block in ("BASE", "CLIP", "T5"):
        return frozenset()
    path = path.removeprefix("lora_unet_")
    word = next((word for word, pattern in _PATTERNS if pattern.search(path)), "")
    if word == "ATTENTION" and architecture_id in _OWN and _OWN[architecture_id][1] in path:
        word = _OWN[architecture_id][0]
    if not word or (word != "MODULATION" and (block is None or not block[-1].isdigit())):
        return frozenset()
    return frozenset((word, "ATTENTION") if word.endswith("-ATTENTION") else (word,))


@cache
def elements_of(architecture_id: str) -> dict[str, str]:
    """The words that a base model has, in the order of the table, each with a layer that it stands for."""
    from lib_loramerge import models  # not at a WebUI's start

    names = models.ARCHITECTURES[architecture_id].names
    if names is not None:
        known = [f"lora_unet_{path.replace('{}', '0').replace('.', '_')}" for path in names.layers]
    else:
        known = list(models.layers(architecture_id))
    found: dict[str, str] = {}
    for layer in known:
        for word in words_of(architecture_id, models.block(architecture_id, layer), layer):
            found.setdefault(word, layer)
    return {word: found[word] for word in WORDS if word in found}
