# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Picture models of the newer kinds: one stream of blocks, or joint blocks of their own."""

from __future__ import annotations

from dataclasses import replace

from .base import CLIP_AFTER, CLIP_G, CLIP_L, COMFY, SAME, T5_XXL, Architecture, Names, Size, TextEncoder
from .table import parse_table

# --- Lumina 2 and Z-Image -----------------------------------------------------------------


def _lumina(block: str, edges: str) -> Names:
    """Names of a model whose three kinds of blocks are built alike; one has no modulation."""
    plain = "\n".join(line for line in block.splitlines() if not line.startswith("adaLN"))
    plain = plain.replace("norm1.norm", "norm1")
    return parse_table(
        f"[layers.{{L}}]\n{block}[noise_refiner.{{2}}]\n{block}[context_refiner.{{2}}]\n{plain}\n[]\n{edges}"
    )


_LUMINA2 = _lumina("""
attention.qkv 3840,h > attn.to_q:3 + attn.to_k + attn.to_v
attention.out h,h > attn.to_out.0
attention.{q,k}_norm 96 > attn.norm_{q,k}
feed_forward.w{1,2,3} {9216,h,9216},{h,9216,h} > feed_forward.linear_{1,2,3}
adaLN_modulation.1 4h,1024 > norm1.linear
attention_norm1 h > norm1.norm
attention_norm2 h > norm2
ffn_norm{1,2} h > ffn_norm{1,2}
""", """
x_embedder h,64 > =
cap_embedder.0 h > time_caption_embed.caption_embedder.0
cap_embedder.1 h,h > time_caption_embed.caption_embedder.1
t_embedder.mlp.{0,2} 1024,{256,1024} > time_caption_embed.timestep_embedder.linear_{1,2}
final_layer.linear 64,h > norm_out.linear_2
final_layer.adaLN_modulation.1 h,1024 > norm_out.linear_1
""")  # fmt: skip
_ZIMAGE = _lumina("""
attention.qkv 3h,h > attention.to_q + attention.to_k + attention.to_v
attention.out h,h > attention.to_out.0
attention.{q,k}_norm 128 > attention.norm_{q,k}
feed_forward.w{1,2,3} {10240,h,10240},{h,10240,h} > =
adaLN_modulation.0 4h,256 > =
attention_norm{1,2} h > =
ffn_norm{1,2} h > =
""", """
x_embedder h,64 > all_x_embedder.2-1
cap_embedder.0 2560 > =
cap_embedder.1 h,2560 > =
t_embedder.mlp.{0,2} {1024,256},{256,1024} > =
final_layer.linear 64,h > all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 h,256 > all_final_layer.2-1.adaLN_modulation.1
!x_pad_token
!cap_pad_token
""")  # fmt: skip

# --- Models whose code and checkpoint name their layers alike -----------------------------

_QWEN = parse_table("""
[transformer_blocks.{60}]
attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out} h,h > =
{img,txt}_mlp.net.0.proj 4h,h > =
{img,txt}_mlp.net.2 h,4h > =
{img,txt}_mod.1 6h,h > =
attn.{norm_q,norm_k,norm_added_q,norm_added_k} 128 > =
[]
img_in h,64 > =
txt_in h,3584 > =
txt_norm 3584 > =
proj_out 64,h > =
norm_out.linear 2h,h > =
time_text_embed.timestep_embedder.linear_{1,2} h,{256,h} > =
time_text_embed.addition_t_embedding * > =
""")
_QWEN_21 = parse_table("""
[transformer_blocks.{32}]
attn.to_{q,k,v,out.0} h,h > =
attn.norm_{q,k} 128 > =
img_mlp.gate_up 24576,h > img_mlp.gate_layer + img_mlp.proj
img_mlp.out h,12288 > =
[]
img_in h,64 > =
txt_in.{in,out}_layer h,h > =
txt_in.text_norm h > =
modulation.1 4h,h > =
norm_out.linear h,h > =
proj_out 64,h > =
time_text_embed.timestep_embedder.linear_{1,2} h,{256,h} > =
""")

_HIDREAM = parse_table(
    "".join(
        f"""
[{root}.{{{count}}}.block]
attn1.to_{{q,k,v,out}} h,h > =
attn1.{{q,k}}_rms_norm h > =
ff_i.shared_experts.w{{1,2,3}} {{3584,h,3584}},{{h,3584,h}} > =
ff_i.gate 4,h > =
"""
        + "".join(f"ff_i.experts.{n}.w{{1,2,3}} {{6912,h,6912}},{{h,6912,h}} > =\n" for n in range(4))
        for root, count in (("double_stream_blocks", 16), ("single_stream_blocks", 32))
    )
    + """
[double_stream_blocks.{16}.block]
attn1.to_{q,k,v,out}_t h,h > =
attn1.{q,k}_rms_norm_t h > =
ff_t.w{1,2,3} {6912,h,6912},{h,6912,h} > =
adaLN_modulation.1 12h,h > =
[single_stream_blocks.{32}.block]
adaLN_modulation.1 6h,h > =
[]
t_embedder.timestep_embedder.linear_{1,2} h,{256,h} > =
p_embedder.pooled_embedder.linear_{1,2} h,{2048,h} > =
x_embedder.proj h,64 > =
final_layer.linear 64,h > =
final_layer.adaLN_modulation.1 2h,h > =
caption_projection.{}.linear h,4096 > =
"""
)


def _krea2_block(root: str, theirs: str, h: str, kv: str, f: str) -> str:
    return f"""
[{root} > {theirs}]
attn.wq {h},{h} > attn.to_q
attn.w{{k,v}} {kv},{h} > attn.to_{{k,v}}
attn.wo {h},{h} > attn.to_out.0 | /{theirs}.attn.to_out
attn.gate {h},{h} > attn.to_gate
mlp.{{gate,up,down}} {{{f},{f},{h}}},{{{h},{h},{f}}} > ff.{{gate,up,down}}
!attn.qknorm.{{q,k}}norm.scale 128
!{{prenorm,postnorm}}.scale {h}
"""


_KREA2 = parse_table(
    _krea2_block("blocks.{28}", "transformer_blocks.{}", "h", "1536", "16384")
    + "!mod.lin *\n"
    + _krea2_block("txtfusion.layerwise_blocks.{2}", "text_fusion.layerwise_blocks.{}", "t", "t", "6912")
    + _krea2_block("txtfusion.refiner_blocks.{2}", "text_fusion.refiner_blocks.{}", "t", "t", "6912")
    + """
[]
first h,64 > img_in
tmlp.{0,2} h,{256,h} > time_embed.linear_{1,2}
tproj.1 6h,h > time_mod_proj
txtmlp.{1,3} h,{t,h} > txt_in.linear_{1,2}
txtfusion.projector 1,12 > text_fusion.projector
last.linear 64,h > final_layer.linear
!txtmlp.0.scale t
!last.norm.scale h
!last.modulation.lin *
"""
)

_IDEOGRAM4 = parse_table("""
[layers.{34}]
attention.qkv 3h,h > attention.to_q + attention.to_k + attention.to_v
attention.o h,h > attention.to_out.0
attention.norm_{q,k} 256 > =
feed_forward.w{1,2,3} {12288,h,12288},{h,12288,h} > =
attention_norm{1,2} h > =
ffn_norm{1,2} h > =
adaln_modulation 4h,512 > =
[]
input_proj h,128 > =
llm_cond_norm 53248 > =
llm_cond_proj h,53248 > =
t_embedding.mlp_{in,out} h,h > =
adaln_proj 512,h > =
embed_image_indicator 2,h > =
final_layer.linear 128,h > =
final_layer.adaln_modulation h,512 > =
""")

_ERNIE = parse_table("""
[layers.{L}]
self_attention.to_{q,k,v,out.0} h,h > =
self_attention.norm_{q,k} 128 > =
mlp.{gate_proj,up_proj,linear_fc2} {f,f,h},{h,h,f} > =
adaLN_{sa,mlp}_ln h > =
[]
x_embedder.proj h,128 > =
text_proj h,* > =
time_embedding.linear_{1,2} h,h > =
adaLN_modulation.1 6h,h > =
final_norm.linear 2h,h > =
final_linear 128,h > =
""")

_OMNIGEN2 = parse_table("".join(f"""
[{root}]
attn.to_{{q,k,v,out.0}} {{h,840,840,h}},h > =
attn.norm_{{q,k}} 120 > =
feed_forward.linear_{{1,2,3}} {{10240,h,10240}},{{h,10240,h}} > =
norm1.linear 4h,1024 > =
norm1.norm h > =
{{norm1,ffn_norm1,norm2,ffn_norm2}} h > =
""" for root in ("layers.{32}", "noise_refiner.{2}", "ref_image_refiner.{2}", "context_refiner.{2}")) + """
[]
x_embedder h,64 > =
ref_image_patch_embedder h,64 > =
time_caption_embed.timestep_embedder.linear_{1,2} 1024,{256,1024} > =
time_caption_embed.caption_embedder.0 2048 > =
time_caption_embed.caption_embedder.1 h,2048 > =
norm_out.linear_1 h,1024 > =
norm_out.linear_2 64,h > =
!image_index_embedding
""")  # fmt: skip

_KANDINSKY5_BLOCK = """
self_attention.to_{query,key,value} h,h > =
self_attention.{query,key}_norm * > =
self_attention.out_layer h,h > =
feed_forward.in_layer f,h > =
feed_forward.out_layer h,f > =
"""
_KANDINSKY5 = parse_table(
    f"[text_transformer_blocks.{{T}}]\n{_KANDINSKY5_BLOCK}text_modulation.out_layer 6h,t > =\n"
    f"[visual_transformer_blocks.{{V}}]\n{_KANDINSKY5_BLOCK}visual_modulation.out_layer 9h,t > =\n"
    + _KANDINSKY5_BLOCK.partition("feed")[0].replace("self_", "cross_")
    + """
[]
time_embeddings.{in,out}_layer t,{h,t} > =
text_embeddings.in_layer h,3584 > =
text_embeddings.norm h > =
pooled_text_embeddings.in_layer t,768 > =
pooled_text_embeddings.norm t > =
visual_embeddings.in_layer h,* > =
out_layer.modulation.out_layer 2h,t > =
out_layer.out_layer *,h > =
"""
)

_QWEN_7B = TextEncoder("llama", "qwen25_7b", 28, 3584)

RECORDS = (
    Architecture(
        "lumina2", "Lumina Image 2", "lumina2", "lumina-2",
        "https://github.com/Alpha-VLLM/Lumina-Image-2.0", text_encoders=SAME, words=("lumina",),
        names=_LUMINA2, sizes=(Size("", {"h": 2304, "L": 26}),),
        encoders={"te": TextEncoder("llama", "gemma2_2b", 26, 2304)},
        blocks="BASE IN noise_refiner:NR context_refiner:CR layers:B OUT",
    ),
    Architecture(
        "zimage", "Z-Image", "zimage", "z-image", "https://github.com/Tongyi-MAI/Z-Image",
        text_encoders=SAME, words=("zimage", "z-image"), names=_ZIMAGE,
        sizes=(Size("", {"h": 3840, "L": 30}),), encoders={"te": TextEncoder("llama", "qwen3_4b", 36, 2560)},
        blocks="BASE IN noise_refiner:NR context_refiner:CR layers:B OUT",
    ),
    Architecture(
        "qwen_image", "Qwen-Image", "qwen_image", "qwen-image", "https://github.com/QwenLM/Qwen-Image",
        text_encoders=SAME, words=("qwen",), names=_QWEN, sizes=(Size("", {"h": 3072}),),
        encoders={"te": _QWEN_7B},
        blocks="BASE IN transformer_blocks:B OUT",
    ),
    Architecture(
        "qwen_image21", "Qwen-Image 2.1", "qwen_image_2_1", "qwen-image-2.1",
        "https://github.com/QwenLM/Qwen-Image", text_encoders=SAME,
        words=("qwen-image-2.1", "qwen-image-2-1", "qwen-image2.1", "qwen-image21", "qwenimage21"), names=_QWEN_21, sizes=(Size("", {"h": 4096}),),
        spelling=COMFY,
        blocks="BASE IN transformer_blocks:B OUT",
    ),
    Architecture(
        "hidream", "HiDream", "hidream", "hidream", "https://github.com/HiDream-ai/HiDream-I1",
        text_encoders={"te": "te", "te1": "te1", "te2": "te2", "te3": "te3"}, words=("hidream",),
        names=_HIDREAM, sizes=(Size("", {"h": 2560}),),
        encoders={
            "te1": CLIP_L, "te2": CLIP_G, "te3": T5_XXL,
            "te": TextEncoder("llama", "llama", 32, 4096, dotted=True),
        },
        spelling=COMFY,
        blocks="BASE IN double_stream_blocks:D single_stream_blocks:S OUT",
    ),
    Architecture(
        "krea2", "Krea 2", "krea2", "krea-2", "https://huggingface.co/krea", text_encoders=SAME,
        words=("krea2", "krea-2"), names=_KREA2, sizes=(Size("", {"h": 6144, "t": 2560}),),
        encoders={"te": TextEncoder("llama", "qwen3vl_4b", 36, 2560)}, spelling=COMFY,
        blocks="BASE IN blocks:B OUT",
    ),
    Architecture(
        "ideogram4", "Ideogram 4", "ideogram4", "ideogram-4", "https://huggingface.co/ideogram-ai",
        text_encoders=SAME, words=("ideogram",), names=_IDEOGRAM4, sizes=(Size("", {"h": 4608}),),
        encoders={"te": TextEncoder("llama", "qwen3vl_8b", 36, 4096)}, spelling=COMFY,
        blocks="BASE IN layers:B OUT",
    ),
    Architecture(
        "ernie_image", "Ernie-Image", "ernie_image", "ernie-image", "https://huggingface.co/baidu",
        text_encoders=SAME, words=("ernie",), names=_ERNIE,
        sizes=(
            Size("4096 wide", {"h": 4096, "f": 12288, "L": 36}),
            Size("3072 wide", {"h": 3072, "f": 8192, "L": 24}),
        ),
        encoders={"te": TextEncoder("llama", "ministral3_3b", 26, 3072)}, spelling=COMFY,
        blocks="BASE IN layers:B OUT",
    ),
    Architecture(
        "omnigen2", "OmniGen2", "omnigen2", "omnigen2", "https://github.com/VectorSpaceLab/OmniGen2",
        text_encoders=SAME, words=("omnigen",), names=_OMNIGEN2, sizes=(Size("", {"h": 2520}),),
        encoders={"te": TextEncoder("llama", "qwen25_3b", 36, 2048)}, spelling=COMFY,
        blocks="BASE IN noise_refiner:NR ref_image_refiner:RR context_refiner:CR layers:B OUT",
    ),
    Architecture(
        "kandinsky5", "Kandinsky 5", "kandinsky5", "kandinsky-5",
        "https://github.com/kandinskylab/kandinsky-5", text_encoders=CLIP_AFTER, words=("kandinsky",),
        names=_KANDINSKY5,
        sizes=(
            Size("Pro", {"h": 4096, "f": 16384, "t": 1024, "T": 4, "V": 60}),
            Size("image Lite", {"h": 2560, "f": 10240, "t": 512, "T": 2, "V": 50}),
            Size("Lite", {"h": 1792, "f": 7168, "t": 512, "T": 2, "V": 32}),
        ),
        encoders={
            "te": TextEncoder("llama", "qwen25_7b", 28, 3584, dotted=True),
            "te1": replace(CLIP_L, places=("text_encoder_2.",)),
        },
        pipeline={"te1": "text_encoder_2"}, spelling=COMFY,
        blocks="BASE IN text_transformer_blocks:TB visual_transformer_blocks:B OUT",
    ),
)  # fmt: skip
