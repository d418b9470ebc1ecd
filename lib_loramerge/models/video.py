# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Video and sound models, and the Cosmos transformers."""

from __future__ import annotations

from .base import COMFY, SAME, T5_ALONE, T5_XXL, Architecture, Size, TextEncoder
from .table import parse_table

_WAN_BLOCK = """
self_attn.{q,k,v,o} h,h > attn1.to_{q,k,v,out.0}
self_attn.norm_{q,k} h > attn1.norm_{q,k}
cross_attn.{q,k,v,o} h,h > attn2.to_{q,k,v,out.0}
cross_attn.norm_{q,k} h > attn2.norm_{q,k}
ffn.{0,2} {f,h},{h,f} > ffn.net.{0.proj,2}
norm3 h > norm2
!modulation
"""
_WAN = parse_table(
    f"""
[blocks.{{B}}]
{_WAN_BLOCK}
cross_attn.{{k,v}}_img h,h > attn2.add_{{k,v}}_proj
cross_attn.norm_k_img h > attn2.norm_added_k
audio_cross_attn_wrapper.audio_cross_attn.{{q,k,v,o}} h,{{h,1536,1536,h}}
audio_cross_attn_wrapper.audio_cross_attn.norm_{{q,k}} h
audio_cross_attn_wrapper.norm1_audio h
[vace_blocks.{{8}}]
{_WAN_BLOCK}
before_proj h,h > proj_in
after_proj h,h > proj_out
[face_adapter.fuser_blocks.{{8}} > face_adapter.{{}}]
linear1_kv 2h,h > to_k + to_v
linear1_q h,h > to_q
linear2 h,h > to_out
{{q,k}}_norm 128 > norm_{{q,k}}
[audio_injector.injector.{{12}}]
{{q,k,v,o}} h,h
norm_{{q,k}} h
[audio_injector.injector_adain_layers.{{12}}]
linear 2h,h
"""
    + """
[]
text_embedding.{0,2} h,{4096,h} > condition_embedder.text_embedder.linear_{1,2}
time_embedding.{0,2} h,{256,h} > condition_embedder.time_embedder.linear_{1,2}
time_projection.1 6h,h > condition_embedder.time_proj
img_emb.proj.{1,3} {1280,h},1280 > condition_embedder.image_embedder.ff.net.{0.proj,2}
img_emb.proj.{0,4} {1280,h} > condition_embedder.image_embedder.norm{1,2}
head.head *,h > proj_out
patch_embedding h,* > =
vace_patch_embedding h,96 > =
pose_patch_embedding h,16 > =
trainable_cond_mask 3,h
cond_encoder h,16
frame_packer.{proj,proj_2x,proj_4x} h,16
casual_audio_encoder.encoder.final_linear h,h
casual_audio_encoder.encoder.{conv1_local,conv1_global,conv2,conv3}.conv *
audio_proj.audio_proj_glob_{1,2,3}.layer *
audio_proj.audio_proj_glob_norm.layer 1536
face_encoder.out_proj h,1024 > =
face_encoder.{conv1_local,conv2,conv3}.conv * > face_encoder.{conv1_local,conv2,conv3}
control_adapter.conv *
control_adapter.residual_blocks.{}.conv{1,2} *
ref_conv *
!head.modulation
!img_emb.emb_pos
"""
)

_COSMOS_BLOCK = """
[blocks.{B} > transformer_blocks.{}]
self_attn.{q,k,v,output}_proj h,h > attn1.to_{q,k,v,out.0}
self_attn.{q,k}_norm 128 > attn1.norm_{q,k}
cross_attn.{q,k,v,output}_proj h,{h,1024,1024,h} > attn2.to_{q,k,v,out.0}
cross_attn.{q,k}_norm 128 > attn2.norm_{q,k}
mlp.layer{1,2} {4h,h},{h,4h} > ff.net.{0.proj,2}
adaln_modulation_self_attn.{1,2} {256,3h},{h,256} > norm1.linear_{1,2}
adaln_modulation_cross_attn.{1,2} {256,3h},{h,256} > norm2.linear_{1,2}
adaln_modulation_mlp.{1,2} {256,3h},{h,256} > norm3.linear_{1,2}
[]
x_embedder.proj.1 h,* > patch_embed.proj
t_embedder.1.linear_{1,2} {h,3h},h > time_embed.t_embedder.linear_{1,2}
t_embedding_norm h > time_embed.norm
final_layer.linear 64,h > proj_out
final_layer.adaln_modulation.{1,2} {256,2h},{h,256} > norm_out.linear_{1,2}
"""
_COSMOS = parse_table(_COSMOS_BLOCK)
_ANIMA = parse_table(
    _COSMOS_BLOCK
    + """
[llm_adapter.blocks.{6}]
{self,cross}_attn.o_proj 1024,1024
{self,cross}_attn.q_norm 64
{self,cross}_attn.k_norm 64
{self,cross}_attn.q_proj 1024,1024
{self,cross}_attn.k_proj 1024,1024
{self,cross}_attn.v_proj 1024,1024
{norm_self_attn,norm_cross_attn,norm_mlp} 1024
mlp.{0,2} {4096,1024},{1024,4096}
[]
llm_adapter.{out_proj,embed} *,1024
llm_adapter.norm 1024
"""
)

_MOCHI = parse_table("""
[blocks.{48} > transformer_blocks.{}]
attn.qkv_x 3h,h > attn1.to_q + attn1.to_k + attn1.to_v
attn.qkv_y 3h,1536 > attn1.add_q_proj + attn1.add_k_proj + attn1.add_v_proj
attn.proj_x h,h > attn1.to_out.0
attn.proj_y 1536,h > attn1.to_add_out
attn.{q,k}_norm_x 128 > attn1.norm_{q,k}
attn.{q,k}_norm_y 128 > attn1.norm_added_{q,k}
mod_x 4h,h > norm1.linear
mod_y *,h > norm1_context.linear
mlp_x.w1 16384,h > ~ff.net.0.proj
mlp_x.w2 h,8192 > ff.net.2
mlp_y.w1 8192,1536 > ~ff_context.net.0.proj
mlp_y.w2 1536,4096 > ff_context.net.2
[blocks.47 > transformer_blocks.47]
mod_y 1536,h > norm1_context.linear_1
[]
x_embedder.proj h,12 > patch_embed.proj
t_embedder.mlp.{0,2} h,{256,h} > time_embed.timestep_embedder.linear_{1,2}
t5_y_embedder.to_{kv,q,out} {8192,4096,h},4096 > time_embed.pooler.to_{kv,q,out}
t5_yproj 1536,4096 > time_embed.caption_proj
final_layer.mod 2h,h > ~norm_out.linear
final_layer.linear 48,h > proj_out
!pos_frequencies
""")


def _ltx_attention(name: str, query: str, keys: str, inner: str, out: str) -> str:
    return f"""
{name}.to_{{q,k,v,out.0}} {{{inner},{inner},{inner},{out}}},{{{query},{keys},{keys},{inner}}} > =
{name}.{{q,k}}_norm {inner} > {name}.norm_{{q,k}}
{name}.to_gate_logits *,{query} > =
"""


_LTX_EDGES = """
[]
patchify_proj h,128 > proj_in
adaln_single.emb.timestep_embedder.linear_{1,2} h,{256,h} > time_embed.emb.timestep_embedder.linear_{1,2}
adaln_single.linear *,h > time_embed.linear
caption_projection.linear_{1,2} h,{c,h} > =
proj_out 128,h > =
!scale_shift_table
"""
_LTXV = parse_table(
    "[transformer_blocks.{L}]"
    + _ltx_attention("attn1", "h", "h", "h", "h")
    + _ltx_attention("attn2", "h", "h", "h", "h")
    + "ff.net.{0.proj,2} {4h,h},{h,4h} > =\n!scale_shift_table"
    + _LTX_EDGES
)
_LTX2 = parse_table(
    "[transformer_blocks.{L}]"
    + _ltx_attention("attn1", "h", "h", "h", "h")
    + _ltx_attention("attn2", "h", "h", "h", "h")
    + _ltx_attention("audio_attn1", "a", "a", "a", "a")
    + _ltx_attention("audio_attn2", "a", "a", "a", "a")
    + _ltx_attention("audio_to_video_attn", "h", "a", "a", "h")
    + _ltx_attention("video_to_audio_attn", "a", "h", "a", "a")
    + """
ff.net.{0.proj,2} {4h,h},{h,4h} > =
audio_ff.net.{0.proj,2} {4a,a},{a,4a} > =
!{scale_shift_table,audio_scale_shift_table,scale_shift_table_a2v_ca_audio,scale_shift_table_a2v_ca_video}
!{prompt_scale_shift_table,audio_prompt_scale_shift_table}
"""
    + _LTX_EDGES
    + """
audio_patchify_proj a,128 > audio_proj_in
audio_adaln_single.emb.timestep_embedder.linear_{1,2} a,{256,a} > audio_time_embed.emb.timestep_embedder.linear_{1,2}
audio_adaln_single.linear *,a > audio_time_embed.linear
prompt_adaln_single.emb.timestep_embedder.linear_{1,2} h,{256,h} > prompt_adaln.emb.timestep_embedder.linear_{1,2}
prompt_adaln_single.linear *,h > prompt_adaln.linear
audio_prompt_adaln_single.emb.timestep_embedder.linear_{1,2} a,{256,a} > audio_prompt_adaln.emb.timestep_embedder.linear_{1,2}
audio_prompt_adaln_single.linear *,a > audio_prompt_adaln.linear
av_ca_video_scale_shift_adaln_single.emb.timestep_embedder.linear_{1,2} h,{256,h} > av_cross_attn_video_scale_shift.emb.timestep_embedder.linear_{1,2}
av_ca_video_scale_shift_adaln_single.linear *,h > av_cross_attn_video_scale_shift.linear
av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_{1,2} h,{256,h} > av_cross_attn_video_a2v_gate.emb.timestep_embedder.linear_{1,2}
av_ca_a2v_gate_adaln_single.linear h,h > av_cross_attn_video_a2v_gate.linear
av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_{1,2} a,{256,a} > av_cross_attn_audio_scale_shift.emb.timestep_embedder.linear_{1,2}
av_ca_audio_scale_shift_adaln_single.linear *,a > av_cross_attn_audio_scale_shift.linear
av_ca_v2a_gate_adaln_single.emb.timestep_embedder.linear_{1,2} a,{256,a} > av_cross_attn_audio_v2a_gate.emb.timestep_embedder.linear_{1,2}
av_ca_v2a_gate_adaln_single.linear a,a > av_cross_attn_audio_v2a_gate.linear
audio_caption_projection.linear_{1,2} a,{c,a} > =
audio_proj_out 128,a > =
!audio_scale_shift_table
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.attn1.to_q *
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.attn1.to_k *
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.attn1.to_v *
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.attn1.to_out.0 *
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.attn1.to_gate_logits *
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.attn1.q_norm *
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.attn1.k_norm *
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.ff.net.0.proj *
{video,audio}_embeddings_connector.transformer_1d_blocks.{}.ff.net.2 *
!{video,audio}_embeddings_connector.learnable_registers
"""
)

_ACE_STEP = parse_table("""
[transformer_blocks.{24}]
attn.to_{q,k,v,out.0} h,h > =
cross_attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out} h,h > =
ff.{inverted_conv,depth_conv,point_conv}.conv * > =
!scale_shift_table
[lyric_encoder.encoders.{6}]
self_attn.linear_{q,k,v,out,pos} 1024,1024 > =
feed_forward.w_{1,2} {4096,1024},{1024,4096} > =
norm_{ff,mha} 1024 > =
!self_attn.pos_bias_{u,v}
[]
timestep_embedder.linear_{1,2} h,{256,h} > =
t_block.1 6h,h > =
{speaker,genre}_embedder h,{512,768} > =
lyric_embs *,1024 > =
lyric_encoder.embed.out.{0,1} * > =
lyric_encoder.after_norm 1024 > =
lyric_proj h,1024 > =
projectors.{0,1}.0 5120,h > =
projectors.{0,1}.2 5120,5120 > =
projectors.{0,1}.4 *,5120 > =
proj_in.early_conv_layers.{0,1,2} * > =
final_layer.linear 128,h > =
!final_layer.scale_shift_table
""")

# The decoder; its own code and LoRAs of it leave the word out.
_ACE_STEP_15 = parse_table(
    "".join(
        f"""
[decoder.layers.{{L}} > layers.{{}}]
{attention}.{{q,k,v,o}}_proj {{h,1024,1024,h}},h > {attention}.to_{{q,k,v,out.0}} | /layers.{{}}.{attention}.{{q,k,v,o}}_proj
{attention}.{{q,k}}_norm 128 > {attention}.norm_{{q,k}} | /layers.{{}}.{attention}.{{q,k}}_norm
{attention}_norm h > =
"""
        for attention in ("self_attn", "cross_attn")
    )
    + """
mlp.{gate,up,down}_proj {6144,6144,h},{h,h,6144} > =
mlp_norm h > =
!scale_shift_table
[]
decoder.proj_in.1 * > proj_in_conv | proj_in.1
decoder.proj_out.1 * > proj_out_conv | proj_out.1
decoder.time_embed.linear_{1,2} h,{256,h} > time_embed.linear_{1,2}
decoder.time_embed.time_proj 6h,h > time_embed.time_proj
decoder.time_embed_r.linear_{1,2} h,{256,h} > time_embed_r.linear_{1,2}
decoder.time_embed_r.time_proj 6h,h > time_embed_r.time_proj
decoder.condition_embedder h,h > condition_embedder
decoder.norm_out h > norm_out
!decoder.scale_shift_table
"""
)

RECORDS = (
    Architecture(
        "wan", "Wan 2", "wan", "wan2.1", "https://github.com/Wan-Video/Wan2.1", resolution="",
        text_encoders=SAME, words=("wan",), names=_WAN,
        sizes=(
            Size("14B", {"h": 5120, "f": 13824, "B": 40}, ("wan2.1-14b", "wan2.2-14b", "wan-14b", "wan2.2-a14b")),
            Size("1.3B", {"h": 1536, "f": 8960, "B": 30}, ("wan2.1-1.3b", "wan-1.3b")),
            Size("5B", {"h": 3072, "f": 14336, "B": 30}, ("wan2.2-5b", "wan2.2-ti2v", "wan-5b")),
        ),
        encoders={"te": TextEncoder("t5", "umt5xxl", 24, 4096, dotted=True)},
        blocks="BASE IN blocks:B OUT + vace_blocks:V face_adapter.fuser_blocks:F audio_injector.injector:A audio_injector.injector_adain_layers:A",
    ),
    Architecture(
        "anima", "Anima", "anima", "anima", "https://huggingface.co/circlestone-labs/Anima",
        text_encoders=SAME, words=("anima",), names=_ANIMA, sizes=(Size("", {"h": 2048, "B": 28}),),
        encoders={"te": TextEncoder("llama", "qwen3_06b", 28, 1024)},
        blocks="BASE IN blocks:B|40 OUT",
    ),
    Architecture(
        "cosmos_predict2", "Cosmos-Predict2", "cosmos_predict2", "cosmos-predict2",
        "https://github.com/nvidia-cosmos/cosmos-predict2", text_encoders=T5_ALONE, words=("cosmos",),
        names=_COSMOS,
        sizes=(Size("2B", {"h": 2048, "B": 28}), Size("14B", {"h": 5120, "B": 36})),
        encoders={"te1": TextEncoder("t5", "t5xxl", 24, 1024, dotted=True)}, spelling=COMFY,
        blocks="BASE IN blocks:B OUT",
    ),
    Architecture(
        "mochi", "Mochi", "mochi", "mochi", "https://github.com/genmoai/mochi", resolution="",
        text_encoders=T5_ALONE, words=("mochi",), names=_MOCHI, sizes=(Size("", {"h": 3072}),),
        encoders={"te1": T5_XXL}, spelling=COMFY,
        blocks="BASE IN blocks:B OUT",
    ),
    Architecture(
        "ltx_video", "LTX-Video", "ltxv", "ltx-video", "https://github.com/Lightricks/LTX-Video", resolution="",
        text_encoders=T5_ALONE, words=("ltxv", "ltx-video", "ltx-v"), names=_LTXV,
        sizes=(
            Size("13B", {"h": 4096, "L": 48, "c": 4096}, ("ltxv-13b", "ltx-video-13b")),
            Size("2B", {"h": 2048, "L": 28, "c": 4096}, ("ltxv-2b", "ltx-video-2b")),
        ),
        encoders={"te1": T5_XXL}, spelling=COMFY,
        blocks="BASE IN transformer_blocks:B OUT",
    ),
    Architecture(
        "ltx2", "LTX-2", "ltx2", "ltx-2", "https://github.com/Lightricks/LTX-2", resolution="",
        text_encoders=SAME, words=("ltx2", "ltx-2", "ltxav"), names=_LTX2,
        sizes=(Size("", {"h": 4096, "a": 2048, "L": 48, "c": 3840}),),
        encoders={"te": TextEncoder("llama", "gemma3_12b", 48, 3840, dotted=True)}, spelling=COMFY,
        blocks="BASE IN transformer_blocks:B OUT",
    ),
    Architecture(
        "ace_step", "ACE-Step", "ace_step", "ace-step", "https://github.com/ace-step/ACE-Step",
        resolution="", text_encoders=SAME, words=("ace-step",), names=_ACE_STEP,
        sizes=(Size("", {"h": 2560}),), spelling=COMFY,
        blocks="BASE IN transformer_blocks:B OUT",
    ),
    Architecture(
        "ace_step15", "ACE-Step 1.5", "ace_step_1_5", "ace-step-1.5",
        "https://github.com/ace-step/ACE-Step-1.5", resolution="", text_encoders=SAME,
        words=("ace-step-1.5", "ace-step-1-5", "ace-step15", "acestep-v15"), names=_ACE_STEP_15,
        sizes=(Size("", {"h": 2048, "L": 24}),),
        encoders={"te": TextEncoder("llama", "qwen3_06b", 28, 1024, dotted=True)}, spelling=COMFY,
        blocks="BASE IN decoder.layers:B OUT",
    ),
)  # fmt: skip
