"""How close the cores come to the ideal schedule, in fake time: a scheduler, agents, and runners
whose tasks take a known time.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.agent import Agent
from achilles.core.scheduler import Scheduler
from achilles.runtime.hosted import LOOK_SECONDS
from achilles.runtime.runner import QUIET_SECONDS
from benchmarks.stats import Span, ideal_seconds, longest_idle
from tests.unit.core.bench import crossed

CLIENT = "client"


class Runner:
    """What it was given and has not started, and the results that nobody has seen yet."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, int, int, bool]] = deque()
        self.is_busy = False
        self.woken_at = -inf
        self.cut_until = 0.0  # until then its host looks more often, for a chunk that was cut
        self.results: list[tuple[int, int, int, float, bytes]] = []


class Cluster:
    """``workers`` of ``slots`` slots; a message to or from a worker takes ``delay`` seconds."""

    def __init__(self, seconds: Sequence[float], *, workers: int, slots: int, delay: float) -> None:
        self.seconds = seconds
        self.spans: dict[int, Span] = {}
        self.returned = 0  # tasks that came back, and were given out again
        self.now = 0.0
        self._delay = delay
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._scheduler = Scheduler(now=0.0)
        self._agents = {f"worker {number}": Agent(slots) for number in range(workers)}
        self._runners: dict[tuple[str, int], Runner] = {}
        hello = p.ClientHello(bytes(16), "client", "0", "3", CLIENT)
        self._scheduler.join(CLIENT, hello, 0.0)
        for name in self._agents:
            self._send(
                self._scheduler.join(name, p.WorkerHello(bytes(16), "0", "3", name, slots, 1), 0.0)
            )

    def run(self) -> list[Span]:
        """When each task ran."""
        count = len(self.seconds)
        self._say(CLIENT, p.Blob(0, 1, b"f"))
        self._say(CLIENT, p.Submit(1, 0, list(range(1, count + 1)), [b"x"] * count))
        while len(self.spans) < count:
            self._step()
        return [self.spans[id] for id in range(1, count + 1)]

    def _step(self) -> None:
        cores: dict[str, Scheduler | Agent] = {"": self._scheduler, **self._agents}
        due = [
            (at, name) for name, core in cores.items() if (at := core.next_deadline()) is not None
        ]
        at, name = min(due, default=(float("inf"), ""))
        if self._events and self._events[0][0] <= at:
            self.now, _, event = heapq.heappop(self._events)
            event()
            return
        assert due, "tasks are left, and nothing will happen"
        self.now = max(self.now, at)
        if name:
            self._take(name, self._agents[name].tick(self.now))
        else:
            self._send(self._scheduler.tick(self.now))

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def _say(self, peer: str, message: Any) -> None:
        self.returned += len(message.indexes) if isinstance(message, p.Returned) else 0
        self._send(self._scheduler.receive(peer, crossed(message), self.now))
        self._scheduler.check_invariants()

    def _send(self, sends: Iterable[Any]) -> None:
        for to, message in sends:
            if to != CLIENT:
                self._after(self._delay, lambda to=to, message=message: self._tell(to, message))  # type: ignore[misc]

    def _tell(self, name: str, message: Any) -> None:
        self._take(name, self._agents[name].receive(message, self.now))
        self._agents[name].check_invariants()

    def _take(self, name: str, sends: Iterable[Any]) -> None:
        """What an agent sends."""
        for to, message in sends:
            if to == "broker":
                self._after(self._delay, lambda message=message: self._say(name, message))  # type: ignore[misc]
            elif isinstance(message, p.Spawn):
                self._runners[name, message.runner] = Runner()
            elif isinstance(message, p.Execute):
                runner = self._runners[name, message.runner]
                last = len(message.ids) - 1
                runner.waiting.extend(
                    (message.seq, n, id, n == last) for n, id in enumerate(message.ids)
                )
                if not runner.is_busy:
                    self._start(name, message.runner)
            elif isinstance(message, p.Recall):
                self._recall(name, message.runner)

    def _recall(self, name: str, number: int) -> None:
        runner = self._runners[name, number]
        counts: dict[int, int] = {}
        for seq, *_ in runner.waiting:
            counts[seq] = counts.get(seq, 0) + 1
        runner.waiting.clear()
        if counts:
            runner.cut_until = self.now + QUIET_SECONDS
            self._after(0.0, lambda: self._read(name, number))
        self._tell(name, p.RunnerRecalled(number, list(counts.items())))

    def _start(self, name: str, number: int) -> None:
        runner = self._runners[name, number]
        runner.is_busy = bool(runner.waiting)
        if not runner.is_busy:
            return
        seq, index, id, is_last = runner.waiting.popleft()
        start, seconds = self.now, self.seconds[id - 1]

        def end() -> None:
            self.spans[id] = Span(start, self.now)
            runner.results.append((seq, index, 0, seconds, b""))
            is_seen = is_last or self.now - runner.woken_at >= QUIET_SECONDS
            if is_seen:
                runner.woken_at = self.now
            unseen = LOOK_SECONDS if self.now < runner.cut_until else QUIET_SECONDS
            self._after(0.0 if is_seen else unseen, lambda: self._read(name, number))
            self._start(name, number)

        self._after(seconds, end)

    def _read(self, name: str, number: int) -> None:
        runner = self._runners[name, number]
        results, runner.results = runner.results, []
        if results:
            self._tell(name, p.RunnerDone(number, results))


def skewed(seed: int) -> list[float]:
    """One task in a hundred is 100 times longer."""
    seconds = [0.1 if index % 100 == 0 else 0.001 for index in range(1000)]
    random.Random(seed).shuffle(seconds)
    return seconds


def in_order(seconds: Sequence[float], slots: int) -> float:
    """How long it takes if whoever is free takes the next one at once."""
    free_at = [0.0] * slots
    for one in seconds:
        heapq.heapreplace(free_at, free_at[0] + one)
    return max(free_at)


@pytest.mark.parametrize("delay", [0.0, 0.0003])
@pytest.mark.parametrize("seed", range(4))
def test_skewed_lengths_come_near_the_ideal(seed: int, delay: float) -> None:
    seconds = skewed(seed)
    spans = Cluster(seconds, workers=1, slots=2, delay=delay).run()
    total = max(span.end for span in spans)
    assert total <= 1.03 * in_order(seconds, 2)
    assert total <= 1.1 * ideal_seconds(seconds, 2)
    assert longest_idle(spans, 2, 0.0) <= 0.03 + 4 * delay


@pytest.mark.parametrize("seed", range(3))
def test_nothing_waits_long_behind_a_long_task_where_another_worker_idles(seed: int) -> None:
    spans = Cluster(skewed(seed), workers=2, slots=2, delay=0.0003).run()
    assert longest_idle(spans, 4, 0.0) <= 0.03


@pytest.mark.parametrize(("workers", "slots"), [(8, 2), (1, 16)])
def test_the_first_tasks_that_are_done_do_not_stand_for_all(workers: int, slots: int) -> None:
    """They are the shortest of those that begin together. By their length alone,
    a third of all would be given out twice.
    """
    returned, ratios = 0, []
    for seed in range(12):
        lengths = random.Random(seed)
        seconds = [lengths.expovariate(500) for _ in range(600)]
        cluster = Cluster(seconds, workers=workers, slots=slots, delay=0.0003)
        spans = cluster.run()
        returned += cluster.returned
        ratios.append(max(span.end for span in spans) / in_order(seconds, 16))
        assert longest_idle(spans, 16, 0.0) <= 0.03
    assert returned <= 0.1 * 12 * 600
    assert statistics.mean(ratios) <= 1.045


@pytest.mark.parametrize("length", [0.0001, 0.001, 0.01, 0.04, 0.06, 0.08, 0.09, 0.1, 0.2])
def test_equal_lengths_leave_no_gaps(length: float) -> None:
    count = min(5000, int(2 / length))
    spans = Cluster([length] * count, workers=1, slots=2, delay=0.0003).run()
    ideal = -(-count // 2) * length
    assert ideal / max(span.end for span in spans) >= 0.98


@pytest.mark.parametrize("length", [0.06, 0.1, 0.2])
def test_tasks_of_some_length_do_not_pay_for_a_slow_connection(length: float) -> None:
    """A message takes 20 ms each way. Sent one by one, each task of 100 ms would take 140; so much
    do the first and the last ones.
    """
    returned, ratios = 0, []
    for seed in range(6):
        lengths = random.Random(seed)
        seconds = [length * lengths.uniform(0.8, 1.2) for _ in range(320)]
        cluster = Cluster(seconds, workers=4, slots=4, delay=0.02)
        spans = cluster.run()
        returned += cluster.returned
        ratios.append(max(span.end for span in spans) / in_order(seconds, 16))
    assert returned <= 0.02 * 6 * 320
    assert statistics.mean(ratios) <= 1 + 0.14 / (20 * length)
