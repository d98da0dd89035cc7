"""One real runner as its host has it: results, deaths, and what must not block or leak."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from achilles.core.protocol import (
    Execute,
    Kill,
    Load,
    Parts,
    Recall,
    Retire,
    RunnerDied,
)
from achilles.runtime import host as host_module
from achilles.runtime import hosted as hosted_module
from achilles.runtime import process as process_module
from achilles.runtime import shared
from achilles.runtime.bundle import Bundle
from achilles.runtime.runner import RECORD
from achilles.runtime.serialize import LARGE, dumps, dumps_call
from tests.descriptors import open_descriptors, wait_until_closed
from tests.security.attacks import attack
from tests.unit.runtime import tasks
from tests.unit.runtime.driver import BOUND, CLIENT, Driver, Gate, await_end, driving

# --- Results --------------------------------------------------------------------------------------


def test_one_task(driver: Driver) -> None:
    assert driver.run(tasks.add, 1, 2) == 3


def test_a_chunk_gives_a_result_a_task(driver: Driver) -> None:
    fn = driver.load(tasks.add)
    driver.execute(1, fn, *((n,) for n in range(5000)))
    driver.until(lambda: len(driver.results) == 5000)
    assert [driver.outcome(1, index) for index in range(5000)] == [*range(5000)]
    assert all(0 <= seconds < BOUND for seconds in driver.seconds.values())


def test_a_record_comes_in_as_many_pieces_as_it_will(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose payload is not behind it, but was handed over."""
    monkeypatch.setattr(host_module, "READ_MAX", 7)
    monkeypatch.setattr(hosted_module, "READS_MAX", 1)
    with driving() as driver:
        driver.spawn()
        assert driver.run(tasks.identity, 2 * LARGE * b"x") == 2 * LARGE * b"x"
        assert driver.run(tasks.add, 1, seq=201) == 1


def test_chunks_queue_up_and_seqs_come_again(driver: Driver) -> None:
    fn = driver.load(tasks.add)
    for round in range(3):
        for seq in range(1, 256):
            driver.execute(seq, fn, (seq,), (round,))
        driver.until(lambda: len(driver.results) == 510)
        assert driver.outcome(255, 0) == 255
        assert driver.outcome(255, 1) == round
        driver.results.clear()


def test_a_result_does_not_wait_for_a_slow_successor(driver: Driver, gate: Gate) -> None:
    driver.execute(1, driver.load(tasks.wait_at), (os.devnull,), (os.devnull,), (gate.path,))
    driver.until(gate.is_reached)
    assert driver.outcome(1, 0) == driver.outcome(1, 1) == ""
    assert (1, 1, 2) not in driver.results
    gate.open("x")
    assert driver.outcome(1, 2) == "x"


def test_what_a_bundle_tells_comes_behind_what_was_done_before_it(
    driver: Driver, gate: Gate
) -> None:
    """Else who loses the worker then would take another task for the one that was running."""
    fn = driver.load(Bundle(tasks.wait_at))
    paths = [[os.devnull], [os.devnull], [gate.path, os.devnull]]
    driver.execute(1, fn, *((flat, 1, number) for number, flat in enumerate(paths)))
    driver.until(lambda: driver.letters)
    assert driver.outcome(1, 0) == ([""], {})
    assert (1, 1, 1) in driver.results
    driver.until(gate.is_reached)
    gate.open("x")
    assert driver.outcome(1, 2) == (["x"], {})


# --- Deaths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "argument", "reason"),
    [
        (tasks.exit_hard, 5, "exited with code 5"),
        (tasks.exit_hard, 0, "exited with code 0"),
        (tasks.signal_self, signal.SIGSEGV, "was killed by SIGSEGV"),
        (tasks.signal_self, signal.SIGABRT, "was killed by SIGABRT"),
        (
            tasks.signal_self,
            signal.SIGKILL,
            "was killed by SIGKILL (often the kernel's out-of-memory killer)",
        ),
    ],
)
def test_a_death_is_told_after_all_results(
    driver: Driver, capfd: pytest.CaptureFixture[str], function: Any, argument: int, reason: str
) -> None:
    add, die = driver.load(tasks.add), driver.load(function)
    driver.execute(1, add, (1,), (2,), (3,))
    driver.execute(2, die, (argument,), (argument,))
    driver.execute(3, add, (4,))
    assert driver.death() == RunnerDied(1, reason, [(2, 1), (3, 1)], 3)
    assert driver.results.keys() == {(1, 1, 0), (1, 1, 1), (1, 1, 2)}
    assert driver.host.pids() == {}
    assert driver.host.next_deadline(0.0) is None


@attack("T30")
@pytest.mark.bad_input(22)
@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (tasks.close_everything, "exited with code 74 (did the task close the worker's pipe?)"),
        (
            tasks.close_everything_and_spin,
            "lost its pipe to the worker (did the task close it?), and was killed",
        ),
    ],
)
def test_a_task_that_closes_our_descriptors_ends_its_runner_only(
    driver: Driver, function: Any, hint: str
) -> None:
    driver.execute(1, driver.load(function), ())
    assert driver.death() == RunnerDied(1, hint, [], 1)


@attack("T30")
@pytest.mark.bad_input(24)
def test_kill_ends_a_busy_runner_and_what_it_started(driver: Driver, tmp_path: Path) -> None:
    pid = driver.run(tasks.leave_a_process, "")
    driver.execute(1, driver.load(tasks.spin_noted), (str(tmp_path / "log"),), ("",))
    driver.until((tmp_path / "log").exists)
    driver.apply(Kill(1))
    assert driver.death() == RunnerDied(1, "was killed", [(1, 1)], 1)
    await_end(pid)


def test_a_death_is_seen_although_a_grandchild_holds_the_pipes(driver: Driver) -> None:
    pid = driver.run(tasks.leave_a_process, "")
    driver.execute(1, driver.load(tasks.exit_hard), (3,))
    assert driver.death().reason == "exited with code 3"
    await_end(pid)


@pytest.mark.bad_input(76)
def test_without_a_pidfd_a_death_is_seen_by_the_end_of_the_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_module, "_pidfd", lambda pid, ours: -1)
    with driving() as driver:
        driver.spawn()
        driver.execute(1, driver.load(tasks.exit_hard), (3,))
        assert driver.death().reason == "exited with code 3"
        driver.spawn(2)
        driver.run(tasks.add, 1, runner=2)


def test_retire_lets_a_runner_finish(driver: Driver, gate: Gate) -> None:
    driver.execute(1, driver.load(tasks.wait_at), (gate.path,))
    driver.execute(2, driver.load(tasks.add), (1,))
    driver.until(gate.is_reached)
    driver.apply(Retire(1), Retire(1))
    gate.open()
    assert driver.death() == RunnerDied(1, "", [], 2)
    assert driver.outcome(2) == 1


def test_what_a_retired_runner_is_given_comes_back(driver: Driver, gate: Gate) -> None:
    driver.execute(1, driver.load(tasks.wait_at), (gate.path,))
    driver.until(gate.is_reached)
    driver.execute(2, driver.load(tasks.add), (1,))
    driver.apply(Recall(1))
    driver.execute(2, driver.load(tasks.add), (1,))  # held back until the sync
    driver.apply(Retire(1))
    driver.execute(3, driver.load(tasks.add), (1,))
    gate.open()
    assert driver.death() == RunnerDied(1, "", [(2, 1), (3, 1)], 3)


def test_a_reaped_child_is_still_buried(driver: Driver) -> None:
    pid = driver.host.pids()[1]
    driver.run(tasks.add, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)  # as a program's own SIGCHLD handler might
    assert driver.death().reason.startswith("ended (how is not known")


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "in band"])
@pytest.mark.parametrize("size", [LARGE - 100, LARGE, 3_000_000])
def test_large_payloads(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, size: int, is_shared: bool
) -> None:
    if not is_shared:
        monkeypatch.setattr(hosted_module, "IS_AVAILABLE", False)
    value = os.urandom(size)
    driver.apply(Load(1, CLIENT, 9, Parts((dumps(tasks.identity), bytes(size)))))
    for seq in (1, 2):
        driver.execute(seq, 9, (value,), (b"small",), (value,))
    for seq in (1, 2):
        assert driver.outcome(seq, 0) == driver.outcome(seq, 2) == value
        assert driver.outcome(seq, 1) == b"small"


def test_buffers_are_handed_over_writable_and_private(driver: Driver) -> None:
    data = bytearray(LARGE * 2)
    payload: Any = dumps_call((tasks.Buffer(data), 7), {})
    fn = driver.load(tasks.fill)
    for seq in (1, 2):  # as after a crash: the same payload once more
        driver.apply(Execute(1, seq, CLIENT, fn, 0, [payload]))
        result = driver.outcome(seq).data
        assert bytes(result) == b"\7" * (LARGE * 2)
        result[0] = 1  # ours to write to as well
    assert data == bytes(LARGE * 2)


def test_more_results_than_may_be_mapped(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(shared, "MAPPINGS_MAX", 2)
    before = open_descriptors()
    fn = driver.load(tasks.identity)
    results = []
    for seq in range(1, 9):
        driver.execute(seq, fn, (tasks.Buffer(bytearray(LARGE)),))
        results.append(driver.outcome(seq))
        driver.results.clear()
    results[-1].data[0] = 1
    wait_until_closed(before, more=4)


def test_a_result_that_cannot_be_received(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    def fail(self: object, *, keep: bool) -> None:
        raise OSError("too many open files")

    driver.run(tasks.add, 1)
    monkeypatch.setattr(shared.Handoff, "receive", fail)
    driver.execute(1, driver.load(tasks.identity), (bytes(LARGE),), (1,))
    death = driver.death()
    assert death.unstarted in ([], [(1, 1)])
    assert not {key for key in driver.results if key[1] == 1}
    assert death.reason == (
        "gave a result that could not be received: too many open files, and was killed"
    )


def test_more_than_a_command_can_hold(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    fn = driver.load(tasks.identity)
    monkeypatch.setattr(hosted_module, "COMMAND_MAX", 2 * LARGE)
    monkeypatch.setattr(hosted_module, "HANDOFFS_MAX", 2)
    large = bytes(LARGE)
    driver.execute(1, fn, *((large,) for _ in range(4)))
    for index in range(4):
        assert "more than 2 GiB of arguments" in str(driver.outcome(1, index))
    driver.execute(2, fn, (large,), (large + b"x",))
    assert driver.outcome(2, 1) == large + b"x"
    monkeypatch.setattr(hosted_module, "IS_AVAILABLE", False)
    driver.apply(Load(1, CLIENT, 99, bytes(3 * LARGE)))
    driver.execute(3, 99, (1,))
    assert "did not pass function 99 on" in str(driver.outcome(3))


def test_a_busy_runner_does_not_block_the_host(driver: Driver, gate: Gate) -> None:
    add, wait = driver.load(tasks.add), driver.load(tasks.wait_at)
    identity = driver.load(tasks.identity)
    driver.execute(1, wait, (gate.path,))
    driver.until(gate.is_reached)
    data = bytes(LARGE - 1000)
    for seq in range(2, 42):  # 5 MB
        driver.execute(seq, identity, (data,))
    driver.execute(42, add, (42,))
    gate.open()
    assert driver.outcome(42) == 42
    assert driver.outcome(41) == data


def test_a_command_beyond_the_sockets_buffer_reaches_an_idle_runner(driver: Driver) -> None:
    fn = driver.load(tasks.add)
    driver.apply(Load(1, CLIENT, 77, bytes(LARGE - 1)), Load(1, CLIENT, 78, bytes(LARGE - 1)))
    driver.execute(1, fn, *((n,) for n in range(10_000)))
    driver.until(lambda: len(driver.results) == 10_000)


def test_tokens_beyond_the_pipes_size(driver: Driver, gate: Gate) -> None:
    import fcntl

    pipe = driver.host.runners[1].process.tokens._write_end
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)  # as of a user who has many pipes
    wait, add = driver.load(tasks.wait_at), driver.load(tasks.add)
    driver.execute(1, wait, (gate.path,))
    driver.until(gate.is_reached)
    driver.execute(2, add, *((n,) for n in range(9_000)))
    gate.open()
    driver.until(lambda: len(driver.results) == 9_001)


# --- A scripted runner ----------------------------------------------------------------------------


def test_a_record_that_was_not_finished_is_dropped(driver: Driver) -> None:
    add = driver.load(tasks.add)
    driver.execute(1, driver.load(_write_half_a_record), (tasks.__file__,), (1,))
    assert driver.death().reason == "exited with code 9"
    assert driver.death().unstarted == [(1, 1)]
    assert add
    assert driver.results == {}


def _write_half_a_record(_: str) -> None:
    import gc
    import os

    from achilles.runtime.runner import RECORD, Runner

    (runner,) = (found for found in gc.get_objects() if type(found) is Runner)
    os.write(runner.sock, RECORD.pack(1, 0, 0, 0.0, 100) + b"x" * 99)
    os.write(runner.stream, RECORD.pack(1, 0, 0, 0.0, 100)[:-1])
    os._exit(9)


@attack("T30")
@pytest.mark.parametrize(
    "record",
    [
        b"\x4d" * 100,
        RECORD.pack(2, 0, 0, 0.0, 0),
        RECORD.pack(0, 0, 0, 0.0, 0),
        RECORD.pack(1, 3, 0, 0.0, 0),
        RECORD.pack(1, 0, 5, 0.0, 0),
    ],
    ids=["junk", "unknown chunk", "no sync", "unknown status", "unknown task"],
)
def test_a_runner_that_writes_nonsense_is_killed(driver: Driver, record: bytes) -> None:
    driver.execute(1, driver.load(_write_and_spin), (record,))
    assert driver.death().reason == (
        "wrote something else than results to the worker's pipe, and was killed"
    )
    assert driver.results == {}


def _write_and_spin(record: bytes) -> None:
    import gc
    import os

    from achilles.runtime.runner import Runner
    from tests.unit.runtime import tasks

    (runner,) = (found for found in gc.get_objects() if type(found) is Runner)
    os.write(runner.sock, record)
    tasks.spin()
