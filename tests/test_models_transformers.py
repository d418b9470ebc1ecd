"""Layer names of the diffusion transformers, judged by diffusers' own models and converters."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as single_file
from torch import Tensor, nn

from lib_loramerge.models import canonical_path, diffusers_layers, layer_path
from lib_loramerge.models.dit import NAMES

# Base model to a small model of the right class: two blocks of each kind, weights on no device.
MODELS = {
    "flux1": ("FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}),
    "chroma": ("ChromaTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "dual_attention_layers": (0, 1),
        },
    ),
    "flux2": ("Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "lumina2": ("Lumina2Transformer2DModel", {"num_layers": 2, "num_refiner_layers": 2}),
    "zimage": ("ZImageTransformer2DModel", {"n_layers": 2}),
    "qwen_image": ("QwenImageTransformer2DModel", {"num_layers": 2}),
    "wan": ("WanTransformer3DModel", {"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {"num_layers": 2, "num_single_layers": 2}),
    "hunyuan_image": (
        "HunyuanImageTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True, "text_embed_2_dim": 1472},
    ),
    "anima": ("CosmosTransformer3DModel", {"num_layers": 2}),
    "cosmos_predict2": ("CosmosTransformer3DModel", {"num_layers": 2}),
    "longcat": ("LongCatImageTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "hunyuan_video15": ("HunyuanVideo15Transformer3DModel", {"num_layers": 2}),
    "qwen_image21": ("QwenImage21Transformer2DModel", {"num_layers": 2}),
    "auraflow": ("AuraFlowTransformer2DModel", {"num_mmdit_layers": 2, "num_single_dit_layers": 2}),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "num_layers": 2,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "use_additional_conditions": True,
        },
    ),
    "mochi": ("MochiTransformer3DModel", {"num_layers": 48}),
    "ltx_video": ("LTXVideoTransformer3DModel", {"num_layers": 2}),
    "ltx2": ("LTX2VideoTransformer3DModel", {"num_layers": 2}),
    "ace_step15": ("AceStepTransformer1DModel", {"num_hidden_layers": 2}),
    "ideogram4": ("Ideogram4Transformer2DModel", {"num_layers": 2}),
    "krea2": ("Krea2Transformer2DModel", {"num_layers": 2}),
    "kandinsky5": ("Kandinsky5Transformer3DModel", {"num_visual_blocks": 2}),
    "ernie_image": ("ErnieImageTransformer2DModel", {"num_layers": 2}),
}


def trainable_layers(architecture: str) -> dict[str, nn.Module]:
    name, config = MODELS[architecture]
    model = getattr(diffusers, name, None)
    if model is None:
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        built = model(**config)
    return {
        path: module
        for path, module in built.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }


@pytest.mark.parametrize("architecture", MODELS)
def test_every_trainable_layer_of_the_diffusers_model_has_a_checkpoint_name_and_comes_back_from_it(
    architecture,
):
    layers = trainable_layers(architecture)
    assert len(layers) > 20
    for path in layers:
        found = canonical_path(architecture, "unet", path.replace(".", "_").replace("-", "_"))
        assert found is not None, path
        assert (path, found[1]) in diffusers_layers(architecture, f"lora_unet_{found[0]}")


@pytest.mark.parametrize("architecture", MODELS)
def test_the_members_of_a_fused_layer_have_rows_in_the_proportion_of_the_model(architecture):
    layers = trainable_layers(architecture)
    rows: dict[str, list[tuple[int, int]]] = {}
    for path, module in layers.items():
        target, part = canonical_path(architecture, "unet", path.replace(".", "_").replace("-", "_"))
        if part is not None and part.units < part.of:
            spans, total = part.spans(module.weight.shape[0])
            rows.setdefault(target, []).extend((*span, total) for span in spans)
    for target, spans in rows.items():
        assert len({total for _, _, total in spans}) == 1, target
        covered = sorted(row for start, stop, _ in spans for row in range(start, stop))
        assert covered == list(range(spans[0][2])), target


# Base model to its converter, and the rows of the fused layers where the converter is made for one width.
CONVERTERS = {
    "flux1": ("convert_flux_transformer_checkpoint_to_diffusers", {"linear1": 7 * 3072, "qkv": 3 * 3072}),
    "chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", {"linear1": 7 * 3072, "qkv": 3 * 3072}),
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "sd3_large": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "flux2": ("convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "lumina2": ("convert_lumina2_to_diffusers", {"qkv": 2304 + 768 + 768}),
    "zimage": ("convert_z_image_transformer_checkpoint_to_diffusers", {}),
    "wan": ("convert_wan_transformer_to_diffusers", {}),
    "hunyuan_video": ("convert_hunyuan_video_transformer_to_diffusers", {"linear1": 7 * 3072}),
    "anima": ("convert_cosmos_transformer_checkpoint_to_diffusers", {}),
}
BLOCKS = {"sd3": 24, "sd3_large": 38}
# The context of the last joint block ends in attention.
LAST = {"sd3": "joint_blocks.23.context_block", "sd3_large": "joint_blocks.37.context_block"}
# Layers that the checkpoints of these converters do not have.
ABSENT = {
    "lumina2": ("context_refiner.{}.adaLN",),
    "zimage": ("context_refiner.{}.adaLN",),
    "wan": (
        "vace_",
        "face_",
        "pose_patch",
        "audio_",
        "frame_packer",
        "cond_",
        "trainable",
        "control_",
        "ref_conv",
    ),
    "anima": ("llm_adapter",),
}
# Norms that the converters handle by other rules than layers.
NORMS = (
    "_norm1",
    "_norm2",
    "ffn_norm",
    ".norm1",
    ".norm2",
    "norms.",
    "cap_embedder.0",
    "t_embedding_norm",
    "img_emb.proj.0",
    "img_emb.proj.4",
    ".layernorm",
)


class Checkpoint(dict):
    """A checkpoint whose biases, norms and position tables a converter may take although we made none."""

    def pop(self, key, *default):
        if key in self or default:
            return super().pop(key, *default)
        if key.endswith(".bias") or key == "pos_embed" or ".norms." in key:
            return torch.zeros(7 * 3072)
        raise KeyError(key)


def make_checkpoint(architecture: str, special: dict[str, int]) -> dict[str, tuple[str, Tensor]]:
    """Flattened path to its tensor's name in the model's own code, and a weight with different rows."""
    names = NAMES[architecture]
    own = {target: path for path, (target, rows) in names.aliases.items() if rows is None}
    own = own if architecture == "hunyuan_video" else {}
    made: dict[str, tuple[str, Tensor]] = {}
    for template in names.layers:
        if template in names.parameters or any(part in template for part in NORMS):
            continue
        if any(part in template for part in ABSENT.get(architecture, ())):
            continue
        for number in range(BLOCKS.get(architecture, 2) if "{}" in template else 1):
            path = template.format(number)
            if path.startswith(LAST.get(architecture, "-")) and (".proj" in path or ".mlp" in path):
                continue
            flat = path.replace(".", "_")
            units = max(
                (rows.of for _, rows in diffusers_layers(architecture, f"lora_unet_{flat}") if rows),
                default=1,
            )
            rows = special.get(path.rpartition(".")[2], 3 * units)
            weight = torch.arange(rows, dtype=torch.float64).add(100_000 * len(made))
            is_scale = path.endswith(("query_norm", "key_norm")) and template not in own
            name = own.get(template, template).format(number) + (".scale" if is_scale else ".weight")
            made[flat] = (name, weight if is_scale else weight[:, None])
    return made


@pytest.mark.parametrize("architecture", CONVERTERS)
def test_rows_and_names_are_those_of_the_converter_of_diffusers(architecture):
    name, special = CONVERTERS[architecture]
    convert = getattr(single_file, name, None)
    if convert is None:
        pytest.skip(f"this diffusers has no {name}")
    made = make_checkpoint(architecture, special)
    theirs = convert(Checkpoint({name: weight.clone() for name, weight in made.values()}))
    theirs = {key: value for key, value in theirs.items() if key.endswith(".weight") and ".norms." not in key}
    ours = {}
    for flat, (_, weight) in made.items():
        for member, rows in diffusers_layers(architecture, f"lora_unet_{flat}"):
            ranges = rows.cut(weight.shape[0]) if rows is not None else ((0, weight.shape[0]),)
            ours[f"{member}.weight"] = torch.cat([weight[start:stop] for start, stop in ranges])
    assert sorted(ours) == sorted(theirs)
    for key, weight in ours.items():
        assert torch.equal(weight, theirs[key]), key


@pytest.mark.parametrize("architecture", NAMES)
def test_no_two_layers_of_a_table_share_a_spelling(architecture):
    names = NAMES[architecture]
    seen: dict[str, str] = {}
    for path, members in names.layers.items():
        spellings = {path, *(member for member, _ in members)}
        for spelling in spellings:
            flat = spelling.replace(".", "_").replace("-", "_")
            assert seen.setdefault(flat, path) == path, (flat, seen[flat], path)


@pytest.mark.parametrize("architecture", NAMES)
def test_a_checkpoint_name_means_itself_and_its_members_mean_parts_of_it(architecture):
    for template, members in NAMES[architecture].layers.items():
        numbers = ["1"] * template.count("{}")
        flat = template.format(*numbers).replace(".", "_")
        assert canonical_path(architecture, "unet", flat) == (flat, None)
        assert layer_path(f"lora_unet_{flat}") == flat
        for member, rows in members:
            spelled = member.format(*numbers).replace(".", "_").replace("-", "_")
            expected = (flat, None) if spelled == flat else (flat, rows)
            assert canonical_path(architecture, "unet", spelled) == expected
