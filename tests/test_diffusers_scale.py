"""The strength that diffusers gives each layer of a file without alphas, asked of its own code.

Runs under the newest diffusers with the other tests, and once more under an old one (``.ci/run``): up to
0.39 the first layer's rank decided over all of them.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.peft_utils import get_peft_kwargs
from safetensors.torch import load_file, save_file

from lib_loramerge.blocks import load_presets
from lib_loramerge.merge import plan_merge, run_merge
from lib_loramerge.recipe import LoraInput, MergeRecipe

LAYERS = {
    "transformer.transformer_blocks.0.img_mlp.net.2": 8,
    "transformer.transformer_blocks.0.txt_mlp.net.2": 2,
    "transformer.transformer_blocks.1.img_mlp.net.2": 5,
    "text_encoder.model.layers.0.self_attn.q_proj": 3,
}


@pytest.mark.parametrize("alpha", [None, 4.0])
@pytest.mark.parametrize("rule", [{"rank": "full"}, {"rank": 4}, {"retain": 0.9}, {"size": 0.02}])
def test_layers_of_several_ranks_keep_their_strength_in_diffusers(rule, alpha, tmp_path):
    generator = torch.Generator().manual_seed(3)
    tensors, exact = {}, {}
    for name, rank in LAYERS.items():
        up, down = torch.randn(64, rank, generator=generator), torch.randn(rank, 64, generator=generator)
        tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        exact[name] = (1.0 if alpha is None else alpha / rank) * up.double() @ down.double()
    source, target = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    recipe = MergeRecipe(inputs=(LoraInput("a"),), dialect="diffusers", dtype="float32", **rule)
    plan = plan_merge(recipe, find=lambda name: source, presets=load_presets([]))
    run_merge(plan, target)
    result = load_file(target)
    for component in ("transformer.", "text_encoder."):
        mine = [key for key in result if key.startswith(component)]
        state = {key.removeprefix(component): result[key] for key in mine}
        ranks = {key: value.shape[1] for key, value in state.items() if "lora_B" in key}
        config = get_peft_kwargs(ranks, None, state)
        for key, rank in ranks.items():
            name = key.removesuffix(".lora_B.weight")
            stated = config["alpha_pattern"].get(name, config["lora_alpha"])
            assert config["rank_pattern"].get(name, config["r"]) == rank
            read = stated / rank * state[key].double() @ state[f"{name}.lora_A.weight"].double()
            wanted = exact[component + name]
            kept = torch.linalg.norm(read - wanted) / torch.linalg.norm(wanted)
            best = torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt() / torch.linalg.norm(wanted)
            assert kept < best + (1e-5 if rule == {"rank": "full"} else 0.75)
            # The best approximation is no stronger and no weaker than what it approximates, along itself.
            along = (read * wanted).sum() / (read * read).sum()
            assert abs(along - 1) < 1e-5
