# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Flux and the models that are built like it."""

from __future__ import annotations

from dataclasses import replace

from .base import (
    CLIP_AFTER,
    CLIP_AND_T5,
    CLIP_L,
    COMFY,
    SAME,
    T5_ALONE,
    T5_XXL,
    Architecture,
    Names,
    Size,
    TextEncoder,
)
from .table import parse_table

_BFL = "https://github.com/black-forest-labs/flux"

_DOUBLE_ATTENTION = """
[double_blocks.{D} > transformer_blocks.{}]
img_attn.qkv  3h,h > attn.to_q + attn.to_k + attn.to_v | img_attn_qkv processor.qkv_lora1
img_attn.proj h,h  > attn.to_out.0                     | img_attn_proj processor.proj_lora1
txt_attn.qkv  3h,h > attn.add_q_proj + attn.add_k_proj + attn.add_v_proj | txt_attn_qkv processor.qkv_lora2
txt_attn.proj h,h  > attn.to_add_out                   | txt_attn_proj processor.proj_lora2
img_attn.norm.{query,key}_norm 128 > attn.norm_{q,k}       | img_attn_{q,k}_norm
txt_attn.norm.{query,key}_norm 128 > attn.norm_added_{q,k} | txt_attn_{q,k}_norm
!img_attn.norm.{query,key}_norm.scale 128
!txt_attn.norm.{query,key}_norm.scale 128
"""
_DOUBLE = f"""
{_DOUBLE_ATTENTION}
img_mlp.0 4h,h > ff.net.0.proj | img_mlp.fc1 ff.linear_in
img_mlp.2 h,4h > ff.net.2      | img_mlp.fc2 ff.linear_out
txt_mlp.0 4h,h > ff_context.net.0.proj | txt_mlp.fc1 ff_context.linear_in
txt_mlp.2 h,4h > ff_context.net.2      | txt_mlp.fc2 ff_context.linear_out
"""
_DOUBLE_MODULATION = """
img_mod.lin 6h,h > norm1.linear         | img_mod.linear
txt_mod.lin 6h,h > norm1_context.linear | txt_mod.linear
"""
# The mlp rows are four times as many as those of q, k or v. XLabs trains q, k, v alone.
_SINGLE = """
[single_blocks.{S} > single_transformer_blocks.{}]
linear1 7h,h > attn.to_q + attn.to_k + attn.to_v + proj_mlp:4 | processor.qkv_lora<7:0-3 linear1_qkv<7:0-3
linear2 h,5h > proj_out | processor.proj_lora
norm.{query,key}_norm 128 > attn.norm_{q,k} | {q,k}_norm
!norm.{query,key}_norm.scale 128
"""
_SINGLE_MODULATION = """
modulation.lin 3h,h > norm.linear | modulation.linear
"""
_EDGES = """
[]
img_in h,* > x_embedder
txt_in h,c > context_embedder
final_layer.linear 64,h > proj_out
"""
# diffusers has scale before shift, the checkpoint shift before scale.
_FINAL_MODULATION = """
final_layer.adaLN_modulation.1 2h,h > ~norm_out.linear
"""
_TIMES = """
time_in.{in,out}_layer h,{256,h} > time_text_embed.timestep_embedder.linear_{1,2}
vector_in.{in,out}_layer h,{768,h} > time_text_embed.text_embedder.linear_{1,2}
guidance_in.{in,out}_layer h,{256,h} > time_text_embed.guidance_embedder.linear_{1,2}
"""


def _with_aliases(text: str, *needles: str) -> Names:
    """A table with only those aliases that contain one of the texts."""
    names = parse_table(text)
    kept = {path: to for path, to in names.aliases.items() if any(needle in path for needle in needles)}
    return replace(names, aliases=kept)


# XLabs' names, those of LyCORIS for the newer feed-forward, and Flux.1's of what Flux.2 calls otherwise.
_FLUX_ALIASES = (
    "processor", "linear1_qkv", "linear_in", "linear_out", "ff.net", "ff_context.net", "time_text_embed",
)  # fmt: skip
# Names of the models' own code.
_OWN = (
    "_attn_",
    "fc1",
    "fc2",
    "mod.linear",
    "modulation.linear",
    "c_embedder.linear",
    "self_attn_",
    "_norm",
    ".mlp.",
)
FLUX1 = _with_aliases(
    _DOUBLE + _DOUBLE_MODULATION + _SINGLE + _SINGLE_MODULATION + _EDGES + _FINAL_MODULATION + _TIMES,
    *_FLUX_ALIASES,
)
CHROMA = _with_aliases(_DOUBLE + _SINGLE + _EDGES + """
distilled_guidance_layer.in_proj 5120,64 > =
distilled_guidance_layer.out_proj h,5120 > =
distilled_guidance_layer.layers.{}.{in,out}_layer 5120,5120 > distilled_guidance_layer.layers.{}.linear_{1,2}
distilled_guidance_layer.norms.{} 5120 > =
""", *_FLUX_ALIASES)  # fmt: skip
LONGCAT = _with_aliases(_DOUBLE + _DOUBLE_MODULATION + _SINGLE + _SINGLE_MODULATION + _EDGES + _FINAL_MODULATION + """
time_in.{in,out}_layer h,{256,h} > time_embed.timestep_embedder.linear_{1,2} | time_text_embed.timestep_embedder.linear_{1,2}
""", *_FLUX_ALIASES)  # fmt: skip
FLUX2 = _with_aliases(_DOUBLE_ATTENTION + """
img_mlp.0 6h,h > ff.linear_in          | ff.net.0.proj
img_mlp.2 h,3h > ff.linear_out         | ff.net.2
txt_mlp.0 6h,h > ff_context.linear_in  | ff_context.net.0.proj
txt_mlp.2 h,3h > ff_context.linear_out | ff_context.net.2
[single_blocks.{S} > single_transformer_blocks.{}]
linear1 9h,h > attn.to_qkv_mlp_proj | linear1_qkv<9:0-3
linear2 h,4h > attn.to_out
norm.{query,key}_norm 128 > attn.norm_{q,k}
!norm.{query,key}_norm.scale 128
[]
img_in h,128 > x_embedder
txt_in h,c > context_embedder
final_layer.linear 128,h > proj_out
time_in.{in,out}_layer h,{256,h} > time_guidance_embed.timestep_embedder.linear_{1,2} | time_text_embed.timestep_embedder.linear_{1,2}
guidance_in.{in,out}_layer h,{256,h} > time_guidance_embed.guidance_embedder.linear_{1,2} | time_text_embed.guidance_embedder.linear_{1,2}
double_stream_modulation_{img,txt}.lin 6h,h > double_stream_modulation_{img,txt}.linear
single_stream_modulation.lin 3h,h > single_stream_modulation.linear
""" + _FINAL_MODULATION, *_FLUX_ALIASES)  # fmt: skip

# ComfyUI names the layers of the Hunyuan models like Flux's, and so do we; the trainers use the names of
# the models' own code.
_REFINER = "txt_in.individual_token_refiner.blocks"
_HUNYUAN = _DOUBLE + _DOUBLE_MODULATION + _SINGLE + _SINGLE_MODULATION + """
[txt_in.individual_token_refiner.blocks.{2} > context_embedder.token_refiner.refiner_blocks.{}]
self_attn.qkv 3h,h > attn.to_q + attn.to_k + attn.to_v | self_attn_qkv
self_attn.proj h,h > attn.to_out.0 | self_attn_proj
mlp.0 4h,h > ff.net.0.proj | mlp.fc1
mlp.2 h,4h > ff.net.2 | mlp.fc2
norm{1,2} h > norm{1,2}
adaLN_modulation.1 2h,h > norm_out.linear
[]
img_in.proj h,* > x_embedder.proj
txt_in.input_embedder h,c > context_embedder.proj_in
txt_in.t_embedder.{in,out}_layer h,{256,h} > context_embedder.time_text_embed.timestep_embedder.linear_{1,2} | txt_in.t_embedder.mlp.{0,2}
txt_in.c_embedder.{in,out}_layer h,{c,h} > context_embedder.time_text_embed.text_embedder.linear_{1,2} | txt_in.c_embedder.linear_{1,2}
final_layer.linear *,h > proj_out
""" + _FINAL_MODULATION  # fmt: skip
HUNYUAN_VIDEO = _with_aliases(_HUNYUAN + """
time_in.{in,out}_layer h,{256,h} > time_text_embed.timestep_embedder.linear_{1,2} | time_in.mlp.{0,2}
vector_in.{in,out}_layer h,{768,h} > time_text_embed.text_embedder.linear_{1,2}
guidance_in.{in,out}_layer h,{256,h} > time_text_embed.guidance_embedder.linear_{1,2} | guidance_in.mlp.{0,2}
""", *_OWN)  # fmt: skip
_BYT5 = """
byt5_in.fc{1,2,3} h,{1472,2048,2048} > context_embedder_2.linear_{1,2,3}
byt5_in.layernorm 1472 > context_embedder_2.norm
"""
HUNYUAN_IMAGE = _with_aliases(_HUNYUAN + """
time_in.{in,out}_layer h,{256,h} > time_guidance_embed.timestep_embedder.linear_{1,2} | time_in.mlp.{0,2}
time_r_in.{in,out}_layer h,{256,h} > time_guidance_embed.timestep_embedder_r.linear_{1,2} | time_r_in.mlp.{0,2}
guidance_in.{in,out}_layer h,{256,h} > time_guidance_embed.guidance_embedder.linear_{1,2} | guidance_in.mlp.{0,2}
""" + _BYT5.replace("h,{1472,2048,2048}", "{2048,2048,h},{1472,2048,2048}"), *_OWN)  # fmt: skip
HUNYUAN_VIDEO_15 = _with_aliases(_HUNYUAN + """
time_in.{in,out}_layer h,{256,h} > time_embed.timestep_embedder.linear_{1,2} | time_in.mlp.{0,2}
vision_in.proj.{0,1,3,4} * > image_embedder.{norm_in,linear_1,linear_2,norm_out}
cond_type_embedding 3,h > cond_type_embed
"""+ _BYT5, *_OWN)  # fmt: skip

_FLUX_SIZE = {"h": 3072, "D": 19, "S": 38, "c": 4096}
_CLIP_AND_T5 = {"te1": CLIP_L, "te3": replace(T5_XXL, places=("text_encoder_2.",))}
_LLAMA = TextEncoder("llama", "llama", 32, 4096, dotted=True)
_QWEN_7B = TextEncoder("llama", "qwen25_7b", 28, 3584)

RECORDS = (
    Architecture(
        "flux1", "Flux.1", "flux1", "flux-1-dev", _BFL, text_encoders=CLIP_AND_T5, words=("flux",),
        names=FLUX1, sizes=(Size("", _FLUX_SIZE),), encoders=_CLIP_AND_T5,
        pipeline={"te3": "text_encoder_2"},
        blocks="CLIP T5 IN double_blocks:D single_blocks:S OUT",
    ),
    Architecture(
        "chroma", "Chroma", "chroma", "chroma", "https://huggingface.co/lodestones/Chroma",
        text_encoders=T5_ALONE, words=("chroma",), names=CHROMA, sizes=(Size("", _FLUX_SIZE),),
        encoders={"te1": T5_XXL},
        blocks="CLIP T5 IN double_blocks:D single_blocks:S OUT",
    ),
    Architecture(
        "longcat", "LongCat-Image", "longcat", "longcat-image",
        "https://github.com/meituan-longcat/LongCat-Image", text_encoders=SAME, words=("longcat",),
        names=LONGCAT, sizes=(Size("", {"h": 3072, "D": 10, "S": 20, "c": 3584}),),
        encoders={"te": _QWEN_7B}, spelling=COMFY,
        blocks="BASE IN double_blocks:D single_blocks:S OUT",
    ),
    Architecture(
        "flux2", "Flux.2", "flux2", "flux-2-dev", "https://github.com/black-forest-labs/flux2",
        text_encoders=SAME, words=("flux2", "flux-2", "flux.2", "klein"), names=FLUX2,
        sizes=(
            Size("dev", {"h": 6144, "D": 8, "S": 48, "c": 15360}, ("flux2-dev", "flux-2-dev", "flux.2-dev")),
            Size(
                "Klein 9B", {"h": 4096, "D": 8, "S": 24, "c": 12288},
                ("flux2-klein-9b", "flux-2-klein-9b", "flux.2-klein-9b", "klein-9b"),
                "flux2_klein_9b", "flux-2-klein-9b",
            ),
            Size(
                "Klein 4B", {"h": 3072, "D": 5, "S": 20, "c": 7680},
                ("flux2-klein-4b", "flux-2-klein-4b", "flux.2-klein-4b", "klein-4b"),
                "flux2_klein_4b", "flux-2-klein-4b",
            ),
        ),
        # Klein's are 36 layers long, and dev's 40.
        encoders={
            "te": TextEncoder("llama", "qwen3_4b", 40, 2560, sizes={"qwen3_8b": 4096, "mistral3_24b": 5120})
        },
        blocks="BASE IN double_blocks:D single_blocks:S OUT",
    ),
    Architecture(
        "hunyuan_image", "HunyuanImage 2.1", "hunyuan-image-2.1", "hunyuan-image-2.1",
        "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1", resolution="2048x2048",
        text_encoders=SAME, words=("hunyuan-image", "hunyuanimage"), names=HUNYUAN_IMAGE,
        sizes=(Size("", {"h": 3584, "D": 20, "S": 40, "c": 3584}),), encoders={"te": replace(_QWEN_7B, dotted=True)},
        blocks="BASE IN double_blocks:D single_blocks:S OUT",
    ),
    Architecture(
        "hunyuan_video", "HunyuanVideo", "hunyuan_video", "hunyuan-video",
        "https://github.com/Tencent-Hunyuan/HunyuanVideo", resolution="", text_encoders=CLIP_AFTER,
        words=("hunyuan-video", "hunyuanvideo"), names=HUNYUAN_VIDEO,
        sizes=(Size("", {"h": 3072, "D": 20, "S": 40, "c": 4096}),),
        encoders={"te": _LLAMA, "te1": replace(CLIP_L, places=("text_encoder_2.",))},
        pipeline={"te1": "text_encoder_2"},
        blocks="BASE IN double_blocks:D single_blocks:S OUT",
    ),
    Architecture(
        "hunyuan_video15", "HunyuanVideo 1.5", "hunyuan_video_1_5", "hunyuan-video-1.5",
        "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5", resolution="", text_encoders=SAME,
        words=("hunyuan-video-1.5", "hunyuan-video-1-5", "hunyuan-video15", "hunyuanvideo1.5", "hunyuanvideo-1.5"),
        names=replace(HUNYUAN_VIDEO_15, layers={
            path: members for path, members in HUNYUAN_VIDEO_15.layers.items() if not path.startswith("single")
        }),
        sizes=(Size("", {"h": 2048, "D": 54, "S": 0, "c": 3584}),),
        encoders={"te": _QWEN_7B}, spelling=COMFY,
        blocks="BASE IN double_blocks:D OUT",
    ),
)  # fmt: skip
