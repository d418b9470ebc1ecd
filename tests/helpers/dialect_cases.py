# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Key lists for the tests of names: complete ones from trainers, and small ones of every dialect."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

Shape = tuple[int, ...]

LISTS: dict[str, list] = json.loads(
    gzip.decompress((Path(__file__).resolve().parents[1] / "data" / "key_lists.json.gz").read_bytes())
)


def tensors_of(rows: list) -> dict[str, Shape]:
    """Keys and shapes of a list; kohya's lists name layers, PEFT's name keys."""
    tensors: dict[str, Shape] = {}
    for row in rows:
        if len(row) == 3:
            tensors[f"{row[0]}.lora_up.weight"] = tuple(row[1])
            tensors[f"{row[0]}.lora_down.weight"] = tuple(row[2])
            tensors[f"{row[0]}.alpha"] = ()
        else:
            tensors[row[0]] = tuple(row[1])
    return tensors


def lora(
    layers: Iterable[str | tuple[str, int, int]],
    out: int = 3072,
    in_: int = 3072,
    *,
    up: str = "lora_B.weight",
    rank: int = 4,
) -> dict[str, Shape]:
    """Keys and shapes of plain LoRA layers; a layer may bring its own width as (name, out, in)."""
    down = up.replace("lora_B", "lora_A").replace("up", "down")
    tensors: dict[str, Shape] = {}
    for layer in layers:
        name, rows, columns = (layer, out, in_) if isinstance(layer, str) else layer
        tensors[f"{name}.{up}"] = (rows, rank)
        tensors[f"{name}.{down}"] = (rank, columns)
    return tensors


KOHYA = "lora_up.weight"
SD1_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
SD1_CANONICAL = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
TE_Q = "text_model.encoder.layers.0.self_attn.q_proj"


# Name of the case to (tensors, dialect, base model, canonical layers with the rows of each).
# One line for each row of the tables of prefixes, suffixes and model families.
CASES: dict[str, tuple[dict[str, Shape], str, str, dict[str, tuple | None]]] = {
    "kohya SD1": (
        lora([f"lora_unet_{SD1_K}".replace(".", "_")], 320, 768, up=KOHYA), "kohya", "sd1", {SD1_CANONICAL: None},
    ),
    "kohya with lora_A": (
        lora([f"lora_unet_{SD1_K}".replace(".", "_")], 320, 768), "kohya", "sd1", {SD1_CANONICAL: None},
    ),
    "kohya SD1 by ldm name": (lora([SD1_CANONICAL], 320, 768, up=KOHYA), "kohya", "sd1", {SD1_CANONICAL: None}),
    "SD1 with lora_te1_": (
        lora([(SD1_CANONICAL, 320, 768), (f"lora_te1_{TE_Q}".replace(".", "_"), 768, 768)], up=KOHYA),
        "kohya", "sd1",
        {SD1_CANONICAL: None, "lora_te_text_model_encoder_layers_0_self_attn_q_proj": None},
    ),
    "SD2": (
        lora([(SD1_CANONICAL, 320, 1024), ("lora_te_text_model_encoder_layers_22_mlp_fc1", 4096, 1024)], up=KOHYA),
        "kohya", "sd2", {SD1_CANONICAL: None, "lora_te_text_model_encoder_layers_22_mlp_fc1": None},
    ),
    "SD2 by the names of OpenCLIP": (
        lora([(SD1_CANONICAL, 320, 1024), ("lora_te_model_transformer_resblocks_3_mlp_c_fc", 4096, 1024)], up=KOHYA),
        "kohya", "sd2", {SD1_CANONICAL: None, "lora_te_text_model_encoder_layers_3_mlp_fc1": None},
    ),
    "refiner": (
        lora([
            ("lora_unet_input_blocks_4_1_transformer_blocks_3_attn2_to_k", 768, 1280),
            ("lora_te_text_model_encoder_layers_31_mlp_fc1", 5120, 1280),
        ], up=KOHYA), "kohya", "sdxl_refiner",
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_3_attn2_to_k": None,
            "lora_te_text_model_encoder_layers_31_mlp_fc1": None,
        },
    ),
    "diffusers SDXL": (
        lora([
            ("unet.up_blocks.0.attentions.1.transformer_blocks.9.attn2.to_k", 1280, 2048),
            ("unet.up_blocks.0.upsamplers.0.conv", 1280, 1280), ("unet.add_embedding.linear_1", 1280, 2816),
            ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 3072, 768),
            ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", 5120, 1280),
            ("text_encoder_2.encoder.layers.30.mlp.fc1", 5120, 1280),
        ]), "diffusers", "sdxl",
        {
            "lora_unet_output_blocks_1_1_transformer_blocks_9_attn2_to_k": None,
            "lora_unet_output_blocks_2_2_conv": None, "lora_unet_label_emb_0_0": None,
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": None,
            "lora_te2_text_model_encoder_layers_31_mlp_fc1": None,
            "lora_te2_text_model_encoder_layers_30_mlp_fc1": None,
        },
    ),
    "diffusers unet with lora.up": (
        lora([f"unet.{SD1_K}"], 320, 768, up="lora.up.weight"), "diffusers", "sd1", {SD1_CANONICAL: None},
    ),
    "attention processors": (
        {
            f"unet.{SD1_K.replace('to_k', 'processor.to_k_lora')}.up.weight": (320, 4),
            f"unet.{SD1_K.replace('to_k', 'processor.to_k_lora')}.down.weight": (4, 768),
            f"unet.{SD1_K.replace('to_k', 'processor.to_out_lora')}.up.weight": (320, 4),
            f"unet.{SD1_K.replace('to_k', 'processor.to_out_lora')}.down.weight": (4, 320),
            f"text_encoder.{TE_Q}.lora_linear_layer.up.weight": (768, 4),
            f"text_encoder.{TE_Q}.lora_linear_layer.down.weight": (4, 768),
            "text_encoder.text_model.encoder.layers.1.self_attn.to_k_lora.up.weight": (768, 4),
            "text_encoder.text_model.encoder.layers.1.self_attn.to_k_lora.down.weight": (4, 768),
        },
        "diffusers", "sd1",
        {
            SD1_CANONICAL: None, SD1_CANONICAL.replace("to_k", "to_out_0"): None,
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj": None,
            "lora_te_text_model_encoder_layers_1_self_attn_k_proj": None,
        },
    ),
    "attention processors without a prefix": (
        {
            f"{SD1_K.replace('to_k', 'processor.to_k_lora')}.up.weight": (320, 4),
            f"{SD1_K.replace('to_k', 'processor.to_k_lora')}.down.weight": (4, 1024),
        },
        "bare", "sd2", {SD1_CANONICAL: None},
    ),
    "PEFT": (lora([f"base_model.model.{SD1_K}"], 320, 768), "peft", "sd1", {SD1_CANONICAL: None}),
    "PEFT with an adapter's name": (
        lora([f"base_model.model.{SD1_K}"], 320, 768, up="lora_B.my_style.weight"), "peft", "sd1", {SD1_CANONICAL: None},
    ),
    "PEFT under a component": (lora([f"unet.base_model.model.{SD1_K}"], 320, 768), "peft", "sd1", {SD1_CANONICAL: None}),
    "PEFT's bare state": (
        lora([SD1_K], 320, 768, up="lora_B.default.weight"), "bare", "sd1", {SD1_CANONICAL: None},
    ),
    "NTC slider": (
        lora(["diffusion_model_input_blocks_1_1_transformer_blocks_0_attn2_to_k"], 320, 768, up=KOHYA),
        "slider", "sd1", {SD1_CANONICAL: None},
    ),
    "compiled and wrapped": (
        lora([f"unet._orig_mod.{SD1_K}", f"module.unet.{SD1_K.replace('to_k', 'to_v')}"], 320, 768),
        "diffusers", "sd1", {SD1_CANONICAL: None, SD1_CANONICAL.replace("to_k", "to_v"): None},
    ),
    "compiled and flattened": (
        lora([f"lora_unet__orig_mod_{SD1_K}".replace(".", "_")], 320, 768, up=KOHYA), "kohya", "sd1", {SD1_CANONICAL: None},
    ),
    "upper case": (
        lora([f"LORA_UNET_{SD1_K}".replace(".", "_").upper()], 320, 768, up=KOHYA), "kohya", "sd1", {SD1_CANONICAL: None},
    ),
    "OneTrainer's raw format": (
        lora([
            ("clip_l.text_model.encoder.layers.0.mlp.fc1", 3072, 768),
            ("clip_g.text_model.encoder.layers.31.mlp.fc1", 5120, 1280),
            ("unet.up_blocks.0.attentions.0.transformer_blocks.9.attn2.to_k", 1280, 2048),
        ], up=KOHYA), "diffusers", "sdxl",
        {
            "lora_unet_output_blocks_0_1_transformer_blocks_9_attn2_to_k": None,
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": None,
            "lora_te2_text_model_encoder_layers_31_mlp_fc1": None,
        },
    ),
    "SD3 of ComfyUI with its text encoders": (
        lora([
            ("diffusion_model.joint_blocks.0.x_block.attn.qkv", 4608, 1536),
            ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", 3072, 768),
            ("text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc1", 5120, 1280),
            ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", 4096, 4096),
        ]), "comfy", "sd3",
        {
            "lora_unet_joint_blocks_0_x_block_attn_qkv": None, "lora_te1_text_model_encoder_layers_0_mlp_fc1": None,
            "lora_te2_text_model_encoder_layers_31_mlp_fc1": None,
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": None,
        },
    ),
    "SDXL text encoders as transformers 5 names them": (
        lora([
            ("text_encoder.encoder.layers.0.mlp.fc1", 3072, 768), ("text_encoder_2.encoder.layers.31.mlp.fc1", 5120, 1280),
        ]), "diffusers", "sdxl",
        {
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": None, "lora_te2_text_model_encoder_layers_31_mlp_fc1": None,
        },
    ),
    "PEFT's text encoder alone": (
        lora(["base_model.model.encoder.layers.3.self_attn.q_proj"], 768, 768), "peft", "sd1",
        {"lora_te_text_model_encoder_layers_3_self_attn_q_proj": None},
    ),
    "Flux fused": (
        lora([("lora_unet_double_blocks_18_img_attn_qkv", 9216, 3072), ("lora_unet_single_blocks_37_linear1", 21504, 3072)], up=KOHYA),
        "kohya", "flux1",
        {"lora_unet_double_blocks_18_img_attn_qkv": None, "lora_unet_single_blocks_37_linear1": None},
    ),
    "Flux split": (
        lora([
            "transformer.transformer_blocks.0.attn.to_k", "transformer.transformer_blocks.0.attn.add_v_proj",
            ("transformer.single_transformer_blocks.3.proj_mlp", 12288, 3072),
            "transformer.single_transformer_blocks.4.attn.to_q", ("transformer.norm_out.linear", 6144, 3072),
        ]), "diffusers", "flux1",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": ((1, 2),), "lora_unet_double_blocks_0_txt_attn_qkv": ((2, 3),),
            "lora_unet_single_blocks_3_linear1": ((3, 7),), "lora_unet_single_blocks_4_linear1": ((0, 1),),
            "lora_unet_final_layer_adaLN_modulation_1": ((1, 2), (0, 1)),
        },
    ),
    "Flux of OneTrainer": (
        lora([
            "lora_transformer_transformer_blocks_0_attn_to_q", "lora_transformer_single_transformer_blocks_0_attn_to_v",
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768),
            ("lora_te2_encoder_block_0_layer_0_SelfAttention_q", 4096, 4096),
        ], up=KOHYA), "onetrainer", "flux1",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": ((0, 1),), "lora_unet_single_blocks_0_linear1": ((2, 3),),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": None,
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": None,
        },
    ),
    "Flux of a diffusers pipeline with T5": (
        lora([
            "transformer.single_transformer_blocks.0.attn.to_v",
            ("text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wi_0", 10240, 4096),
        ]), "diffusers", "flux1",
        {
            "lora_unet_single_blocks_0_linear1": ((2, 3),),
            "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0": None,
        },
    ),
    "Flux of SimpleTuner": (
        lora(["lycoris_single_transformer_blocks_0_attn_to_k"], up=KOHYA), "lycoris", "flux1",
        {"lora_unet_single_blocks_0_linear1": ((1, 2),)},
    ),
    "Flux of BFL": (
        {
            **lora([("double_blocks.0.img_attn.qkv", 9216, 3072), ("img_in", 3072, 128)]),
            "double_blocks.0.img_attn.qkv.lora_B.bias": (9216,),
            "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        },
        "bare", "flux1",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": None, "lora_unet_img_in": None,
            "lora_unet_double_blocks_0_img_attn_norm_key_norm": None,
        },
    ),
    "Flux of XLabs": (
        {
            "double_blocks.0.processor.qkv_lora1.down.weight": (16, 3072),
            "double_blocks.0.processor.qkv_lora1.up.weight": (9216, 16),
            "double_blocks.0.processor.proj_lora2.down.weight": (16, 3072),
            "double_blocks.0.processor.proj_lora2.up.weight": (3072, 16),
            "single_blocks.0.processor.qkv_lora.down.weight": (16, 3072),
            "single_blocks.0.processor.qkv_lora.up.weight": (9216, 16),
            "single_blocks.0.processor.proj_lora.down.weight": (16, 15360),
            "single_blocks.0.processor.proj_lora.up.weight": (3072, 16),
        },
        "xlabs", "flux1",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": None, "lora_unet_double_blocks_0_txt_attn_proj": None,
            "lora_unet_single_blocks_0_linear1": ((0, 3),), "lora_unet_single_blocks_0_linear2": None,
        },
    ),
    "Chroma": (
        lora([
            ("diffusion_model.double_blocks.0.img_attn.qkv", 9216, 3072),
            ("diffusion_model.distilled_guidance_layer.layers.0.in_layer", 5120, 5120),
        ]), "comfy", "chroma",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": None,
            "lora_unet_distilled_guidance_layer_layers_0_in_layer": None,
        },
    ),
    "Flux.2": (
        lora([
            "diffusion_model.double_blocks.0.img_attn.proj", ("diffusion_model.double_stream_modulation_img.lin", 36864, 6144),
        ], 6144, 6144), "comfy", "flux2",
        {"lora_unet_double_blocks_0_img_attn_proj": None, "lora_unet_double_stream_modulation_img_lin": None},
    ),
    "Flux.2 of diffusers": (
        lora([
            ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 27648, 3072),
            ("transformer.transformer_blocks.0.ff.linear_in", 18432, 3072), "transformer.transformer_blocks.0.attn.to_q",
        ]), "diffusers", "flux2",
        {
            "lora_unet_single_blocks_0_linear1": None, "lora_unet_double_blocks_0_img_mlp_0": None,
            "lora_unet_double_blocks_0_img_attn_qkv": ((0, 1),),
        },
    ),
    "SD3": (
        lora([("lora_unet_joint_blocks_23_x_block_attn_qkv", 4608, 1536)], up=KOHYA), "kohya", "sd3",
        {"lora_unet_joint_blocks_23_x_block_attn_qkv": None},
    ),
    "SD3 of diffusers": (
        lora([
            "transformer.transformer_blocks.0.attn.to_k", ("transformer.transformer_blocks.23.norm1_context.linear", 3072, 1536),
            ("transformer.transformer_blocks.22.norm1_context.linear", 9216, 1536),
        ], 1536, 1536), "diffusers", "sd3",
        {
            "lora_unet_joint_blocks_0_x_block_attn_qkv": ((1, 2),),
            "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1": ((1, 2), (0, 1)),
            "lora_unet_joint_blocks_22_context_block_adaLN_modulation_1": None,
        },
    ),
    "SD3.5 large": (
        lora(["transformer.transformer_blocks.23.norm1_context.linear", "transformer.transformer_blocks.37.attn.add_k_proj"], 2432, 2432),
        "diffusers", "sd3_large",
        {
            "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1": None,
            "lora_unet_joint_blocks_37_context_block_attn_qkv": ((1, 2),),
        },
    ),
    "Lumina 2": (
        lora([
            ("transformer.layers.0.attn.to_q", 2304, 2304), ("transformer.noise_refiner.1.attn.to_k", 768, 2304),
            ("transformer.context_refiner.1.attn.to_v", 768, 2304), ("transformer.layers.3.feed_forward.linear_1", 9216, 2304),
        ]), "diffusers", "lumina2",
        {
            "lora_unet_layers_0_attention_qkv": ((0, 3),), "lora_unet_noise_refiner_1_attention_qkv": ((3, 4),),
            "lora_unet_context_refiner_1_attention_qkv": ((4, 5),), "lora_unet_layers_3_feed_forward_w1": None,
        },
    ),
    "Z-Image": (
        lora([
            "diffusion_model.layers.0.attention.to_k", "diffusion_model.layers.29.attention.to_out.0",
            ("diffusion_model.layers.1.attention.qkv", 11520, 3840), "diffusion_model.all_final_layer.2-1.linear",
        ], 3840, 3840), "comfy", "zimage",
        {
            "lora_unet_layers_0_attention_qkv": ((1, 2),), "lora_unet_layers_29_attention_out": None,
            "lora_unet_layers_1_attention_qkv": None, "lora_unet_final_layer_linear": None,
        },
    ),
    "Qwen-Image": (
        lora([
            "transformer.transformer_blocks.0.attn.to_q", "diffusion_model.transformer_blocks.59.attn.add_k_proj",
            "lora_unet_transformer_blocks_1_img_mlp_net_0_proj", "lycoris_transformer_blocks_2_attn_to_add_out",
            "transformer_blocks.3.txt_mod.1",
        ]), "diffusers", "qwen_image",
        {
            "lora_unet_transformer_blocks_0_attn_to_q": None, "lora_unet_transformer_blocks_59_attn_add_k_proj": None,
            "lora_unet_transformer_blocks_1_img_mlp_net_0_proj": None,
            "lora_unet_transformer_blocks_2_attn_to_add_out": None, "lora_unet_transformer_blocks_3_txt_mod_1": None,
        },
    ),
    "Wan": (
        {
            **lora(["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.39.cross_attn.k_img"], 5120, 5120),
            "diffusion_model.blocks.0.self_attn.q.diff_b": (5120,), "diffusion_model.blocks.0.norm3.diff": (5120,),
            "diffusion_model.blocks.0.norm3.diff_b": (5120,),
        },
        "comfy", "wan",
        {
            "lora_unet_blocks_0_self_attn_q": None, "lora_unet_blocks_39_cross_attn_k_img": None,
            "lora_unet_blocks_0_norm3": None,
        },
    ),
    "Wan with two underscores": (
        lora(["lora_unet__blocks_0_ffn_0"], 13824, 5120, up=KOHYA) | lora(["lora_unet__blocks_0_cross_attn_o"], 5120, 5120, up=KOHYA),
        "kohya", "wan", {"lora_unet_blocks_0_ffn_0": None, "lora_unet_blocks_0_cross_attn_o": None},
    ),
    "Wan of diffusers": (
        lora(["transformer.blocks.0.attn1.to_q", "transformer.blocks.0.ffn.net.0.proj", "transformer.condition_embedder.time_proj"], 1536, 1536),
        "diffusers", "wan",
        {"lora_unet_blocks_0_self_attn_q": None, "lora_unet_blocks_0_ffn_0": None, "lora_unet_time_projection_1": None},
    ),
    "Anima": (
        lora([
            "lora_unet_blocks_0_self_attn_q_proj", "lora_unet_blocks_27_mlp_layer1",
            "lora_unet_blocks_1_adaln_modulation_self_attn_1", "lora_unet_llm_adapter_blocks_0_self_attn_q_proj",
            ("lora_te_layers_3_self_attn_q_proj", 2048, 1024),
        ], 2048, 2048, up=KOHYA), "kohya", "anima",
        {
            "lora_unet_blocks_0_self_attn_q_proj": None, "lora_unet_blocks_27_mlp_layer1": None,
            "lora_unet_blocks_1_adaln_modulation_self_attn_1": None,
            "lora_unet_llm_adapter_blocks_0_self_attn_q_proj": None, "lora_te_layers_3_self_attn_q_proj": None,
        },
    ),
    "Anima of ComfyUI": (
        lora([
            "diffusion_model.blocks.0.cross_attn.output_proj",
            ("text_encoders.qwen3_06b.transformer.model.layers.3.self_attn.q_proj", 2048, 1024),
        ], 2048, 2048), "comfy", "anima",
        {"lora_unet_blocks_0_cross_attn_output_proj": None, "lora_te_layers_3_self_attn_q_proj": None},
    ),
    "HunyuanImage of sd-scripts": (
        lora([
            "lora_unet_double_blocks_0_img_mlp_fc1", "lora_unet_double_blocks_19_txt_mod_linear",
            "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_39_modulation_linear",
        ], 3584, 3584, up=KOHYA), "kohya", "hunyuan_image",
        {
            "lora_unet_double_blocks_0_img_mlp_0": None, "lora_unet_double_blocks_19_txt_mod_lin": None,
            "lora_unet_double_blocks_0_img_attn_qkv": None, "lora_unet_single_blocks_39_modulation_lin": None,
        },
    ),
    "HunyuanVideo": (
        lora([
            "diffusion_model.double_blocks.0.img_attn_qkv", "diffusion_model.double_blocks.0.img_mlp.fc1",
            "diffusion_model.single_blocks.39.linear2",
            "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv",
        ]), "comfy", "hunyuan_video",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": None, "lora_unet_double_blocks_0_img_mlp_0": None,
            "lora_unet_single_blocks_39_linear2": None,
            "lora_unet_txt_in_individual_token_refiner_blocks_0_self_attn_qkv": None,
        },
    ),
    "HunyuanDiT": (
        lora(["base_model.model.blocks.0.attn1.Wqkv"], 4224, 1408), "peft", "hunyuan_dit",
        {"lora_unet_blocks_0_attn1_Wqkv": None},
    ),
    "Stable Cascade": (
        lora(["lora_prior_unet_down_blocks_0_3_attention_attn_in_proj", "lora_prior_te_text_model_encoder_layers_0_mlp_fc1"], 1280, 1280, up=KOHYA),
        "kohya", "stable_cascade",
        {
            "lora_prior_unet_down_blocks_0_3_attention_attn_in_proj": None,
            "lora_te_text_model_encoder_layers_0_mlp_fc1": None,
        },
    ),
    "AuraFlow": (
        lora(["transformer.joint_transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_q"]),
        "diffusers", "auraflow",
        {"lora_unet_double_layers_0_attn_w2q": None, "lora_unet_single_layers_0_attn_w1q": None},
    ),
    "PixArt": (
        lora(["unet.base_model.model.transformer_blocks.0.attn1.to_q", "unet.base_model.model.adaln_single.linear"], 1152, 1152),
        "peft", "pixart",
        {"lora_unet_blocks_0_attn_qkv": ((0, 1),), "lora_unet_t_block_1": None},
    ),
    "HiDream of LyCORIS": (
        lora(["lycoris_double_stream_blocks_3_block_attn1_to_q_t"], 2560, 2560, up=KOHYA), "lycoris", "hidream",
        {"lora_unet_double_stream_blocks_3_block_attn1_to_q_t": None},
    ),
    "Mochi of diffusers": (
        lora(["transformer.transformer_blocks.2.attn1.to_k", ("transformer.transformer_blocks.2.attn1.add_k_proj", 3072, 1536)]),
        "diffusers", "mochi",
        {"lora_unet_blocks_2_attn_qkv_x": ((1, 2),), "lora_unet_blocks_2_attn_qkv_y": ((1, 2),)},
    ),
    "ACE-Step": (
        lora(["transformer_blocks.2.cross_attn.to_q", "transformer_blocks.2.cross_attn.add_q_proj"], 2560, 2560), "bare", "ace_step",
        {"lora_unet_transformer_blocks_2_cross_attn_to_q": None, "lora_unet_transformer_blocks_2_cross_attn_add_q_proj": None},
    ),
    "ACE-Step 1.5": (
        lora(["base_model.model.layers.3.self_attn.q_proj", ("base_model.model.layers.3.cross_attn.k_proj", 1024, 2048)], 2048, 2048),
        "peft", "ace_step15",
        {"lora_unet_decoder_layers_3_self_attn_q_proj": None, "lora_unet_decoder_layers_3_cross_attn_k_proj": None},
    ),
    "Krea 2": (
        lora([("transformer.transformer_blocks.3.attn.to_k", 1536, 6144), ("transformer.text_fusion.refiner_blocks.1.ff.up", 6912, 2560)]),
        "diffusers", "krea2",
        {"lora_unet_blocks_3_attn_wk": None, "lora_unet_txtfusion_refiner_blocks_1_mlp_up": None},
    ),
    "LTX-Video": (
        lora(["diffusion_model.transformer_blocks.3.attn1.to_q", ("diffusion_model.adaln_single.linear", 12288, 2048)], 2048, 2048),
        "comfy", "ltx_video",
        {"lora_unet_transformer_blocks_3_attn1_to_q": None, "lora_unet_adaln_single_linear": None},
    ),
    "LTX-2": (
        lora(["transformer.transformer_blocks.3.attn1.to_q", ("transformer.audio_time_embed.linear", 12288, 2048)], 4096, 4096),
        "diffusers", "ltx2",
        {"lora_unet_transformer_blocks_3_attn1_to_q": None, "lora_unet_audio_adaln_single_linear": None},
    ),
    "Kandinsky 5": (
        lora(["transformer.visual_transformer_blocks.3.self_attention.to_query"], 4096, 4096), "diffusers", "kandinsky5",
        {"lora_unet_visual_transformer_blocks_3_self_attention_to_query": None},
    ),
    "OmniGen2": (
        lora(["diffusion_model.layers.3.attn.to_q", ("diffusion_model.layers.3.attn.to_k", 840, 2520)], 2520, 2520), "comfy", "omnigen2",
        {"lora_unet_layers_3_attn_to_q": None, "lora_unet_layers_3_attn_to_k": None},
    ),
    "LongCat-Image": (
        lora(["transformer.time_embed.timestep_embedder.linear_2", ("transformer.context_embedder", 3072, 3584)]), "diffusers", "longcat",
        {"lora_unet_time_in_out_layer": None, "lora_unet_txt_in": None},
    ),
    "HunyuanVideo 1.5": (
        lora([("diffusion_model.double_blocks.53.img_attn_qkv", 6144, 2048), ("diffusion_model.vision_in.proj.1", 1152, 1152)]),
        "comfy", "hunyuan_video15",
        {"lora_unet_double_blocks_53_img_attn_qkv": None, "lora_unet_vision_in_proj_1": None},
    ),
    "Qwen-Image 2.1": (
        lora(["transformer.transformer_blocks.3.attn.to_q", ("transformer.transformer_blocks.3.img_mlp.gate_layer", 12288, 4096)], 4096, 4096),
        "diffusers", "qwen_image21",
        {"lora_unet_transformer_blocks_3_attn_to_q": None, "lora_unet_transformer_blocks_3_img_mlp_gate_up": ((0, 1),)},
    ),
    "Ideogram 4": (
        lora(["transformer.layers.3.attention.to_v", "transformer.layers.3.attention.to_out.0"], 4608, 4608, up=KOHYA), "diffusers", "ideogram4",
        {"lora_unet_layers_3_attention_qkv": ((2, 3),), "lora_unet_layers_3_attention_o": None},
    ),
    "Ernie-Image": (
        lora(["transformer.layers.3.self_attention.to_q", ("transformer.layers.3.mlp.linear_fc2", 4096, 12288)], 4096, 4096), "diffusers", "ernie_image",
        {"lora_unet_layers_3_self_attention_to_q": None, "lora_unet_layers_3_mlp_linear_fc2": None},
    ),
    "Cosmos-Predict2": (
        lora(["diffusion_model.blocks.35.self_attn.q_proj", ("diffusion_model.blocks.3.mlp.layer1", 20480, 5120)], 5120, 5120), "comfy", "cosmos_predict2",
        {"lora_unet_blocks_35_self_attn_q_proj": None, "lora_unet_blocks_3_mlp_layer1": None},
    ),
    "a model that nobody knows": (
        lora(["diffusion_model.strange_blocks.0.mix.q"], 640, 640, up="lora_B"), "comfy", "unknown",
        {"diffusion_model.strange_blocks.0.mix.q": None},
    ),
}  # fmt: skip
