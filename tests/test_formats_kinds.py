# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""Every adapter kind in a file of its own project, merged with a plain LoRA: LyCORIS and PEFT judge."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn

from lib_loramerge.errors import LoraMergeError, UnsupportedError
from tests.helpers.adapter_judges import base_layer, randomise, seen_delta
from tests.helpers.fixtures import dense_deltas, make_lora
from tests.helpers.format_files import assert_close, merge, plan, save, written

logging.getLogger("LyCORIS").setLevel(logging.ERROR)

_BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"
# Layer, its place in a checkpoint, its shape.
LAYERS: dict[str, tuple[str, tuple[int, ...]]] = {
    f"lora_unet_{_BLOCK}_attn1_to_q": (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", (24, 36),
    ),
    f"lora_unet_{_BLOCK}_attn2_to_k": (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k", (24, 768),
    ),
    "lora_unet_down_blocks_0_resnets_0_conv1": ("model.diffusion_model.input_blocks.1.0.in_layers.2", (24, 8, 3, 3)),
    "lora_unet_down_blocks_0_attentions_0_proj_in": ("model.diffusion_model.input_blocks.1.1.proj_in", (24, 24, 1, 1)),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1", (24, 12),
    ),
}  # fmt: skip
# What LyCORIS's and kohya's trainers write into a file.
METADATA = {"ss_base_model_version": "sd_v1", "ss_network_module": "lycoris.kohya", "ss_v2": "False"}
STRENGTHS = [(1.0, 0.5), (-0.6, 1.3), (2.0, 0.0)]

# Name, module, options; shapes of more than two axes are convolutions.
KINDS: dict[str, tuple[type, dict]] = {
    "LoCon": (LoConModule, {"lora_dim": 3, "alpha": 2}),
    "LoCon, rank-stabilised": (LoConModule, {"lora_dim": 3, "alpha": 2, "rs_lora": True}),
    "LoCon with a scalar": (LoConModule, {"lora_dim": 3, "alpha": 2, "use_scalar": True}),
    "LoCon, Tucker": (LoConModule, {"lora_dim": 2, "alpha": 1, "use_tucker": True}),
    "LoHa": (LohaModule, {"lora_dim": 3, "alpha": 2}),
    "LoHa, more ranks than the layer": (LohaModule, {"lora_dim": 8, "alpha": 2}),
    "LoHa, Tucker": (LohaModule, {"lora_dim": 2, "alpha": 2, "use_tucker": True}),
    "LoKr": (LokrModule, {"lora_dim": 1, "alpha": 2}),
    "LoKr, both factored": (LokrModule, {"lora_dim": 1, "alpha": 2, "decompose_both": True}),
    "LoKr, both whole": (LokrModule, {"lora_dim": 9, "alpha": 2, "full_matrix": True}),
    "LoKr, unbalanced": (LokrModule, {"lora_dim": 1, "alpha": 2, "factor": 2, "unbalanced_factorization": True}),
    "LoKr, Tucker": (LokrModule, {"lora_dim": 1, "alpha": 2, "use_tucker": True}),
    "DoRA per output": (LoConModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": True}),
    "DoRA per input": (LoConModule, {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    "DoRA on LoHa": (LohaModule, {"lora_dim": 2, "alpha": 2, "weight_decompose": True, "wd_on_out": True}),
    "DoRA on LoKr": (LokrModule, {"lora_dim": 1, "alpha": 2, "weight_decompose": True, "wd_on_out": True}),
    "GLoRA": (GLoRAModule, {"lora_dim": 3, "alpha": 2}),
    "(IA)^3 on inputs": (IA3Module, {"train_on_input": True}),
    "(IA)^3 on outputs": (IA3Module, {"train_on_input": False}),
    "diag-OFT": (DiagOFTModule, {"lora_dim": 4, "alpha": 0, "constraint": 0}),
    "diag-OFT with a constraint and rescaling": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 6, "constraint": 0.01}),
    "full": (FullModule, {}),
}  # fmt: skip
NEED_BASE = {name for name in KINDS if name.startswith(("DoRA", "GLoRA", "(IA)", "diag", "BOFT"))}


def lycoris_file(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write ``kind.safetensors`` and ``base.safetensors``; weight and bias change of each layer."""
    module_class, options = KINDS[name]
    # LyCORIS inverts in float32 whatever the layer's dtype.
    dtype = torch.float32 if module_class in (DiagOFTModule, ButterflyOFTModule) else torch.float64
    tensors, base_tensors, weights, biases = {}, {}, {}, {}
    for seed, (layer, (key, shape)) in enumerate(LAYERS.items(), start=1):
        base = base_layer(shape, seed=seed).to(dtype)
        untouched = copy.deepcopy(base)
        module = module_class(layer, base, 1.0, **options).to(dtype)
        lengths = {n: p for n, p in module.named_parameters() if n in ("dora_scale", "rescale")}
        randomise({n: p for n, p in module.named_parameters() if n not in lengths}, seed=seed)
        for parameter in lengths.values():  # near their start, not around zero
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.8, 1.25)).copy_(parameter.float())
        state = {slot: t.detach().clone() for slot, t in module.state_dict().items()}
        if module_class is FullModule:  # from apply_to on its parameters are the whole weight
            state = {"diff": module.weight.detach().clone(), "diff_b": module.bias.detach().clone()}
        module.apply_to()
        module.eval()
        tensors |= {f"{layer}.{slot}": t.float() for slot, t in state.items()}
        base_tensors[f"{key}.weight"] = untouched.weight.float()
        weights[layer], biases[layer] = seen_delta(base, untouched, shape)
    save(folder / "kind.safetensors", tensors, METADATA)
    save(folder / "base.safetensors", base_tensors)
    return weights, biases


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_each_kind_merges_with_a_plain_lora_as_its_own_module_says(tmp_path, name):
    weights, biases = lycoris_file(tmp_path, name)
    make_lora(
        tmp_path / "plain.safetensors",
        {layer: shape for layer, (_, shape) in LAYERS.items()},
        rank=2,
        alpha=1,
    )
    plain = dense_deltas(tmp_path / "plain.safetensors")
    base = tmp_path / "base.safetensors" if name in NEED_BASE else None
    for number, (mine, other) in enumerate(STRENGTHS):
        report = merge(tmp_path, f"kind:{mine}", f"plain:{other}", base=base, out=f"out{number}")
        got, got_biases = written(tmp_path / f"out{number}.safetensors")
        for layer, change in weights.items():
            assert_close(got[layer], mine * change + other * plain[layer])
            if biases[layer].any():
                assert_close(got_biases[layer], mine * biases[layer])
        assert got.keys() == weights.keys()
        assert report.error < 1e-6


@pytest.mark.parametrize("rank", ["same", "full", 2])
@pytest.mark.parametrize(
    "name", ["LoHa", "LoKr, both whole", "DoRA per output", "(IA)^3 on inputs", "BOFT", "full"]
)
def test_the_size_foreseen_from_the_headers_is_never_exceeded(tmp_path, name, rank):
    lycoris_file(tmp_path, name)
    base = tmp_path / "base.safetensors" if name in NEED_BASE else None
    foreseen = plan(tmp_path, "kind:0.7", rank=rank, base=base).predicted_bytes
    report = merge(tmp_path, "kind:0.7", rank=rank, base=base)
    assert 0.8 * foreseen < report.size_bytes <= foreseen


@pytest.mark.parametrize("name", sorted(NEED_BASE))
def test_a_kind_that_needs_the_base_model_is_refused_by_name_before_any_work(tmp_path, name):
    lycoris_file(tmp_path, name)
    with pytest.raises(UnsupportedError, match=r"kind\.safetensors.*--base") as caught:
        plan(tmp_path, "kind")
    assert any(layer in str(caught.value) for layer in LAYERS)


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "DoRA per output", "full", "GLoRA"])
def test_a_rank_limit_gives_the_best_approximation_of_what_the_kind_does(tmp_path, name):
    weights, _ = lycoris_file(tmp_path, name)
    base = tmp_path / "base.safetensors" if name in NEED_BASE else None
    merge(tmp_path, "kind:0.8", base=base, rank=3)
    got, _ = written(tmp_path / "out.safetensors")
    for layer, change in weights.items():
        left = torch.linalg.vector_norm(got[layer] - 0.8 * change)
        best = 0.8 * torch.linalg.vector_norm(torch.linalg.svdvals(change)[3:])
        assert float(left) == pytest.approx(float(best), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["LoHa", "LoKr", "DoRA per output", "GLoRA", "BOFT", "full"])
def test_concatenation_cuts_nothing_of_any_kind(tmp_path, name):
    weights, _ = lycoris_file(tmp_path, name)
    base = tmp_path / "base.safetensors" if name in NEED_BASE else None
    merge(tmp_path, "kind:-0.5", mode="concat", base=base, out=name)
    got, _ = written(tmp_path / f"{name}.safetensors")
    for layer, change in weights.items():
        assert_close(got[layer], -0.5 * change)


def test_norms_of_lycoris_are_summed_and_kept(tmp_path):
    layers = {
        f"lora_unet_{_BLOCK}_norm1": nn.LayerNorm(8),
        "lora_unet_down_blocks_0_resnets_0_norm1": nn.GroupNorm(2, 8),
    }
    plain = {layer: shape for layer, (_, shape) in LAYERS.items()}
    changes = {}
    for file in ("a", "b"):
        tensors = {}
        for layer, norm in layers.items():
            module = NormModule(layer, copy.deepcopy(norm), 1.0)
            randomise(dict(module.named_parameters()), seed=ord(file))
            state = {slot: t.detach() for slot, t in module.state_dict().items()}
            tensors |= {f"{layer}.{slot}": t for slot, t in state.items()}
            changes[file, layer] = state
        save(tmp_path / f"{file}.safetensors", tensors, METADATA)
    make_lora(tmp_path / "plain.safetensors", plain)
    merge(tmp_path, "a:0.5", "b:-2", "plain")
    got, got_biases = written(tmp_path / "out.safetensors")
    assert got.keys() == layers.keys() | plain.keys()
    for layer in layers:
        a, b = changes["a", layer], changes["b", layer]
        assert_close(got[layer], 0.5 * a["w_norm"] - 2 * b["w_norm"])
        assert_close(got_biases[layer], 0.5 * a["b_norm"] - 2 * b["b_norm"])


# --- PEFT ---------------------------------------------------------------------------------------

PEFT_LAYERS = {layer: shape for layer, (_, shape) in LAYERS.items() if layer.startswith("lora_unet_")}
_PATHS = {
    f"lora_unet_{_BLOCK}_attn1_to_q": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    f"lora_unet_{_BLOCK}_attn2_to_k": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "lora_unet_down_blocks_0_resnets_0_conv1": "down_blocks.0.resnets.0.conv1",
    "lora_unet_down_blocks_0_attentions_0_proj_in": "down_blocks.0.attentions.0.proj_in",
}


class Tree(nn.Module):
    """A model that holds its layers at dotted paths, as diffusers' U-Net does."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        for path, layer in layers.items():
            node: nn.Module = self
            *parents, leaf = path.split(".")
            for name in parents:
                if not hasattr(node, name):
                    node.add_module(name, nn.Module())
                node = getattr(node, name)
            node.add_module(leaf, layer)


def peft_file(folder: Path, config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save a model with ``config`` on its layers by PEFT; weight and bias change of each layer."""
    untouched = {
        layer: base_layer(shape, seed=s).double() for s, (layer, shape) in enumerate(PEFT_LAYERS.items())
    }
    model = get_peft_model(Tree({_PATHS[layer]: copy.deepcopy(m) for layer, m in untouched.items()}), config)
    model = model.double().eval()
    trained = {n: p for n, p in model.named_parameters() if "base_layer" not in n}
    randomise({n: p for n, p in trained.items() if "magnitude" not in n and "ia3" not in n})
    for name, parameter in trained.items():
        if "magnitude" in name or "ia3" in name:
            torch.manual_seed(3)
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.8, 1.25)).copy_(parameter.float())
    model.float().save_pretrained(folder / "saved")
    (folder / "saved" / "adapter_model.safetensors").rename(folder / "kind.safetensors")
    model.double()
    save(
        folder / "base.safetensors",
        {f"{LAYERS[layer][0]}.weight": m.weight.float() for layer, m in untouched.items()},
    )
    weights, biases = {}, {}
    for layer, base in untouched.items():
        adapted = model.base_model.model.get_submodule(_PATHS[layer])
        weights[layer], biases[layer] = seen_delta(adapted, base, PEFT_LAYERS[layer])
    return weights, biases


_TARGETS = ["to_q", "to_k", "conv1", "proj_in"]
# Configurations whose scale is 1, as the WebUIs read files that hold no alpha.
PEFT_KINDS = {
    "LoRA": LoraConfig(r=4, lora_alpha=4, target_modules=_TARGETS),
    "rsLoRA": LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=_TARGETS),
    "LoRA with a bias": LoraConfig(r=4, lora_alpha=4, lora_bias=True, target_modules=_TARGETS[:2]),
    "DoRA": LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=_TARGETS),
    "LoHa": LoHaConfig(r=2, alpha=2, target_modules=_TARGETS),
    "LoHa, Tucker": LoHaConfig(r=2, alpha=2, use_effective_conv2d=True, target_modules=_TARGETS),
    "LoKr": LoKrConfig(r=1, alpha=1, target_modules=_TARGETS),
    "LoKr, both factored, Tucker": LoKrConfig(
        r=1, alpha=1, use_effective_conv2d=True, decompose_both=True, target_modules=_TARGETS
    ),
}


@pytest.mark.filterwarnings("ignore:.*invalid shape")
@pytest.mark.parametrize("name", PEFT_KINDS)
def test_a_file_of_peft_merges_with_a_plain_lora_as_its_forward_pass_says(tmp_path, name):
    weights, biases = peft_file(tmp_path, copy.deepcopy(PEFT_KINDS[name]))
    make_lora(tmp_path / "plain.safetensors", PEFT_LAYERS, rank=2, alpha=1)
    plain = dense_deltas(tmp_path / "plain.safetensors")
    base = tmp_path / "base.safetensors" if name == "DoRA" else None
    trained = weights.keys() if name != "LoRA with a bias" else list(weights)[:2]
    for number, (mine, other) in enumerate(STRENGTHS):
        merge(tmp_path, f"kind:{mine}", f"plain:{other}", base=base, out=f"out{number}")
        got, got_biases = written(tmp_path / f"out{number}.safetensors")
        for layer in trained:
            assert_close(got[layer], mine * weights[layer] + other * plain[layer])
            if biases[layer].any():
                assert_close(got_biases[layer], mine * biases[layer])


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (OFTConfig(r=0, oft_block_size=4, target_modules=_TARGETS[:2]), "OFT"),
        (BOFTConfig(boft_block_size=4, target_modules=_TARGETS[:2]), "BOFT"),
        (IA3Config(target_modules=_TARGETS[:2], feedforward_modules=[]), r"\(IA\)\^3"),
    ],
    ids=["OFT", "BOFT", "IA3"],
)
def test_files_of_peft_that_no_webui_reads_are_refused_by_name(tmp_path, config, name):
    peft_file(tmp_path, config)
    with pytest.raises(LoraMergeError, match=rf"kind\.safetensors.*{name}"):
        plan(tmp_path, "kind")


@pytest.mark.parametrize("config", [
    LoraConfig(r=4, lora_alpha=12, target_modules=_TARGETS),
    LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=_TARGETS),
    LoHaConfig(r=2, alpha=6, target_modules=_TARGETS),
], ids=["LoRA", "rsLoRA", "LoHa"])  # fmt: skip
def test_a_scale_that_only_pefts_configuration_knows_is_reported_and_not_applied(tmp_path, config):
    """The WebUIs do not read adapter_config.json, so a merge that did would differ from the prompt."""
    weights, _ = peft_file(tmp_path, config)
    (tmp_path / "saved" / "adapter_config.json").rename(tmp_path / "adapter_config.json")
    report = merge(tmp_path, "kind")
    got, _ = written(tmp_path / "out.safetensors")
    for layer, change in weights.items():
        assert_close(got[layer], change / 3)
    assert any("adapter_config.json" in text and "3" in text for text in report.warnings)
