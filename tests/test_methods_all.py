"""Laws that every merge method keeps, read off the registry: a new method is covered when it is registered.

What a method is meant to break is declared once, in EXCEPT.
"""

from __future__ import annotations

import pytest
import torch

from lib_loramerge.delta import Dense, LowRank, parallel_map, stack
from lib_loramerge.methods import METHODS, LayerContext
from tests.helpers.delta_cases import dense, low_rank, size, with_gauge

# Method -> the laws that do not hold for it.
EXCEPT: dict[str, set[str]] = {
    # The sum of factors is no function of the deltas: it depends on how they are factored.
    "add": {"gauge", "orthogonal", "zero", "doubling", "dense", "stacked", "third"},
    # Strengths are shares, so their common factor does not count.
    "average": {"doubling"},
    "slerp": {"doubling"},
    "karcher": {"doubling"},
    # They look at elements, which a rotation mixes.
    "ties": {"orthogonal"},
    "dare_linear": {"orthogonal"},
    "dare_ties": {"orthogonal"},
    "della": {"orthogonal"},
    "breadcrumbs": {"orthogonal"},
    "magnitude_prune": {"orthogonal"},
    "sce": {"orthogonal"},
    # The rows of the deltas are brought to common directions, their columns are not.
    "knots": {"orthogonal"},
}
# The value of a parameter at which a method drops nothing and changes nothing of one LoRA.
WHOLE = {"density": 1.0, "select_topk": 1.0, "beta": 0.0}
# An inner rule that draws, for methods that have a choice of them.
DRAWING = {"rule": "dare_linear"}


def keeping(law: str) -> list[str]:
    return [name for name in METHODS if law not in EXCEPT.get(name, set())]


def run(name, deltas, weights, *, seed=0, layer="a.layer", **given):
    """The method's result as a dense float64 matrix; parameters it does not have are ignored."""
    method = METHODS[name]
    params = {param.name: given.get(param.name, param.default) for param in method.params}
    context = LayerContext(
        layer, seed=seed, present=tuple(range(len(deltas))), inputs=len(deltas), strengths=tuple(weights)
    )
    return method.merge(deltas, weights, context, **params).dense()


def pair(seed: int = 0) -> tuple[LowRank, LowRank]:
    return low_rank(40, 60, 6, seed=seed, alpha=3.0), low_rank(40, 60, 6, seed=seed + 100, alpha=9.0)


def same(one, other, tolerance=1e-5):
    assert size(one - other) <= tolerance * max(size(one), size(other))


def rotation(side: int, seed: int):
    noise = torch.randn(side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def test_exceptions_are_declared_for_methods_that_exist():
    assert set(EXCEPT) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_one_lora_alone_at_strength_1_comes_back_unchanged(name):
    a, _ = pair()
    same(run(name, [a], [1.0], **WHOLE), dense(a), 1e-6)


@pytest.mark.parametrize("name", keeping("zero"))
def test_a_lora_at_strength_0_has_no_effect(name):
    a, b = pair()
    same(run(name, [a, b], [0.6, 0.0]), run(name, [a], [0.6]), 1e-6)


@pytest.mark.parametrize("name", keeping("doubling"))
def test_doubling_every_strength_doubles_the_delta(name):
    a, b = pair()
    same(run(name, [a, b], [1.4, -0.6]), 2 * run(name, [a, b], [0.7, -0.3]))


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].ordered])
def test_the_order_of_the_inputs_does_not_matter(name):
    a, b = pair()
    same(run(name, [a, b], [0.7, 0.2]), run(name, [b, a], [0.2, 0.7]))


@pytest.mark.parametrize(
    "name", [name for name in keeping("third") if not METHODS[name].ordered and METHODS[name].maximum is None]
)
def test_the_order_of_three_inputs_does_not_matter(name):
    a, b = pair()
    c = low_rank(40, 60, 3, seed=7)
    same(run(name, [a, b, c], [0.7, -0.2, 1.0]), run(name, [c, a, b], [1.0, 0.7, -0.2]))


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**10, -1.0])
@pytest.mark.parametrize("name", METHODS)
def test_scaled_inputs_give_the_scaled_result(name, factor):
    """Whatever the training's learning rate: no threshold of ours is absolute."""
    a, b = pair()
    scaled = [LowRank(d.up * factor, d.down, d.alpha) for d in (a, b)]
    same(run(name, scaled, [0.7, 0.2]), factor * run(name, [a, b], [0.7, 0.2]))


@pytest.mark.parametrize("name", keeping("gauge"))
def test_how_an_input_is_factored_does_not_matter(name):
    a, b = pair()
    same(run(name, [a, b], [0.7, 0.5]), run(name, [with_gauge(a, 3), with_gauge(b, 4)], [0.7, 0.5]))


@pytest.mark.parametrize("name", keeping("gauge"))
def test_how_the_scale_is_split_between_the_factors_does_not_matter(name):
    a, b = pair()
    split = LowRank(b.up * 3e3, b.down / 3e3, b.alpha)
    same(run(name, [a, b], [0.7, 0.5]), run(name, [a, split], [0.7, 0.5]))


@pytest.mark.parametrize("name", keeping("orthogonal"))
def test_rotated_inputs_give_the_rotated_result(name):
    a, b = pair()
    p, q = rotation(40, 1), rotation(60, 2)
    turned = [LowRank(p @ d.up.double(), d.down.double() @ q, d.alpha) for d in (a, b)]
    same(run(name, turned, [0.7, 0.5]), p @ run(name, [a, b], [0.7, 0.5]) @ q)


@pytest.mark.parametrize("name", keeping("dense"))
def test_a_lora_held_whole_counts_like_its_factors(name):
    a, b = pair()
    whole = Dense(dense(b).float())
    same(run(name, [a, b], [0.7, 0.5]), run(name, [a, whole], [0.7, 0.5]))
    same(run(name, [a, b], [0.7, 0.5]), run(name, [Dense(dense(a).float()), whole], [0.7, 0.5]))


@pytest.mark.parametrize("name", keeping("stacked"))
def test_a_lora_in_several_pieces_counts_like_one(name):
    """Pieces that an adapter kind stacks, each component with a factor of its own."""
    a, b = pair()
    pieces = [LowRank(b.up[:, :2], b.down[:2], 2.0), LowRank(b.up[:, 2:], b.down[2:], 4.0)]
    scale = b.alpha / b.rank
    same(run(name, [a, b], [0.7, 0.5]), run(name, [a, stack(pieces, [scale, scale])], [0.7, 0.5]))


@pytest.mark.parametrize("name", METHODS)
def test_results_are_the_same_bit_for_bit_on_any_number_of_threads_and_in_any_order(name):
    layers = [(f"layer.{index}", pair(index)) for index in range(4)]

    def merge(job):
        layer, deltas = job
        return layer, run(name, deltas, [0.7, -0.3], seed=5, layer=layer)

    once = dict(parallel_map(merge, layers, workers=1))
    again = dict(parallel_map(merge, reversed(layers), workers=3))
    assert all(torch.equal(once[layer], again[layer]) for layer, _ in layers)


@pytest.mark.parametrize("name", METHODS)
def test_only_random_methods_depend_on_the_seed_and_none_on_the_random_state_of_torch(name):
    a, b = pair()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(name, [a, b], [0.7, 0.5], seed=1, **DRAWING)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(run(name, [a, b], [0.7, 0.5], seed=1, **DRAWING), first)
    assert torch.equal(run(name, [a, b], [0.7, 0.5], seed=2, **DRAWING), first) != METHODS[name].random
    assert (
        torch.equal(run(name, [a, b], [0.7, 0.5], seed=1, layer="other", **DRAWING), first)
        != METHODS[name].random
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_limit_of_every_parameter_gives_a_finite_result_that_is_not_empty(name):
    deltas = pair()
    for param in METHODS[name].params:
        for value in param.choices or (param.minimum, param.maximum):
            if value is None:
                continue
            result = run(name, deltas, [0.7, 0.5], **{param.name: param.check(value)})
            assert bool(result.isfinite().all())
            assert bool(result.any()), f"{param.name} {value}"


@pytest.mark.parametrize("name", METHODS)
def test_the_kernel_of_a_convolution_is_kept(name):
    deltas = [LowRank(d.up, d.down[:, :54], d.alpha, (3, 3)) for d in pair()]
    method = METHODS[name]
    params = {param.name: param.default for param in method.params}
    result = method.merge(deltas, [1.0, 0.5], LayerContext("a.layer"), **params)
    assert result.kernel == (3, 3)
    assert (result.out, result.in_) == (40, 54)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_factors_are_merged_as_precisely_as_others(name):
    half = [LowRank(d.up.half(), d.down.half(), d.alpha) for d in pair()]
    wide = [LowRank(d.up.double(), d.down.double(), d.alpha) for d in half]
    same(run(name, half, [0.7, 0.5]), run(name, wide, [0.7, 0.5]), 1e-6)
