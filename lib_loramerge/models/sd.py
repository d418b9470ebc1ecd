"""Stable Diffusion and the earlier transformers: SD3, AuraFlow, PixArt, HunyuanDiT, Stable Cascade."""

from __future__ import annotations

from dataclasses import replace

from .base import (
    CLIP_G,
    CLIP_L,
    COMFY,
    ONE,
    SAME,
    SECOND_CLIP_G,
    T5_ALONE,
    T5_XXL,
    THREE,
    TWO,
    Architecture,
    Names,
    Size,
    TextEncoder,
    UNet,
)
from .table import parse_table

_SGM = "https://github.com/Stability-AI/generative-models"


def _sd3(blocks: int) -> Names:
    """Names of a model with so many joint blocks; the last one's context only feeds attention."""
    table = """
[joint_blocks.{D} > transformer_blocks.{}]
x_block.{attn,attn2}.qkv 3h,h > {attn,attn2}.to_q + {attn,attn2}.to_k + {attn,attn2}.to_v
x_block.{attn,attn2}.proj h,h > {attn,attn2}.to_out.0
x_block.attn.ln_{q,k} 64 > attn.norm_{q,k}
x_block.attn2.ln_{q,k} 64 > attn2.norm_{q,k}
x_block.mlp.fc{1,2} {4h,h},{h,4h} > ff.net.{0.proj,2}
x_block.adaLN_modulation.1 *,h > norm1.linear
context_block.attn.qkv 3h,h > attn.add_q_proj + attn.add_k_proj + attn.add_v_proj
context_block.attn.proj h,h > attn.to_add_out
context_block.attn.ln_{q,k} 64 > attn.norm_added_{q,k}
context_block.mlp.fc{1,2} {4h,h},{h,4h} > ff_context.net.{0.proj,2}
context_block.adaLN_modulation.1 6h,h > norm1_context.linear
[joint_blocks.LAST.context_block > transformer_blocks.LAST]
adaLN_modulation.1 2h,h > ~norm1_context.linear
[]
context_embedder h,4096 > =
t_embedder.mlp.{0,2} h,{256,h} > time_text_embed.timestep_embedder.linear_{1,2}
y_embedder.mlp.{0,2} h,{2048,h} > time_text_embed.text_embedder.linear_{1,2}
x_embedder.proj h,16 > pos_embed.proj
final_layer.linear 64,h > proj_out
final_layer.adaLN_modulation.1 2h,h > ~norm_out.linear
!pos_embed
"""
    return parse_table(table.replace("LAST", str(blocks - 1)))


_AURAFLOW = parse_table("""
[double_layers.{4} > joint_transformer_blocks.{}]
attn.w2{q,k,v,o} h,h > attn.to_{q,k,v,out.0}
attn.w1{q,k,v,o} h,h > attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out}
mlpX.{c_fc1,c_fc2,c_proj} {8192,8192,h},{h,h,8192} > ff.{linear_1,linear_2,out_projection}
mlpC.{c_fc1,c_fc2,c_proj} {8192,8192,h},{h,h,8192} > ff_context.{linear_1,linear_2,out_projection}
mod{X,C}.1 6h,h > {norm1,norm1_context}.linear
[single_layers.{32} > single_transformer_blocks.{}]
attn.w1{q,k,v,o} h,h > attn.to_{q,k,v,out.0}
mlp.{c_fc1,c_fc2,c_proj} {8192,8192,h},{h,h,8192} > ff.{linear_1,linear_2,out_projection}
modCX.1 6h,h > norm1.linear
[]
t_embedder.mlp.{0,2} h,{256,h} > time_step_proj.linear_{1,2}
cond_seq_linear h,2048 > context_embedder
init_x_linear h,16 > pos_embed.proj
final_linear 16,h > proj_out
modF.1 2h,h > ~norm_out.linear
!positional_encoding
!register_tokens
""")

_PIXART = parse_table("""
[blocks.{28} > transformer_blocks.{}]
attn.qkv 3h,h > attn1.to_q + attn1.to_k + attn1.to_v
attn.proj h,h > attn1.to_out.0
cross_attn.q_linear h,h > attn2.to_q
cross_attn.kv_linear 2h,h > attn2.to_k + attn2.to_v
cross_attn.proj h,h > attn2.to_out.0
mlp.fc{1,2} {4h,h},{h,4h} > ff.net.{0.proj,2}
!scale_shift_table
[]
x_embedder.proj h,4 > pos_embed.proj
t_block.1 6h,h > adaln_single.linear
t_embedder.mlp.{0,2} h,{256,h} > adaln_single.emb.timestep_embedder.linear_{1,2}
csize_embedder.mlp.{0,2} 384,{256,384} > adaln_single.emb.resolution_embedder.linear_{1,2}
ar_embedder.mlp.{0,2} 384,{256,384} > adaln_single.emb.aspect_ratio_embedder.linear_{1,2}
y_embedder.y_proj.fc{1,2} h,{4096,h} > caption_projection.linear_{1,2}
final_layer.linear 32,h > proj_out
!y_embedder.y_embedding
!final_layer.scale_shift_table
!pos_embed
""")

# diffusers' own names of this model are those of its first code with the projections split.
_HUNYUAN_DIT = parse_table("""
[blocks.{40}]
attn1.Wqkv 3h,h > attn1.to_q + attn1.to_k + attn1.to_v
attn1.out_proj h,h > attn1.to_out.0
attn1.{q,k}_norm 88 > attn1.norm_{q,k}
attn2.q_proj h,h > attn2.to_q
attn2.kv_proj 2h,1024 > attn2.to_k + attn2.to_v
attn2.out_proj h,h > attn2.to_out.0
attn2.{q,k}_norm 88 > attn2.norm_{q,k}
mlp.fc{1,2} {6144,h},{h,6144} > ff.net.{0.proj,2}
default_modulation.1 h,h > norm1.linear
norm1 h > norm1.norm
norm{2,3} h
skip_norm 2h > =
skip_linear h,2h > =
[]
mlp_t5.{0,2} {8192,1024},{2048,8192} > text_embedder.linear_{1,2}
pooler.{k,q,v,c}_proj {2048,2048,2048,1024},2048 > time_extra_emb.pooler.{k,q,v,c}_proj
x_embedder.proj h,4 > pos_embed.proj
t_embedder.mlp.{0,2} h,{256,h} > time_extra_emb.timestep_embedder.linear_{1,2}
extra_embedder.{0,2} {4h,h},{*,4h} > time_extra_emb.extra_embedder.linear_{1,2}
final_layer.linear 32,h > proj_out
final_layer.adaLN_modulation.1 2h,h > ~norm_out.linear
!text_embedding_padding
!pooler.positional_embedding
""")

# Stage C. diffusers splits attention from this, and no public list relates the two.
_CASCADE = parse_table("".join(f"""
[{side}_blocks.{{}}.{{}}]
channelwise.{{0,2,4}} *
{{depthwise,mapper,mapper_sca,mapper_crp}} *
attention.attn.{{to_q,to_k,to_v,out_proj}} *
kv_mapper.1 *
""" for side in ("down", "up")) + """
[]
{clip_txt_mapper,clip_txt_pooled_mapper,clip_img_mapper,embedding.1,clf.1} *
down_downscalers.1.1.blocks.0 *
up_upscalers.0.1.blocks.1 *
""")  # fmt: skip

_ALL_CLIPS = {"te1": CLIP_L, "te2": SECOND_CLIP_G, "te3": replace(T5_XXL, places=("text_encoder_3.",))}
# A1111 has the last norm of a U-Net by the checkpoint's path alone.
_LAST_NORM = {"lora_unet_out_0": "lora_unet_out_0"}

RECORDS = (
    Architecture(
        "sd1", "Stable Diffusion 1", "sd_v1", "stable-diffusion-v1",
        "https://github.com/CompVis/stable-diffusion", resolution="512x512", prediction_type="epsilon",
        text_encoders=ONE, words=("sd-v1", "stable-diffusion-v1"),
        unet=UNet((1, 2, 4, 4), (1, 1, 1, 0), 1, 768, convolution=True),
        encoders={
            "te": replace(
                CLIP_L, places=("cond_stage_model.transformer.", "cond_stage_model.", "text_encoder.")
            ),
        },
        pipeline={"unet": "unet"}, diffusers_under_kohya=True,
        own_names={**_LAST_NORM, "lora_te_text_projection": "lora_te1_text_projection"},
    ),
    Architecture(
        "sd2", "Stable Diffusion 2", "sd_v2", "stable-diffusion-v2-512",
        "https://github.com/Stability-AI/stablediffusion", v2=True, resolution="512x512",
        prediction_type="epsilon", text_encoders=ONE, words=("sd-v2", "stable-diffusion-v2"),
        unet=UNet((1, 2, 4, 4), (1, 1, 1, 0), 1, 1024),
        encoders={
            "te": TextEncoder(
                "clip", "clip_h", 24, 1024,
                # The second is SD-Turbo's.
                open_clip=("cond_stage_model.model.", "conditioner.embedders.0.model."),
            ),
        },
        pipeline={"unet": "unet"}, diffusers_under_kohya=True, own_names=_LAST_NORM,
    ),
    Architecture(
        "sdxl", "Stable Diffusion XL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", _SGM,
        prediction_type="epsilon", text_encoders=TWO, words=("sdxl", "stable-diffusion-xl"),
        unet=UNet((1, 2, 4), (0, 2, 10), 10, 2048, labels=True),
        encoders={
            "te1": replace(CLIP_L, places=("conditioner.embedders.0.transformer.", "text_encoder.")),
            "te2": replace(SECOND_CLIP_G, open_clip=("conditioner.embedders.1.model.",)),
        },
        pipeline={"unet": "unet"},
    ),
    Architecture(
        "sdxl_refiner", "Stable Diffusion XL refiner", "sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner",
        _SGM, prediction_type="epsilon", text_encoders={"te": "te", "te1": "te", "te2": "te"},
        words=("sdxl-refiner", "stable-diffusion-xl-v1-refiner"),
        unet=UNet((1, 2, 4, 4), (0, 4, 4, 0), 4, 1280, channels=384, labels=True),
        encoders={"te": replace(SECOND_CLIP_G, open_clip=("conditioner.embedders.0.model.",))},
        pipeline={"unet": "unet", "te": "text_encoder_2"},
        own_names={"lora_te_text_projection": "lora_te2_text_projection"},
    ),
    Architecture(
        "sd3", "Stable Diffusion 3 / 3.5 medium", "sd3_medium", "stable-diffusion-3-medium",
        "https://github.com/Stability-AI/sd3.5", text_encoders=THREE,
        words=("sd3", "medium", "5-medium", "stable-diffusion-3"),
        names=_sd3(24), sizes=(Size("", {"h": 1536, "D": 24}),), encoders=_ALL_CLIPS,
        blocks="BASE IN joint_blocks:B OUT",
    ),
    Architecture(
        "sd3_large", "Stable Diffusion 3.5 large", "sd3_5-large", "stable-diffusion-3-5-large",
        "https://github.com/Stability-AI/sd3.5", text_encoders=THREE,
        words=(
            "sd3-5-large", "sd3.5-large", "5-large", "stable-diffusion-3-5-large",
            "stable-diffusion-3.5-large",
        ),
        names=_sd3(38), sizes=(Size("", {"h": 2432, "D": 38}),), encoders=_ALL_CLIPS,
        blocks="BASE IN joint_blocks:B OUT",
    ),
    Architecture(
        "auraflow", "AuraFlow", "auraflow", "auraflow", "https://huggingface.co/fal/AuraFlow",
        text_encoders=T5_ALONE, words=("auraflow",), names=_AURAFLOW, sizes=(Size("", {"h": 3072}),),
        encoders={"te1": TextEncoder("t5", "pile_t5xl", 24, 2048, dotted=True)}, spelling=COMFY,
        blocks="BASE IN double_layers:D single_layers:S OUT",
    ),
    Architecture(
        "pixart", "PixArt", "pixart", "pixart", "https://github.com/PixArt-alpha/PixArt-sigma",
        text_encoders=T5_ALONE, words=("pixart",), names=_PIXART, sizes=(Size("", {"h": 1152}),),
        encoders={"te1": T5_XXL}, spelling=COMFY,
        blocks="BASE IN blocks:B OUT",
    ),
    Architecture(
        "hunyuan_dit", "HunyuanDiT", "hunyuan_dit", "hunyuan-dit",
        "https://github.com/Tencent-Hunyuan/HunyuanDiT", text_encoders=SAME,
        words=("hunyuan-dit", "hunyuandit"), names=_HUNYUAN_DIT, sizes=(Size("", {"h": 1408}),),
        spelling=COMFY,
        blocks="BASE IN blocks:B OUT",
    ),
    Architecture(
        "stable_cascade", "Stable Cascade", "stable_cascade", "stable-cascade-v1-prior",
        "https://github.com/Stability-AI/StableCascade", text_encoders={"te": "te", "te1": "te", "te2": "te"},
        words=("stable-cascade",), names=_CASCADE, sizes=(Size("", {}),), encoders={"te": CLIP_G},
        spelling=COMFY,
        blocks="BASE IN down_blocks:D|2 up_blocks:U|2 OUT",
    ),
)  # fmt: skip
