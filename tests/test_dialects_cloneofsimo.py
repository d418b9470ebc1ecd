"""Numbered files: the order of the layers is the only name they have."""

from __future__ import annotations

import pytest

from lib_loramerge.dialects import parse_file
from lib_loramerge.dialects.cloneofsimo import text_encoder_order, unet_order
from lib_loramerge.errors import UnsupportedError
from lib_loramerge.models import diffusers_layers


def widths(path: str, width: int, context: int) -> tuple[int, int]:
    if path.endswith("ff_net_0_proj"):
        return 8 * width, width
    if "attn2_to_k" in path or "attn2_to_v" in path:
        return width, context
    return width, width


def numbered(context: int = 768, encoder: int = 768) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {}
    for number, (path, width) in enumerate(unet_order()):
        out, in_ = widths(path, width, context)
        tensors[f"unet:{number}:up"] = (out, 4)
        tensors[f"unet:{number}:down"] = (4, in_)
    for number, _ in enumerate(text_encoder_order()):
        tensors[f"text_encoder:{number}:up"] = (encoder, 4)
        tensors[f"text_encoder:{number}:down"] = (4, encoder)
    return tensors


def test_the_order_is_that_of_the_modules_of_a_diffusers_unet_with_the_middle_last():
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768)
    attention = [
        path
        for stage in ("down_blocks", "up_blocks", "mid_block")
        for path, module in getattr(model, stage).named_modules(prefix=stage)
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in path
    ]
    ours = [path for path, _ in unet_order()]
    assert {path.replace(".", "_") for path in attention if not path.endswith("ff.net.2")} == set(ours)
    # Blocks come in the model's order; in a block the feed-forward came between the attentions then.
    blocks = list(
        dict.fromkeys(path.partition(".transformer_blocks")[0].replace(".", "_") for path in attention)
    )
    assert list(dict.fromkeys(path.partition("_transformer_blocks")[0] for path in ours)) == blocks
    assert [path.partition("blocks_0_")[2] for path in ours if path.startswith("mid_block")] == [
        "attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "ff_net_0_proj",
        "attn2_to_q", "attn2_to_k", "attn2_to_v", "attn2_to_out_0",
    ]  # fmt: skip


@pytest.mark.parametrize(("context", "encoder", "expected"), [(768, 768, "sd1"), (1024, 1024, "sd2")])
def test_a_numbered_file_gets_its_names_and_base_model(context, encoder, expected):
    tensors = numbered(context, encoder)
    parsed = parse_file(tensors, {})
    assert parsed.dialect == "cloneofsimo"
    assert parsed.architecture.id == expected
    assert len(parsed.parts) == 144 + 48
    assert parsed.unknown == ()
    by_spelling = {part.spelling: part for part in parsed.parts}
    ((dotted, _),) = diffusers_layers(expected, by_spelling["unet:4"].layer)
    assert dotted == "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    assert by_spelling["text_encoder:2"].layer == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert by_spelling["unet:143"].slots == {"up": "unet:143:up", "down": "unet:143:down"}


def test_a_numbered_file_whose_shapes_do_not_fit_the_order_is_refused_naming_the_layer():
    tensors = numbered()
    tensors["unet:5:down"], tensors["unet:6:down"] = tensors["unet:6:down"], tensors["unet:5:down"]
    with pytest.raises(
        UnsupportedError, match=r"file\.safetensors: unet:5 should be down_blocks_0_attentions_0.*attn2_to_q"
    ):
        parse_file(tensors, {}, where="file.safetensors")


def test_a_numbered_file_of_another_length_is_refused_with_the_length_we_know():
    tensors = {key: shape for key, shape in numbered().items() if not key.startswith("unet:143:")}
    with pytest.raises(UnsupportedError, match="only files with 144"):
        parse_file(tensors, {})
