# ruff: noqa: E501  (tables of names are easier to read one row to a line)
"""The same deltas in every dialect, spelled by hand, merge to the same file: fused and split, whole and in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.format_files import assert_close, merge, rand, save, written

RANK = 2


@dataclass(frozen=True)
class Layer:
    """A layer of a base model under its names.

    Attributes:
        checkpoint: Dotted path in the checkpoint; kohya's name is this, flattened.
        members: Dotted path in diffusers to its share of the rows, in the order of the checkpoint.
        rows: Rows of one share.
        swapped: diffusers has the two halves of the rows the other way round.
        trained: The members that the file has.
    """

    checkpoint: str
    members: Mapping[str, int]
    in_: int
    rows: int = 4
    part: str = "unet"
    swapped: bool = False
    trained: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"lora_{self.part}_{self.checkpoint}".replace(".", "_")

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(up, down) of each trained member, in diffusers' order of rows; the scale is 1."""
        return {
            path: (
                rand(share * self.rows, RANK, seed=len(path) + share),
                rand(RANK, self.in_, *self.kernel, seed=7 * len(path) + len(self.checkpoint)),
            )
            for path, share in self.members.items()
            if path in (self.trained or self.members)
        }

    def delta(self) -> Tensor:
        """(out, in) float64 in the checkpoint's order of rows, untrained members 0."""
        pieces = []
        for path, share in self.members.items():
            pair = self.factors().get(path)
            width = self.in_ * torch.Size(self.kernel).numel()
            pieces.append(
                torch.zeros(share * self.rows, width).double()
                if pair is None
                else pair[0].double() @ pair[1].double().flatten(1)
            )
        whole = torch.cat(pieces)
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole

    def fused(self) -> tuple[Tensor, Tensor]:
        """One (up, down) of the whole layer: ups on the diagonal, downs below each other."""
        ups, downs = [], []
        for path, share in self.members.items():
            if path in self.factors():
                up, down = self.factors()[path]
                ups.append(up)
                downs.append(down)
            else:
                ups.append(torch.zeros(share * self.rows, 0))
        up = torch.block_diag(*ups)
        return torch.cat(up.chunk(2)[::-1]) if self.swapped else up, torch.cat(downs)


@dataclass(frozen=True)
class Spelling:
    """How a tool writes a layer: names, endings, and whether it writes an alpha."""

    prefix: Mapping[str, str]
    flat: bool = False
    up: str = "lora_B.weight"
    alpha: float | None = None
    split: bool = True
    rename: Callable[[str], str] = field(default=lambda path: path)

    @property
    def down(self) -> str:
        return self.up.replace("lora_B", "lora_A").replace("up", "down")

    def file(self, layers: list[Layer]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            pairs = layer.factors() if self.split else {layer.checkpoint: layer.fused()}
            for path, (up, down) in pairs.items():
                path = self.rename(path)
                name = self.prefix[layer.part] + (path.replace(".", "_") if self.flat else path)
                scale = 1.0
                if self.alpha is not None:
                    scale = self.alpha / down.shape[0]
                    tensors[f"{name}.alpha"] = torch.tensor(self.alpha)
                if down.dim() == 4:
                    up = up[:, :, None, None]
                tensors[f"{name}.{self.up}"], tensors[f"{name}.{self.down}"] = up / scale, down
        return tensors


def both(*names: str) -> dict[str, str]:
    """Prefixes of the denoiser and the text encoders, in order."""
    return dict(zip(("unet", "te1", "te2", "te3"), names))


KOHYA = "lora_up.weight"
FLUX_PREFIXES = both("transformer.", "text_encoder.", "", "text_encoder_2.")
FLAT = {"flat": True, "up": KOHYA, "alpha": 3.0}
SPELLINGS = {
    "kohya": Spelling(both("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_"), split=False, **FLAT),
    "kohya without alpha": Spelling(
        both("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_"), split=False, flat=True, up=KOHYA
    ),
    "kohya with lora_A": Spelling(both("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_"), split=False, flat=True),
    "ComfyUI": Spelling(
        both(
            "diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.",
            "text_encoders.t5xxl.transformer.",
        ), split=False,
    ),
    "diffusers, ai-toolkit": Spelling(FLUX_PREFIXES),
    "diffusers with alphas": Spelling(FLUX_PREFIXES, alpha=1.0),
    "diffusers with lora.up": Spelling(FLUX_PREFIXES, up="lora.up.weight"),
    "PEFT's bare state": Spelling(FLUX_PREFIXES, up="lora_B.default.weight"),
    "PEFT with an adapter's name": Spelling(FLUX_PREFIXES, up="lora_B.my_style.weight"),
    "PEFT without weight": Spelling(FLUX_PREFIXES, up="lora_B"),
    "PEFT under its components": Spelling(
        both("transformer.base_model.model.", "text_encoder.base_model.model.", "", "text_encoder_2.base_model.model.")
    ),
    "OneTrainer": Spelling(both("lora_transformer_", "lora_te1_", "", "lora_te2_"), **FLAT),
    "OneTrainer's raw format": Spelling(both("transformer.", "clip_l.", "", "t5."), up=KOHYA, alpha=0.5),
    "SimpleTuner": Spelling(both("lycoris_", "lora_te1_", "", "lora_te3_"), **FLAT),
    "compiled": Spelling(both("transformer._orig_mod.", "text_encoder._orig_mod.", "", "text_encoder_2.")),
}  # fmt: skip

FLUX = [
    Layer("double_blocks.0.img_attn.qkv", {f"transformer_blocks.0.attn.to_{n}": 1 for n in "qkv"}, 16, 16),
    Layer("double_blocks.0.txt_attn.qkv", {f"transformer_blocks.0.attn.add_{n}_proj": 1 for n in "qkv"}, 16, 16),
    Layer("double_blocks.0.img_attn.proj", {"transformer_blocks.0.attn.to_out.0": 1}, 16, 16),
    Layer("double_blocks.0.txt_attn.proj", {"transformer_blocks.0.attn.to_add_out": 1}, 16, 16),
    Layer("double_blocks.0.img_mlp.0", {"transformer_blocks.0.ff.net.0.proj": 4}, 16, 16),
    Layer("double_blocks.0.txt_mlp.2", {"transformer_blocks.0.ff_context.net.2": 1}, 64, 16),
    Layer("double_blocks.0.img_mod.lin", {"transformer_blocks.0.norm1.linear": 6}, 16, 16),
    Layer(
        "single_blocks.0.linear1",
        {**{f"single_transformer_blocks.0.attn.to_{n}": 1 for n in "qkv"}, "single_transformer_blocks.0.proj_mlp": 4},
        16, 16,
    ),
    Layer("single_blocks.0.linear2", {"single_transformer_blocks.0.proj_out": 1}, 80, 16),
    Layer("single_blocks.0.modulation.lin", {"single_transformer_blocks.0.norm.linear": 3}, 16, 16),
    Layer("final_layer.adaLN_modulation.1", {"norm_out.linear": 2}, 16, 16, swapped=True),
    Layer("text_model.encoder.layers.0.mlp.fc1", {"text_model.encoder.layers.0.mlp.fc1": 1}, 768, part="te1"),
    Layer("encoder.block.0.layer.0.SelfAttention.q", {"encoder.block.0.layer.0.SelfAttention.q": 1}, 32, part="te3"),
]  # fmt: skip
PARTLY = [
    Layer(
        "double_blocks.3.img_attn.qkv", {f"transformer_blocks.3.attn.to_{n}": 1 for n in "qkv"}, 16, 16,
        trained=("transformer_blocks.3.attn.to_v",),
    ),
    Layer(
        "single_blocks.5.linear1",
        {**{f"single_transformer_blocks.5.attn.to_{n}": 1 for n in "qkv"}, "single_transformer_blocks.5.proj_mlp": 4},
        16, 16, trained=("single_transformer_blocks.5.attn.to_k", "single_transformer_blocks.5.proj_mlp"),
    ),
]  # fmt: skip


def assert_same_merge(folder, layers: list[Layer], spelling: Spelling, *, metadata=None, **fields) -> None:
    """The spelled file, merged with a kohya file of other deltas, is their weighted sum."""
    save(folder / "a.safetensors", spelling.file(layers), metadata)
    other = {f"{layer.name}.{end}": t for layer in layers for end, t in _other(layer).items()}
    save(folder / "b.safetensors", other, metadata)
    merge(folder, "a:0.7", "b:-0.4", **fields)
    weights, biases = written(folder / "out.safetensors")
    assert weights.keys() == {layer.name for layer in layers}
    assert not biases
    for layer in layers:
        pair = _other(layer)
        plain = pair[KOHYA].double().flatten(1) @ pair["lora_down.weight"].double().flatten(1)
        assert_close(weights[layer.name], 0.7 * layer.delta() - 0.4 * plain)


def _other(layer: Layer) -> dict[str, Tensor]:
    out = sum(layer.members.values()) * layer.rows
    up, down = rand(out, 1, seed=91), rand(1, layer.in_, *layer.kernel, seed=92)
    return {KOHYA: up[:, :, None, None] if layer.kernel else up, "lora_down.weight": down}


@pytest.mark.parametrize("name", SPELLINGS)
def test_flux_merges_the_same_from_every_dialect(tmp_path, name):
    assert_same_merge(tmp_path, FLUX + PARTLY, SPELLINGS[name])


def test_flux_of_bfl_without_a_prefix_is_the_same(tmp_path):
    layers = [layer for layer in FLUX + PARTLY if layer.part == "unet"]
    assert_same_merge(tmp_path, layers, Spelling(both(""), split=False))


def test_flux_of_diffusers_without_a_prefix_is_the_same(tmp_path):
    layers = [layer for layer in FLUX + PARTLY if layer.part == "unet"]
    assert_same_merge(tmp_path, layers, Spelling(both("")))
    assert_same_merge(tmp_path / "peft", layers, Spelling(both("base_model.model.")))


def test_flux_of_xlabs_fills_the_qkv_rows_of_linear1_alone(tmp_path):
    names = {
        "double_blocks.{}.processor.qkv_lora1": "double_blocks.{}.img_attn.qkv",
        "double_blocks.{}.processor.qkv_lora2": "double_blocks.{}.txt_attn.qkv",
        "double_blocks.{}.processor.proj_lora1": "double_blocks.{}.img_attn.proj",
        "double_blocks.{}.processor.proj_lora2": "double_blocks.{}.txt_attn.proj",
        "single_blocks.{}.processor.qkv_lora": "single_blocks.{}.linear1",
        "single_blocks.{}.processor.proj_lora": "single_blocks.{}.linear2",
    }
    shapes = dict(zip(names, [(48, 16), (48, 16), (16, 16), (16, 16), (48, 16), (16, 80)]))
    for prefix in ("", "diffusion_model."):
        tensors, wanted = {}, {}
        for theirs, layer in names.items():
            up, down = rand(shapes[theirs][0], 4, seed=1), rand(4, shapes[theirs][1], seed=len(theirs))
            tensors[f"{prefix}{theirs.format(2)}.up.weight"] = up
            tensors[f"{prefix}{theirs.format(2)}.down.weight"] = down
            delta = up.double() @ down.double()
            if layer.endswith("linear1"):
                delta = torch.cat([delta, torch.zeros(64, 16).double()])
            wanted[f"lora_unet_{layer.format(2)}".replace(".", "_")] = delta
        save(tmp_path / "a.safetensors", tensors)
        save(tmp_path / "b.safetensors", SPELLINGS["diffusers, ai-toolkit"].file(FLUX))
        merge(tmp_path, "a:-0.3", "b:0.6", out=f"out{len(prefix)}")
        weights, _ = written(tmp_path / f"out{len(prefix)}.safetensors")
        others = {layer.name: 0.6 * layer.delta() for layer in FLUX}
        assert weights.keys() == wanted.keys() | others.keys()
        for name, delta in wanted.items():
            assert_close(weights[name], -0.3 * delta)
        for name, delta in others.items():
            assert_close(weights[name], delta)


def test_a_split_qkv_file_of_kohya_has_its_alpha_over_all_its_ranks(tmp_path):
    """Its three down factors lie below each other, and alpha stays that of one: the WebUIs divide by 3 r."""
    layer = FLUX[0]
    up, down = layer.fused()
    tensors = {f"{layer.name}.{KOHYA}": up, f"{layer.name}.lora_down.weight": down}
    save(tmp_path / "a.safetensors", {**tensors, f"{layer.name}.alpha": torch.tensor(float(RANK))})
    save(tmp_path / "b.safetensors", SPELLINGS["OneTrainer"].file(FLUX))
    merge(tmp_path, "a:1", "b:1")
    weights, _ = written(tmp_path / "out.safetensors")
    assert_close(weights[layer.name], (1 / 3 + 1) * layer.delta())


@pytest.mark.parametrize("mode", ["concat", "svd"])
def test_a_fused_flux_file_written_for_diffusers_and_read_again_is_the_same(tmp_path, mode):
    save(tmp_path / "a.safetensors", SPELLINGS["kohya"].file(FLUX + PARTLY))
    merge(tmp_path, "a", mode=mode, dialect="diffusers", out="there")
    keys = load_file(tmp_path / "there.safetensors").keys()
    assert all(key.startswith(("transformer.", "text_encoder")) for key in keys)
    assert not any(key.endswith(".alpha") for key in keys)
    merge(tmp_path, "there", mode=mode, dialect="kohya", out="back")
    weights, _ = written(tmp_path / "back.safetensors")
    for layer in FLUX + PARTLY:
        assert_close(weights[layer.name], layer.delta(), 1e-6)


# --- U-Nets -------------------------------------------------------------------------------------


def _sd_layer(ldm: str, diffusers: str, in_: int, rows: int = 6, kernel: tuple[int, ...] = ()) -> Layer:
    return Layer(ldm, {diffusers: 1}, in_, rows, kernel=kernel)


_T = "transformer_blocks.0"
SDXL = [
    _sd_layer(f"input_blocks.4.1.{_T}.attn2.to_k", f"down_blocks.1.attentions.0.{_T}.attn2.to_k", 2048),
    _sd_layer(f"middle_block.1.{_T}.attn1.to_out.0", f"mid_block.attentions.0.{_T}.attn1.to_out.0", 8),
    _sd_layer("output_blocks.0.1.transformer_blocks.9.ff.net.0.proj",
              "up_blocks.0.attentions.0.transformer_blocks.9.ff.net.0.proj", 8),
    _sd_layer("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv", 4, 4, (3, 3)),
    _sd_layer("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv", 4, 4, (3, 3)),
    _sd_layer("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv", 4, 4, (3, 3)),
    _sd_layer("input_blocks.7.0.skip_connection", "down_blocks.2.resnets.0.conv_shortcut", 5, 4, (1, 1)),
    _sd_layer("label_emb.0.0", "add_embedding.linear_1", 10),
    _sd_layer("time_embed.2", "time_embedding.linear_2", 10),
    _sd_layer("input_blocks.0.0", "conv_in", 4, 4, (3, 3)),
    _sd_layer("out.2", "conv_out", 4, 4, (3, 3)),
    Layer("text_model.encoder.layers.0.mlp.fc1", {"text_model.encoder.layers.0.mlp.fc1": 1}, 768, part="te1"),
    Layer("text_model.encoder.layers.31.mlp.fc2", {"text_model.encoder.layers.31.mlp.fc2": 1}, 5120, part="te2"),
]  # fmt: skip
SDXL_PREFIXES = both("unet.", "text_encoder.", "text_encoder_2.")
UNET_SPELLINGS = {
    "kohya by ldm names": Spelling(both("lora_unet_", "lora_te1_", "lora_te2_"), split=False, **FLAT),
    "kohya by diffusers names": Spelling(both("lora_unet_", "lora_te1_", "lora_te2_"), **FLAT),
    "slider": Spelling(both("diffusion_model_", "lora_te1_", "lora_te2_"), split=False, **FLAT),
    "diffusers": Spelling(SDXL_PREFIXES),
    "diffusers of lora.up": Spelling(SDXL_PREFIXES, up="lora.up.weight"),
    "PEFT": Spelling(
        both("unet.base_model.model.", "text_encoder.base_model.model.", "text_encoder_2.base_model.model.")
    ),
    "PEFT with an adapter's name": Spelling(SDXL_PREFIXES, up="lora_B.default.weight"),
    "ComfyUI": Spelling(
        both("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
        split=False,
    ),
    "OneTrainer's raw format": Spelling(both("unet.", "clip_l.", "clip_g."), up=KOHYA, alpha=2.0),
    "SimpleTuner": Spelling(both("lycoris_", "lora_te1_", "lora_te2_"), **FLAT),
    "wrapped": Spelling(both("unet._orig_mod.", "text_encoder.module.", "text_encoder_2._orig_mod.")),
}


@pytest.mark.parametrize("name", UNET_SPELLINGS)
def test_sdxl_merges_the_same_from_every_dialect(tmp_path, name):
    assert_same_merge(tmp_path, SDXL, UNET_SPELLINGS[name])


SD1 = [
    _sd_layer(f"input_blocks.1.1.{_T}.attn2.to_k", f"down_blocks.0.attentions.0.{_T}.attn2.to_k", 768),
    _sd_layer(f"middle_block.1.{_T}.attn1.to_out.0", f"mid_block.attentions.0.{_T}.attn1.to_out.0", 8),
    _sd_layer(f"output_blocks.3.1.{_T}.attn1.to_q", f"up_blocks.1.attentions.0.{_T}.attn1.to_q", 8),
    Layer("text_model.encoder.layers.0.self_attn.q_proj", {"text_model.encoder.layers.0.self_attn.q_proj": 1}, 768, part="te1"),
]  # fmt: skip


def _processor(path: str) -> str:
    """`attn1.to_q` as attention processors of early diffusers say it."""
    head, _, leaf = path.removesuffix(".0").rpartition(".")
    return f"{head}.processor.{leaf}_lora" if leaf.startswith("to_") else path


SD1_SPELLINGS = {
    "kohya": Spelling(both("lora_unet_", "lora_te_"), **FLAT),
    "kohya by ldm names": Spelling(both("lora_unet_", "lora_te_"), split=False, **FLAT),
    "with lora_te1_": Spelling(both("lora_unet_", "lora_te1_"), **FLAT),
    "in capitals": Spelling(both("LORA_UNET_", "LORA_TE_"), **FLAT, rename=str.upper),
    "diffusers": Spelling(both("unet.", "text_encoder.")),
    "attention processors": Spelling(both("unet.", "text_encoder."), up="up.weight", rename=_processor),
    "lora_linear_layer": Spelling(both("unet.", "text_encoder."), up="lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("name", SD1_SPELLINGS)
def test_sd1_merges_the_same_from_every_dialect(tmp_path, name):
    spelling, layers = SD1_SPELLINGS[name], SD1
    if name == "attention processors":
        layers = SD1[:3]  # the text encoder's have another ending
    tensors = spelling.file(layers)
    save(tmp_path / "a.safetensors", tensors)
    save(tmp_path / "b.safetensors", SD1_SPELLINGS["kohya by ldm names"].file(SD1))
    merge(tmp_path, "a:0.7", "b:0.5")
    weights, _ = written(tmp_path / "out.safetensors")
    assert len(weights) == len(SD1)
    for layer in SD1:
        prefix = "lora_unet_" if layer.part == "unet" else "lora_te_"
        name = prefix + next(iter(layer.members)).replace(".", "_")
        assert_close(weights[name], (1.2 if layer in layers else 0.5) * layer.delta())


# --- Other transformers -------------------------------------------------------------------------


def _same(path: str, in_: int, **options) -> Layer:
    return Layer(path, {path: 1}, in_, **options)


MODELS: dict[str, list[Layer]] = {
    "SD3": [
        Layer("joint_blocks.0.x_block.attn.qkv", {f"transformer_blocks.0.attn.to_{n}": 1 for n in "qkv"}, 1536),
        Layer("joint_blocks.0.context_block.attn.qkv",
              {f"transformer_blocks.0.attn.add_{n}_proj": 1 for n in "qkv"}, 1536),
        Layer("joint_blocks.0.x_block.attn2.qkv", {f"transformer_blocks.0.attn2.to_{n}": 1 for n in "qkv"}, 1536),
        Layer("joint_blocks.1.x_block.mlp.fc1", {"transformer_blocks.1.ff.net.0.proj": 4}, 1536),
        Layer("joint_blocks.23.context_block.adaLN_modulation.1",
              {"transformer_blocks.23.norm1_context.linear": 2}, 1536, swapped=True),
        Layer("final_layer.adaLN_modulation.1", {"norm_out.linear": 2}, 1536, swapped=True),
    ],
    "Lumina 2": [
        Layer("layers.0.attention.qkv", {f"layers.0.attn.to_{n}": 3 if n == "q" else 1 for n in "qkv"}, 2304),
        Layer("context_refiner.1.attention.qkv",
              {f"context_refiner.1.attn.to_{n}": 3 if n == "q" else 1 for n in "qkv"}, 2304,
              trained=("context_refiner.1.attn.to_v",)),
        Layer("noise_refiner.1.feed_forward.w2", {"noise_refiner.1.feed_forward.linear_2": 1}, 24),
        Layer("layers.0.attention.out", {"layers.0.attn.to_out.0": 1}, 2304),
    ],
    "Z-Image": [
        Layer("layers.0.attention.qkv", {f"layers.0.attention.to_{n}": 1 for n in "qkv"}, 3840),
        Layer("layers.0.attention.out", {"layers.0.attention.to_out.0": 1}, 3840),
        Layer("noise_refiner.0.feed_forward.w1", {"noise_refiner.0.feed_forward.w1": 1}, 3840),
        Layer("final_layer.linear", {"all_final_layer.2-1.linear": 1}, 3840),
    ],
    "Qwen-Image": [
        _same("transformer_blocks.0.attn.add_k_proj", 24),
        _same("transformer_blocks.0.attn.to_out.0", 24),
        _same("transformer_blocks.59.img_mlp.net.0.proj", 24),
        _same("transformer_blocks.59.txt_mod.1", 24),
    ],
    "Wan": [
        Layer("blocks.0.self_attn.q", {"blocks.0.attn1.to_q": 1}, 1536),
        Layer("blocks.0.cross_attn.k_img", {"blocks.0.attn2.add_k_proj": 1}, 1536),
        Layer("blocks.0.cross_attn.o", {"blocks.0.attn2.to_out.0": 1}, 1536),
        Layer("blocks.0.ffn.0", {"blocks.0.ffn.net.0.proj": 1}, 1536),
        Layer("time_projection.1", {"condition_embedder.time_proj": 1}, 1536),
    ],
    "HunyuanImage": [
        Layer("double_blocks.0.img_attn.qkv", {f"transformer_blocks.0.attn.to_{n}": 1 for n in "qkv"}, 3584),
        Layer("double_blocks.0.txt_mlp.0", {"transformer_blocks.0.ff_context.net.0.proj": 4}, 3584),
        Layer("single_blocks.0.linear2", {"single_transformer_blocks.0.proj_out": 1}, 40),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "spelling", ["kohya", "ComfyUI", "diffusers, ai-toolkit", "PEFT with an adapter's name"]
)
@pytest.mark.parametrize("model", MODELS)
def test_other_transformers_merge_the_same_fused_and_split(tmp_path, model, spelling):
    assert_same_merge(tmp_path, MODELS[model], SPELLINGS[spelling], dialect="kohya")


def test_anima_merges_the_same_from_kohya_and_comfyui(tmp_path):
    layers = [
        _same("blocks.0.self_attn.q_proj", 2048),
        _same("blocks.0.cross_attn.output_proj", 2048),
        _same("blocks.27.mlp.layer1", 2048),
        _same("blocks.0.adaln_modulation_mlp.2", 16),
        _same("llm_adapter.blocks.0.self_attn.q_proj", 32),
    ]
    for name in ("kohya", "ComfyUI"):
        assert_same_merge(tmp_path / name, layers, SPELLINGS[name])


def test_sd3_is_written_in_both_spellings_and_both_say_the_same(tmp_path):
    layers = MODELS["SD3"]
    save(tmp_path / "a.safetensors", SPELLINGS["kohya"].file(layers))
    merge(tmp_path, "a", dialect="diffusers", out="diffusers")
    keys = load_file(tmp_path / "diffusers.safetensors").keys()
    # A1111 takes SD3 only like this.
    assert all(
        key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys
    )
    merge(tmp_path, "diffusers", dialect="kohya", out="kohya")
    weights, _ = written(tmp_path / "kohya.safetensors")
    for layer in layers:
        assert_close(weights[layer.name], layer.delta())


def test_an_unknown_model_keeps_the_spelling_of_its_files(tmp_path):
    names = {
        "diffusion_model.future_blocks.0.mixer": (6, 10),
        "diffusion_model.future_blocks.1.mixer.out": (4, 6),
    }
    for file, seed in (("a", 1), ("b", 2)):
        tensors = {}
        for name, (out, in_) in names.items():
            tensors |= {
                f"{name}.lora_B.weight": rand(out, 2, seed=seed),
                f"{name}.lora_A.weight": rand(2, in_, seed=seed),
            }
        save(tmp_path / f"{file}.safetensors", tensors)
    merge(tmp_path, "a:0.7", "b:-0.4")
    weights, _ = written(tmp_path / "out.safetensors")
    assert weights.keys() == names.keys()
    for name, (out, in_) in names.items():
        a, b = (rand(out, 2, seed=s).double() @ rand(2, in_, seed=s).double() for s in (1, 2))
        assert_close(weights[name], 0.7 * a - 0.4 * b)
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()
