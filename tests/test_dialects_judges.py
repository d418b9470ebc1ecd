"""Names judged by the projects that made them: PEFT's state dicts and diffusers' loaders."""

from __future__ import annotations

import peft
import pytest
import torch

from lib_loramerge.dialects import output_key, output_parts, parse_file
from lib_loramerge.dialects.refusals import claimed
from lib_loramerge.errors import UnsupportedError
from lib_loramerge.models import component, diffusers_layers
from tests.helpers.dialect_cases import LISTS, tensors_of


def small_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=768,
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip


def small_clip():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=16,
            projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


TARGETS = ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.2"]
# Name to the configuration, and the slots that a layer of it has.
CONFIGS = {
    "LoRA": ("LoraConfig", {"r": 4}, {"up", "down"}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}, {"up", "down", "magnitude"}),
    "LoRA with bias": ("LoraConfig", {"r": 4, "lora_bias": True}, {"up", "down", "up_bias"}),
    "LoHa": ("LoHaConfig", {"r": 4}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "LoKr": ("LoKrConfig", {"r": 2}, {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
}


def state_dicts(name: str) -> tuple[set[str], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Adapted modules, the state as PEFT saves it, and the raw state with the adapter's name in it."""
    kind, options, _ = CONFIGS[name]
    model = small_unet()
    adapted = {
        path for path, module in model.named_modules()
        if any(path.endswith(f".{target}") for target in TARGETS) and hasattr(module, "weight")
    }  # fmt: skip
    wrapped = peft.get_peft_model(
        model, getattr(peft, kind)(target_modules=TARGETS, **options), adapter_name="mine"
    )
    saved = peft.get_peft_model_state_dict(wrapped, adapter_name="mine")
    raw = {key: value for key, value in wrapped.state_dict().items() if ".mine" in key}
    return adapted, saved, raw


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_that_peft_saves_finds_its_layer_and_slot(name):
    adapted, saved, raw = state_dicts(name)
    assert len(adapted) > 20
    for state in (saved, raw):
        parsed = parse_file({key: tuple(value.shape) for key, value in state.items()}, {})
        assert parsed.dialect == "peft"
        assert parsed.architecture.id == "sd1"
        assert parsed.unknown == ()
        spelled = {dotted for part in parsed.parts for dotted, _ in diffusers_layers("sd1", part.layer)}
        assert spelled == adapted
        found = {slot for part in parsed.parts for slot in part.slots}
        # Small layers of LoKr keep both factors whole, large ones do not.
        assert found <= CONFIGS[name][2]
        assert len(found) >= 2
        assert sum(len(part.slots) for part in parsed.parts) == len(state)


def test_prefixed_as_a_pipeline_saves_it_the_layers_are_the_same():
    _, saved, _ = state_dicts("LoRA")
    plain = parse_file({key: tuple(value.shape) for key, value in saved.items()}, {})
    piped = {key.replace("base_model.model.", "unet."): tuple(value.shape) for key, value in saved.items()}
    parsed = parse_file(piped, {})
    assert parsed.dialect == "diffusers"
    assert [part.layer for part in parsed.parts] == [part.layer for part in plain.parts]


def test_a_text_encoder_that_peft_saved_alone_is_recognised_as_one():
    model = peft.get_peft_model(small_clip(), peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    parsed = parse_file({k: tuple(v.shape) for k, v in peft.get_peft_model_state_dict(model).items()}, {})
    assert len(parsed.parts) + len(parsed.unknown) > 0
    # A width of 8 fits no base model; with the real one the layers are found.
    real = {
        key: tuple(768 if size == 8 else size for size in value.shape)
        for key, value in peft.get_peft_model_state_dict(model).items()
    }
    parsed = parse_file(real, {})
    assert parsed.architecture.id == "sd1"
    assert {component(part.layer) for part in parsed.parts} == {"te"}
    assert len(parsed.parts) == 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("OFTConfig", {"target_modules": ["to_q"], "oft_block_size": 8, "r": 0}),
        ("BOFTConfig", {"target_modules": ["to_q"], "boft_block_size": 4}),
        ("IA3Config", {"target_modules": ["to_q"], "feedforward_modules": []}),
        ("VeraConfig", {"target_modules": ["to_q"], "r": 4}),
        ("FourierFTConfig", {"target_modules": ["to_q"], "n_frequency": 8}),
    ],
)
def test_what_peft_makes_and_no_host_reads_is_refused_by_name(kind, options):
    if kind == "VeraConfig":
        model = peft.get_peft_model(
            small_clip(), getattr(peft, kind)(**{**options, "target_modules": ["q_proj"]})
        )
    else:
        model = peft.get_peft_model(small_unet(), getattr(peft, kind)(**options))
    state = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(model).items()}
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        parse_file(state, {})
    assert len(claimed(state)) == 1


def written(name: str, dialect: str) -> dict[str, torch.Tensor]:
    """A complete list, written in a dialect with tensors of rank 1."""
    parsed = parse_file(tensors_of(LISTS[name]), {})
    shapes = tensors_of(LISTS[name])
    tensors = {}
    for part in parsed.parts:
        up, down = shapes[part.slots["up"]], shapes[part.slots["down"]]
        for prefix, rows in output_parts(parsed.architecture.id, part.layer, dialect):
            if part.rows is not None and rows != part.rows:
                continue
            count = (
                sum(stop - start for start, stop in rows.cut(up[0])) if rows and part.rows is None else up[0]
            )
            tensors[output_key(prefix, "up", dialect)] = torch.zeros(count, 1, *up[2:])
            tensors[output_key(prefix, "down", dialect)] = torch.zeros(1, *down[1:])
            if dialect == "kohya":
                tensors[output_key(prefix, "alpha", dialect)] = torch.tensor(1.0)
    return tensors


def layers_of(keys) -> set[str]:
    endings = (".lora.up.weight", ".lora_linear_layer.up.weight", ".lora_B.weight", ".lora.down.weight",
               ".lora_linear_layer.down.weight", ".lora_A.weight")  # fmt: skip
    found = set()
    for key in keys:
        for ending in endings:
            if key.endswith(ending):
                found.add(key[: -len(ending)].replace(".processor", ""))
    return found


@pytest.mark.parametrize("name", ["sd15_kohya", "sdxl_kohya"])
def test_diffusers_reads_our_kohya_file_as_the_layers_of_our_diffusers_file(name):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    loader = StableDiffusionLoraLoaderMixin if name.startswith("sd15") else StableDiffusionXLLoraLoaderMixin

    class Config:
        layers_per_block = 2

    theirs, _ = loader.lora_state_dict(written(name, "kohya"), unet_config=Config())
    # diffusers turns kohya's names into those of its early attention processors, which we read too.
    read = parse_file({key: tuple(value.shape) for key, value in theirs.items()}, {})
    ours = parse_file({key: tuple(value.shape) for key, value in written(name, "diffusers").items()}, {})
    assert [part.layer for part in read.parts] == [part.layer for part in ours.parts]
    assert len(ours.parts) == len(LISTS[name])
    assert read.unknown == ours.unknown == ()


def test_diffusers_splits_our_kohya_flux_file_as_our_diffusers_file_is_split():
    from diffusers.loaders import FluxLoraLoaderMixin

    theirs = FluxLoraLoaderMixin.lora_state_dict(written("flux_kohya", "kohya"))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = written("flux_kohya", "diffusers")
    assert {k for k in layers_of(theirs) if k.startswith("transformer.")} == {
        k for k in layers_of(ours) if k.startswith("transformer.")
    }
    for key, value in ours.items():
        if key.startswith("transformer.") and key.endswith("lora_B.weight"):
            assert tuple(theirs[key].shape) == tuple(value.shape), key


def test_diffusers_reads_an_xlabs_file_as_the_layers_we_say():
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    from tests.helpers.dialect_cases import CASES

    tensors = CASES["Flux of XLabs"][0]
    theirs = _convert_xlabs_flux_lora_to_diffusers(
        {key: torch.zeros(shape) for key, shape in tensors.items()}
    )
    parsed = parse_file(tensors, {})
    ours = set()
    for part in parsed.parts:
        covered = set(range(part.rows.parts[0][0], part.rows.parts[0][1])) if part.rows else None
        for prefix, rows in output_parts("flux1", part.layer, "diffusers"):
            units = set(range(*rows.parts[0])) if rows else None
            if covered is None or units is None or units <= covered:
                ours.add(prefix)
    assert layers_of(theirs) == ours
