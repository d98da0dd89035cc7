"""Large arguments and functions travel once, are the value at the call, and are each task's own."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from achilles import DistributedExecutor
from achilles.core import protocol as p
from achilles.core.submission import Send, Submission
from achilles.net import near
from achilles.runtime.shared import adopt
from tests import tasks
from tests.integration.test_faults import kill_broker, own_cluster, runners_of, start_broker
from tests.modes import CLUSTER, EMBEDDED, OURS, Maker, of_modes, wait_until

np = pytest.importorskip("numpy")

MIB = 1 << 20

Sent = list[tuple[type, int]]


def array(fill: float, mib: int = 2) -> Any:
    return np.full(mib * MIB // 8, float(fill))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The kinds and sizes of what submissions sent to their brokers."""
    messages: list[tuple[type, int]] = []

    def noting(method: Callable[..., list[Send]]) -> Callable[..., list[Send]]:
        @functools.wraps(method)
        def note(*args: Any) -> list[Send]:
            sends = method(*args)
            for _, message in sends:
                if isinstance(message, p.Blob):
                    messages.append((p.Blob, p.size_of(message.payload)))
                elif isinstance(message, p.Submit):
                    messages.extend((p.Submit, p.size_of(payload)) for payload in message.payloads)
            return sends

        return note

    for method in (Submission.submit, Submission.receive):
        monkeypatch.setattr(Submission, method.__name__, noting(method))
    return messages


def large_blobs(sent: Sent) -> int:
    return sum(kind is p.Blob and size >= MIB for kind, size in sent)


def bytes_of_tasks(sent: Sent) -> int:
    return sum(size for kind, size in sent if kind is p.Submit)


def memfds(pid: int) -> int:
    """How many large payloads a process has mapped."""
    return sum(
        "memfd:achilles" in line for line in Path(f"/proc/{pid}/maps").read_text().split("\n")
    )


@contextlib.contextmanager
def holding(executor: Any, gate: Path) -> Iterator[None]:
    """Both slots are taken until all is submitted: what was given once is forgotten when done."""
    blockers = [executor.submit(tasks.await_file, str(gate)) for _ in range(2)]
    wait_until(lambda: all(blocker.running() for blocker in blockers))
    yield
    gate.touch()
    for blocker in blockers:
        blocker.result(60)


@of_modes(*OURS)
@pytest.mark.parametrize("kind", ["array", "bytes", "str", "nested"])
def test_two_hundred_tasks_and_one_transfer(
    make: Maker, sent: Sent, kind: str, tmp_path: Path
) -> None:
    value: Any = {
        "array": array(1, 16),
        "bytes": bytes(16 * MIB),
        "str": "x" * (16 * MIB),
        "nested": [{"deep": array(1, 16)}],
    }[kind]
    executor = make(2)
    with holding(executor, tmp_path / "gate"):
        futures = [executor.submit(tasks.second, value, n) for n in range(200)]
    assert [future.result(60) for future in futures] == list(range(200))
    assert large_blobs(sent) == 1
    assert bytes_of_tasks(sent) < MIB


@of_modes(*OURS)
@pytest.mark.parametrize("kind", ["partial", "closure", "object", "map"])
def test_functions_are_not_sent_again_either(
    make: Maker, sent: Sent, kind: str, tmp_path: Path
) -> None:
    x = array(3, 4)
    fn: Any = {
        "partial": functools.partial(tasks.first_plus, x),
        "closure": lambda n: float(x[0]) + n,
        "object": tasks.Holder(x),
        "map": functools.partial(tasks.first_plus, x),
    }[kind]
    executor = make(2)
    with holding(executor, tmp_path / "gate"):
        if kind == "map":
            results = executor.map(fn, range(40))
        else:
            futures = [executor.submit(fn, n) for n in range(40)]
            results = (future.result(60) for future in futures)
    assert list(results) == [3.0 + n for n in range(40)]
    assert large_blobs(sent) == 1
    assert bytes_of_tasks(sent) < MIB


@of_modes(*OURS)
def test_one_after_the_other_it_travels_at_most_twice(make: Maker, sent: Sent) -> None:
    x, executor = array(5), make(2)
    for n in range(10):
        assert executor.submit(tasks.first_plus, x, n).result(60) == 5.0 + n
    assert large_blobs(sent) <= 2


@of_modes(*OURS)
def test_items_of_maps_share(make: Maker, sent: Sent, tmp_path: Path) -> None:
    x, y, executor = array(1), array(2), make(2)
    with holding(executor, tmp_path / "gate"):
        results = executor.map(tasks.first_plus, [x, y] * 20, range(40))
    assert list(results) == [(1.0, 2.0)[n % 2] + n for n in range(40)]
    assert large_blobs(sent) == 2


@of_modes(*OURS)
def test_a_change_between_calls_is_seen(make: Maker) -> None:
    x, executor = array(0), make(2)
    futures = []
    for n in range(30):
        x[n % 3] = n
        futures.append((float(x.sum()), executor.submit(np.sum, x)))
        futures.append((float(x.sum()), executor.submit(functools.partial(np.sum, x))))
    for expected, future in futures:
        assert future.result(60) == expected


@of_modes(*OURS)
@pytest.mark.parametrize("size", [1000, 100_000, 300_000, 2 * MIB])
def test_what_a_task_writes_is_its_own(make: Maker, size: int) -> None:
    """Also what it writes to an array that its function holds, however that came to the runner."""
    x, executor = np.ones(size // 8), make(1)
    held, bound = functools.partial(tasks.add_one, x), tasks.Holder(x).add_one
    futures = [executor.submit(tasks.add_one, x) for _ in range(10)]
    for fn in (held, bound):
        futures += [executor.submit(fn) for _ in range(10)]
    if size >= MIB:
        futures += [executor.submit(lambda: tasks.add_one(x)) for _ in range(10)]
    assert [future.result(60) for future in futures] == [2.0 * len(x)] * len(futures)
    assert list(executor.map(tasks.Holder(x).add_one, range(10))) == [2.0 * len(x)] * 10
    assert (x == 1).all()


def anonymous(pid: int) -> int:
    """The bytes of a process that are its own."""
    (line,) = (
        line
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n")
        if line.startswith("Anonymous:")
    )
    return int(line.split()[1]) << 10


@of_modes(*OURS)
def test_an_idle_runner_keeps_nothing_of_what_tasks_wrote(make: Maker, tmp_path: Path) -> None:
    """Though the rest of the chunk was called back, and the result is a view of it."""
    x, executor, gate = array(0, 32), make(1), tmp_path / "gate"
    for future in [executor.submit(tasks.write_and_return, x) for _ in range(60)]:
        future.result(60)
    first = executor.submit(tasks.write_and_return, x, str(gate))
    others = [executor.submit(tasks.write_and_return, x) for _ in range(20)]
    noted = tmp_path / "gate.pid"
    wait_until(lambda: tasks.notes(noted))
    pid = int(tasks.notes(noted)[0])  # of a cluster's runners any may have it
    held = anonymous(pid)
    assert held > 32 * MIB
    cancelled = [future.cancel() for future in others]
    gate.touch()
    assert first.result(60) == 1.0
    wait_until(lambda: anonymous(pid) < held - 16 * MIB)
    assert any(cancelled)


@of_modes(*OURS)
def test_what_was_used_once_is_forgotten_everywhere(make: Maker, sent: Sent) -> None:
    executor = make(1)
    pid = executor.submit(os.getpid).result(60)
    parent = executor.submit(os.getppid).result(60)
    before = memfds(pid), memfds(parent)
    for n in range(20):
        assert executor.submit(tasks.first_plus, array(n), 1).result(60) == n + 1
    assert large_blobs(sent) == 20
    submission = executor._core.backend._submission
    wait_until(lambda: len(submission._blobs) <= 4, "the client forgets")
    if make.mode == EMBEDDED:  # other runners of a cluster may have had it
        wait_until(lambda: memfds(pid) <= before[0], "the runner forgets")
    wait_until(lambda: memfds(parent) <= before[1] + 1, "the worker forgets")


@of_modes(EMBEDDED)
def test_what_is_used_often_is_kept_within_bounds(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("achilles.core.submission.BYTES_KEPT", 8 * MIB)
    executor = make(1)
    executor._arguments._bytes_kept = 8 * MIB
    arrays = [array(n) for n in range(20)]
    for _ in range(3):
        for n, x in enumerate(arrays):
            futures = [executor.submit(tasks.first_plus, x, 1) for _ in range(2)]
            assert [future.result(60) for future in futures] == [n + 1, n + 1]
    pid = executor.submit(os.getpid).result(60)
    submission = executor._core.backend._submission
    assert submission._idle_bytes <= 8 * MIB
    assert executor._arguments._kept <= 8 * MIB
    wait_until(lambda: memfds(pid) <= 2 * 5, "the runner forgets")  # each is mapped twice


def test_a_new_broker_gets_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, gate = array(4, 4), tmp_path / "gate"
    with (
        own_cluster(monkeypatch, workers=1, slots=1) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        assert executor.submit(tasks.first_plus, x, 1).result(60) == 5
        assert executor.submit(tasks.first_plus, x, 2).result(60) == 6
        blocker = executor.submit(tasks.await_file, str(gate))
        futures = [executor.submit(tasks.first_plus, x, n) for n in range(10)]
        wait_until(blocker.running)
        kill_broker(cluster)
        gate.touch()
        start_broker(cluster)
        assert [future.result(60) for future in futures] == [4.0 + n for n in range(10)]


def test_each_worker_gets_it_once_and_a_late_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = array(4, 4)
    with (
        own_cluster(monkeypatch, workers=1, slots=2) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        first = cluster.workers[0]
        futures = [executor.submit(tasks.first_plus, x, n) for n in range(20)]
        assert [future.result(60) for future in futures] == [4.0 + n for n in range(20)]
        assert memfds(first.pid) == 1
        second = cluster.add_worker(2)
        cluster.wait_until(lambda status: status["workers"] == 2)
        first.terminate()
        cluster.wait_until(lambda status: status["workers"] == 1)
        futures = [executor.submit(tasks.first_plus, x, n) for n in range(20)]
        assert [future.result(60) for future in futures] == [4.0 + n for n in range(20)]
        assert memfds(second.pid) == 1


# --- On one host ----------------------------------------------------------------------------------


def most_memory(pid: int) -> int:
    """The most bytes that a process ever had in memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def has_no_memfds(pid: int) -> bool:
    directory = f"/proc/{pid}/fd"
    names = []
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            names.append(os.readlink(f"{directory}/{name}"))
    return not any("memfd:achilles" in name for name in names)


def test_on_one_host_large_payloads_are_not_copied_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither broker nor worker ever has them in memory, and both let go of them."""
    x = array(4, 64)
    with own_cluster(monkeypatch, workers=1, slots=1) as cluster:
        assert cluster.broker is not None
        pids = [cluster.broker.pid, cluster.workers[0].pid]
        with DistributedExecutor(address=cluster.address) as executor:
            assert executor.submit(tasks.add, 1, 1).result(60) == 2
            before = [most_memory(pid) for pid in pids]
            for n in range(3):
                x[-1] = n
                result = executor.submit(tasks.echo, x).result(60)
                assert np.array_equal(result, x)
                result[0] = 5  # it is ours
            grown = [most_memory(pid) - size for pid, size in zip(pids, before, strict=True)]
            assert max(grown) < 16 * MIB
        for pid in pids:
            wait_until(functools.partial(has_no_memfds, pid), "memory is kept for nobody")


@pytest.mark.parametrize("who", ["the broker", "the client"])
def test_who_cannot_reach_the_memory_of_others_gets_it_in_full(
    monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """As in another container."""
    x, failed = array(4, 4), []
    original_fold, original_adopt = near.fold, adopt

    def fold(frames: Any) -> Any:
        folded = original_fold(frames)
        if folded is frames or who == "the client":
            return folded
        failed.append(len(frames))
        head = bytes(folded[0])
        nobody = (2**22 + 1).to_bytes(4, "little")
        return [head[:2] + nobody + head[6:], *folded[1:]]

    def try_to_adopt(*args: Any, **options: Any) -> Any:
        if who == "the broker":
            return original_adopt(*args, **options)
        failed.append(1)
        raise OSError("there is no /proc")

    with (
        own_cluster(monkeypatch, workers=1, slots=1) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        monkeypatch.setattr(near, "fold", fold)
        monkeypatch.setattr(near, "adopt", try_to_adopt)
        for n in range(3):
            x[-1] = n
            assert np.array_equal(executor.submit(tasks.echo, x).result(30), x)
    assert len(failed) == 1, "it was tried again and again, or never"


@pytest.mark.parametrize("who", ["a runner", "a worker", "the broker"])
def test_whoever_dies_large_payloads_and_results_arrive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, who: str
) -> None:
    """The memory of who has died is gone, and so is what was under way in it."""
    arrays, gate = [array(n) for n in range(12)], tmp_path / "gate"
    with (
        own_cluster(monkeypatch, workers=2, slots=1) as cluster,
        DistributedExecutor(address=cluster.address) as executor,
    ):
        blockers = [executor.submit(tasks.await_file, str(gate)) for _ in range(2)]
        futures = [executor.submit(tasks.echo, x) for x in arrays]
        wait_until(lambda: all(blocker.running() for blocker in blockers))
        if who == "a runner":
            runners_of(cluster.workers[0])[0].kill()
        elif who == "a worker":
            cluster.workers[0].kill()
        else:
            kill_broker(cluster)
            start_broker(cluster)
        gate.touch()
        for future, x in zip(futures, arrays, strict=True):
            assert np.array_equal(future.result(60), x)


@of_modes(CLUSTER)
def test_many_middling_arguments_and_results(make: Maker) -> None:
    """Together larger than a frame can be, though each is small enough to be sent inside a
    message.
    """
    executor = make(2)
    payload = bytes(p.INLINE_MAX - 1000)
    assert list(executor.map(len, [payload] * 600, chunksize=600)) == [len(payload)] * 600
    assert list(executor.map(bytes, [len(payload)] * 600, chunksize=600)) == [payload] * 600
    futures = [executor.submit(len, payload) for _ in range(1500)]
    assert [future.result(30) for future in futures] == [len(payload)] * 1500
