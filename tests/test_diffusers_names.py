"""Names of the diffusers dialect, looked up among the modules of diffusers' own models, without weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import diffusers
import pytest
import torch

from lib_loramerge.dialects import output_parts, parse_file
from lib_loramerge.errors import LoraMergeError
from lib_loramerge.models import component
from tests.helpers.accepted import accepted
from tests.helpers.names_judge import header, parameter, spellings

SD3 = diffusers.SD3Transformer2DModel
FLUX2 = diffusers.Flux2Transformer2DModel
# Model of the facts, our base model, and diffusers' model of it.
MODELS: list[tuple[str, str, Callable[[], torch.nn.Module]]] = [
    ("sd35_medium", "sd3", lambda: SD3(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=8,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")),
    ("sd3_large", "sd3_large", lambda: SD3(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=8,
        qk_norm="rms_norm")),
    ("flux1", "flux1", lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True)),
    ("chroma", "chroma", diffusers.ChromaTransformer2DModel),
    ("flux2_dev", "flux2", FLUX2),
    ("flux2_klein_4b", "flux2", lambda: FLUX2(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)),
    ("hunyuan_video", "hunyuan_video", lambda: diffusers.HunyuanVideoTransformer3DModel(
        guidance_embeds=True)),
    ("lumina2", "lumina2", lambda: diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304)),
    ("zimage", "zimage", diffusers.ZImageTransformer2DModel),
    ("qwen_image", "qwen_image", diffusers.QwenImageTransformer2DModel),
    ("wan_i2v", "wan", lambda: diffusers.WanTransformer3DModel(
        in_channels=36, image_dim=1280, added_kv_proj_dim=5120)),
    ("anima", "anima", lambda: diffusers.CosmosTransformer3DModel(
        in_channels=16, num_layers=28, num_attention_heads=16, adaln_lora_dim=256, text_embed_dim=1024)),
]  # fmt: skip


def built(build: Callable[[], torch.nn.Module]) -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        return dict(build().named_modules())


@pytest.mark.parametrize(("model", "architecture", "build"), MODELS, ids=[row[0] for row in MODELS])
def test_every_name_of_the_dialect_is_a_module_of_the_right_size(model, architecture, build):
    modules, names = built(build), spellings(model)["lora_unet_"]
    shapes = accepted("comfyui").shapes(model)
    parsed = parse_file(header(model, names), {})
    assert parsed.architecture.id == architecture
    wrong, named = [], 0
    for part in parsed.parts:
        if component(part.layer) != "unet":
            continue
        try:
            parts = output_parts(architecture, part.layer, "diffusers")
        except LoraMergeError:
            continue
        shape = shapes[parameter(names[part.spelling])]
        for name, rows in parts:
            named += 1
            module = modules.get(name.removeprefix("transformer."))
            weight = getattr(module, "weight", None)
            out = shape[0] if rows is None else sum(stop - start for start, stop in rows.cut(shape[0]))
            size = (out, math.prod(shape[1:]))
            if weight is None or (weight.shape[0], math.prod(weight.shape[1:])) != size:
                wrong.append(re.sub(r"\.\d+\.", ".{}.", f"{part.layer} {name}"))
    assert named > 100
    assert sorted(set(wrong)) == []
