"""What a message costs does not grow with the number of workers, nor with the queue.

Work is counted, in bytecodes; times would say something else each time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import CodeType, FrameType
from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.core.chunking import CHUNK_SECONDS_MAX
from achilles.core.link import Packet
from achilles.core.liveness import Timings
from achilles.core.scheduler import Scheduler
from achilles.core.sessions import Sessions

FEW, MANY = 10, 500
SECONDS = CHUNK_SECONDS_MAX  # that a task takes: however many are queued, one makes a chunk
NOW = 100.0
PAYLOAD = b"a call"


class Site:
    """Sessions of a client and of ``workers`` workers,
    in front of a scheduler with ``queue`` queued tasks.
    """

    def __init__(self, workers: int, queue: int = 0) -> None:
        scheduler = Scheduler(now=NOW)
        self.sessions = Sessions(scheduler, epoch=bytes(16), timings=Timings(), credit=0, now=NOW)
        self.scheduler = scheduler
        self.peers = 0
        self.client = self.join(self.client_hello())
        self.first = self.join(self.worker_hello())
        for _ in range(workers - 1):
            self.last = self.join(self.worker_hello())
        self.say(self.client, p.Blob(0, 1, b"a function"))
        self.next_id = 1
        if queue:
            self.submit(workers * 2 + queue)

    def name(self) -> bytes:
        self.peers += 1
        return self.peers.to_bytes(16, "big")

    def client_hello(self) -> p.ClientHello:
        return p.ClientHello(self.name(), "client", "0", "3", "client")

    def worker_hello(self) -> p.WorkerHello:
        return p.WorkerHello(self.name(), "0", "3", "worker", 1, 1)

    def join(self, hello: p.ClientHello | p.WorkerHello) -> int:
        """Begin a session; its number in the scheduler."""
        role = "client" if isinstance(hello, p.ClientHello) else "worker"
        packet = Packet(p.Header(p.NO_TOKEN, 0, 0), hello)
        self.sessions.receive(self.peers, frozenset({role}), packet, NOW, hello.incarnation)
        return self.sessions._by_token[hello.incarnation].number

    def say(self, peer: int, message: Any) -> list[Any]:
        return self.scheduler.receive(peer, message, NOW)

    def submit(self, count: int = 1, blob: int = 1) -> list[Any]:
        first, self.next_id = self.next_id, self.next_id + count
        ids = list(range(first, self.next_id))
        return self.say(self.client, p.Submit(blob, 0, ids, [PAYLOAD] * count))

    def run_one(self) -> None:
        """A task is submitted, given out and done."""
        (run,) = self._runs(self.submit())
        self.say(*run)

    def done(self) -> Callable[[], object]:
        """What a worker's result costs, with the task that it gets in its place."""
        lease = next(iter(self.scheduler._workers[self.first].leases))
        return lambda: self.say(self.first, p.Done(lease, [0], b"\0", [b"value"], SECONDS))

    def _runs(self, sends: list[Any]) -> list[tuple[int, p.Done]]:
        return [
            (to, p.Done(message.lease, [0], b"\0", [b"value"], SECONDS))
            for to, message in sends
            if isinstance(message, p.Run)
        ]


def work(function: Callable[[], object]) -> int:
    """How many bytecodes are run by a call."""
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is None:
        return _trace(function)
    tool, event = monitoring.PROFILER_ID, monitoring.events.INSTRUCTION
    count = 0

    def note(code: CodeType, offset: int) -> None:
        nonlocal count
        count += 1

    monitoring.use_tool_id(tool, "bytecodes")
    try:
        monitoring.register_callback(tool, event, note)
        monitoring.set_events(tool, event)
        function()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.register_callback(tool, event, None)
        monitoring.free_tool_id(tool)
    return count


def _trace(function: Callable[[], object]) -> int:
    """The same below Python 3.12; from there on a trace function is not told of each."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def _count_to(number: int) -> None:
    for _ in range(number):
        pass


def test_work_is_counted() -> None:
    few, many = (work(partial(_count_to, count)) for count in (FEW, MANY))
    assert many > 10 * few > 0


def _forget(site: Site) -> Callable[[], object]:
    """An argument of its own, which one worker has had."""
    site.say(site.client, p.Blob(0, 2, b"an argument"))
    ((to, done),) = site._runs(site.submit(blob=2))
    site.say(to, done)
    return lambda: site.say(site.client, p.Forget(0, [2]))


def _letter(site: Site) -> Callable[[], object]:
    """A client's answer to a runner of the worker that came last."""
    to = site.last
    while not site.scheduler._workers[to].leases:
        site.submit()
    worker, client = site.scheduler._workers[to], site.scheduler._clients[site.client]
    letter = p.Letter(worker.number, 1, client.number, p.IMPORT, b"a module")
    return lambda: site.say(site.client, letter)


def _question(site: Site) -> Callable[[], object]:
    """A client wants to know why its tasks wait, which they do because all slots are taken."""
    site.submit(3 * len(site.scheduler._workers))
    return lambda: site.say(site.client, p.StatusRequest(is_brief=True))


WORKERS: dict[str, Callable[[Site], Callable[[], object]]] = {
    "a task, all the way": lambda site: site.run_one,
    "a worker's join": lambda site: lambda: site.join(site.worker_hello()),
    "a worker's leave": lambda site: lambda: site.scheduler.leave(site.last, NOW, "gone"),
    "a worker's drain": lambda site: lambda: site.say(site.last, p.Drain()),
    "a client's join": lambda site: lambda: site.join(site.client_hello()),
    "a client's question": _question,
    "a blob that is forgotten": _forget,
    "a letter to a runner": _letter,
    "a tick": lambda site: lambda: site.sessions.tick(NOW),
}


@pytest.mark.parametrize("name", WORKERS)
def test_it_costs_the_same_with_many_workers(name: str) -> None:
    few, many = (work(WORKERS[name](Site(count))) for count in (FEW, MANY))
    assert 0 < many <= 1.1 * few


def _with_clients(count: int) -> Site:
    """So many clients wait for one slot."""
    site = Site(1)
    for _ in range(count):
        client = site.join(site.client_hello())
        site.say(client, p.Blob(0, 1, b"a function"))
        for id in range(1, 4):
            site.say(client, p.Submit(1, 0, [id], [PAYLOAD]))
    return site


def test_a_slot_costs_the_same_with_many_clients_that_wait() -> None:
    """The one that holds fewest and was served longest ago is found at once,
    and not by comparing all.
    """
    costs = []
    for count in (FEW, MANY):
        site = _with_clients(count)
        for _ in range(3):
            site.done()()
        costs.append(max(work(site.done()) for _ in range(5)))
    assert 0 < costs[1] <= 1.1 * costs[0]


QUEUE: dict[str, Callable[[Site], Callable[[], object]]] = {
    "a submit": lambda site: site.submit,
    "a result, and the next task": lambda site: site.done(),
    "a cancel": lambda site: lambda: site.say(site.client, p.Cancel([site.next_id - 1])),
    "a client's question": _question,
    "a tick": WORKERS["a tick"],
}


@pytest.mark.parametrize("name", QUEUE)
def test_it_costs_the_same_with_a_long_queue(name: str) -> None:
    few, many = (work(QUEUE[name](Site(2, queue=count))) for count in (FEW, 20 * MANY))
    assert 0 < many <= 1.1 * few
