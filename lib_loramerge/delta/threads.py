"""Work spread over threads, one layer each, so that results do not depend on how many there are."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import TypeVar

import torch

from ..errors import Cancelled
from .settings import own_settings

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_NUMBERS_A_THREAD = 150_000


def parallel_map(
    function: Callable[[_Job], _Result],
    jobs: Iterable[_Job],
    *,
    workers: int | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Iterator[_Result]:
    """Apply ``function`` to each job on worker threads; results come in the order of the jobs.

    At most a few jobs per worker are ahead of the consumer, so memory stays bounded. An exception of a job
    is raised here; leaving the loop early stops the rest.

    Args:
        function: Called on a worker thread with gradients off and one torch thread.
        jobs: Taken lazily, on the caller's thread.
        workers: Threads; by default one per core.
        cancel: Asked about every tenth of a second; True ends the work.

    Raises:
        Cancelled: ``cancel`` said so.
    """
    workers = workers or available_cores()
    waiting = iter(jobs)
    ahead: deque[Future[_Result]] = deque()
    with own_settings():
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loramerge", initializer=_start_worker)
        complete = False
        try:
            while True:
                while len(ahead) < 4 * workers:
                    try:
                        job = next(waiting)
                    except StopIteration:
                        break
                    ahead.append(pool.submit(_without_gradients, function, job))
                if not ahead:
                    complete = True
                    return
                yield _result(ahead.popleft(), cancel)
        finally:
            # Whoever stops does not wait for a large layer that is under way; its result is dropped.
            pool.shutdown(wait=complete, cancel_futures=True)


def in_turn(
    function: Callable[[_Job], _Result], jobs: Iterable[_Job], *, cancel: Callable[[], bool] | None = None
) -> Iterator[_Result]:
    """The same as :func:`parallel_map` on the caller's thread, where nothing else is to be done meanwhile.

    Threads that hand each other Python's lock cost CPU, which only pays where they work side by side.
    """
    with own_settings():
        for job in jobs:
            raise_if(cancel)
            yield _without_gradients(function, job)


def raise_if(cancel: Callable[[], bool] | None) -> None:
    """Raise Cancelled where ``cancel`` says that the work is to stop."""
    if cancel is not None and cancel():
        raise Cancelled("Stopped. Nothing was written.")


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def helpful_threads(numbers: float) -> int:
    """How many threads get through jobs of so many numbers soonest.

    A layer's small factors are a few hundred short operations, between which Python's threads wait for each
    other: on 16 cores, four take longer than two. Whole matrices keep every core busy.
    """
    return min(available_cores(), max(2, round(numbers / _NUMBERS_A_THREAD)))


def _start_worker() -> None:
    torch.set_num_threads(1)


def _without_gradients(function: Callable[[_Job], _Result], job: _Job) -> _Result:
    with torch.no_grad():
        return function(job)


def _result(future: Future[_Result], cancel: Callable[[], bool] | None) -> _Result:
    while True:
        raise_if(cancel)
        try:
            return future.result(timeout=0.1)
        except NotYet:
            if future.done():  # The job's own.
                return future.result()
