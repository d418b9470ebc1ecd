# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Where a layer's weight lies in a checkpoint, judged by diffusers' converters and models."""

from __future__ import annotations

import pytest
import torch

from lib_loramerge.errors import IncompatibleError
from lib_loramerge.models import CheckpointKey, Rows, checkpoint_keys, layers
from lib_loramerge.models.dit import NAMES


def read(checkpoint: dict[str, torch.Tensor], architecture: str, layer: str) -> torch.Tensor | None:
    """A layer's weight by the first alternative whose tensors are all there."""
    for alternative in checkpoint_keys(architecture, layer):
        if all(entry.key in checkpoint for entry in alternative):
            pieces = []
            for entry in alternative:
                tensor = checkpoint[entry.key]
                tensor = tensor.T if entry.transposed else tensor
                if entry.take is not None:
                    tensor = torch.cat([tensor[a:b] for a, b in entry.take.cut(tensor.shape[0])])
                pieces.append((entry, tensor))
            if pieces[0][0].rows is None:
                return pieces[0][1]
            total = pieces[0][0].rows.spans(pieces[0][1].shape[0])[1]
            whole = torch.empty(total, *pieces[0][1].shape[1:], dtype=pieces[0][1].dtype)
            for entry, tensor in pieces:
                done = 0
                for start, stop in entry.rows.spans(tensor.shape[0])[0]:
                    whole[start:stop] = tensor[done : done + stop - start]
                    done += stop - start
            return whole
    return None


def test_open_clip_weights_are_those_that_the_converter_of_diffusers_takes():
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    class Model:
        class config:  # noqa: N801
            hidden_size = 6

    prefix = "conditioner.embedders.1.model."
    block = f"{prefix}transformer.resblocks.0."
    checkpoint = {
        f"{block}attn.in_proj_weight": torch.rand(18, 6), f"{block}attn.in_proj_bias": torch.rand(18),
        f"{block}attn.out_proj.weight": torch.rand(6, 6), f"{block}mlp.c_fc.weight": torch.rand(12, 6),
        f"{block}mlp.c_proj.weight": torch.rand(6, 12), f"{block}ln_1.weight": torch.rand(6),
        f"{block}ln_2.weight": torch.rand(6), f"{prefix}text_projection": torch.rand(6, 6),
        f"{prefix}ln_final.weight": torch.rand(6), f"{prefix}token_embedding.weight": torch.rand(9, 6),
        f"{prefix}positional_embedding": torch.rand(5, 6),
    }  # fmt: skip
    theirs = convert_open_clip_checkpoint(Model(), dict(checkpoint), prefix=prefix)
    compared = 0
    for key, weight in theirs.items():
        if key.endswith(".weight"):
            path = key.removesuffix(".weight").replace(".", "_")
            path = path if path.startswith(("text_model_", "text_projection")) else f"text_model_{path}"
            found = read(checkpoint, "sdxl", f"lora_te2_{path}")
            assert found is not None, key
            assert torch.equal(found, weight), key
            compared += 1
    assert compared == 12


@pytest.mark.parametrize(
    ("architecture", "layer", "key"),
    [
        ("sd1", "lora_unet_input_blocks_1_1_proj_in", "model.diffusion_model.input_blocks.1.1.proj_in.weight"),
        ("sd1", "lora_unet_input_blocks_1_1_proj_in", "down_blocks.0.attentions.0.proj_in.weight"),
        ("sd1", "lora_te_text_model_encoder_layers_0_mlp_fc1", "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"),
        ("sd2", "lora_te_text_model_encoder_layers_0_mlp_fc1", "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight"),
        ("sdxl", "lora_te1_text_model_encoder_layers_0_mlp_fc1", "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"),
        ("sdxl_refiner", "lora_te_text_model_encoder_layers_0_mlp_fc1", "conditioner.embedders.0.model.transformer.resblocks.0.mlp.c_fc.weight"),
        ("flux1", "lora_unet_double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv.weight"),
        ("flux1", "lora_unet_double_blocks_0_img_attn_qkv", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
        ("flux1", "lora_unet_double_blocks_0_img_attn_norm_key_norm", "double_blocks.0.img_attn.norm.key_norm.scale"),
        ("flux1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("hunyuan_video", "lora_unet_double_blocks_0_img_mlp_0", "double_blocks.0.img_mlp.fc1.weight"),
        ("sd3", "lora_unet_joint_blocks_0_x_block_attn_qkv", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    ],
)  # fmt: skip
def test_known_places_are_among_the_alternatives(architecture, layer, key):
    assert (CheckpointKey(key),) in checkpoint_keys(architecture, layer)


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_every_listed_layer_has_a_place_and_no_two_share_one(architecture):
    seen: dict[tuple, str] = {}
    for layer in layers(architecture):
        places = checkpoint_keys(architecture, layer)
        assert places, layer
        first = places[0]
        assert seen.setdefault(first, layer) == layer


@pytest.mark.parametrize("architecture", NAMES)
def test_a_split_checkpoint_gives_the_fused_weight_back(architecture):
    for template, members in NAMES[architecture].layers.items():
        if not any(rows for _, rows in members):
            continue
        layer = "lora_unet_" + template.format(0).replace(".", "_")
        units = members[0][1].of
        weight = torch.arange(units * 3.0)[:, None]
        checkpoint = {
            f"{member.format(0)}.weight": torch.cat([weight[a:b] for a, b in rows.cut(units * 3)])
            for member, rows in members
        }
        assert torch.equal(read(checkpoint, architecture, layer), weight)
        checkpoint.pop(f"{members[-1][0].format(0)}.weight")
        assert read(checkpoint, architecture, layer) is None


def test_layers_that_we_do_not_know_have_no_place():
    assert checkpoint_keys("unknown", "transformer.strange.q") == ()
    assert checkpoint_keys("flux1", "lora_unet_double_blocks_0_img_attn_strange") == ()


def test_spans_and_cuts_are_inverse_and_refuse_what_cannot_be_divided():
    rows = Rows(((1, 2), (0, 1)), 2)
    assert rows.spans(6) == (((3, 6), (0, 3)), 6)
    assert rows.cut(6) == ((3, 6), (0, 3))
    assert Rows(((3, 7),), 7).spans(12288) == (((9216, 21504),), 21504)
    for call in (lambda: rows.spans(5), lambda: rows.cut(5), lambda: Rows(((0, 3),), 7).spans(0)):
        with pytest.raises(IncompatibleError, match="cannot be divided"):
            call()
