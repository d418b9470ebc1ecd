"""Every layer of SD1, SD2, SDXL and Flux, under every spelling, gets the weight of its own block."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest

from lib_loramerge import models
from lib_loramerge.blocks import BLOCK_IDS, BlockWeights, Presets, resolve
from lib_loramerge.dialects import parse_file
from lib_loramerge.recipe import LoraInput
from tests.helpers.fixtures import sample_data

RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
}
LINEARS = [f"{a}_to_{p}" for a in ("attn1", "attn2") for p in ("q", "k", "v", "out_0")]
TRANSFORMER = ["norm1", "norm2", "norm3", *LINEARS, "ff_net_0_proj", "ff_net_2"]

# attention depth on each level down, and in the middle
DEPTHS = {"sd1": ((1, 1, 1, 0), 1), "sd2": ((1, 1, 1, 0), 1), "sdxl": ((0, 2, 10), 10)}


def attention(prefix: str, depth: int) -> Iterator[str]:
    for leaf in ("norm", "proj_in", "proj_out"):
        yield f"{prefix}_{leaf}"
    for t in range(depth):
        for leaf in TRANSFORMER:
            yield f"{prefix}_transformer_blocks_{t}_{leaf}"


def unet_layers(depths: tuple[int, ...], middle: int) -> Iterator[tuple[str, str, str]]:
    """(diffusers name, ldm name, block) of every layer of attention, sampling and the first convolutions.

    Numbered as the papers' U-Net is: each level down has two blocks and a sampler, each level up three.
    """
    yield "conv_in", "input_blocks_0_0", "IN00"
    levels = len(depths)
    for i in range(levels):
        for j in range(2):
            block = 1 + 3 * i + j
            for ours, theirs in RESNET.items():
                yield (
                    f"down_blocks_{i}_resnets_{j}_{ours}",
                    f"input_blocks_{block}_0_{theirs}",
                    f"IN{block:02}",
                )
            if depths[i]:
                names = attention(f"down_blocks_{i}_attentions_{j}", depths[i])
                for ours, theirs in zip(names, attention(f"input_blocks_{block}_1", depths[i]), strict=True):
                    yield ours, theirs, f"IN{block:02}"
        if i < levels - 1:
            block = 3 + 3 * i
            yield f"down_blocks_{i}_downsamplers_0_conv", f"input_blocks_{block}_0_op", f"IN{block:02}"
    for n, theirs in ((0, 0), (1, 2)):
        for leaf, path in RESNET.items():
            yield f"mid_block_resnets_{n}_{leaf}", f"middle_block_{theirs}_{path}", "M00"
    for ours, theirs in zip(
        attention("mid_block_attentions_0", middle), attention("middle_block_1", middle), strict=True
    ):
        yield ours, theirs, "M00"
    for i in range(levels):
        depth = depths[levels - 1 - i]
        for j in range(3):
            block = 3 * i + j
            for leaf, path in RESNET.items():
                yield f"up_blocks_{i}_resnets_{j}_{leaf}", f"output_blocks_{block}_0_{path}", f"OUT{block:02}"
            yield (
                f"up_blocks_{i}_resnets_{j}_conv_shortcut",
                f"output_blocks_{block}_0_skip_connection",
                f"OUT{block:02}",
            )
            if depth:
                names = attention(f"up_blocks_{i}_attentions_{j}", depth)
                for ours, theirs in zip(names, attention(f"output_blocks_{block}_1", depth), strict=True):
                    yield ours, theirs, f"OUT{block:02}"
        if i < levels - 1:
            block = 3 * i + 2
            yield (
                f"up_blocks_{i}_upsamplers_0_conv",
                f"output_blocks_{block}_{2 if depth else 1}_conv",
                f"OUT{block:02}",
            )


def numbered(count: int) -> BlockWeights:
    """Weights 10, 11, 12...: no two blocks are alike, and none is like a layer of no block."""
    text = ",".join(str(n + 10) for n in range(count))
    return resolve(LoraInput("a", lbw=text), Presets(), rng=random.Random(0))


def place(block: str | None, count: int = 26) -> float:
    """The weight that :func:`numbered` gives a block; 1 for no block."""
    return BLOCK_IDS[count].index(block) + 10 if block else 1


def weight_of(architecture: str, part: str, flat: str, found: BlockWeights) -> float:
    path, _ = models.canonical_path(architecture, part, flat)
    layer = models.layer_name(part, path)
    return found.weight(part, models.block(architecture, layer), layer)


@pytest.mark.parametrize("architecture", DEPTHS)
def test_every_unet_layer_gets_the_weight_of_its_block_in_both_spellings(architecture):
    found = numbered(26)
    walked = list(unet_layers(*DEPTHS[architecture]))
    for ours, theirs, block in walked:
        expected = place(block)
        assert weight_of(architecture, "unet", ours, found) == expected, ours
        assert weight_of(architecture, "unet", theirs, found) == expected, theirs
    # What is left: shortcuts on the way down, time and label embeddings, the last convolution.
    known = {n.removeprefix("lora_unet_") for n in models.layers(architecture) if "_unet_" in n}
    left = known - {theirs for _, theirs, _ in walked}
    assert all("skip_connection" in n or n.startswith(("time_embed", "label_emb", "out_")) for n in left), (
        left
    )
    assert len(known) == (1050 if architecture == "sdxl" else 391)


@pytest.mark.parametrize("architecture", DEPTHS)
def test_layers_outside_the_blocks_keep_1(architecture):
    found = numbered(26)
    for layer in models.layers(architecture):
        if layer.startswith(("lora_unet_time_embed", "lora_unet_label_emb", "lora_unet_out_")):
            assert found.weight("unet", models.block(architecture, layer), layer) == 1


@pytest.mark.parametrize("architecture", DEPTHS)
def test_the_layer_lists_of_the_base_models_agree(architecture):
    folder = sample_data()
    if folder is None:
        return  # the lists lie beside the checkout, not in it; the walk above needs none
    found = numbered(26)
    listed = json.loads((folder / "unet" / f"{architecture}.json").read_text(encoding="utf-8"))
    assert len(listed) == (1050 if architecture == "sdxl" else 391)
    for diffusers, facts in listed.items():
        expected = place(facts["lbw26"])
        for spelling in (diffusers, facts["ldm"]):
            assert weight_of(architecture, "unet", spelling, found) == expected, spelling


@pytest.mark.parametrize(
    ("architecture", "parts"), [("sd1", ["te"]), ("sd2", ["te"]), ("sdxl", ["te1", "te2"])]
)
def test_text_encoders_get_base(architecture, parts):
    for part in parts:
        for leaf in ("self_attn_q_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"):
            assert weight_of(
                architecture, part, f"text_model_encoder_layers_0_{leaf}", numbered(26)
            ) == place("BASE")


def flux_layers() -> Iterator[tuple[str, str]]:
    """(kohya or diffusers name without its component, block) of Flux layers in both spellings."""
    for n in range(19):
        for side in ("img", "txt"):
            for leaf in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin"):
                yield f"double_blocks_{n}_{side}_{leaf}", f"D{n:02}"
        for leaf in (
            "to_q",
            "to_k",
            "to_v",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_out_0",
            "to_add_out",
        ):
            yield f"transformer_blocks_{n}_attn_{leaf}", f"D{n:02}"
        for leaf in (
            "norm1_linear",
            "norm1_context_linear",
            "ff_net_0_proj",
            "ff_net_2",
            "ff_context_net_0_proj",
        ):
            yield f"transformer_blocks_{n}_{leaf}", f"D{n:02}"
    for n in range(38):
        for leaf in ("linear1", "linear2", "modulation_lin"):
            yield f"single_blocks_{n}_{leaf}", f"S{n:02}"
        for leaf in ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp", "proj_out", "norm_linear"):
            yield f"single_transformer_blocks_{n}_{leaf}", f"S{n:02}"
    for name in ("img_in", "txt_in", "time_in_in_layer", "vector_in_out_layer", "guidance_in_in_layer"):
        yield name, "IN"
    for name in ("x_embedder", "context_embedder", "time_text_embed_timestep_embedder_linear_1"):
        yield name, "IN"
    yield "final_layer_linear", "OUT"
    yield "proj_out", "OUT"


def test_every_flux_layer_gets_the_weight_of_its_block_in_both_spellings():
    found = numbered(61)
    for name, block in flux_layers():
        assert weight_of("flux1", "unet", name, found) == place(block, 61), name


def test_the_text_encoders_of_flux_get_clip_and_t5():
    found = numbered(61)
    assert weight_of("flux1", "te1", "text_model_encoder_layers_11_mlp_fc2", found) == place("CLIP", 61)
    assert weight_of("flux1", "te3", "encoder_block_23_layer_0_SelfAttention_q", found) == place("T5", 61)


@pytest.mark.parametrize("spelling", ["kohya", "peft"])
def test_the_layers_of_a_flux_file_get_the_weight_of_their_blocks(spelling):
    """Through the reader: fused kohya layers, and the split ones that diffusers writes."""
    kohya = spelling == "kohya"
    names = {"D": "double_blocks_{}_img_attn_qkv", "S": "single_blocks_{}_linear1"}
    if not kohya:
        names = {"D": "transformer_blocks.{}.attn.to_v", "S": "single_transformer_blocks.{}.attn.to_q"}
    rows = {"D": 9216, "S": 21504} if kohya else {"D": 3072, "S": 3072}
    up, down = ("lora_up", "lora_down") if kohya else ("lora_B", "lora_A")
    tensors = {}
    for letter, count in (("D", 19), ("S", 38)):
        for n in range(count):
            name = ("lora_unet_" if kohya else "transformer.") + names[letter].format(n)
            tensors |= {f"{name}.{up}.weight": (rows[letter], 4), f"{name}.{down}.weight": (4, 3072)}
    parsed = parse_file(tensors, {})
    assert parsed.architecture.id == "flux1"
    found = numbered(61)
    got = [
        found.weight("unet", models.block(parsed.architecture.id, part.layer), part.layer)
        for part in parsed.parts
    ]
    assert sorted(got) == [place(block, 61) for block in BLOCK_IDS[61] if block[0] in "DS"]
