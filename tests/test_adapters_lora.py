"""LoRA, LoCon and Tucker layers: the delta that the WebUIs compute, and the layers they stumble over."""

from __future__ import annotations

import math

import pytest
import torch

from lib_loramerge.adapters import build, describe
from lib_loramerge.delta import LowRank
from lib_loramerge.errors import IncompatibleError, UnsupportedError

WHERE = "style.safetensors: lora_unet_mid_block_1_proj_in"


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def shapes(slots: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {slot: tuple(t.shape) for slot, t in slots.items()}


def both(slots: dict[str, torch.Tensor], **kwargs):
    """Facts and delta of the same slots."""
    return describe(shapes(slots), where=WHERE, kernel=kwargs.get("kernel")), build(
        slots, where=WHERE, **kwargs
    )


@pytest.mark.parametrize(
    ("up", "down", "kernel"),
    [
        ((12, 4), (4, 10), ()),
        ((12, 4, 1, 1), (4, 10, 1, 1), ()),
        ((12, 4), (4, 10, 1, 1), ()),
        ((12, 4, 1, 1), (4, 10), ()),
        ((12, 4, 1, 1), (4, 10, 3, 3), (3, 3)),
        ((12, 4), (4, 10, 3, 1), (3, 1)),
        ((12, 4, 1, 1, 1), (4, 10, 1, 2, 2), (1, 2, 2)),
    ],
)
def test_a_lora_is_alpha_over_rank_times_up_times_down_however_it_is_stored(up, down, kernel):
    slots = {"up": rand(*up), "down": rand(*down), "alpha": torch.tensor(3.0)}
    facts, delta = both(slots)
    assert (facts.kind, facts.out, facts.in_, facts.kernel, facts.rank) == ("lora", 12, 10, kernel, 4)
    expected = 0.75 * slots["up"].double().reshape(12, 4) @ slots["down"].double().reshape(4, -1)
    torch.testing.assert_close(delta.weight.dense(), expected, rtol=0, atol=1e-12)
    assert delta.weight.kernel == kernel


def test_the_factors_and_the_alpha_of_a_plain_lora_are_handed_on_untouched():
    up, down = rand(6, 3).half(), rand(3, 5)
    delta = build({"up": up, "down": down, "alpha": torch.tensor([7], dtype=torch.int64)}, where=WHERE).weight
    assert isinstance(delta, LowRank)
    assert delta.alpha == 7.0
    assert torch.equal(delta.up, up)
    assert torch.equal(delta.down, down)


def test_a_flat_down_factor_of_a_convolution_is_read_with_the_known_kernel():
    facts, delta = both({"up": rand(4, 2), "down": rand(2, 27)}, kernel=(3, 3))
    assert (facts.in_, facts.kernel, facts.columns) == (3, (3, 3), 27)
    assert delta.weight.kernel == (3, 3)


def test_a_missing_alpha_means_a_scale_of_one():
    slots = {"up": rand(6, 3), "down": rand(3, 5)}
    expected = slots["up"].double() @ slots["down"].double()
    torch.testing.assert_close(build(slots, where=WHERE).weight.dense(), expected)


def test_an_alpha_of_zero_gives_a_zero_delta_and_says_so():
    slots = {"up": rand(6, 3), "down": rand(3, 5), "alpha": torch.tensor(0.0)}
    delta = build(slots, where=WHERE)
    assert torch.count_nonzero(delta.weight.dense()) == 0
    assert delta.weight.alpha > 0, "merge methods divide by it and take its root"
    assert any("alpha is 0" in note for note in delta.notes)


def test_a_negative_alpha_turns_the_sign():
    slots = {"up": rand(6, 3), "down": rand(3, 5), "alpha": torch.tensor(-1.5)}
    delta = build(slots, where=WHERE).weight
    assert delta.alpha > 0
    torch.testing.assert_close(delta.dense(), -0.5 * slots["up"].double() @ slots["down"].double())


NUMERIC = ["int64", "int32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"]


# torch 2.0 knows no float8.
@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in NUMERIC if hasattr(torch, name)])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_may_have_any_numeric_dtype_and_one_element_in_any_shape(dtype, shape):
    slots = {"up": rand(6, 3), "down": rand(3, 5), "alpha": torch.full(shape, 6.0).to(dtype)}
    assert build(slots, where=WHERE).weight.alpha == 6.0


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan")), torch.tensor(float("inf"))])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(IncompatibleError, match=r"style\.safetensors: lora_unet_mid_block_1_proj_in: alpha"):
        build({"up": rand(6, 3), "down": rand(3, 5), "alpha": alpha}, where=WHERE)


def test_dyn_takes_the_first_ranks_at_the_same_scale():
    slots = {"up": rand(6, 4), "down": rand(4, 5), "alpha": torch.tensor(2.0)}
    delta = build(slots, where=WHERE, dyn=3).weight
    assert delta.rank == 3
    expected = 0.5 * slots["up"][:, :3].double() @ slots["down"][:3].double()
    torch.testing.assert_close(delta.dense(), expected)
    assert build(slots, where=WHERE, dyn=9).weight.rank == 4


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 3)])
@pytest.mark.parametrize("flat", [False, True])
def test_a_tucker_core_is_folded_without_a_higher_rank(kernel, flat):
    ones = () if flat else (1, 1)
    slots = {
        "up": rand(9, 4, *ones),
        "mid": rand(4, 3, *kernel),
        "down": rand(3, 7, *ones),
        "alpha": torch.tensor(2.0),
    }
    facts, delta = both(slots)
    stored = kernel if math.prod(kernel) > 1 else ()
    assert (facts.kind, facts.out, facts.in_, facts.kernel, facts.rank) == ("tucker", 9, 7, stored, 4)
    assert (delta.weight.rank, delta.weight.kernel) == (4, stored)
    up, mid, down = slots["up"].reshape(9, 4), slots["mid"], slots["down"].reshape(3, 7)
    # The hosts divide by the rank of the down factor.
    expected = 2 / 3 * torch.einsum("nmkl,in,mj->ijkl", mid.double(), up.double(), down.double())
    torch.testing.assert_close(delta.weight.dense(), expected.reshape(9, -1), rtol=1e-6, atol=1e-6)


def test_dyn_leaves_a_tucker_layer_whole_and_says_so():
    slots = {"up": rand(9, 4), "mid": rand(4, 4, 3, 3), "down": rand(4, 7)}
    delta = build(slots, where=WHERE, dyn=2)
    assert delta.weight.rank == 4
    assert any("dyn=" in note for note in delta.notes)


@pytest.mark.parametrize(
    ("slots", "missing"),
    [
        ({"up": (6, 3), "alpha": ()}, "lacks down"),
        ({"down": (3, 5)}, "lacks up"),
        ({"up": (6, 3), "mid": (3, 3, 3, 3)}, "lacks down"),
        ({"mid": (3, 3, 3, 3)}, "lacks down, up"),
    ],
)
def test_an_incomplete_lora_is_an_error_that_names_file_layer_and_part(slots, missing):
    with pytest.raises(IncompatibleError, match=missing) as caught:
        describe(slots, where=WHERE)
    assert str(caught.value).startswith(WHERE)


@pytest.mark.parametrize(
    "slots",
    [
        {"up": (6, 3), "down": (4, 5)},
        {"up": (6, 3), "mid": (3, 2, 3, 3), "down": (3, 5)},
        {"up": (6, 3, 3, 3), "down": (3, 5)},
        {"up": (6,), "down": (6, 5)},
        {"up": (6, 0), "down": (0, 5)},
    ],
)
def test_factors_that_do_not_fit_are_reported_with_their_shapes_from_the_header(slots):
    with pytest.raises(IncompatibleError) as caught:
        describe(slots, where=WHERE)
    message = str(caught.value)
    assert message.startswith(WHERE)
    assert any(str(shape) in message for shape in slots.values())


def test_a_kernel_that_the_base_model_does_not_have_is_refused():
    with pytest.raises(IncompatibleError, match="3 x 3 convolution"):
        describe({"up": (6, 3, 1, 1), "down": (3, 5, 1, 1)}, where=WHERE, kernel=(3, 3))


def test_an_alpha_without_factors_is_dropped_with_a_note():
    facts, delta = both({"alpha": torch.tensor(4.0)})
    assert facts.empty
    assert (delta.weight, delta.bias) == (None, None)
    assert any("dropped" in note for note in delta.notes)
    assert delta.notes == facts.notes


@pytest.mark.parametrize("slot", ["set_weight", "reshape_weight", "q_layer", "something_new"])
def test_what_cannot_be_merged_is_refused_by_name(slot):
    for slots in ({slot: (5,)}, {"up": (6, 3), "down": (3, 5), slot: (5,)}):
        with pytest.raises(UnsupportedError, match=slot) as caught:
            describe(slots, where=WHERE)
        assert str(caught.value).startswith(WHERE)
