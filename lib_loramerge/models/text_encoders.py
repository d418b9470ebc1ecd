"""The text encoders: CLIP, OpenCLIP, T5 and language models, by their Hugging Face names.

LoRA files name the OpenCLIP encoders as Hugging Face does even though the
checkpoints hold them in OpenCLIP's own layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from .records import ARCHITECTURES

# Hugging Face leaf of a CLIP layer to OpenCLIP's.
CLIP_LEAVES: dict[str, str] = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
# Hugging Face path outside the layers to OpenCLIP's.
CLIP_EDGES: dict[str, str] = {
    "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding": "positional_embedding",
    "text_projection": "text_projection",
}
T5_LEAVES = (
    "layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v",
    "layer.0.SelfAttention.o",
    "layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1", "layer.1.DenseReluDense.wo",
    "layer.0.layer_norm", "layer.1.layer_norm",
    # The first T5 has one of the former two; some have a bias in each block, most in the first alone.
    "layer.1.DenseReluDense.wi", "layer.0.SelfAttention.relative_attention_bias",
)  # fmt: skip

# The encoders that checkpoints hold in OpenCLIP's layout.
OPEN_CLIPS: dict[str, str] = {
    record.id: part
    for record in ARCHITECTURES.values()
    for part, encoder in record.encoders.items()
    if encoder.open_clip
}
LLAMA_LEAVES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
    "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
    "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip


def clip_paths(layers: int) -> Iterator[str]:
    """Dotted Hugging Face paths of a CLIP text encoder."""
    for number in range(layers):
        for leaf in CLIP_LEAVES:
            yield f"text_model.encoder.layers.{number}.{leaf}"
    yield from CLIP_EDGES


def t5_paths(layers: int) -> Iterator[str]:
    """Dotted Hugging Face paths of a T5 encoder."""
    for number in range(layers):
        for leaf in T5_LEAVES:
            yield f"encoder.block.{number}.{leaf}"
    yield "encoder.final_layer_norm"
    yield "shared"


def llama_paths(layers: int) -> Iterator[str]:
    """Dotted paths of a language model, after ``model.``."""
    for number in range(layers):
        for leaf in LLAMA_LEAVES:
            yield f"layers.{number}.{leaf}"
    yield "embed_tokens"
    yield "norm"
    yield "lm_head"


_PATHS = {"clip": clip_paths, "t5": t5_paths, "llama": llama_paths}


@cache
def paths(architecture_id: str) -> Mapping[str, Mapping[str, str]]:
    """Component to {flattened path: dotted path}; only components whose layers are known."""
    return {
        part: {path.replace(".", "_"): path for path in _PATHS[encoder.kind](encoder.layers)}
        for part, encoder in ARCHITECTURES[architecture_id].encoders.items()
    }


def comfy_name(architecture_id: str, part: str, flat: str) -> str | None:
    """ComfyUI's dotted name of a text encoder layer; None where the layer is not known."""
    encoder = ARCHITECTURES[architecture_id].encoders.get(part)
    dotted = paths(architecture_id).get(part, {}).get(flat)
    if encoder is None or dotted is None:
        return None
    model = "model." if encoder.kind == "llama" else ""
    return f"text_encoders.{encoder.comfy}.transformer.{model}{dotted}"


@cache
def spellings(architecture_id: str) -> Mapping[str, Mapping[str, str]]:
    """Component to {any flattened spelling: canonical flattened path}."""
    table: dict[str, dict[str, str]] = {}
    for part, known in paths(architecture_id).items():
        names = {flat: flat for flat in known}
        for flat, dotted in known.items():
            for other in _other_spellings(dotted):
                names[other.replace(".", "_")] = flat
        table[part] = names
    return table


def _other_spellings(path: str) -> Iterator[str]:
    """OpenCLIP's path, the path without ``text_model``, and those of early diffusers."""
    if path.startswith("text_model."):
        # transformers 5 saves the encoder without this level.
        yield path.removeprefix("text_model.")
    if path.startswith("text_model.encoder.layers."):
        number, _, leaf = path.removeprefix("text_model.encoder.layers.").partition(".")
        yield f"transformer.resblocks.{number}.{CLIP_LEAVES[leaf]}"
        yield f"model.transformer.resblocks.{number}.{CLIP_LEAVES[leaf]}"
        if leaf.startswith("self_attn."):
            yield f"text_model.encoder.layers.{number}.self_attn.to_{leaf[10:-5]}"
    elif path in CLIP_EDGES and CLIP_EDGES[path] != path:
        yield CLIP_EDGES[path]
    if path.startswith(("layers.", "embed_tokens", "norm", "lm_head")):
        yield f"model.{path}"
        yield f"transformer.model.{path}"
        yield f"model.language_model.{path}"
    # ComfyUI keeps the whole encoder under this name.
    yield f"transformer.{path}"
