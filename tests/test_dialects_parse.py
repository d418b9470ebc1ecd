"""Every dialect's names become the names that all files of a base model share."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import save_file

from lib_loramerge.dialects import has_alpha, output_key, output_parts, parse_file
from lib_loramerge.errors import IncompatibleError, UnsupportedError
from lib_loramerge.merge import open_source
from lib_loramerge.models import ARCHITECTURES, kernel
from tests.helpers.dialect_cases import CASES, KOHYA, LISTS, SD1_CANONICAL, SD1_K, lora, tensors_of
from tests.helpers.fixtures import sample_data


def spelled_again(parsed, dialect: str) -> set[str]:
    """Keys of the parts of a file, written in a dialect: each part under the name that has its rows."""
    style = parsed.style if parsed.architecture.opaque else None
    keys = set()
    for part in parsed.parts:
        for prefix, rows in output_parts(parsed.architecture.id, part.layer, dialect):
            if part.rows is None or rows == part.rows:
                keys |= {output_key(prefix, slot, dialect, style) for slot in part.slots}
    return keys


@pytest.mark.parametrize("name", CASES)
def test_layers_base_model_and_dialect_are_recognised(name):
    tensors, dialect, architecture, layers = CASES[name]
    parsed = parse_file(tensors, {})
    assert parsed.architecture.id == architecture, parsed.reason
    assert parsed.dialect == dialect
    assert {part.layer: part.rows and part.rows.parts for part in parsed.parts} == layers
    assert parsed.unknown == ()
    assert parsed.orphans == ()
    assert sorted(key for part in parsed.parts for key in part.slots.values()) == sorted(tensors)
    assert parsed.reason


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_as_the_same_layers_and_rows(name):
    parsed = parse_file(CASES[name][0], {})
    style = parsed.style if parsed.architecture.opaque else None
    compared = {"auto": 0, "kohya": 0, "diffusers": 0}
    for dialect in compared:
        for part in parsed.parts:
            try:
                written = output_parts(parsed.architecture.id, part.layer, dialect)
            except UnsupportedError:
                assert dialect == "diffusers"
                continue
            # The layer alone may not tell the base model, so it is read beside the whole file.
            again = {
                output_key(prefix, slot, dialect, style): CASES[name][0][key]
                for prefix, _ in written
                for slot, key in part.slots.items()
            }
            others = {key: shape for key, shape in CASES[name][0].items() if key not in part.slots.values()}
            others = {key: shape for key, shape in others.items() if not overlaps(name, key, part)}
            read = parse_file({**others, **again}, {})
            if read.architecture.id != parsed.architecture.id:
                # A text encoder that several models share, under the one name that all of them have.
                assert parsed.architecture.id in {model for model, _ in read.candidates}
                read = parse_file({**others, **again}, {}, base_model=parsed.architecture.id)
            found = {
                (entry.layer, entry.rows) for entry in read.parts if set(entry.slots.values()) & set(again)
            }
            assert found == {(part.layer, rows) for _, rows in written}
            compared[dialect] += 1
    assert compared["auto"] == compared["kohya"] > 0


def overlaps(name: str, key: str, part) -> bool:
    """Whether a key of the case belongs to the same layer as a part."""
    parsed = parse_file(CASES[name][0], {})
    return any(entry.layer == part.layer and key in entry.slots.values() for entry in parsed.parts)


def test_every_base_model_has_a_case():
    covered = {architecture for _, _, architecture, _ in CASES.values()} | {"sdxl"}
    assert covered >= set(ARCHITECTURES)


@pytest.mark.parametrize("name", LISTS)
def test_the_complete_lists_of_the_trainers_parse_with_nothing_left_over(name):
    tensors = tensors_of(LISTS[name])
    parsed = parse_file(tensors, {})
    expected = {"sd15": "sd1", "sdxl": "sdxl", "flux": "flux1"}[name.partition("_")[0]]
    assert parsed.architecture.id == expected
    assert (parsed.unknown, parsed.orphans, parsed.embeddings) == ((), (), {})
    assert sum(len(part.slots) for part in parsed.parts) == len(tensors)


@pytest.mark.parametrize("name", LISTS)
def test_the_complete_lists_are_written_as_they_were_read(name):
    tensors = tensors_of(LISTS[name])
    dialect = "diffusers" if name.endswith("_peft") else "auto"
    assert spelled_again(parse_file(tensors, {}), dialect) == set(tensors)


@pytest.mark.parametrize("name", ["sd15_kohya_conv", "sdxl_kohya_conv", "sd15_peft", "sdxl_peft"])
def test_kernels_of_the_layer_lists_are_those_that_the_trainers_made(name):
    tensors = tensors_of(LISTS[name])
    parsed = parse_file(tensors, {})
    for part in parsed.parts:
        stored = tensors[part.slots["down"]][2:]
        assert kernel(parsed.architecture.id, part.layer) == (stored or None), part.layer


@pytest.mark.parametrize("name", LISTS)
def test_the_sample_lists_beside_the_checkout_are_our_copy(name):
    import json

    folder = sample_data()
    if folder is not None:
        assert json.loads((folder / "shapes" / f"{name}.json").read_text("utf-8")) == LISTS[name]


def test_an_sdxl_file_of_three_thousand_keys_is_parsed_at_once():
    tensors = tensors_of(LISTS["sdxl_kohya_conv"])
    parse_file(tensors, {})
    used = []
    for _ in range(3):
        before = time.process_time()
        parse_file(tensors, {})
        used.append(time.process_time() - before)
    assert min(used) < 2  # It takes 0.02; this rules out work that grows with the square of the keys.


def test_fused_split_and_xlabs_files_of_flux_share_their_layers():
    fused = parse_file(tensors_of(LISTS["flux_kohya"]), {})
    split = parse_file(tensors_of(LISTS["flux_peft"]), {})
    denoiser = {part.layer for part in fused.parts if part.layer.startswith("lora_unet_")}
    shared = denoiser & {part.layer for part in split.parts}
    assert len(shared) > 200
    for part in split.parts:
        if part.layer.endswith("_linear1"):
            rows = {entry.rows.parts for entry in split.parts if entry.layer == part.layer}
            assert rows <= {((0, 1),), ((1, 2),), ((2, 3),), ((3, 7),)}


def test_members_of_a_fused_layer_come_in_row_order():
    names = ("to_v", "to_q", "to_k")
    parsed = parse_file(lora([f"transformer.single_transformer_blocks.0.attn.{name}" for name in names]), {})
    assert [part.rows.parts[0][0] for part in parsed.parts] == [0, 1, 2]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"lora_unet_{SD1_K}".replace(".", "_"), SD1_CANONICAL),
        (f"unet.{SD1_K}", SD1_CANONICAL),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    ],
)
def test_one_layer_under_two_spellings_is_an_error_that_names_both(first, second, tmp_path):
    tensors = lora(
        [(first, 320, 768), (second, 320, 768), (SD1_CANONICAL.replace("_to_k", "_to_v"), 320, 768)], up=KOHYA
    )
    with pytest.raises(IncompatibleError) as caught:
        open_source(random_file(tmp_path / "twice.safetensors", tensors))
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert str(caught.value).startswith("twice.safetensors: ")


def random_file(path, tensors):
    """A file of such tensors, with numbers that differ from tensor to tensor."""
    values = {key: torch.randn(shape) if shape else torch.tensor(2.0) for key, shape in tensors.items()}
    save_file(values, path)
    return path


def test_a_fused_layer_beside_one_of_its_members_is_an_error(tmp_path):
    tensors = lora(
        [
            ("diffusion_model.double_blocks.0.img_attn.qkv", 9216, 3072),
            "transformer.transformer_blocks.0.attn.to_q",
        ]
    )
    with pytest.raises(IncompatibleError, match="one layer twice"):
        open_source(random_file(tmp_path / "twice.safetensors", tensors))


def test_one_slot_under_two_spellings_is_an_error():
    tensors = {f"{SD1_CANONICAL}.lora_up.weight": (320, 4), f"{SD1_CANONICAL}.lora_B.weight": (320, 4)}
    with pytest.raises(IncompatibleError, match="same tensor twice"):
        parse_file(tensors, {})


def test_a_lone_alpha_is_an_orphan_and_no_layer():
    tensors = {
        **lora([SD1_CANONICAL], 320, 768, up=KOHYA),
        f"{SD1_CANONICAL.replace('to_k', 'to_v')}.alpha": (),
    }
    parsed = parse_file(tensors, {})
    assert [part.layer for part in parsed.parts] == [SD1_CANONICAL]
    assert parsed.orphans == (f"{SD1_CANONICAL.replace('to_k', 'to_v')}.alpha",)


def test_bundled_embeddings_are_kept_apart_with_their_names():
    tensors = {
        **lora([SD1_CANONICAL], 320, 768, up=KOHYA),
        "bundle_emb.my style.string_to_param.*": (4, 768),
        "bundle_emb.other.clip_g": (2, 1280),
    }
    parsed = parse_file(tensors, {})
    assert parsed.embeddings == {
        "my style.string_to_param.*": "bundle_emb.my style.string_to_param.*",
        "other.clip_g": "bundle_emb.other.clip_g",
    }
    assert parsed.unknown == ()


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_nowhere.lora_up.weight",
        "lora_te_text_model_encoder_layers_12_mlp_fc1.lora_up.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        f"{SD1_CANONICAL}.lora_sideways.weight",
        "lora_unet_.lora_up.weight",
        "step",
        f"{SD1_CANONICAL}.weight",
    ],
)
def test_what_is_not_understood_is_listed_and_never_dropped(key):
    parsed = parse_file({**lora([SD1_CANONICAL], 320, 768, up=KOHYA), key: (3, 3)}, {})
    assert parsed.unknown == (key,)
    assert [part.layer for part in parsed.parts] == [SD1_CANONICAL]


def test_an_unknown_model_keeps_its_spelling_word_for_word():
    for up in ("lora_B", "lora_B.weight", "lora_B.my_name.weight", "lora.up.weight", "lora_up.weight"):
        tensors = lora(["Strange.Blocks.0.mix-2.Q", "Strange.head"], 64, 64, up=up)
        parsed = parse_file(tensors, {})
        assert parsed.architecture.id == "unknown"
        assert spelled_again(parsed, "auto") == set(tensors)
        assert has_alpha("unknown", "auto", parsed.style) == (up == "lora_up.weight")
    with_alpha = {**lora(["Strange.head"], 64, 64), "Strange.head.alpha": ()}
    parsed = parse_file(with_alpha, {})
    assert has_alpha("unknown", "auto", parsed.style)
    assert spelled_again(parsed, "auto") == set(with_alpha)


def test_the_order_of_the_keys_does_not_matter():
    for name in ("Flux split", "attention processors", "OneTrainer's raw format", "Qwen-Image"):
        tensors = CASES[name][0]
        backwards = parse_file(dict(reversed(tensors.items())), {})
        assert {(p.layer, p.rows) for p in backwards.parts} == {
            (p.layer, p.rows) for p in parse_file(tensors, {}).parts
        }


def test_a_second_transformer_in_one_file_is_listed_and_never_taken_for_the_first():
    first = lora(["transformer.blocks.0.attn1.to_q", "transformer.blocks.0.attn2.to_q"], 5120, 5120)
    second = lora(["transformer_2.blocks.0.attn1.to_q"], 5120, 5120)
    parsed = parse_file({**first, **second}, {})
    assert sorted(parsed.unknown) == sorted(second)
    assert len(parsed.parts) == 2


def test_norm_layers_and_biases_of_lycoris_find_their_layers():
    tensors = {
        "lora_unet_down_blocks_0_attentions_0_norm.w_norm": (320,),
        "lora_unet_down_blocks_0_attentions_0_norm.b_norm": (320,),
        "lora_te_text_model_encoder_layers_0_layer_norm1.w_norm": (768,),
        "lora_te_text_model_final_layer_norm.w_norm": (768,),
        "lora_unet_conv_norm_out.w_norm": (320,),
        f"{SD1_CANONICAL}.diff": (320, 768),
        f"{SD1_CANONICAL}.diff_b": (320,),
    }
    parsed = parse_file(tensors, {})
    assert parsed.unknown == ()
    assert {part.layer for part in parsed.parts} == {
        "lora_unet_input_blocks_1_1_norm",
        "lora_te_text_model_encoder_layers_0_layer_norm1",
        "lora_te_text_model_final_layer_norm",
        "lora_unet_out_0",
        SD1_CANONICAL,
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            "transformer.single_transformer_blocks.0.attn.to_q",
            "lycoris_single_transformer_blocks_0_attn_to_q",
        ),
        ("transformer.single_transformer_blocks.0.attn.to_k", "single_blocks.0.processor.qkv_lora"),
    ],
)
def test_the_same_rows_of_a_fused_layer_twice_are_an_error_that_names_both(first, second, tmp_path):
    tensors = lora([first]) | lora([second], 9216, up="up.weight" if "processor" in second else KOHYA)
    with pytest.raises(IncompatibleError) as caught:
        open_source(random_file(tmp_path / "twice.safetensors", tensors))
    assert first in str(caught.value)
    assert second in str(caught.value)


@pytest.mark.parametrize(
    "start",
    ["base_model.model.transformer.", "transformer.base_model.model.", "base_model.model."],
)
def test_the_component_may_stand_on_either_side_of_pefts_prefix(start):
    names = {
        "single_transformer_blocks.5.proj_mlp": "lora_unet_single_blocks_5_linear1",
        "norm_out.linear": "lora_unet_final_layer_adaLN_modulation_1",
    }
    tensors = {}
    for name in names:
        tensors |= {f"{start}{name}.lora_A.weight": (2, 24), f"{start}{name}.lora_B.weight": (48, 2)}
    parsed = parse_file(tensors, {})
    assert (parsed.dialect, parsed.architecture.id, parsed.unknown) == ("peft", "flux1", ())
    assert {part.layer for part in parsed.parts} == set(names.values())


def test_a_text_encoder_inside_pefts_prefix_is_the_one_it_names():
    layer = "text_model.encoder.layers.0.mlp.fc1"
    tensors = {
        f"base_model.model.{start}.lora_{side}.weight": shape
        for start, wide in (
            (f"text_encoder.{layer}", 768),
            (f"text_encoder_2.{layer}", 1280),
            ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k", 2048),
        )
        for side, shape in (("A", (2, wide)), ("B", (16, 2)))
    }
    parsed = parse_file(tensors, {})
    assert (parsed.architecture.id, parsed.unknown) == ("sdxl", ())
    assert {part.layer for part in parsed.parts} == {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    }
