"""Chunks hold 5 to 80 ms of work by what is queued, and fewer tasks at the tail,
or while few were measured.
"""

from __future__ import annotations

from achilles.core.chunking import (
    CHUNK_SECONDS,
    CHUNK_SECONDS_MAX,
    MEASURED_TASKS,
    STUCK_SECONDS,
    Estimate,
    chunk_size,
)
from achilles.core.protocol import TASKS_MAX
from achilles.runtime.hosted import LOOK_SECONDS
from achilles.runtime.runner import QUIET_SECONDS
from tests.sim import runners


def estimate(seconds: float, tasks: int = 100) -> Estimate:
    """An estimate that has seen so many tasks of that duration."""
    made = Estimate()
    made.observe(tasks, seconds * tasks)
    return made


def test_an_unknown_duration_means_one_task() -> None:
    """Nothing may wait behind what could be long."""
    assert chunk_size(Estimate(), 10_000, 2) == 1
    assert not Estimate().is_short


def test_a_chunk_holds_so_much_work() -> None:
    """Short tasks share a dispatch, long ones do not."""
    assert chunk_size(estimate(CHUNK_SECONDS / 50), 160, 2) == 50
    assert chunk_size(estimate(1.0), 100_000, 2) == 1
    assert chunk_size(estimate(0.0), 10_000_000, 2) == TASKS_MAX


def test_a_chunk_holds_more_where_much_is_queued() -> None:
    """Half of a slot's share, and never so much that a result is missed."""
    short = estimate(1e-3)
    assert [chunk_size(short, queued, 2) for queued in (20, 100, 200, 80_000)] == [5, 25, 50, 80]
    assert chunk_size(short, 20_000, 2_000) == 5
    assert chunk_size(short, 80_000, 2, 7) == 7


def test_a_chunk_holds_no_more_where_clients_compete() -> None:
    """Or whose tasks come one by one would wait for the others' chunks."""
    assert chunk_size(estimate(1e-3), 80_000, 2, is_contested=True) == 5


def test_chunks_shrink_at_the_tail() -> None:
    """What is left is shared by all slots."""
    short = estimate(1e-4)
    assert [chunk_size(short, queued, 4) for queued in (320, 80, 48, 40)] == [50, 14, 8, 7]


def test_chunks_do_not_shrink_below_what_a_dispatch_is_worth() -> None:
    """Tasks that are submitted as fast as they are done are all tail."""
    short = estimate(1e-6)
    assert [chunk_size(short, queued, 4) for queued in (8000, 800, 80, 1)] == [1334, 500, 80, 1]
    assert chunk_size(estimate(1e-4), 9, 4) == 5
    assert chunk_size(estimate(1e-3), 9, 4) == 2


def test_an_explicit_chunksize_is_an_upper_bound() -> None:
    """The user's word holds; it never enlarges."""
    assert chunk_size(estimate(1e-6), 10_000, 2, 7) == 7
    assert chunk_size(estimate(1.0), 10_000, 2, 7) == 1


def test_no_more_travel_together_than_were_measured() -> None:
    """Who is first done took least, so the first few say little of the rest."""
    made = Estimate()
    sizes = []
    for tasks in (1, 2, 20, MEASURED_TASKS):
        made.observe(tasks, 1e-6 * tasks)
        sizes.append(chunk_size(made, 10_000, 2))
    assert sizes == [4, 12, 92, 3334]


def test_a_guess_is_as_good_as_what_it_is_from() -> None:
    """And the first task that is measured replaces it, but says no more than any first one."""
    made = Estimate(estimate(1e-6, tasks=7))
    assert chunk_size(made, 10_000, 2) == 28
    made.observe(1, 1e-4)
    assert made.seconds == 1e-4
    assert chunk_size(made, 80_000, 2) == 4


def test_one_slow_first_call_is_soon_outweighed() -> None:
    """A first call pays for imports."""
    made = estimate(0.5, tasks=1)
    made.observe(1000, 1000 * 1e-5)
    assert made.seconds is not None
    assert made.seconds < 1e-3
    assert made.is_short


def test_long_tasks_are_not_prefetched() -> None:
    """Where what waits behind them would be given back before they end."""
    assert estimate(0.9 * STUCK_SECONDS).is_short
    assert not estimate(1.1 * STUCK_SECONDS).is_short
    assert repr(Estimate()) == "<Estimate unknown>"


def test_a_whole_chunk_goes_by_before_its_results_are_looked_for() -> None:
    """Or each chunk would send two messages. And what lies in a pipe unseen is not taken for
    stuck.
    """
    assert CHUNK_SECONDS_MAX < QUIET_SECONDS < STUCK_SECONDS


def test_simulated_hosts_look_as_often_as_real_ones() -> None:
    """They may not import the runtime."""
    assert (runners.STREAM_INTERVAL, runners.CUT_INTERVAL) == (QUIET_SECONDS, LOOK_SECONDS)
