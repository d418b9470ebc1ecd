"""The subspace methods against their papers' formulas on dense float64 matrices, and what each must keep."""

from __future__ import annotations

import itertools

import pytest
import torch

from lib_loramerge.delta import Dense, LowRank, cut_layer
from lib_loramerge.methods import METHODS, LayerContext
from lib_loramerge.methods.subspace import RULES, aligned, join
from tests.helpers.delta_cases import dense, dense_sum, low_rank, optimum, size, with_gauge

SUBSPACE = ("tsv", "iso", "np", "ssr", "knots", "core", "ctm")
RULED = ("knots", "core", "ctm")
OUT, IN = 24, 18


def run(name, deltas, weights, *, limit=None, seed=0, layer="a.layer", **given):
    """The method's result as a dense float64 matrix."""
    method = METHODS[name]
    params = {param.name: param.default for param in method.params} | given
    context = LayerContext(layer, seed, tuple(range(len(deltas))), len(deltas), limit)
    return method.merge(deltas, weights, context, **params).dense()


def same(one, other, tolerance=1e-6):
    assert size(one - other) <= tolerance * max(size(one), size(other))


def inputs(ranks=(4, 3), out=OUT, in_=IN):
    return [low_rank(out, in_, rank, seed=i + 1, alpha=2.0 + i) for i, rank in enumerate(ranks)]


def svd_of(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].mT


def polar(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def separate(rows=True, columns=True):
    """Two deltas whose row spaces, or column spaces, are orthogonal to each other."""
    noise = torch.Generator().manual_seed(5)
    left = torch.linalg.qr(torch.randn(OUT, 8, generator=noise, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(IN, 8, generator=noise, dtype=torch.float64)).Q
    mix = [torch.randn(4, 4, generator=noise, dtype=torch.float64) for _ in range(4)]
    lefts = (left[:, :4], left[:, 4:]) if columns else (left[:, :4], left[:, :4] + 0.3 * left[:, 4:])
    rights = (right[:, :4], right[:, 4:]) if rows else (right[:, :4], right[:, :4] + 0.3 * right[:, 4:])
    return [LowRank(lefts[i] @ mix[i], mix[i + 2] @ rights[i].mT, 4.0) for i in (0, 1)]


# --- what all of them keep


@pytest.mark.parametrize("name", SUBSPACE)
def test_inputs_that_cancel_leave_nothing(name):
    a = low_rank(OUT, IN, 4, seed=1, dtype=torch.float16)
    result = METHODS[name].merge([a, with_gauge(a)], [1.0, -1.0], LayerContext("a.layer"))
    if name == "np":  # the first one keeps its say
        assert size(result.dense()) > 0.1 * size(dense(a))
    else:
        assert cut_layer(result, torch.float32, lambda spectrum: spectrum.rank) is None


@pytest.mark.parametrize("name", SUBSPACE)
def test_strengths_of_0_and_empty_inputs_give_an_empty_delta(name):
    a = low_rank(OUT, IN, 4, seed=1)
    empty = LowRank(torch.zeros(OUT, 2), torch.ones(2, IN), 2.0)
    assert not run(name, [a, a], [0.0, 0.0]).any()
    assert not run(name, [empty, empty], [1.0, 1.0]).any()
    same(run(name, [empty, a], [1.0, 0.5]), run(name, [a], [0.5]))


@pytest.mark.parametrize("name", SUBSPACE)
def test_more_components_than_the_layer_has_rows_or_columns_are_one_more_factorisation(name):
    wide = low_rank(OUT, IN, 30, seed=1)
    b = low_rank(OUT, IN, 4, seed=2)
    same(run(name, [wide, b], [0.7, 0.5]), run(name, [Dense(dense(wide)), b], [0.7, 0.5]), 1e-5)


@pytest.mark.parametrize("name", SUBSPACE)
@pytest.mark.parametrize("nearness", [1e-2, 1e-4])
def test_factorisation_does_not_matter_for_nearly_equal_inputs(name, nearness):
    a = low_rank(OUT, IN, 4, seed=1)
    noise = low_rank(OUT, IN, 4, seed=2)
    near = LowRank(a.up.double() + nearness * noise.up, a.down.double() + nearness * noise.down, 4.0)
    # Elements that differ by less than the rounding of float32 may fall on either side of a threshold.
    given = {"density": 1.0} if name in RULED else {}
    one = run(name, [a, near], [0.8, 0.6], **given)
    same(one, run(name, [with_gauge(a, 3), with_gauge(near, 4)], [0.8, 0.6], **given), 1e-5)


@pytest.mark.parametrize("name", SUBSPACE)
def test_a_negative_strength_is_the_negative_lora(name):
    a, b = inputs()
    minus = LowRank(-b.up, b.down, b.alpha)
    same(run(name, [a, b], [0.7, -0.4]), run(name, [a, minus], [0.7, 0.4]))


@pytest.mark.parametrize("name", SUBSPACE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("nearness", [1.0, 1e-3])
def test_what_is_stored_is_the_best_of_its_rank_and_its_error_is_right(name, dtype, nearness):
    a = low_rank(96, 128, 12, seed=1, dtype=torch.float16)
    noise = low_rank(96, 128, 12, seed=2)
    near = LowRank(a.up.double() + nearness * noise.up, a.down.double() + nearness * noise.down, 12.0)
    params = {param.name: param.default for param in METHODS[name].params}
    rank = 7
    for deltas in ([a, near], [with_gauge(a, 3), with_gauge(near, 4)]):
        result = METHODS[name].merge(deltas, [0.8, -0.6], LayerContext("a.layer"), **params)
        exact = result.dense()
        stored = cut_layer(result, dtype, lambda spectrum: rank)
        assert stored.exact_sq == pytest.approx(size(exact) ** 2, rel=1e-7)
        error = size(exact - dense(stored.delta())) ** 2
        assert stored.error_sq == pytest.approx(error, rel=1e-6, abs=1e-12 * stored.exact_sq)
        least = float(torch.linalg.svdvals(exact)[rank:].square().sum())
        precise = cut_layer(result, torch.float64, lambda spectrum: rank)
        assert precise.error_sq == pytest.approx(least, rel=1e-8, abs=1e-14 * precise.exact_sq)


# --- tsv


def tsv_by_formula(deltas, weights, counts):
    parts = [svd_of(dense(delta), count) for delta, count in zip(deltas, counts)]
    values = torch.cat([weight * s for weight, (_, s, _) in zip(weights, parts)])
    left, right = torch.cat([u for u, _, _ in parts], 1), torch.cat([v for _, _, v in parts], 1)
    return polar(left) @ torch.diag(values) @ polar(right).mT


@pytest.mark.parametrize(
    ("limit", "counts"), [(None, (4, 3, 5)), (3, (1, 1, 1)), (9, (3, 3, 3)), (11, (4, 3, 4))]
)
def test_tsv_is_the_papers_formula_with_equal_shares_of_the_rank(limit, counts):
    deltas, weights = inputs((4, 3, 5)), (0.7, -0.4, 1.2)
    same(run("tsv", deltas, weights, limit=limit), tsv_by_formula(deltas, weights, counts))


@pytest.mark.parametrize("limit", [4, 5, 8])
def test_tsv_shares_do_not_depend_on_the_order(limit):
    a, b = inputs((4, 5))
    same(run("tsv", [a, b], [0.7, 0.4], limit=limit), run("tsv", [b, a], [0.4, 0.7], limit=limit))
    result = METHODS["tsv"].merge([a, b], [0.7, 0.4], LayerContext(rank_limit=limit))
    assert torch.linalg.matrix_rank(result.dense(), rtol=1e-6) == limit


def test_tsv_of_orthogonal_inputs_is_their_sum_and_of_equal_ones_their_average():
    a, b = separate()
    same(run("tsv", [a, b], [0.7, -0.4]), dense_sum([a, b], [0.7, -0.4]))
    same(run("tsv", [a, a], [0.8, 0.4]), 0.6 * dense(a))


# --- iso


@pytest.mark.parametrize(("beta", "norm"), [(0.0, "mean"), (0.3, "mean"), (1.0, "mean"), (0.7, "fro")])
def test_iso_moves_singular_values_and_leaves_the_vectors(beta, norm):
    deltas, weights = inputs(), (0.7, -0.4)
    u, s, v = svd_of(dense_sum(deltas, weights), 7)
    level = s.mean() if norm == "mean" else s.square().mean().sqrt()
    same(
        run("iso", deltas, weights, beta=beta, norm=norm),
        u @ torch.diag((1 - beta) * s + beta * level) @ v.mT,
    )


def test_iso_at_beta_1_is_flat_and_norm_fro_keeps_the_norm():
    deltas, whole = inputs(), dense_sum(inputs(), (1.0, 1.0))
    values = torch.linalg.svdvals(run("iso", deltas, (1.0, 1.0), beta=1.0, norm="fro"))
    assert float(values[0] / values[6]) == pytest.approx(1, rel=1e-6)
    assert float(values[7:].max()) <= 1e-6 * float(values[0])
    assert size(run("iso", deltas, (1.0, 1.0), beta=1.0, norm="fro")) == pytest.approx(size(whole), rel=1e-6)


def test_iso_does_not_raise_what_only_rounding_left():
    a = low_rank(OUT, IN, 4, seed=1)
    result = run("iso", [a, with_gauge(a)], [0.5, 0.5], beta=1.0)
    assert torch.linalg.matrix_rank(result, rtol=1e-3) == 4


# --- np


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 9.0])
def test_np_divides_the_overlap_with_the_first_lora_by_1_plus_mu(mu):
    (a, b), weights = inputs(), (0.7, -0.4)
    _, _, v = svd_of(dense(a), 4)
    left_over = run("np", [a, b], weights, mu=mu) - 0.7 * dense(a)
    assert size(left_over @ v) == pytest.approx(0.4 * size(dense(b) @ v) / (1 + mu), rel=1e-6)
    outside = torch.eye(IN, dtype=torch.float64) - v @ v.mT
    same(left_over @ outside, -0.4 * dense(b) @ outside)


def test_np_of_three_gives_way_to_all_earlier_input_spaces():
    deltas, weights, mu = inputs((4, 3, 5)), (1.0, 0.5, -0.8), 3.0
    expected, rows = torch.zeros(OUT, IN, dtype=torch.float64), torch.zeros(0, IN, dtype=torch.float64)
    for delta, weight in zip(deltas, weights):
        projector = torch.linalg.pinv(rows) @ rows
        expected += weight * dense(delta) @ (torch.eye(IN) - mu / (1 + mu) * projector)
        rows = torch.cat([rows, delta.down.double()])
    same(run("np", deltas, weights, mu=mu), expected)


@pytest.mark.parametrize("mu", [1e3, 1e6])
def test_np_takes_all_but_nothing_where_earlier_loras_read_everything(mu):
    """What is left of the later ones is the small rest of a cancellation; it must not be made of rounding."""
    a, b = inputs((10, 4))
    c = LowRank(low_rank(OUT, IN, 10, seed=8).up, a.down.double(), 10.0)
    d = low_rank(OUT, IN, 12, seed=9)  # with a and b it has more rows than the layer has columns
    for deltas in ([a, c], [a, d, b], [a, b, d, c]):
        rows, expected = torch.zeros(0, IN, dtype=torch.float64), torch.zeros(OUT, IN, dtype=torch.float64)
        for delta in deltas:
            projector = torch.linalg.pinv(rows) @ rows
            expected += dense(delta) @ (torch.eye(IN) - mu / (1 + mu) * projector)
            rows = torch.cat([rows, delta.down.double()])
        params = {"mu": mu, "energy": 1.0}
        result = METHODS["np"].merge(deltas, [1.0] * len(deltas), LayerContext("a.layer"), **params)
        stored = cut_layer(result, torch.float64, lambda spectrum: spectrum.rank)
        same(dense(stored.delta()), expected, 1e-7)


def test_np_protects_only_directions_with_the_wanted_energy():
    a, b = low_rank(OUT, IN, 4, seed=1, decay=2.0), low_rank(OUT, IN, 3, seed=2)
    _, s, v = svd_of(dense(a), 4)
    count = 1 + int((s.square().cumsum(0) < 0.9 * s.square().sum()).sum())
    assert count < 4
    expected = dense(a) + dense(b) @ (torch.eye(IN) - 0.5 * v[:, :count] @ v[:, :count].mT)
    same(run("np", [a, b], [1.0, 1.0], energy=0.9), expected)
    same(run("np", [a, b], [1.0, 1.0], energy=0.0), dense_sum([a, b], [1.0, 1.0]))


def test_np_is_the_sum_where_loras_read_different_features_and_depends_on_order_elsewhere():
    a, b = separate(columns=False)
    same(run("np", [a, b], [0.7, -0.4]), dense_sum([a, b], [0.7, -0.4]))
    c, d = inputs()
    assert size(run("np", [c, d], [1.0, 1.0]) - run("np", [d, c], [1.0, 1.0])) > 0.01


# --- ssr


def projectors(deltas):
    return [torch.linalg.pinv(delta.down.double()) @ delta.down.double() for delta in deltas]


def test_ssr_without_ridge_is_the_closed_form():
    deltas, weights = inputs((4, 3, 5)), (0.7, -0.4, 1.2)
    spaces = projectors(deltas)
    targets = sum(w * dense(delta) @ space for w, delta, space in zip(weights, deltas, spaces))
    expected = targets @ torch.linalg.pinv(sum(spaces), rtol=1e-9)
    same(run("ssr", deltas, weights, ridge=0.0), expected)


@pytest.mark.parametrize("ridge", [0.01, 0.3])
def test_ssr_with_ridge_is_regularised_routing(ridge):
    deltas, weights = inputs((4, 3)), (0.7, -0.4)
    parts = [svd_of(weight * dense(delta), delta.rank) for delta, weight in zip(deltas, weights)]
    v = torch.cat([right for _, _, right in parts], 1)
    ups = torch.cat([u * s for u, s, _ in parts], 1)
    routed = torch.cat([right.mT @ right @ right.mT @ v for _, _, right in parts])
    covariance = sum(v.mT @ right @ right.mT @ v for _, _, right in parts)
    held = ridge * covariance.diagonal().mean()
    plain = ups @ routed @ torch.linalg.inv(covariance + held * torch.eye(7)) @ v.mT
    most = torch.linalg.eigvalsh(covariance)[-1]
    same(run("ssr", deltas, weights, ridge=ridge), (1 + held / most) * plain)


def test_ssr_adds_strangers_and_averages_copies():
    a, b = separate(columns=False)
    same(run("ssr", [a, b], [0.7, -0.4]), dense_sum([a, b], [0.7, -0.4]))
    other = LowRank(low_rank(OUT, IN, 4, seed=9).up.double(), a.down, 4.0)
    same(run("ssr", [a, other], [1.0, 1.0]), dense_sum([a, other], [0.5, 0.5]))


def test_ssr_keeps_each_lora_on_its_own_inputs_better_than_the_sum_and_does_not_blow_up():
    deltas = [low_rank(40, 60, 6, seed=seed) for seed in (1, 2)]
    routed, plain = run("ssr", deltas, [1.0, 1.0]), dense_sum(deltas, [1.0, 1.0])
    for delta, space in zip(deltas, projectors(deltas)):
        assert size((routed - dense(delta)) @ space) <= 0.3 * size((plain - dense(delta)) @ space)
    near = LowRank(deltas[1].up, deltas[0].down + 0.05 * deltas[1].down, 6.0)
    result = run("ssr", [deltas[0], near], [1.0, 1.0])
    assert size(result) <= size(dense_sum([deltas[0], near], [1.0, 1.0]))


# --- inner rules: knots, core, ctm


def ties_by_formula(matrices, density):
    thinned = []
    for matrix in matrices:
        least = matrix.abs().flatten().sort(descending=True).values[int(density * matrix.numel()) - 1]
        thinned.append(torch.where(matrix.abs() >= least, matrix, 0.0))
    sign = sum(thinned).sign()
    agree = [(matrix * sign) > 0 for matrix in thinned]
    return sum(matrix * won for matrix, won in zip(thinned, agree)) / sum(agree).clamp(min=1)


@pytest.mark.parametrize("name", ["knots", "core"])
def test_the_linear_rule_is_the_exact_sum(name):
    deltas, weights = inputs(), (0.7, -0.4)
    same(run(name, deltas, weights, rule="linear"), dense_sum(deltas, weights), 1e-12)
    same(run(name, deltas, weights, rule="magnitude_prune", density=1.0), dense_sum(deltas, weights))


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_ties_is_the_papers_formula(density):
    deltas, weights = inputs(), (0.7, -0.4)
    u, s, v = svd_of(torch.cat([w * dense(delta) for delta, w in zip(deltas, weights)], 1), 7)
    rows = [v[:IN].mT, v[IN:].mT]
    same(run("knots", deltas, weights, density=density), u @ torch.diag(s) @ ties_by_formula(rows, density))


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_core_ties_is_the_papers_formula_on_balanced_factors(density):
    deltas, weights = inputs(), (0.7, -0.4)
    parts = [svd_of(w * dense(delta), delta.rank) for delta, w in zip(deltas, weights)]
    left, _, _ = svd_of(torch.cat([u * s.sqrt() for u, s, _ in parts], 1), 7)
    right, _, _ = svd_of(torch.cat([v * s.sqrt() for _, s, v in parts], 1), 7)
    cores = [left.mT @ (w * dense(delta)) @ right for delta, w in zip(deltas, weights)]
    same(run("core", deltas, weights, density=density), left @ ties_by_formula(cores, density) @ right.mT)


@pytest.mark.parametrize("name", RULED)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_works_without_regard_to_order_or_factorisation(name, rule):
    a, b = inputs()
    one = run(name, [a, b], [0.7, -0.4], rule=rule)
    same(one, run(name, [with_gauge(b, 2), with_gauge(a, 3)], [-0.4, 0.7], rule=rule), 1e-5)


@pytest.mark.parametrize("name", ["knots", "core"])
def test_dare_inside_is_the_sum_on_average(name):
    deltas, weights = inputs(), (0.7, 0.4)
    mean = sum(run(name, deltas, weights, rule="dare_linear", seed=seed) for seed in range(400)) / 400
    exact = dense_sum(deltas, weights)
    assert size(mean - exact) <= 0.1 * size(exact)  # one draw is about as far away as it is large


# --- ctm


def test_ctm_at_full_rank_loses_nothing():
    deltas, weights = inputs(), (0.7, -0.4)
    same(run("ctm", deltas, weights, limit=7), dense_sum(deltas, weights))


@pytest.mark.parametrize("rank", [1, 3])
def test_ctm_of_one_lora_is_its_best_truncation(rank):
    a = low_rank(OUT, IN, 5, seed=1)
    same(run("ctm", [a], [0.5], limit=rank), 0.5 * optimum(dense(a), rank)[0])


def kept(deltas, weights, p, q):
    return [size(p.mT @ (w * dense(delta)) @ q) ** 2 for delta, w in zip(deltas, weights)]


def test_ctm_keeps_more_of_the_inputs_than_their_leading_spaces_do_and_each_step_keeps_more(monkeypatch):
    deltas, weights = inputs((6, 6, 6)), (1.0, 0.8, -0.6)
    parts = [w * dense(delta) for delta, w in zip(deltas, weights)]
    left, _, _ = svd_of(torch.cat(parts, 1), 6)
    right, _, _ = svd_of(torch.cat([part.mT for part in parts], 1), 6)
    energies = [sum(kept(deltas, weights, left, right))]
    monkeypatch.setattr(aligned, "_CONVERGED", -1.0)
    for steps in range(1, 8):
        monkeypatch.setattr(aligned, "_MOST_STEPS", steps)
        result = run("ctm", deltas, weights, limit=6)
        u, _, v = svd_of(result, 6)
        energies.append(sum(kept(deltas, weights, u, v)))
        same(result, u @ u.mT @ dense_sum(deltas, weights) @ v @ v.mT)
    assert all(after >= before * (1 - 1e-6) for before, after in itertools.pairwise(energies))
    assert energies[-1] > 1.01 * energies[0]


def test_ctm_with_balance_1_gives_a_quiet_lora_the_same_say():
    deltas, weights = inputs((5, 5)), (1.0, 0.1)
    shares = []
    for balance in (0.0, 1.0):
        u, _, v = svd_of(run("ctm", deltas, weights, limit=5, balance=balance), 5)
        loud, quiet = (part / (w * size(dense(d))) ** 2 for part, w, d in zip(
            kept(deltas, weights, u, v), weights, deltas))  # fmt: skip
        shares.append(quiet / loud)
    assert shares[0] < 0.6 < shares[1] < 1.7


def test_the_joint_space_shows_every_delta_from_small_matrices():
    deltas, weights = [*inputs(), low_rank(OUT, IN, 2, seed=8)], (0.7, 0.0, -0.4)
    space = join(deltas, weights)
    assert space.present == (0, 2)
    left, right = space.source.up.double() @ space.left, space.source.down.double().mT @ space.right
    for index, span in zip(space.present, space.spans):
        u, v = left[:, span], right[:, span]
        same(u @ torch.diag(space.values[span]) @ v.mT, weights[index] * dense(deltas[index]), 1e-12)
        same(u.mT @ u, torch.eye(u.shape[1], dtype=torch.float64), 1e-12)
    same(space.gram_up, left.mT @ left, 1e-12)
    same(space.gram_down, right.mT @ right, 1e-12)
