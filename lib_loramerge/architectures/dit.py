"""Layer names of the diffusion transformers: the checkpoint's own and those of diffusers.

Each table row is one layer: its path in the checkpoint, and the layers that
diffusers has for it. ``{}`` stands for the block's number. Where diffusers
splits what the checkpoint fuses, each member says which output rows it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from .base import Rows

Members = tuple[tuple[str, Rows | None], ...]


@dataclass(frozen=True)
class Names:
    """Layer names of one family of diffusion transformers.

    Attributes:
        layers: Checkpoint path to its diffusers members.
        roots: Starts of checkpoint paths. A path that starts like this is taken
            as it stands even if it is in no row, since it can only mean itself.
        own: Path in the model's own code to checkpoint path, where hosts renamed it.
        partial: Spellings of adapters alone, to checkpoint path and rows.
    """

    layers: Mapping[str, Members]
    roots: tuple[str, ...]
    own: Mapping[str, str] = field(default_factory=dict)
    partial: Mapping[str, tuple[str, Rows | None]] = field(default_factory=dict)


_SWAPPED = Rows(((1, 2), (0, 1)), 2)


def _one(path: str, rows: Rows | None = None) -> Members:
    return ((path, rows),)


def _fused(paths: tuple[str, ...], units: tuple[int, ...]) -> Members:
    """Members of a fused layer, in order, with the units each of them has."""
    total, start, members = sum(units), 0, []
    for path, count in zip(paths, units):
        members.append((path, Rows(((start, start + count),), total)))
        start += count
    return tuple(members)


def _in_blocks(root: str, diffusers: str, rows: Mapping[str, Members]) -> dict[str, Members]:
    """Rows of one kind of block, numbered."""
    return {
        f"{root}.{{}}.{leaf}": tuple((f"{diffusers}.{{}}.{path}", part) for path, part in members)
        for leaf, members in rows.items()
    }


_QKV = (1, 1, 1)

# --- Flux.1 and its relatives -------------------------------------------------------------

_FLUX_DOUBLE: dict[str, Members] = {
    "img_attn.qkv": _fused(("attn.to_q", "attn.to_k", "attn.to_v"), _QKV),
    "img_attn.proj": _one("attn.to_out.0"),
    "img_attn.norm.query_norm": _one("attn.norm_q"),
    "img_attn.norm.key_norm": _one("attn.norm_k"),
    "img_mlp.0": _one("ff.net.0.proj"),
    "img_mlp.2": _one("ff.net.2"),
    "img_mod.lin": _one("norm1.linear"),
    "txt_attn.qkv": _fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), _QKV),
    "txt_attn.proj": _one("attn.to_add_out"),
    "txt_attn.norm.query_norm": _one("attn.norm_added_q"),
    "txt_attn.norm.key_norm": _one("attn.norm_added_k"),
    "txt_mlp.0": _one("ff_context.net.0.proj"),
    "txt_mlp.2": _one("ff_context.net.2"),
    "txt_mod.lin": _one("norm1_context.linear"),
}
_FLUX_SINGLE: dict[str, Members] = {
    # The mlp rows are four times as many as those of q, k or v.
    "linear1": _fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4)),
    "linear2": _one("proj_out"),
    "norm.query_norm": _one("attn.norm_q"),
    "norm.key_norm": _one("attn.norm_k"),
    "modulation.lin": _one("norm.linear"),
}
_FLUX_EDGES: dict[str, Members] = {
    "img_in": _one("x_embedder"),
    "txt_in": _one("context_embedder"),
    "time_in.in_layer": _one("time_text_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": _one("time_text_embed.timestep_embedder.linear_2"),
    "vector_in.in_layer": _one("time_text_embed.text_embedder.linear_1"),
    "vector_in.out_layer": _one("time_text_embed.text_embedder.linear_2"),
    "guidance_in.in_layer": _one("time_text_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": _one("time_text_embed.guidance_embedder.linear_2"),
    "final_layer.linear": _one("proj_out"),
    # diffusers has scale before shift, the checkpoint shift before scale.
    "final_layer.adaLN_modulation.1": _one("norm_out.linear", _SWAPPED),
}
_FLUX_ROOTS = (
    "double_blocks", "single_blocks", "img_in", "txt_in", "time_in", "vector_in", "guidance_in",
    "final_layer",
)  # fmt: skip

# XLabs trains q, k, v of the single blocks only: the first three of the seven units of linear1.
_XLABS: dict[str, tuple[str, Rows | None]] = {
    "double_blocks.{}.processor.qkv_lora1": ("double_blocks.{}.img_attn.qkv", None),
    "double_blocks.{}.processor.proj_lora1": ("double_blocks.{}.img_attn.proj", None),
    "double_blocks.{}.processor.qkv_lora2": ("double_blocks.{}.txt_attn.qkv", None),
    "double_blocks.{}.processor.proj_lora2": ("double_blocks.{}.txt_attn.proj", None),
    "single_blocks.{}.processor.qkv_lora": ("single_blocks.{}.linear1", Rows(((0, 3),), 7)),
    "single_blocks.{}.processor.proj_lora": ("single_blocks.{}.linear2", None),
}
_FLUX = {
    **_in_blocks("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
    **_in_blocks("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
    **_FLUX_EDGES,
}

_CHROMA_APPROXIMATOR = {
    "distilled_guidance_layer.in_proj": _one("distilled_guidance_layer.in_proj"),
    "distilled_guidance_layer.out_proj": _one("distilled_guidance_layer.out_proj"),
    **{
        f"distilled_guidance_layer.layers.{{}}.{ours}": _one(f"distilled_guidance_layer.layers.{{}}.{theirs}")
        for ours, theirs in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
}

_FLUX2_DOUBLE = {
    **{leaf: members for leaf, members in _FLUX_DOUBLE.items() if "mlp" not in leaf and "mod" not in leaf},
    "img_mlp.0": _one("ff.linear_in"),
    "img_mlp.2": _one("ff.linear_out"),
    "txt_mlp.0": _one("ff_context.linear_in"),
    "txt_mlp.2": _one("ff_context.linear_out"),
}
_FLUX2_SINGLE = {
    "linear1": _one("attn.to_qkv_mlp_proj"),
    "linear2": _one("attn.to_out"),
    "norm.query_norm": _one("attn.norm_q"),
    "norm.key_norm": _one("attn.norm_k"),
}
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_FLUX2_EDGES = {
    "img_in": _one("x_embedder"),
    "txt_in": _one("context_embedder"),
    "time_in.in_layer": _one("time_guidance_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": _one("time_guidance_embed.timestep_embedder.linear_2"),
    "guidance_in.in_layer": _one("time_guidance_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": _one("time_guidance_embed.guidance_embedder.linear_2"),
    **{f"{name}.lin": _one(f"{name}.linear") for name in _MODULATIONS},
    "final_layer.linear": _one("proj_out"),
    "final_layer.adaLN_modulation.1": _one("norm_out.linear", _SWAPPED),
}

# HunyuanImage and HunyuanVideo are built like Flux. ComfyUI names their layers like Flux's too,
# and so do we; the trainers use the names of the model's own code.
_HUNYUAN_LEAVES = {
    "img_attn.qkv": "img_attn_qkv", "img_attn.proj": "img_attn_proj",
    "img_attn.norm.query_norm": "img_attn_q_norm", "img_attn.norm.key_norm": "img_attn_k_norm",
    "img_mlp.0": "img_mlp.fc1", "img_mlp.2": "img_mlp.fc2", "img_mod.lin": "img_mod.linear",
    "txt_attn.qkv": "txt_attn_qkv", "txt_attn.proj": "txt_attn_proj",
    "txt_attn.norm.query_norm": "txt_attn_q_norm", "txt_attn.norm.key_norm": "txt_attn_k_norm",
    "txt_mlp.0": "txt_mlp.fc1", "txt_mlp.2": "txt_mlp.fc2", "txt_mod.lin": "txt_mod.linear",
}  # fmt: skip
_REFINER_BLOCKS = "txt_in.individual_token_refiner.blocks.{}"
_HUNYUAN_OWN = {
    **{
        f"double_blocks.{{}}.{theirs}": f"double_blocks.{{}}.{ours}"
        for ours, theirs in _HUNYUAN_LEAVES.items()
    },
    "single_blocks.{}.modulation.linear": "single_blocks.{}.modulation.lin",
    "single_blocks.{}.q_norm": "single_blocks.{}.norm.query_norm",
    "single_blocks.{}.k_norm": "single_blocks.{}.norm.key_norm",
    "time_in.mlp.0": "time_in.in_layer",
    "time_in.mlp.2": "time_in.out_layer",
    "guidance_in.mlp.0": "guidance_in.in_layer",
    "guidance_in.mlp.2": "guidance_in.out_layer",
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
    "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
    "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
    f"{_REFINER_BLOCKS}.self_attn_qkv": f"{_REFINER_BLOCKS}.self_attn.qkv",
    f"{_REFINER_BLOCKS}.self_attn_proj": f"{_REFINER_BLOCKS}.self_attn.proj",
    f"{_REFINER_BLOCKS}.mlp.fc1": f"{_REFINER_BLOCKS}.mlp.0",
    f"{_REFINER_BLOCKS}.mlp.fc2": f"{_REFINER_BLOCKS}.mlp.2",
}
_REFINER: dict[str, Members] = {
    "self_attn.qkv": _fused(("attn.to_q", "attn.to_k", "attn.to_v"), _QKV),
    "self_attn.proj": _one("attn.to_out.0"),
    "mlp.0": _one("ff.net.0.proj"),
    "mlp.2": _one("ff.net.2"),
    "adaLN_modulation.1": _one("norm_out.linear"),
}
_HUNYUAN_COMMON = {
    **_in_blocks("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
    **_in_blocks("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
    **_in_blocks(
        _REFINER_BLOCKS.removesuffix(".{}"), "context_embedder.token_refiner.refiner_blocks", _REFINER
    ),
    "img_in.proj": _one("x_embedder.proj"),
    "txt_in.input_embedder": _one("context_embedder.proj_in"),
    "txt_in.t_embedder.in_layer": _one("context_embedder.time_text_embed.timestep_embedder.linear_1"),
    "txt_in.t_embedder.out_layer": _one("context_embedder.time_text_embed.timestep_embedder.linear_2"),
    "txt_in.c_embedder.in_layer": _one("context_embedder.time_text_embed.text_embedder.linear_1"),
    "txt_in.c_embedder.out_layer": _one("context_embedder.time_text_embed.text_embedder.linear_2"),
    "final_layer.linear": _one("proj_out"),
    "final_layer.adaLN_modulation.1": _one("norm_out.linear", _SWAPPED),
}
_HUNYUAN_VIDEO = {
    **_HUNYUAN_COMMON,
    **{
        path: members
        for path, members in _FLUX_EDGES.items()
        if path.startswith(("time_in", "vector_in", "guid"))
    },
}
_HUNYUAN_IMAGE = {
    **_HUNYUAN_COMMON,
    "time_in.in_layer": _one("time_guidance_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": _one("time_guidance_embed.timestep_embedder.linear_2"),
    "guidance_in.in_layer": _one("time_guidance_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": _one("time_guidance_embed.guidance_embedder.linear_2"),
    **{f"byt5_in.fc{n}": _one(f"context_embedder_2.linear_{n}") for n in (1, 2, 3)},
}
_HUNYUAN_ROOTS = (*_FLUX_ROOTS, "byt5_in")

# --- Stable Diffusion 3 -------------------------------------------------------------------


def _sd3(last: int) -> dict[str, Members]:
    """Rows of a model whose last joint block is number ``last``."""
    attention: dict[str, Members] = {
        "x_block.attn.qkv": _fused(("attn.to_q", "attn.to_k", "attn.to_v"), _QKV),
        "x_block.attn.proj": _one("attn.to_out.0"),
        "x_block.attn.ln_q": _one("attn.norm_q"),
        "x_block.attn.ln_k": _one("attn.norm_k"),
        "x_block.attn2.qkv": _fused(("attn2.to_q", "attn2.to_k", "attn2.to_v"), _QKV),
        "x_block.attn2.proj": _one("attn2.to_out.0"),
        "x_block.attn2.ln_q": _one("attn2.norm_q"),
        "x_block.attn2.ln_k": _one("attn2.norm_k"),
        "x_block.mlp.fc1": _one("ff.net.0.proj"),
        "x_block.mlp.fc2": _one("ff.net.2"),
        "x_block.adaLN_modulation.1": _one("norm1.linear"),
        "context_block.attn.qkv": _fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), _QKV),
        "context_block.attn.proj": _one("attn.to_add_out"),
        "context_block.attn.ln_q": _one("attn.norm_added_q"),
        "context_block.attn.ln_k": _one("attn.norm_added_k"),
        "context_block.mlp.fc1": _one("ff_context.net.0.proj"),
        "context_block.mlp.fc2": _one("ff_context.net.2"),
        "context_block.adaLN_modulation.1": _one("norm1_context.linear"),
    }
    rows = _in_blocks("joint_blocks", "transformer_blocks", attention)
    # The last block's context only feeds attention; its norm has scale and shift, the other way round.
    rows[f"joint_blocks.{last}.context_block.adaLN_modulation.1"] = _one(
        f"transformer_blocks.{last}.norm1_context.linear", _SWAPPED
    )
    return {
        **rows,
        "context_embedder": _one("context_embedder"),
        "t_embedder.mlp.0": _one("time_text_embed.timestep_embedder.linear_1"),
        "t_embedder.mlp.2": _one("time_text_embed.timestep_embedder.linear_2"),
        "y_embedder.mlp.0": _one("time_text_embed.text_embedder.linear_1"),
        "y_embedder.mlp.2": _one("time_text_embed.text_embedder.linear_2"),
        "x_embedder.proj": _one("pos_embed.proj"),
        "final_layer.linear": _one("proj_out"),
        "final_layer.adaLN_modulation.1": _one("norm_out.linear", _SWAPPED),
    }


# --- Lumina 2 and Z-Image -----------------------------------------------------------------


def _lumina(
    attention: str, units: tuple[int, ...], feed_forward: tuple[str, str, str], modulation: tuple[str, str]
) -> dict[str, Members]:
    """Rows of the three kinds of blocks.

    Args:
        attention: What diffusers calls the attention.
        units: Relative numbers of rows of q, k and v.
        feed_forward: What diffusers calls w1, w2 and w3.
        modulation: The modulation in the checkpoint and in diffusers.
    """
    block: dict[str, Members] = {
        "attention.qkv": _fused(tuple(f"{attention}.to_{name}" for name in "qkv"), units),
        "attention.out": _one(f"{attention}.to_out.0"),
        "attention.q_norm": _one(f"{attention}.norm_q"),
        "attention.k_norm": _one(f"{attention}.norm_k"),
        **{
            f"feed_forward.w{n}": _one(f"feed_forward.{name}") for n, name in enumerate(feed_forward, start=1)
        },
        modulation[0]: _one(modulation[1]),
    }
    return {
        path: members
        for root in ("layers", "noise_refiner", "context_refiner")
        for path, members in _in_blocks(root, root, block).items()
    }


_LUMINA2 = {
    # 24 query heads over 8 key-value heads: q has three times the rows of k and of v.
    **_lumina(
        "attn", (3, 1, 1), ("linear_1", "linear_2", "linear_3"), ("adaLN_modulation.1", "norm1.linear")
    ),
    "x_embedder": _one("x_embedder"),
    "cap_embedder.1": _one("time_caption_embed.caption_embedder.1"),
    "t_embedder.mlp.0": _one("time_caption_embed.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": _one("time_caption_embed.timestep_embedder.linear_2"),
    "final_layer.linear": _one("norm_out.linear_2"),
    "final_layer.adaLN_modulation.1": _one("norm_out.linear_1"),
}
_ZIMAGE = {
    **_lumina("attention", _QKV, ("w1", "w2", "w3"), ("adaLN_modulation.0", "adaLN_modulation.0")),
    "x_embedder": _one("all_x_embedder.2-1"),
    "cap_embedder.1": _one("cap_embedder.1"),
    "t_embedder.mlp.0": _one("t_embedder.mlp.0"),
    "t_embedder.mlp.2": _one("t_embedder.mlp.2"),
    "final_layer.linear": _one("all_final_layer.2-1.linear"),
    "final_layer.adaLN_modulation.1": _one("all_final_layer.2-1.adaLN_modulation.1"),
}
_LUMINA_ROOTS = (
    "layers", "noise_refiner", "context_refiner", "x_embedder", "cap_embedder", "t_embedder", "final_layer",
)  # fmt: skip

# --- Models whose checkpoints split their projections -------------------------------------

_QWEN_BLOCK = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
    "txt_mlp.net.2", "img_mod.1", "txt_mod.1", "attn.norm_q", "attn.norm_k", "attn.norm_added_q",
    "attn.norm_added_k",
)  # fmt: skip
_QWEN_EDGES = (
    "img_in", "txt_in", "proj_out", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)  # fmt: skip
_QWEN: dict[str, Members] = {
    **{f"transformer_blocks.{{}}.{leaf}": _one(f"transformer_blocks.{{}}.{leaf}") for leaf in _QWEN_BLOCK},
    **{path: _one(path) for path in _QWEN_EDGES},
}

_WAN_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_WAN = {
    **_in_blocks("blocks", "blocks", {
        **{f"self_attn.{ours}": _one(f"attn1.{theirs}") for ours, theirs in _WAN_ATTENTION.items()},
        **{f"cross_attn.{ours}": _one(f"attn2.{theirs}") for ours, theirs in _WAN_ATTENTION.items()},
        "cross_attn.k_img": _one("attn2.add_k_proj"),
        "cross_attn.v_img": _one("attn2.add_v_proj"),
        "cross_attn.norm_k_img": _one("attn2.norm_added_k"),
        "ffn.0": _one("ffn.net.0.proj"),
        "ffn.2": _one("ffn.net.2"),
        "norm3": _one("norm2"),
    }),
    "text_embedding.0": _one("condition_embedder.text_embedder.linear_1"),
    "text_embedding.2": _one("condition_embedder.text_embedder.linear_2"),
    "time_embedding.0": _one("condition_embedder.time_embedder.linear_1"),
    "time_embedding.2": _one("condition_embedder.time_embedder.linear_2"),
    "time_projection.1": _one("condition_embedder.time_proj"),
    "img_emb.proj.1": _one("condition_embedder.image_embedder.ff.net.0.proj"),
    "img_emb.proj.3": _one("condition_embedder.image_embedder.ff.net.2"),
    "head.head": _one("proj_out"),
    "patch_embedding": _one("patch_embedding"),
}  # fmt: skip

_ANIMA_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
_ANIMA = {
    **_in_blocks("blocks", "transformer_blocks", {
        **{f"self_attn.{ours}": _one(f"attn1.{theirs}") for ours, theirs in _ANIMA_ATTENTION.items()},
        **{f"cross_attn.{ours}": _one(f"attn2.{theirs}") for ours, theirs in _ANIMA_ATTENTION.items()},
        "mlp.layer1": _one("ff.net.0.proj"),
        "mlp.layer2": _one("ff.net.2"),
        **{
            f"adaln_modulation_{name}.{n}": _one(f"norm{number}.linear_{n}")
            for number, name in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
            for n in (1, 2)
        },
    }),
    "x_embedder.proj.1": _one("patch_embed.proj"),
    "t_embedder.1.linear_1": _one("time_embed.t_embedder.linear_1"),
    "t_embedder.1.linear_2": _one("time_embed.t_embedder.linear_2"),
    "final_layer.linear": _one("proj_out"),
    "final_layer.adaln_modulation.1": _one("norm_out.linear_1"),
    "final_layer.adaln_modulation.2": _one("norm_out.linear_2"),
}  # fmt: skip

_SD3_ROOTS = ("joint_blocks", "t_embedder", "y_embedder", "x_embedder", "final_layer", "context_embedder")
_WAN_ROOTS = (
    "blocks", "text_embedding", "time_embedding", "time_projection", "img_emb", "head", "patch_embedding",
)  # fmt: skip

NAMES: dict[str, Names] = {
    "flux1": Names(_FLUX, _FLUX_ROOTS, partial=_XLABS),
    "chroma": Names(
        {**_FLUX, **_CHROMA_APPROXIMATOR}, (*_FLUX_ROOTS, "distilled_guidance_layer"), partial=_XLABS
    ),
    "flux2": Names(
        {
            **_in_blocks("double_blocks", "transformer_blocks", _FLUX2_DOUBLE),
            **_in_blocks("single_blocks", "single_transformer_blocks", _FLUX2_SINGLE),
            **_FLUX2_EDGES,
        },
        (*_FLUX_ROOTS, *_MODULATIONS),
    ),
    "hunyuan_image": Names(_HUNYUAN_IMAGE, _HUNYUAN_ROOTS, own=_HUNYUAN_OWN),
    "hunyuan_video": Names(_HUNYUAN_VIDEO, _HUNYUAN_ROOTS, own=_HUNYUAN_OWN),
    "sd3": Names(_sd3(23), _SD3_ROOTS),
    "sd3_large": Names(_sd3(37), _SD3_ROOTS),
    "lumina2": Names(_LUMINA2, _LUMINA_ROOTS),
    "zimage": Names(_ZIMAGE, _LUMINA_ROOTS),
    "qwen_image": Names(_QWEN, ("transformer_blocks", *(path.split(".")[0] for path in _QWEN_EDGES))),
    "wan": Names(_WAN, _WAN_ROOTS),
    "anima": Names(_ANIMA, ("blocks", "llm_adapter", "x_embedder", "t_embedder", "final_layer")),
}


# --- Looking names up ---------------------------------------------------------------------

# A flattened path with a block number: its root, the number and the leaf. The root is as short as possible.
_NUMBERED = re.compile(r"([A-Za-z_]+?)_(\d+)_(.+)")


@dataclass(frozen=True)
class _Tables:
    """Flattened spellings of one family, ready for look-ups; templates hold ``{}`` for the number."""

    spellings: Mapping[str, tuple[str, Rows | None]]
    dotted: Mapping[str, str]
    own: Mapping[str, str]
    members: Mapping[str, Members]


def _flat(path: str) -> str:
    return path.replace(".", "_").replace("-", "_")


@cache
def _tables(architecture_id: str) -> _Tables | None:
    names = NAMES.get(architecture_id)
    if names is None:
        return None
    spellings: dict[str, tuple[str, Rows | None]] = {}
    for path, (target, rows) in names.partial.items():
        spellings[_flat(path)] = (_flat(target), rows)
    for path, target in names.own.items():
        spellings[_flat(path)] = (_flat(target), None)
    for path, members in names.layers.items():
        for member, rows in members:
            spellings[_flat(member)] = (_flat(path), rows)
    for path in names.layers:
        spellings[_flat(path)] = (_flat(path), None)
    return _Tables(
        spellings,
        {_flat(path): path for path in names.layers},
        {_flat(target): path for path, target in names.own.items()},
        {_flat(path): members for path, members in names.layers.items()},
    )


def _template(flat: str) -> tuple[str, str]:
    """A flattened path with its block number taken out, and the number."""
    match = _NUMBERED.fullmatch(flat)
    if match is None:
        return flat, ""
    return f"{match[1]}_{{}}_{match[3]}", match[2]


def resolve(architecture_id: str, flat: str) -> tuple[str, Rows | None] | None:
    """Flattened checkpoint path, and rows of it, for any flattened spelling; None for no known layer."""
    tables = _tables(architecture_id)
    if tables is None:
        return None
    flat = _flat(flat)
    found = tables.spellings.get(flat)
    if found is not None:
        return found
    template, number = _template(flat)
    found = tables.spellings.get(template)
    if found is not None:
        return found[0].format(number), found[1]
    if flat.startswith(tuple(f"{root}_" for root in NAMES[architecture_id].roots)):
        return flat, None
    return None


def dotted_paths(architecture_id: str, flat: str) -> tuple[str, ...]:
    """Dotted forms of a flattened checkpoint path: the hosts' and, if it differs, the model's own."""
    tables = _tables(architecture_id)
    if tables is None:
        return ()
    template, number = (flat, "") if flat in tables.dotted else _template(flat)
    found = (table.get(template) for table in (tables.dotted, tables.own))
    return tuple(path.format(number) for path in found if path is not None)


def diffusers_members(architecture_id: str, flat: str) -> Members:
    """Dotted diffusers layers of a flattened checkpoint path, each with its rows; () if there are none."""
    tables = _tables(architecture_id)
    if tables is None:
        return ()
    if flat in tables.members:
        return tables.members[flat]
    template, number = _template(flat)
    return tuple((path.format(number), rows) for path, rows in tables.members.get(template, ()))
