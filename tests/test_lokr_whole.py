"""LoKr of whole matrices: hundreds of components, whose structure tells their singular values."""

from __future__ import annotations

import pytest
import torch

from lib_loramerge import ranks
from lib_loramerge.adapters import build
from lib_loramerge.adapters.scaling import Scale, apply_scale
from lib_loramerge.delta import (
    Cache,
    LayerDelta,
    LowRank,
    all_values,
    counted,
    cut_layer,
    decompose,
    grams,
    inner_products,
    norm,
    overlaps,
    sampled_rows,
    scaled,
    stack,
    times_two_to,
    weighted_sum,
)
from lib_loramerge.recipe import LoraInput, MergeRecipe
from tests.helpers.delta_cases import low_rank, size

SIDE, WIDE = 512, 560  # as many components as the code calls many


def whole_lokr(out: int = SIDE, in_: int = WIDE, seed: int = 0, alpha: float | None = None, factor: int = 8):
    """A delta as built from a file, and its dense float64 matrix."""
    generator = torch.Generator().manual_seed(seed)
    w1 = torch.randn(factor, factor, generator=generator)
    # A falling spectrum, as trained files have.
    w2 = torch.randn(out // factor, in_ // factor, generator=generator) @ torch.diag(
        torch.arange(1, in_ // factor + 1, dtype=torch.float32) ** -0.7
    )
    slots = {"lokr_w1": w1, "lokr_w2": w2}
    if alpha is not None:
        slots["scale"] = torch.tensor(alpha)
    scale = 1.0 if alpha is None else alpha
    return build(slots, where="layer").weight, scale * torch.kron(w1.double(), w2.double())


@pytest.mark.parametrize("scale", [None, 0.3, -2.0])
def test_its_singular_values_are_the_products_of_the_factors(scale):
    delta, whole = whole_lokr(alpha=scale)
    for weight in (1.0, -0.7):
        values = decompose(stack([delta], [weight]), vectors=False).values
        exact = torch.linalg.svdvals(weight * whole)
        assert torch.allclose(values, exact, rtol=1e-6, atol=1e-6 * float(exact[0]))
    assert norm(delta) == pytest.approx(size(whole), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [4, 300])
@pytest.mark.parametrize("weight", [0.8, -1.5])
def test_it_alone_is_cut_as_well_as_by_a_dense_decomposition(rank, dtype, weight):
    delta, whole = whole_lokr()
    stored = cut_layer(stack([delta], [weight]), dtype, lambda s: min(rank, s.rank), most=rank)
    least = float(torch.linalg.svdvals(weight * whole)[rank:].norm())
    distance = size(stored.delta().dense() - weight * whole)
    assert distance == pytest.approx(stored.error_sq**0.5, rel=1e-3)
    assert distance <= least * (1 + 1e-6) + 5e-4 * size(whole) * (dtype == torch.float16)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rank", [8, 24])
def test_a_sum_with_loras_is_cut_to_within_a_hundred_thousandth_of_the_least_error(rank, count):
    delta, whole = whole_lokr()
    loras = [low_rank(SIDE, WIDE, 16, seed=seed, scale=0.5, decay=0.5) for seed in range(1, 1 + count)]
    total = 0.8 * whole + sum(0.5 * lora.dense() for lora in loras)
    stored = cut_layer(
        stack([delta, *loras], [0.8] + [0.5] * count), torch.float32, lambda s: min(rank, s.rank), most=rank
    )
    distance = size(stored.delta().dense() - total)
    assert distance <= float(torch.linalg.svdvals(total)[rank:].norm()) * (1 + 1e-5)
    assert distance == pytest.approx(stored.error_sq**0.5, rel=1e-6)


def test_two_of_them_are_cut_as_well():
    (a, dense_a), (b, dense_b) = whole_lokr(seed=1), whole_lokr(seed=2)
    stored = cut_layer(stack([a, b], [1.0, -0.5]), torch.float32, lambda s: min(16, s.rank), most=16)
    total = dense_a - 0.5 * dense_b
    distance = size(stored.delta().dense() - total)
    assert distance <= float(torch.linalg.svdvals(total)[16:].norm()) * (1 + 1e-5)
    assert distance == pytest.approx(stored.error_sq**0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(SIDE, WIDE), (WIDE, SIDE)])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_at_full_rank_nothing_is_cut_and_the_rounding_is_reported(dtype, shape, scale):
    delta, whole = whole_lokr(*shape, alpha=scale)
    lora = low_rank(*shape, 16, seed=5, scale=0.5 * scale**0.5)
    total = whole + 0.5 * lora.dense()
    stored = cut_layer(stack([delta, lora], [1.0, 0.5]), dtype, lambda s: s.rank, most=SIDE)
    distance = size(stored.delta().dense() - total)
    noise = 1e-7 * size(total)  # factors of so many components are float32 before they are rounded
    assert stored.rank == SIDE
    assert distance <= torch.finfo(dtype).eps * size(total) + noise
    assert distance == pytest.approx(stored.error_sq**0.5, rel=0.02, abs=noise)


@pytest.fixture
def counting(monkeypatch):
    """Layers of this size are counted, as larger ones are."""
    monkeypatch.setattr(counted, "_LARGE", 256)


@pytest.mark.parametrize("shape", [(SIDE, WIDE), (WIDE, SIDE)])
@pytest.mark.parametrize(("weight", "strength"), [(0.8, 0.5), (-1.5, 6.0), (1.0, 1e-4)])
def test_all_values_of_a_sum_are_counted_and_its_norm_is_exact(shape, weight, strength, counting):
    delta, whole = whole_lokr(*shape)
    loras = [low_rank(*shape, 8, seed=seed, scale=0.5, decay=0.5) for seed in (1, 2)]
    found = all_values(stack([delta, *loras], [weight, strength, -strength]))
    exact = torch.linalg.svdvals(weight * whole + strength * loras[0].dense() - strength * loras[1].dense())
    assert found.mixing is None
    assert found.energy == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert float(found.values.square().sum()) == pytest.approx(found.energy, rel=1e-9)
    assert torch.allclose(found.values[:100], exact[:100], rtol=4e-3)
    kept = slice(0, int((exact > 0.03 * exact[0]).sum()))
    assert torch.allclose(found.values[kept], exact[kept], rtol=0.03)


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_retain_keeps_the_share_it_promises_without_all_singular_values(fraction, counting):
    delta, whole = whole_lokr()
    lora = low_rank(SIDE, WIDE, 16, seed=3, scale=0.5)
    total = whole + 0.5 * lora.dense()
    recipe = MergeRecipe(inputs=(LoraInput("a"),), retain=fraction)
    stored = cut_layer(
        stack([delta, lora], [1.0, 0.5]), torch.float32, lambda s: ranks.choose(recipe, s, same=None)
    )
    squares = torch.linalg.svdvals(total).square()
    least = int((squares.cumsum(0) < fraction**2 * squares.sum()).sum()) + 1
    assert least <= stored.rank <= least + 1
    assert size(stored.delta().dense()) >= fraction * size(total) * (1 - 1e-6)


def plain(delta: LowRank) -> LowRank:
    """The same delta by its large factors."""
    return LowRank(delta.up, delta.down, delta.alpha, delta.kernel, delta.parts, delta.gains)


def a_few(shape: tuple[int, int]) -> list[tuple[LowRank, torch.Tensor]]:
    """Whole LoKr of two forms, one of them turned by a negative scale, and a LoRA, with their matrices."""
    lora = low_rank(*shape, 16, seed=4, scale=0.5)
    return [
        whole_lokr(*shape, seed=1),
        whole_lokr(*shape, seed=2, alpha=-0.5),
        whole_lokr(*shape, seed=3, factor=4),
        (lora, lora.dense()),
    ]


@pytest.mark.parametrize("shape", [(SIDE, WIDE), (WIDE, SIDE)])
def test_inner_products_and_sampled_rows_are_those_of_the_matrices(shape):
    deltas, wholes = zip(*a_few(shape))
    flat = torch.stack([whole.flatten() for whole in wholes])
    assert all(delta.structure is not None for delta in deltas[:3])
    sizes = flat.norm(dim=1)
    assert torch.allclose(
        inner_products(deltas) / sizes / sizes[:, None], flat @ flat.T / sizes / sizes[:, None]
    )
    for delta, whole in zip(deltas, wholes):
        rows = sampled_rows(delta, 32)
        assert torch.allclose(rows, whole[:: shape[0] // 32].float(), atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("shape", [(SIDE, WIDE), (WIDE, SIDE)])
def test_shared_spaces_are_those_of_the_large_factors(shape):
    deltas = [delta for delta, _ in a_few(shape)]
    found, exact = overlaps(deltas), overlaps([plain(delta) for delta in deltas])
    assert torch.allclose(found.inputs, exact.inputs, atol=1e-6)
    assert torch.allclose(found.outputs, exact.outputs, atol=1e-6)


def test_the_gram_matrices_of_a_sum_are_those_of_its_large_factors():
    whole = stack([delta for delta, _ in a_few((SIDE, WIDE))], [1.0, -0.5, 0.3, 2.0])
    found, exact = grams(whole), grams(plain(whole))
    for mine, theirs in ((found.up, exact.up), (found.down, exact.down)):
        lengths = theirs.diagonal().sqrt()
        assert float(((mine - theirs) / lengths / lengths[:, None]).abs().max()) < 1e-4
        assert size(mine - theirs) < 1e-6 * size(theirs)


def test_a_layer_that_was_turned_round_has_none_of_the_former_factors():
    delta, whole = whole_lokr()
    assert delta.up.shape == (SIDE, SIDE)
    turned = apply_scale(delta, Scale(-0.5))
    by_factors = (turned.up.double() * turned.component_gains()) @ turned.down.double()
    assert size(by_factors + 0.5 * whole) < 1e-6 * size(whole)
    assert size(turned.dense() + 0.5 * whole) < 1e-12 * size(whole)


def test_layers_of_a_run_are_kept_as_small_as_they_are():
    cache = Cache()
    delta, _ = whole_lokr()
    kept = cache.layer("layer", lambda: LayerDelta(delta)).weight
    assert isinstance(kept, LowRank)
    assert kept.structure is not None
    assert not {"up", "down"} & vars(kept).keys()


def test_a_sum_of_sums_and_a_multiple_of_it_stay_exact_and_keep_their_form():
    (a, dense_a), (b, dense_b), (c, dense_c), _ = a_few((SIDE, WIDE))
    total = 0.5 * (2.0 * dense_a - dense_b) + 3.0 * dense_c
    found = stack([stack([a, b], [2.0, -1.0]), c], [0.5, 3.0])
    for delta, factor in ((found, 1.0), (scaled(found, -0.7), -0.7), (times_two_to(found, 3), 8.0)):
        assert delta.structure is not None
        assert size(delta.dense() - factor * total) < 1e-12 * abs(factor) * size(total)
        by_factors = (delta.up.double() * delta.component_gains()) @ delta.down.double()
        assert size(by_factors - factor * total) < 1e-6 * abs(factor) * size(total)
    assert size(weighted_sum([found], [2.0]).dense() - 2.0 * total) < 1e-12 * size(total)


@pytest.mark.parametrize("others", ["a whole LoKr", "a LoRA of many ranks"])
@pytest.mark.parametrize("shape", [(SIDE, WIDE), (WIDE, SIDE)])
def test_all_values_of_a_sum_that_is_not_counted_are_sampled(shape, others, counting):
    delta, whole = whole_lokr(*shape, seed=1)
    lora = low_rank(*shape, 64, seed=4, scale=0.5, decay=0.5)
    other, dense = whole_lokr(*shape, seed=2) if others == "a whole LoKr" else (lora, lora.dense())
    total = stack([delta, other], [1.0, -0.5])
    found, exact = all_values(total), torch.linalg.svdvals(whole - 0.5 * dense)
    assert counted.is_counted(total)
    assert found.mixing is None
    assert found.energy == pytest.approx(float(exact.square().sum()), rel=1e-9)
    assert torch.allclose(found.values[:16], exact[:16], rtol=1e-4)
    assert bool((found.values.diff() <= 0).all())
    large = int((exact > 0.05 * exact[0]).sum())
    assert torch.allclose(found.values[:large], exact[:large], rtol=0.12)
    for rank in (8, 32, 100):
        assert float(found.values[rank:].norm()) == pytest.approx(float(exact[rank:].norm()), rel=0.02)
