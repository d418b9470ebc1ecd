"""The hosts' rules, where trainers differ or write no such file, against formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_loramerge import refused
from lib_loramerge.adapters import ADAPTERS, build, describe
from lib_loramerge.adapters.groups import COMPANIONS, MAGNITUDES
from lib_loramerge.delta import Dense, LowRank
from lib_loramerge.errors import IncompatibleError, LoraMergeError, UnsupportedError
from tests.helpers.adapter_judges import assert_equal

WHERE = "odd.safetensors: lora_unet_input_blocks_4_1_proj_in"


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) * 31 + len(shape)))


def dense(slots, **kwargs) -> torch.Tensor:
    return build(slots, where=WHERE, **kwargs).weight.dense()


def shapes(slots) -> dict[str, tuple[int, ...]]:
    return {slot: tuple(t.shape) for slot, t in slots.items()}


# One small layer of every kind, for a base weight of (12, 10) or (12, 10, 3, 3).
def sample(kind: str) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """Slots of a layer of this kind, with an alpha, and its base weight's shape."""
    lora = {"up": rand(12, 3), "down": rand(3, 10)}
    tucker = {"up": rand(12, 3, 1, 1), "mid": rand(3, 3, 3, 3), "down": rand(3, 10, 1, 1)}
    loha = {
        "hada_w1_a": rand(12, 2),
        "hada_w1_b": rand(2, 10),
        "hada_w2_a": rand(12, 3),
        "hada_w2_b": rand(3, 10),
    }
    loha_tucker = {
        "hada_t1": rand(2, 2, 3, 3),
        "hada_w1_a": rand(2, 12),
        "hada_w1_b": rand(2, 10),
        "hada_t2": rand(2, 2, 3, 3),
        "hada_w2_a": rand(2, 12),
        "hada_w2_b": rand(2, 10),
    }
    samples = {
        "lora": (lora, (12, 10)),
        "tucker": (tucker, (12, 10, 3, 3)),
        "loha": (loha, (12, 10)),
        "loha_tucker": (loha_tucker, (12, 10, 3, 3)),
        "lokr": ({"lokr_w1": rand(3, 5), "lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 2)}, (12, 10)),
        "dora": ({**lora, "dora_scale": rand(12, 1).abs() + 1}, (12, 10)),
        "glora": ({"a1": rand(10, 2), "a2": rand(2, 10), "b1": rand(12, 2), "b2": rand(2, 10)}, (12, 10)),
        "oft": ({"oft_blocks": rand(3, 4, 4)}, (12, 10)),
        "oft_diag": ({"oft_diag": rand(3, 4, 4)}, (12, 10)),
        "boft": ({"oft_blocks": rand(2, 2, 6, 6)}, (12, 10, 3, 3)),
        "ia3": ({"ia3_weight": rand(12), "on_input": torch.tensor(0)}, (12, 10)),
        "full": ({"diff": rand(12, 10, 3, 3)}, (12, 10, 3, 3)),
        "norm": ({"w_norm": rand(12), "b_norm": rand(12)}, (12,)),
        "bias": ({"diff_b": rand(12)}, (12, 10)),
    }
    slots, shape = samples[kind]
    return {**slots, "alpha": torch.tensor(2.0)}, shape


SCALED = [name for name, kind in ADAPTERS.items() if kind.scale_rank(shapes(sample(name)[0])) is not None]


# --- What holds for every kind --------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_header_shows_what_the_tensors_then_give(kind):
    slots, shape = sample(kind)
    facts = describe(shapes(slots), where=WHERE)
    assert facts.kind == kind
    assert facts.needs_base == ADAPTERS[kind].needs_base
    delta = build(slots, where=WHERE, base=rand(*shape))
    assert (delta.bias is not None) == facts.bias
    if delta.weight is not None:
        assert facts.out in (None, delta.weight.out)
        assert facts.in_ is None or facts.columns in (0, delta.weight.in_)
        assert isinstance(delta.weight, LowRank) == (facts.rank is not None) == ADAPTERS[kind].exact_low_rank
        assert delta.weight.kernel == tuple(shape[2:])
    assert set(facts.notes) <= set(delta.notes)


@pytest.mark.parametrize("kind", [name for name, kind in ADAPTERS.items() if kind.needs_base])
def test_a_kind_that_needs_the_base_weight_says_so_with_the_way_out(kind):
    slots, _ = sample(kind)
    with pytest.raises(UnsupportedError, match="--base CHECKPOINT") as caught:
        build(slots, where=WHERE)
    assert str(caught.value).startswith(WHERE)
    assert ADAPTERS[kind].label in str(caught.value)


@pytest.mark.parametrize("kind", [name for name, kind in ADAPTERS.items() if kind.needs_base])
@pytest.mark.parametrize("wrong", [(13, 11), (12,), (13, 11, 3, 3)])
def test_a_base_weight_of_another_shape_is_refused_with_both_shapes(kind, wrong):
    slots, _ = sample(kind)
    with pytest.raises(IncompatibleError) as caught:
        build(slots, where=WHERE, base=rand(*wrong) if wrong != (12,) else rand(7))
    assert str(caught.value).startswith(WHERE)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_layer_that_lacks_one_of_its_parts_is_never_merged_as_something_else(kind):
    slots, _ = sample(kind)
    for missing in sorted(slots.keys() - {"alpha", "b_norm", "dora_scale"}):
        rest = {slot: shape for slot, shape in shapes(slots).items() if slot != missing}
        if kind in ("oft", "oft_diag", "boft", "full", "bias"):  # nothing but the alpha is left
            assert describe(rest, where=WHERE).empty
        elif missing == "mid" or (kind == "norm" and missing == "w_norm"):
            continue  # without its core a Tucker layer reads as a LoRA; norms are below
        else:
            with pytest.raises(IncompatibleError, match=missing.split("_")[0]):
                describe(rest, where=WHERE)


@pytest.mark.parametrize(
    ("one", "two"), [("lora", "loha"), ("lora", "full"), ("lokr", "glora"), ("oft", "norm")]
)
def test_two_algebras_in_one_layer_are_refused_by_name(one, two):
    slots = {**shapes(sample(one)[0]), **shapes(sample(two)[0])}
    with pytest.raises(UnsupportedError, match="at once") as caught:
        describe(slots, where=WHERE)
    assert str(caught.value).startswith(WHERE)


@pytest.mark.parametrize("kind", SCALED)
def test_a_missing_alpha_is_a_scale_of_one_and_alpha_acts_over_the_rank(kind):
    if kind == "dora":
        return
    slots, shape = sample(kind)
    rank = ADAPTERS[kind].scale_rank(shapes(slots))
    base = rand(*shape)
    with_alpha = dense(slots, base=base)
    del slots["alpha"]
    assert_equal(with_alpha, dense(slots, base=base) * 2.0 / rank, rtol=1e-6)


@pytest.mark.parametrize("kind", SCALED)
def test_an_alpha_of_zero_changes_nothing_and_is_reported_for_every_scaled_kind(kind):
    slots, shape = sample(kind)
    delta = build({**slots, "alpha": torch.tensor(0)}, where=WHERE, base=rand(*shape))
    assert not delta.weight.dense().any()
    assert any("alpha is 0" in note for note in delta.notes)


@pytest.mark.parametrize(
    "kind", [k for k in ADAPTERS if k not in SCALED and k not in ("oft", "boft", "dora")]
)
def test_alpha_is_no_scale_where_the_hosts_read_it_as_none(kind):
    slots, shape = sample(kind)
    if kind == "bias":
        assert torch.equal(build(slots, where=WHERE).bias, slots["diff_b"])
        return
    other = {**slots, "alpha": torch.tensor(7.0)}
    base = rand(*shape)
    assert torch.equal(dense(slots, base=base), dense(other, base=base))


@pytest.mark.parametrize("kind", [k for k in SCALED if k != "dora"])
def test_a_scale_key_replaces_alpha_over_rank_and_is_noted(kind):
    slots, shape = sample(kind)
    base = rand(*shape)
    unscaled = dense({s: t for s, t in slots.items() if s != "alpha"}, base=base)
    delta = build({**slots, "scale": torch.tensor(-0.3)}, where=WHERE, base=base)
    assert_equal(delta.weight.dense(), -0.3 * unscaled, rtol=1e-6)
    assert any("`scale`" in note for note in delta.notes)


@pytest.mark.parametrize("kind", SCALED)
def test_a_scalar_is_ignored_with_a_note_or_folded_when_asked(kind):
    slots, shape = sample(kind)
    base = rand(*shape)
    plain = dense(slots, base=base)
    slots["scalar"] = torch.tensor(0.5)
    ignored = build(slots, where=WHERE, base=base)
    assert torch.equal(ignored.weight.dense(), plain)
    assert any("ignored" in note for note in ignored.notes)
    folded = build(slots, where=WHERE, base=base, fold_scalar=True)
    assert_equal(folded.weight.dense(), 0.5 * plain, rtol=1e-6)
    assert not any("ignored" in note for note in folded.notes)
    assert any("multiplied in" in note for note in folded.notes)


@pytest.mark.parametrize("kind", [k for k in ADAPTERS if k not in ("norm", "bias")])
def test_a_bias_comes_along_with_any_kind_unscaled(kind):
    slots, shape = sample(kind)
    bias = rand(12)
    delta = build({**slots, "diff_b": bias}, where=WHERE, base=rand(*shape))
    assert torch.equal(delta.bias, bias)
    assert_equal(delta.weight.dense(), dense(slots, base=rand(*shape)), rtol=0)
    if describe(shapes(slots), where=WHERE).out is not None:
        with pytest.raises(IncompatibleError, match="diff_b"):
            describe({**shapes(slots), "diff_b": (11,)}, where=WHERE)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_kind_takes_the_dtypes_that_files_hold(kind, dtype):
    slots, shape = sample(kind)
    base = rand(*shape)
    stored = {slot: t.to(dtype) if t.is_floating_point() else t for slot, t in slots.items()}
    exact = build({slot: t.double() for slot, t in stored.items()}, where=WHERE, base=base.double())
    delta = build(stored, where=WHERE, base=base)
    if delta.weight is not None:
        assert_equal(delta.weight.dense(), exact.weight.dense(), rtol=1e-5)
    if delta.bias is not None:
        assert_equal(delta.bias, exact.bias)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_building_leaves_the_tensors_of_the_file_and_the_base_as_they_were(kind):
    slots, shape = sample(kind)
    base = rand(*shape)
    before = {slot: t.clone() for slot, t in slots.items()}
    build({**slots, "scalar": torch.tensor(2.0)}, where=WHERE, base=base, fold_scalar=True)
    assert all(torch.equal(slots[slot], before[slot]) for slot in slots)
    assert torch.equal(base, rand(*shape))


@pytest.mark.parametrize(
    "kind", [k for k in ADAPTERS if k not in ("oft", "oft_diag", "boft", "bias", "dora", "ia3")]
)
def test_all_zero_tensors_give_a_zero_delta(kind):
    slots, shape = sample(kind)
    zeros = {
        slot: torch.zeros_like(t) if slot not in ("alpha", "on_input") else t for slot, t in slots.items()
    }
    assert not dense(zeros, base=rand(*shape)).any()


def outcome(call):
    """(result, None) or (None, the message of a refusal); a bug keeps its traceback."""
    try:
        return call(), None
    except LoraMergeError as error:
        return None, str(error)


ALL_SLOTS = sorted(
    set().union(*(kind.slots for kind in ADAPTERS.values()))
    | COMPANIONS
    | MAGNITUDES
    | refused.SLOTS.keys()
    | {"new_slot"}
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(ALL_SLOTS),
        st.lists(st.integers(0, 4), max_size=5).map(tuple),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_a_header_holds_is_described_or_refused_with_file_and_layer(slots):
    facts, refusal = outcome(lambda: describe(slots, where=WHERE))
    if refusal is None:
        assert facts.empty or facts.kind in ADAPTERS
    else:
        assert refusal.startswith(WHERE)
        assert "\n" not in refusal


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_sound_layer_with_one_wrong_shape_is_described_or_refused_and_builds_if_described(data):
    kind = data.draw(st.sampled_from(sorted(ADAPTERS)))
    slots, shape = sample(kind)
    slot = data.draw(st.sampled_from(sorted(slots)))
    broken = data.draw(st.lists(st.integers(1, 4), max_size=5).map(tuple))
    slots[slot] = rand(*broken) if broken else torch.tensor(1.0)
    delta, refusal = outcome(lambda: build(slots, where=WHERE, base=rand(*shape)))
    if refusal is None:
        assert delta.weight is None or bool(torch.isfinite(delta.weight.dense()).all())
    else:
        assert refusal.startswith(WHERE)


# --- Norms, biases, residuals ---------------------------------------------------------------


def test_a_norm_is_kept_as_vectors_and_needs_its_weight():
    slots = {"w_norm": rand(8), "b_norm": rand(8)}
    facts = describe(shapes(slots), where=WHERE)
    assert (facts.kind, facts.out, facts.in_, facts.bias) == ("norm", 8, 0, True)
    delta = build(slots, where=WHERE)
    assert torch.equal(delta.weight.weight, slots["w_norm"])
    assert torch.equal(delta.bias, slots["b_norm"])
    alone = build({"w_norm": slots["w_norm"]}, where=WHERE)
    assert alone.bias is None
    assert any("not every program" in note for note in alone.notes)
    with pytest.raises(IncompatibleError, match="lacks w_norm"):
        describe({"b_norm": (8,)}, where=WHERE)


def test_a_full_difference_of_a_vector_stays_a_vector():
    facts = describe({"diff": (8,)}, where=WHERE)
    assert (facts.out, facts.in_, facts.rank) == (8, 0, None)
    assert build({"diff": rand(8)}, where=WHERE).weight.weight.shape == (8,)


def test_a_bias_alone_is_a_layer_of_its_own():
    delta = build({"diff_b": rand(6), "alpha": torch.tensor(1.0)}, where=WHERE)
    assert delta.weight is None
    assert torch.equal(delta.bias, rand(6))
    assert any("not every program" in note for note in delta.notes)


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 3, 3)])
@pytest.mark.parametrize("which", [{"up_bias"}, {"down_bias"}, {"up_bias", "down_bias"}])
def test_biases_inside_a_lora_act_as_its_own_forward_pass_does(shape, which):
    torch.manual_seed(0)
    if len(shape) == 2:
        down, up = torch.nn.Linear(10, 3), torch.nn.Linear(3, 12)
    else:
        down, up = torch.nn.Conv2d(10, 3, 3), torch.nn.Conv2d(3, 12, 1)
    slots = {"up": up.weight, "down": down.weight, "alpha": torch.tensor(1.5)}
    for name, layer in (("up_bias", up), ("down_bias", down)):
        if name in which:
            slots[name] = layer.bias
        else:
            torch.nn.init.zeros_(layer.bias)
    slots = {slot: t.detach() for slot, t in slots.items()}
    x = torch.zeros(1, *shape[1:])
    with torch.no_grad():
        expected = 0.5 * up(down(x)).reshape(-1)
    delta = build({**slots, "diff_b": torch.full((12,), 0.25)}, where=WHERE)
    assert_equal(delta.bias, expected + 0.25, rtol=1e-6)


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 3, 3)])
def test_a_residual_is_added_before_the_scale_dense_or_sparse(shape):
    rest = shape[2:] or ()
    slots = {"up": rand(12, 3), "down": rand(3, 10, *rest), "alpha": torch.tensor(1.5)}
    residual = rand(*shape) * (rand(*shape) > 1.5)
    expected = 0.5 * (slots["up"].double() @ slots["down"].double().flatten(1) + residual.double().flatten(1))
    delta = build({**slots, "bias": residual}, where=WHERE)
    assert isinstance(delta.weight, Dense)
    assert_equal(delta.weight.dense(), expected)
    for form in (residual, residual.flatten(1)):  # LyCORIS flattens convolutions
        sparse = form.to_sparse().coalesce()
        stored = {
            "bias_indices": sparse.indices().to(torch.int16),
            "bias_values": sparse.values(),
            "bias_size": torch.tensor(form.shape).to(torch.int16),
        }
        again = build({**slots, **stored}, where=WHERE)
        assert_equal(again.weight.dense(), expected)
    assert describe(shapes({**slots, **stored}), where=WHERE).rank is None
    assert any("residual" in note for note in delta.notes)


def test_a_residual_that_does_not_fit_is_refused():
    slots = {"up": rand(4, 2), "down": rand(2, 4)}
    parts = {
        "bias_indices": torch.tensor([[5], [0]]),
        "bias_values": rand(1),
        "bias_size": torch.tensor([4, 4]),
    }
    with pytest.raises(IncompatibleError, match="outside"):
        build({**slots, **parts}, where=WHERE)
    with pytest.raises(IncompatibleError, match="do not fit"):
        build({**slots, **parts, "bias_values": rand(2)}, where=WHERE)
    for size in ([4, 5], [-4, -4], [32767, 32767], []):
        with pytest.raises(IncompatibleError, match="bias_size"):
            build({**slots, **parts, "bias_size": torch.tensor(size, dtype=torch.int16)}, where=WHERE)
    for shape in ((3, 3), (4,)):
        with pytest.raises(IncompatibleError, match="whole weight"):
            describe({**shapes(slots), "bias": shape}, where=WHERE)
    del parts["bias_size"]
    with pytest.raises(IncompatibleError, match="lacks bias_size"):
        build({**slots, **parts}, where=WHERE)


# --- LoHa -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("r1", "r2"), [(2, 3), (3, 3), (4, 5)])
@pytest.mark.parametrize("columns", [10, 18])
def test_loha_of_two_ranks_is_the_elementwise_product_even_above_what_the_layer_holds(r1, r2, columns):
    slots = {
        "hada_w1_a": rand(12, r1),
        "hada_w1_b": rand(r1, columns),
        "hada_w2_a": rand(12, r2) + 1,
        "hada_w2_b": rand(r2, columns) + 1,
        "alpha": torch.tensor(2.0),
    }
    a1, b1, a2, b2 = (slots[s].double() for s in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    delta = build(slots, where=WHERE).weight
    assert delta.rank == describe(shapes(slots), where=WHERE).rank == min(r1 * r2, 12, columns)
    assert_equal(delta.dense(), 2 / r1 * (a1 @ b1) * (a2 @ b2))


def test_a_flat_loha_of_a_convolution_takes_its_kernel_from_what_is_known():
    slots = {
        "hada_w1_a": rand(4, 2),
        "hada_w1_b": rand(2, 27),
        "hada_w2_a": rand(4, 2),
        "hada_w2_b": rand(2, 27),
    }
    assert describe(shapes(slots), where=WHERE).in_ == 27
    facts = describe(shapes(slots), where=WHERE, kernel=(3, 3))
    assert (facts.in_, facts.kernel) == (3, (3, 3))
    assert build(slots, where=WHERE, base=rand(4, 3, 3, 3)).weight.kernel == (3, 3)
    with pytest.raises(IncompatibleError, match="3 x 3"):
        describe({**shapes(slots), "hada_w1_b": (2, 26)}, where=WHERE, kernel=(3, 3))


def test_loha_tucker_cores_of_two_ranks_are_folded():
    slots = {
        "hada_t1": rand(2, 3, 3, 3),
        "hada_w1_a": rand(2, 12),
        "hada_w1_b": rand(3, 10),
        "hada_t2": rand(3, 2, 3, 3),
        "hada_w2_a": rand(3, 12),
        "hada_w2_b": rand(2, 10),
        "alpha": torch.tensor(6.0),
    }
    sides = [
        torch.einsum("ijkl,jr,ip->prkl", *(slots[f"hada_{s}"].double() for s in names))
        for names in (("t1", "w1_b", "w1_a"), ("t2", "w2_b", "w2_a"))
    ]
    delta = build(slots, where=WHERE).weight
    assert (delta.rank, delta.kernel) == (6, (3, 3))
    assert_equal(delta.dense(), 2 * (sides[0] * sides[1]).flatten(1))


# --- LoKr -----------------------------------------------------------------------------------

LOKR = {
    "whole, whole": {"lokr_w1": rand(3, 5), "lokr_w2": rand(4, 6)},
    "factored, whole": {"lokr_w1_a": rand(3, 2), "lokr_w1_b": rand(2, 5), "lokr_w2": rand(4, 6)},
    "whole, factored": {"lokr_w1": rand(3, 5), "lokr_w2_a": rand(4, 3), "lokr_w2_b": rand(3, 6)},
    "factored at two ranks": {
        "lokr_w1_a": rand(3, 2),
        "lokr_w1_b": rand(2, 5),
        "lokr_w2_a": rand(4, 3),
        "lokr_w2_b": rand(3, 6),
    },
    "factored above its size": {"lokr_w1": rand(3, 5), "lokr_w2_a": rand(4, 9), "lokr_w2_b": rand(9, 6)},
    "one row": {"lokr_w1": rand(1, 1), "lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 6)},
    "unbalanced": {"lokr_w1": rand(10, 2), "lokr_w2": rand(2, 12)},
    "large": {"lokr_w1": rand(9, 11), "lokr_w2": rand(10, 12)},
}


@pytest.mark.parametrize("form", LOKR)
def test_lokr_is_the_kronecker_product_with_the_hosts_scale(form):
    slots = {**LOKR[form], "alpha": torch.tensor(6.0)}
    w1 = (
        slots["lokr_w1"].double()
        if "lokr_w1" in slots
        else slots["lokr_w1_a"].double() @ slots["lokr_w1_b"].double()
    )
    w2 = (
        slots["lokr_w2"].double()
        if "lokr_w2" in slots
        else slots["lokr_w2_a"].double() @ slots["lokr_w2_b"].double()
    )
    rank = next((len(slots[s]) for s in ("lokr_w2_b", "lokr_w1_b") if s in slots), None)
    delta = build(slots, where=WHERE)
    assert_equal(delta.weight.dense(), torch.kron(w1, w2) * (6 / rank if rank else 1))
    true_rank = int(torch.linalg.matrix_rank(w1)) * int(torch.linalg.matrix_rank(w2))
    assert delta.weight.rank == describe(shapes(slots), where=WHERE).rank == true_rank
    assert any("alpha" in note for note in delta.notes) == (rank is None)


def test_lokr_of_a_convolution_reads_its_large_factor_in_two_or_four_axes():
    w1, w2_a, w2_b = rand(3, 5), rand(4, 2), rand(2, 2, 3, 3)
    whole = (w2_a.double() @ w2_b.double().flatten(1)).reshape(4, 2, 3, 3)
    expected = torch.kron(w1.double()[:, :, None, None], whole).flatten(1)
    for w2 in (
        {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b},
        {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b.flatten(1)},
        {"lokr_w2": whole.float()},
        {"lokr_w2": whole.float().flatten(1)},
    ):
        slots = {"lokr_w1": w1, **w2}
        facts = describe(shapes(slots), where=WHERE, kernel=(3, 3))
        assert (facts.out, facts.in_, facts.kernel) == (12, 10, (3, 3))
        assert_equal(dense(slots, kernel=(3, 3)), expected)


def test_lokr_tucker_folds_its_core():
    slots = {
        "lokr_w1": rand(3, 5),
        "lokr_t2": rand(2, 3, 3, 3),
        "lokr_w2_a": rand(2, 4),
        "lokr_w2_b": rand(3, 2),
    }
    w2 = torch.einsum("ijkl,ip,jr->prkl", *(slots[s].double() for s in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")))
    expected = torch.kron(slots["lokr_w1"].double()[:, :, None, None], w2.contiguous()).flatten(1)
    slots["alpha"] = torch.tensor(1.0)
    assert_equal(dense(slots), expected / 3)


@pytest.mark.parametrize(
    "slots",
    [
        {"lokr_w1": (3, 5)},
        {"lokr_w1_a": (3, 2), "lokr_w2": (4, 6)},
        {"lokr_w1": (3, 5), "lokr_w2_a": (4, 2)},
        {"lokr_w1": (3, 5), "lokr_w2": (4, 6), "lokr_t2": (2, 2, 3, 3)},
        {"lokr_w1": (3, 5), "lokr_w1_a": (3, 2), "lokr_w1_b": (2, 5), "lokr_w2": (4, 6)},
        {"lokr_w1_a": (3, 2), "lokr_w1_b": (3, 5), "lokr_w2": (4, 6)},
        {"lokr_w1": (3, 5), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 6), "lokr_t2": (2, 2, 3, 3)},
    ],
)
def test_a_lokr_whose_parts_do_not_add_up_is_refused(slots):
    with pytest.raises(IncompatibleError, match="lokr_w") as caught:
        describe(slots, where=WHERE)
    assert str(caught.value).startswith(WHERE)


def test_the_unused_small_core_of_lokr_is_noted():
    slots = {**LOKR["whole, factored"], "lokr_t1": rand(2, 2)}
    assert any("lokr_t1" in note for note in build(slots, where=WHERE).notes)


# --- DoRA -----------------------------------------------------------------------------------


def dora_formula(base, delta, magnitude, axes):
    """``m * V / |V| - W`` straight from the paper, float64."""
    v = base.double() + delta.double().reshape(base.shape)
    return (magnitude * v / v.pow(2).sum(axes, keepdim=True).sqrt() - base.double()).flatten(1)


@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "loha_tucker", "lokr"])
@pytest.mark.parametrize("side", ["out", "in"])
def test_dora_on_every_low_rank_kind_divides_by_the_length_of_the_changed_weight(kind, side):
    slots, shape = sample(kind)
    base = rand(*shape)
    delta = dense(slots)
    axis = 0 if side == "out" else 1
    magnitude = (rand(shape[axis]).abs() + 1).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    others = tuple(i for i in range(len(shape)) if i != axis)
    expected = dora_formula(base, delta, magnitude.double(), others)
    result = build({**slots, "dora_scale": magnitude}, where=WHERE, base=base)
    assert_equal(result.weight.dense(), expected)
    assert any("DoRA" in note for note in result.notes)


@pytest.mark.parametrize(
    ("shape", "stored", "slot", "side"),
    [
        ((12, 10), (12, 1), "dora_scale", "out"),
        ((12, 10), (1, 10), "dora_scale", "in"),
        ((12, 10), (12,), "dora_scale", "out"),
        ((12, 10), (10,), "dora_scale", "in"),
        ((10, 10), (10,), "dora_scale", "out"),
        ((10, 10), (10, 1), "dora_scale", "out"),
        ((10, 10), (1, 10), "dora_scale", "in"),
        ((10, 10), (10,), "magnitude", "out"),
        ((12, 10, 3, 3), (12, 1, 1, 1), "dora_scale", "out"),
        ((12, 10, 3, 3), (1, 10, 1, 1), "dora_scale", "in"),
        ((12, 10, 3, 3), (1, 12, 1, 1), "dora_scale", "out"),
        ((10, 10, 3, 3), (1, 10, 1, 1), "dora_scale", "in"),
        ((10, 10, 3, 3), (1, 10, 1, 1), "magnitude", "out"),
        ((1, 10), (1, 1), "dora_scale", "out"),
        ((10, 1), (1, 1), "dora_scale", "in"),
    ],
)
def test_the_shape_of_the_magnitude_shows_its_side_and_the_slot_decides_square_convolutions(
    shape, stored, slot, side
):
    slots = {"up": rand(shape[0], 2), "down": rand(2, *shape[1:])}
    base, magnitude = rand(*shape), rand(*stored).abs() + 1
    axis = 0 if side == "out" else 1
    others = tuple(i for i in range(len(shape)) if i != axis)
    aligned = magnitude.double().reshape([-1 if i == axis else 1 for i in range(len(shape))])
    expected = dora_formula(base, dense(slots), aligned, others)
    assert_equal(dense({**slots, slot: magnitude}, base=base), expected)


def test_a_small_change_survives_the_size_of_the_base_weight():
    base = rand(12, 10)
    slots = {"up": rand(12, 2) * 1e-3, "down": rand(2, 10) * 1e-3}
    magnitude = base.double().norm(dim=1, keepdim=True).float()
    expected = dora_formula(base, dense(slots), magnitude.double(), (1,))
    assert_equal(dense({**slots, "dora_scale": magnitude}, base=base), expected, rtol=0.1)
    exact = dense(
        {**{s: t.double() for s, t in slots.items()}, "dora_scale": magnitude.double()}, base=base.double()
    )
    assert_equal(exact, expected, rtol=1e-7)


def test_a_row_that_vanishes_stays_finite():
    base = torch.zeros(3, 4)
    slots = {"up": torch.zeros(3, 2), "down": rand(2, 4), "dora_scale": torch.ones(3, 1)}
    assert not dense(slots, base=base).any()


@pytest.mark.parametrize(
    ("slots", "error"),
    [
        ({"dora_scale": (12, 1)}, IncompatibleError),
        ({"dora_scale": (12, 1), "alpha": ()}, IncompatibleError),
        ({"diff": (12, 10), "dora_scale": (12, 1)}, UnsupportedError),
        ({"up": (12, 2), "down": (2, 10), "dora_scale": (7, 1)}, IncompatibleError),
        ({"up": (12, 2), "dora_scale": (12, 1)}, IncompatibleError),
        ({"up": (12, 2), "down": (2, 10), "dora_scale": (12, 1), "magnitude": (12,)}, UnsupportedError),
    ],
)
def test_a_magnitude_without_a_fitting_layer_is_refused(slots, error):
    with pytest.raises(error) as caught:
        describe(slots, where=WHERE)
    assert str(caught.value).startswith(WHERE)


# --- GLoRA, OFT, (IA)^3 ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 10), (10, 10), (8, 12)])
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_glora_in_the_old_and_the_new_order_square_or_not(shape, alpha):
    out, in_ = shape
    base = rand(*shape)
    given = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    scale = 1.0 if alpha is None else alpha / 3
    new = {"a1": rand(in_, 3), "a2": rand(3, in_) + 1, "b1": rand(out, 3), "b2": rand(3, in_)}
    a1, a2, b1, b2 = (new[s].double() for s in ("a1", "a2", "b1", "b2"))
    expected = scale * (b1 @ b2 + base.double() @ a1 @ a2)
    delta = build({**new, **given}, where=WHERE, base=base).weight
    assert delta.rank == 6
    assert_equal(delta.dense(), expected)
    old = {"a1": new["a2"], "a2": new["a1"], "b1": new["b2"], "b2": new["b1"]}
    assert_equal(dense({**old, **given}, base=base), expected)


def test_glora_of_a_convolution_is_low_rank_while_that_is_smaller_than_the_layer():
    for channels, low_rank in (((64, 40), True), ((12, 10), False)):
        out, in_ = channels
        slots = {
            "a1": rand(in_, 2, 1, 1),
            "a2": rand(2, in_, 1, 1),
            "b1": rand(out, 2, 1, 1),
            "b2": rand(2, in_, 3, 3),
        }
        base = rand(out, in_, 3, 3)
        delta = build(slots, where=WHERE, base=base).weight
        assert isinstance(delta, LowRank) == low_rank
        assert describe(shapes(slots), where=WHERE).rank == (20 if low_rank else None)
        a = slots["a1"].double().flatten(1) @ slots["a2"].double().flatten(1)
        expected = torch.einsum("oikl,ij->ojkl", base.double(), a).flatten(1)
        expected += slots["b1"].double().flatten(1) @ slots["b2"].double().flatten(1)
        assert_equal(delta.dense(), expected)


def test_a_tucker_core_of_glora_is_applied_and_noted():
    slots = {
        "a1": rand(10, 2, 1, 1),
        "a2": rand(2, 10, 1, 1),
        "b1": rand(12, 3, 1, 1),
        "b2": rand(3, 10, 1, 1),
    }
    slots["bm"] = rand(3, 3, 3, 3)
    base = rand(12, 10, 3, 3)
    core = torch.einsum(
        "nmkl,on,mi->oikl", slots["bm"].double(), *(slots[s].double().flatten(1) for s in ("b1", "b2"))
    )
    a = slots["a1"].double().flatten(1) @ slots["a2"].double().flatten(1)
    expected = (core + torch.einsum("oikl,ij->ojkl", base.double(), a)).flatten(1)
    delta = build(slots, where=WHERE, base=base)
    assert_equal(delta.weight.dense(), expected)
    assert any("Tucker" in note for note in delta.notes)


def rotation(blocks: torch.Tensor, limit: float | None) -> torch.Tensor:
    q = blocks.double() - blocks.double().transpose(-1, -2)
    if limit is not None:
        q = q * min(1.0, limit / float(q.norm()))
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return (eye + q) @ torch.linalg.inv(eye - q)


@pytest.mark.parametrize(
    ("alpha", "limit"),
    [(None, None), (0.0, None), (0.01, 0.12), (100.0, None)],
    ids=["none", "zero", "tight", "loose"],
)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_alpha_of_oft_limits_the_turn_and_none_or_zero_is_no_limit(alpha, limit, kernel):
    slots = {"oft_blocks": rand(3, 4, 4)}
    if alpha is not None:
        slots["alpha"] = torch.tensor([alpha])
    base = rand(12, 10, *kernel)
    blocks = rotation(slots["oft_blocks"], limit)
    turned = torch.block_diag(*blocks).T @ base.double().flatten(1)
    assert_equal(dense(slots, base=base), turned - base.double().flatten(1))


def test_oft_diag_is_the_rotation_itself_with_a_rescale():
    slots = {"oft_diag": rand(3, 4, 4), "rescale": rand(12, 1)}
    base = rand(12, 10)
    turned = slots["rescale"].double() * (torch.block_diag(*slots["oft_diag"].double()).T @ base.double())
    assert_equal(dense(slots, base=base), turned - base.double())


@pytest.mark.parametrize(
    "slots",
    [
        {"oft_blocks": (3, 4, 5)},
        {"oft_blocks": (12, 4)},
        {"oft_blocks": (3, 4, 4), "rescale": (11, 1)},
        {"oft_blocks": (2, 2, 3, 3)},
        {"oft_blocks": (9, 2, 4, 4)},
        {"oft_blocks": (3, 4, 4), "oft_diag": (3, 4, 4)},
        {"rescale": (12, 1)},
    ],
)
def test_oft_blocks_that_make_no_rotation_are_refused(slots):
    with pytest.raises(LoraMergeError, match=r"oft_|rescale"):
        describe(slots, where=WHERE)


@pytest.mark.parametrize("on_input", [0, 1])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_ia3_scales_the_channels_of_the_base_weight(on_input, kernel):
    base = rand(12, 10, *kernel)
    vector = rand(10 if on_input else 12)
    stored = vector.reshape(1, -1, 1, 1) if kernel else vector
    delta = dense({"ia3_weight": stored, "on_input": torch.tensor(on_input)}, base=base)
    matrix = torch.diag(vector.double())
    formula = "oi...,ij->oj..." if on_input else "oi...,oj->ji..."
    assert_equal(delta, torch.einsum(formula, base.double(), matrix).flatten(1))
    with pytest.raises(IncompatibleError, match="ia3_weight"):
        build({"ia3_weight": rand(9), "on_input": torch.tensor(on_input)}, where=WHERE, base=base)
