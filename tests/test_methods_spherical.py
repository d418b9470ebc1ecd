"""Average, slerp and Karcher mean against their formulas on dense float64 vectors."""

from __future__ import annotations

import math

import pytest
import torch

from lib_loramerge.delta import Dense, LowRank
from lib_loramerge.methods import METHODS, LayerContext
from tests.helpers.delta_cases import dense, low_rank, size

NAMES = ["average", "slerp", "karcher"]


def run(name, deltas, weights, **params):
    return METHODS[name].merge(deltas, weights, LayerContext("a.layer"), **params)


def deltas_at(cosine: float, lengths=(1.0, 1.0)) -> list[LowRank]:
    """Two deltas of these lengths and this angle between them."""
    a, other = low_rank(40, 60, 4, seed=1), low_rank(40, 60, 4, seed=2)
    u = dense(a) / size(dense(a))
    v = dense(other) - (dense(other) * u).sum() * u
    v = v / size(v)
    vectors = [lengths[0] * u, lengths[1] * (cosine * u + math.sqrt(1 - cosine**2) * v)]
    return [LowRank(vector, torch.eye(60, dtype=torch.float64), 60.0) for vector in vectors]


def slerp_formula(a, b, t):
    """Shoemake's formula with the arc cosine, on whole matrices."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def close(got, wanted, tolerance=1e-10):
    assert size(got.dense() - wanted) <= tolerance * max(size(wanted), 1e-3)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (3.0, -1.0), (-2.0, -2.0), (0.0, 0.4)])
def test_average_is_the_mean_weighted_by_strengths(weights):
    a, b = low_rank(40, 60, 8, seed=1, alpha=4.0), low_rank(40, 60, 5, seed=2)
    total = sum(abs(weight) for weight in weights)
    close(run("average", [a, b], list(weights)), (weights[0] * dense(a) + weights[1] * dense(b)) / total)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_of_a_lora_and_itself_is_that_lora(name, count):
    a = low_rank(40, 60, 8, seed=1)
    if METHODS[name].maximum is not None:
        count = min(count, METHODS[name].maximum)
    close(run(name, [a] * count, [0.3] * count), dense(a))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_proportions_of_the_strengths_count(name):
    a, b = low_rank(40, 60, 8, seed=1), low_rank(40, 60, 5, seed=2)
    close(run(name, [a, b], [0.2, 0.6]), run(name, [a, b], [1.0, 3.0]).dense())


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_of_the_size_of_the_layer_is_made(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("formed whole")

    a, b = low_rank(40, 60, 8, seed=1), low_rank(40, 60, 5, seed=2)
    monkeypatch.setattr(LowRank, "dense", refuse)
    result = run(name, [a, b], [0.7, 0.4])
    assert isinstance(result, LowRank)
    assert result.rank == 13


@pytest.mark.parametrize("lengths", [(1.0, 1.0), (0.01, 40.0)])
@pytest.mark.parametrize("cosine", [-0.99, -0.3, 0.0, 0.5, 0.999])
@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_equals_its_formula_on_the_whole_matrices(cosine, t, lengths):
    a, b = deltas_at(cosine, lengths)
    close(run("slerp", [a, b], [1.0, 1.0], t=t), slerp_formula(dense(a), dense(b), t))


@pytest.mark.parametrize(("weights", "t", "way"), [((0.7, 0.3), 0.5, 0.3), ((1.0, 3.0), 0.25, 0.5)])
def test_strengths_move_the_point_on_the_way(weights, t, way):
    a, b = deltas_at(0.2)
    close(run("slerp", [a, b], list(weights), t=t), slerp_formula(dense(a), dense(b), way))


def test_a_negative_strength_turns_a_delta_round():
    a, b = deltas_at(0.2)
    close(run("slerp", [a, b], [0.6, -0.4]), slerp_formula(dense(a), -dense(b), 0.4))
    close(run("karcher", [a, b], [0.5, -0.5]), slerp_formula(dense(a), -dense(b), 0.5))


@pytest.mark.parametrize("end", [0, 1])
def test_slerp_ends_at_its_deltas_exactly(end):
    pair = [low_rank(40, 60, 8, seed=1), low_rank(40, 60, 5, seed=2)]
    close(run("slerp", pair, [1.0, 1.0], t=float(end)), dense(pair[end]), 1e-14)
    close(run("slerp", pair, [1.0 - end, float(end)]), dense(pair[end]), 1e-14)


@pytest.mark.parametrize(("owner", "t", "counts"), [(0, 1.0, 0), (1, 0.0, 0), (0, 0.9, 1), (1, 0.1, 1)])
def test_at_the_end_of_one_lora_a_layer_that_only_the_other_has_is_not_there(owner, t, counts):
    a = low_rank(40, 60, 8, seed=1)
    context = LayerContext("a.layer", present=(owner,), inputs=2)
    assert size(METHODS["slerp"].merge([a], [0.7], context, t=t).dense() - counts * dense(a)) <= 1e-14
    vector = torch.arange(6.0)
    merged = METHODS["slerp"].merge_vectors([vector], [0.7], context, t=t)
    assert torch.equal(merged, counts * vector.double())


@pytest.mark.parametrize("t", [0.1, 0.4, 0.5, 0.9])
def test_slerp_of_equally_long_deltas_stays_as_long(t):
    a, b = deltas_at(-0.4)
    assert size(run("slerp", [a, b], [1.0, 1.0], t=t).dense()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 0.0])
@pytest.mark.parametrize("name", ["slerp", "karcher"])
def test_deltas_that_nearly_agree_give_the_straight_mean(name, distance):
    a, other = low_rank(40, 60, 8, seed=1), low_rank(40, 60, 8, seed=2)
    near = LowRank(a.up.double() + distance * other.up.double(), a.down.double(), a.alpha)
    close(run(name, [a, near], [1.0, 1.0]), (dense(a) + dense(near)) / 2, 1e-9 + distance**2)


@pytest.mark.parametrize("name", ["slerp", "karcher"])
@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_opposite_deltas_cancel_and_do_not_blow_up(name, noise):
    a, other = low_rank(40, 60, 8, seed=1), low_rank(40, 60, 8, seed=2)
    opposite = LowRank(-a.up.double() + noise * other.up.double(), a.down.double(), a.alpha)
    result = run(name, [a, opposite], [1.0, 1.0]).dense()
    assert size(result) <= 1e-8 * size(dense(a))


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_of_zeros_only_takes_its_share(name):
    a = low_rank(40, 60, 8, seed=1)
    zero = LowRank(torch.zeros(40, 4), torch.randn(4, 60), 4.0)
    close(run(name, [a, zero], [1.0, 1.0]), dense(a) / 2)
    assert not run(name, [zero, zero], [1.0, 1.0]).dense().any()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.7])
def test_karcher_mean_of_two_equally_long_deltas_is_their_slerp(cosine, share):
    a, b = deltas_at(cosine)
    close(run("karcher", [a, b], [1 - share, share]), slerp_formula(dense(a), dense(b), share))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.3), (1.0, -0.6, 0.8)])
def test_karcher_mean_is_where_the_logarithms_balance(weights):
    """The mean's definition: seen from it, the directions of the deltas add up to nothing."""
    deltas = [low_rank(40, 60, 4 + i, seed=i, alpha=2.0**i) for i in range(3)]
    total = sum(abs(weight) for weight in weights)
    got = run("karcher", deltas, list(weights)).dense()
    mean = got / got.norm()
    pull = torch.zeros_like(mean)
    for delta, weight in zip(deltas, weights):
        unit = math.copysign(1.0, weight) * dense(delta) / dense(delta).norm()
        angle = torch.arccos((unit * mean).sum())
        pull += abs(weight) / total * angle / torch.sin(angle) * (unit - torch.cos(angle) * mean)
    assert size(pull) <= 1e-9
    length = sum(abs(w) / total * size(dense(d)) for d, w in zip(deltas, weights))
    assert size(got) == pytest.approx(length, rel=1e-10)


def test_karcher_mean_of_deltas_at_right_angles_is_their_mean_direction():
    deltas = [low_rank(40, 60, 2, seed=1) for _ in range(3)]
    blocks = [torch.zeros(40, 60, dtype=torch.float64) for _ in deltas]
    for index, block in enumerate(blocks):
        block[10 * index : 10 * index + 10] = dense(deltas[0])[:10]
    inputs = [LowRank(block, torch.eye(60, dtype=torch.float64), 60.0) for block in blocks]
    close(run("karcher", inputs, [1.0, 1.0, 1.0]), sum(blocks) / math.sqrt(3))


@pytest.mark.parametrize("name", NAMES)
def test_dense_inputs_give_the_same_mean(name):
    a, b = deltas_at(0.3, (1.0, 2.0))
    whole = run(name, [Dense(dense(a)), b], [0.7, 0.5])
    close(whole, run(name, [a, b], [0.7, 0.5]).dense())


@pytest.mark.parametrize("name", NAMES)
def test_biases_and_norms_take_the_same_shares(name):
    method = METHODS[name]
    params = {param.name: param.default for param in method.params}
    assert method.vector_weights([0.5, -1.5], LayerContext(), **params) == pytest.approx([0.25, -0.75])
    assert method.vector_weights([0.4], LayerContext(), **params) == pytest.approx([1.0])
    assert method.vector_weights([0.0, 0.0], LayerContext(), **params) == [0.0, 0.0]


def test_biases_go_the_same_way_as_slerp():
    assert METHODS["slerp"].vector_weights([1.0, 1.0], LayerContext(), t=0.0) == [1.0, 0.0]
    assert METHODS["slerp"].vector_weights([1.0, 1.0], LayerContext(), t=0.25) == pytest.approx([0.75, 0.25])
