"""Work on threads: same bytes from any number of them, prompt to stop, and the process left as it was."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch

from lib_loramerge.delta import (
    LowRank,
    cut_layer,
    cut_layers,
    full_precision,
    in_turn,
    own_settings,
    parallel_map,
    stack,
)
from lib_loramerge.errors import Cancelled
from tests.helpers.delta_cases import low_rank


def layers():
    shapes = [(64, 96), (130, 70), (64, 96), (200, 40), (33, 35), (70, 70), (64, 96)]
    return [
        stack([low_rank(*s, 12, seed=i, dtype=torch.float16), low_rank(*s, 20, seed=i + 50)], [0.7, -0.4])
        for i, s in enumerate(shapes)
    ]


def write(delta):
    return cut_layer(delta, torch.float16, lambda spectrum: min(16, spectrum.rank))


def same(a, b):
    return (
        torch.equal(a.up, b.up)
        and torch.equal(a.down, b.down)
        and (a.alpha, a.error_sq, a.exact_sq) == (b.alpha, b.error_sq, b.exact_sq)
    )


def test_any_number_of_workers_and_any_order_give_the_same_bytes():
    jobs = layers()
    plain = list(parallel_map(write, jobs, workers=1))
    for workers in (2, 4, 7):
        assert all(same(a, b) for a, b in zip(plain, parallel_map(write, jobs, workers=workers), strict=True))
    order = list(range(len(jobs)))
    random.Random(1).shuffle(order)
    shuffled = list(parallel_map(write, [jobs[i] for i in order], workers=3))
    assert all(same(plain[i], result) for i, result in zip(order, shuffled, strict=True))


def test_threads_and_random_states_are_left_as_they_were():
    torch.set_num_threads(3)
    try:
        torch.manual_seed(5)
        torch_state, python_state, numpy_state = (
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state(),
        )
        list(parallel_map(write, layers(), workers=2))
        assert torch.get_num_threads() == 3
        assert torch.equal(torch_state, torch.get_rng_state())
        assert python_state == random.getstate()
        assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state()))
        with pytest.raises(ZeroDivisionError):
            list(parallel_map(lambda job: 1 / 0, [1], workers=2))
        assert torch.get_num_threads() == 3
        with own_settings():
            with own_settings():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_workers_run_on_one_torch_thread_without_gradients():
    def look(_):
        return torch.get_num_threads(), torch.is_grad_enabled()

    assert set(parallel_map(look, range(4), workers=2)) == {(1, False)}


def test_results_come_in_order_and_jobs_are_taken_only_a_little_ahead():
    taken = []

    def jobs():
        for i in range(100):
            taken.append(i)
            yield i

    results = parallel_map(lambda i: i * i, jobs(), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) < 20
    assert list(results) == [i * i for i in range(3, 100)]


def test_work_in_turn_is_on_the_callers_thread_and_ends_where_it_is_cancelled():
    stop, done = threading.Event(), []

    def work(job):
        done.append((job, threading.get_ident(), torch.is_grad_enabled(), torch.get_num_threads()))
        return job

    with pytest.raises(Cancelled):
        [stop.set() for result in in_turn(work, range(100), cancel=stop.is_set) if result == 3]
    assert done == [(job, threading.get_ident(), False, 1) for job in range(4)]
    assert list(in_turn(work, range(3))) == [0, 1, 2]


def test_cancelling_does_not_wait_for_the_layer_under_way_and_leaves_no_thread():
    stop, release = threading.Event(), threading.Event()
    done = []

    def slow(job):
        if job >= 8:
            release.wait(600)
        done.append(job)
        return job

    def ours():
        return [thread for thread in threading.enumerate() if thread.name.startswith("loramerge")]

    results = parallel_map(slow, range(1000), workers=2, cancel=stop.is_set)
    try:
        with pytest.raises(Cancelled):
            [stop.set() for result in results if result == 7]
        assert sorted(done) == list(range(8))  # The layers under way have not come to an end.
    finally:
        release.set()
    for thread in ours():
        thread.join(60)
    assert not ours()
    assert len(done) <= 10


def test_leaving_the_loop_early_ends_the_work():
    done = []
    for result in parallel_map(lambda job: done.append(job) or job, range(1000), workers=2):
        if result == 5:
            break
    time.sleep(0.05)
    assert len(done) < 100


def test_layers_taken_together_come_out_as_one_by_one():
    jobs = layers()
    jobs.append(stack([low_rank(20, 30, 16, seed=1), low_rank(20, 30, 16, seed=2)], [1.0, 1.0]))
    jobs.append(stack([low_rank(64, 96, 16, seed=1)] * 2, [1.0, -1.0]))
    tiny = low_rank(64, 96, 32, seed=1)
    jobs.append(LowRank(tiny.up * 1e-9, tiny.down, 32.0))
    rules = [lambda spectrum, most=8 + i % 2: min(most, spectrum.rank) for i in range(len(jobs))]
    for dtype in (torch.float16, torch.float32):
        for one, delta, rule in zip(cut_layers(jobs, dtype, rules), jobs, rules, strict=True):
            other = cut_layer(delta, dtype, rule)
            if other is None:
                assert one is None
                continue
            assert (one.rank, one.alpha, one.up.dtype) == (other.rank, other.alpha, dtype)
            assert one.error_sq == pytest.approx(other.error_sq, rel=1e-3)
            torch.testing.assert_close(
                one.delta().dense(),
                other.delta().dense(),
                rtol=0,
                atol=2e-3 * float(other.delta().dense().abs().max()),
            )


def precisions() -> list[object]:
    """Every setting of torch for products of float32 numbers; an error where it cannot be read."""
    looks = (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
    )
    found: list[object] = []
    for look in looks:
        try:
            found.append(look())
        except (AttributeError, RuntimeError) as error:
            found.append(type(error))
    return found


def shared_setting() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def named_setting() -> None:
    torch.set_float32_matmul_precision("medium")


def setting_of_one_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


ROUNDED = {True, "medium", "high", "tf32", "bf16"}


@pytest.mark.parametrize("turn_on", [shared_setting, named_setting, setting_of_one_backend])
def test_products_on_an_accelerator_have_full_precision_whatever_the_host_has_turned_on(turn_on):
    plain = precisions()
    turn_on()
    try:
        wanted = precisions()
        assert wanted != plain
        with full_precision():
            with full_precision():
                assert not ROUNDED & set(precisions())
            assert not ROUNDED & set(precisions())
        assert precisions() == wanted
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("turn_on", [shared_setting, setting_of_one_backend])
def test_work_on_the_cpu_leaves_the_host_its_settings_for_graphics_cards(turn_on):
    turn_on()
    try:
        wanted = precisions()
        seen = list(parallel_map(lambda _: precisions(), range(3), workers=2))
        cut_layers(layers()[:1], torch.float16, [lambda spectrum: seen.append(precisions()) or 4])
        assert [*seen, precisions()] == [wanted] * 5
    finally:
        torch.set_float32_matmul_precision("highest")


def test_work_on_the_cpu_has_full_precision_where_the_host_rounds_there_too():
    named_setting()
    try:
        wanted = precisions()
        seen = list(parallel_map(lambda _: precisions(), range(3), workers=2))
        assert all(not ROUNDED & set(while_working) for while_working in seen)
        assert precisions() == wanted
    finally:
        torch.set_float32_matmul_precision("highest")
