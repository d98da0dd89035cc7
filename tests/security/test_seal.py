"""Whoever owns the broker can deny service, and nothing more: here it changes what it passes on,
in every way it could.

The broker is real but for one thing: `Forger` alters the messages that it sends. The canary is a
folder that an evil pickle makes; it must never be there.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from achilles import DistributedExecutor, Pool
from achilles.core import protocol as p
from achilles.core.sessions import Send
from achilles.errors import ResultUnpickleError, SealError
from achilles.mailbox import INIT_BLOB
from achilles.net.broker import Broker
from achilles.net.keys import code_key
from achilles.net.peer import dialer_to
from achilles.net.worker import Worker
from achilles.runtime.arguments import FIRST_NUMBER
from achilles.runtime.seal import CALL_SIZE, TAG_SIZE, Seal, Sealer
from achilles.runtime.serialize import ERROR, VALUE
from tests import nested_tasks, tasks
from tests.brokers import RunningBroker, hello, raw_peer
from tests.modes import wait_until
from tests.security.attacks import attack

BOUND = 20.0
LARGE = 1 << 21

Alter = Callable[[Any], Any]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


class Forger:
    """Alters what the broker sends, and keeps it as it was."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary
        self.evil = pickle.dumps(Evil(canary), 5)
        self.alter: Alter = lambda message: message
        self.seen: list[Any] = []
        self.hits = 0
        self.is_nested = False  # it goes to a task that submits tasks

    def __call__(self, message: Any) -> Any:
        self.is_nested = isinstance(message, p.Relay)
        inner = message.message if isinstance(message, p.Relay) else message
        self.seen.append(inner)
        altered = self.alter(inner)
        if altered is not inner:
            self.hits += 1
        return (
            msgspec.structs.replace(message, message=altered) if inner is not message else altered
        )

    def last(self, kind: type) -> Any:
        return next(one for one in reversed(self.seen) if isinstance(one, kind))


@pytest.fixture
def forger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Forger:
    forger = Forger(tmp_path / "canary")
    honest = Broker._transmit

    def transmit(self: Broker, sends: Iterable[Send]) -> None:
        honest(
            self,
            [
                Send(route, packet._replace(message=forger(packet.message)))
                for route, packet in sends
            ],
        )

    monkeypatch.setattr(Broker, "_transmit", transmit)
    return forger


@contextlib.contextmanager
def working(broker: RunningBroker) -> Iterator[None]:
    """A worker of one slot, in a thread."""
    joined, ends = threading.Event(), [0]
    worker = Worker(
        dialer_to(broker.join("worker")),
        code=code_key(broker.home),
        slots=1,
        name="w",
        tags=[],
        connect_timeout=BOUND,
    )
    thread = threading.Thread(target=worker.run, args=(lambda: ends[0], joined.set))
    thread.start()
    try:
        assert joined.wait(BOUND)
        yield
    finally:
        ends[0] = 2
        worker.loop.wake()
        thread.join(BOUND)
        assert not thread.is_alive()


@pytest.fixture
def broker(achilles_home: Path, forger: Forger) -> Iterator[RunningBroker]:
    with RunningBroker(achilles_home) as broker, working(broker):
        yield broker


@pytest.fixture
def executor(broker: RunningBroker) -> Iterator[DistributedExecutor]:
    with DistributedExecutor(address="auto") as executor:
        yield executor


def refused(forger: Forger, alter: Alter, ask: Callable[[], Any]) -> None:
    """What is asked for ends with the named error, and without the canary,
    although the broker did its worst.
    """
    forger.alter, forger.hits = alter, 0
    with pytest.raises(SealError, match="does not carry the seal"):
        ask()
    forger.alter = lambda message: message
    assert forger.hits, "nothing was forged"
    assert not forger.canary.exists(), "it was unpickled"


def replacing(kind: type, change: Callable[[bytes], bytes]) -> Alter:
    """Change the payloads of messages of a kind."""

    def alter(message: Any) -> Any:
        if not isinstance(message, kind):
            return message
        if isinstance(message, p.Blob):
            return msgspec.structs.replace(message, payload=change(joined(message.payload)))
        payloads = [change(joined(payload)) for payload in cast(Any, message).payloads]
        return msgspec.structs.replace(cast(Any, message), payloads=payloads)

    return alter


def joined(payload: p.Payload) -> bytes:
    return payload.join() if isinstance(payload, p.Parts) else bytes(payload)


def ways_to_replace(good_end: int, forger: Forger) -> list[Callable[[bytes], bytes]]:
    """Evil without a seal, with the seal of what it replaces, with another cluster's;
    and good with one bit changed.
    """
    other = Sealer(Seal(bytes(32)))
    sealed = forger.evil + other.call(1, (1, 0, ()), b"", forger.evil)
    return [
        lambda data: forger.evil,
        lambda data: forger.evil + data[-good_end:],
        lambda data: sealed,
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"",
    ]


@attack("T14")
def test_a_forged_call_is_not_unpickled(executor: DistributedExecutor, forger: Forger) -> None:
    for change in ways_to_replace(CALL_SIZE, forger):
        refused(forger, replacing(p.Run, change), lambda: executor.submit(pow, 2, 3).result(BOUND))
    assert executor.submit(pow, 2, 3).result(BOUND) == 8


@attack("T14")
def test_a_forged_call_of_a_map_fails_its_item(
    executor: DistributedExecutor, forger: Forger
) -> None:
    change = ways_to_replace(CALL_SIZE, forger)[1]
    refused(forger, replacing(p.Run, change), lambda: list(executor.map(abs, range(3))))
    assert list(executor.map(abs, range(3))) == [0, 1, 2]


@attack("T14")
def test_a_forged_function_is_not_unpickled(executor: DistributedExecutor, forger: Forger) -> None:
    for at, change in enumerate(ways_to_replace(TAG_SIZE, forger)):
        function = (abs, hex, oct, bin, chr)[at]  # each is sent once

        def ask(function: Callable[[int], Any] = function) -> Any:
            return executor.submit(function, 3).result(BOUND)

        refused(forger, replacing(p.Blob, change), ask)
    assert executor.submit(len, "four").result(BOUND) == 4


@attack("T14")
def test_a_forged_argument_is_not_read(executor: DistributedExecutor, forger: Forger) -> None:
    assert executor.submit(len, b"").result(BOUND) == 0

    def alter(message: Any) -> Any:
        if isinstance(message, p.Blob) and message.blob >= FIRST_NUMBER:
            return replacing(p.Blob, lambda data: b"x" * LARGE + data[LARGE:])(message)
        return message

    refused(forger, alter, lambda: executor.submit(len, os.urandom(LARGE)).result(BOUND))
    assert executor.submit(len, os.urandom(LARGE)).result(BOUND) == LARGE


@attack("T14")
def test_a_forged_initializer_is_not_run(broker: RunningBroker, forger: Forger) -> None:
    for change in ways_to_replace(TAG_SIZE, forger):
        with DistributedExecutor(address="auto", initializer=int, initargs=("3",)) as executor:

            def alter(message: Any, change: Callable[[bytes], bytes] = change) -> Any:
                if isinstance(message, p.Blob) and message.blob == INIT_BLOB:
                    return replacing(p.Blob, change)(message)
                return message

            refused(forger, alter, lambda: executor.submit(pow, 2, 3).result(BOUND))


@attack("T14")
def test_a_call_is_not_run_as_another_or_by_another_function(
    executor: DistributedExecutor, forger: Forger
) -> None:
    executor.submit(pow, 2, 3).result(BOUND)
    older = forger.last(p.Run)
    assert executor.submit(divmod, 2, 3).result(BOUND) == (0, 2)

    def fields(**values: Any) -> Alter:
        return lambda message: (
            msgspec.structs.replace(message, **values) if isinstance(message, p.Run) else message
        )

    for alter in (
        fields(ids=older.ids),
        fields(fn=older.fn),
        fields(payloads=older.payloads),
        fields(fn=older.fn, payloads=older.payloads),
        fields(fn=0),
        fields(init=older.fn),
        fields(blobs=(older.fn,)),
    ):
        refused(forger, alter, lambda: executor.submit(divmod, 5, 3).result(BOUND))
    assert executor.submit(divmod, 5, 3).result(BOUND) == (1, 2)


@attack("T14")
def test_a_call_that_is_run_once_more_gives_no_other_task_its_result(
    executor: DistributedExecutor, forger: Forger
) -> None:
    executor.submit(pow, 2, 3).result(BOUND)
    older = forger.last(p.Run)

    def alter(message: Any) -> Any:
        if isinstance(message, p.Run):
            return msgspec.structs.replace(message, ids=older.ids, payloads=older.payloads)
        return message

    refused(forger, alter, lambda: executor.submit(pow, 3, 3).result(BOUND))


@attack("T13")
def test_a_forged_result_is_not_unpickled(executor: DistributedExecutor, forger: Forger) -> None:
    executor.submit(pow, 2, 3).result(BOUND)
    older = forger.last(p.Results)
    changes = [*ways_to_replace(TAG_SIZE, forger), lambda data: joined(older.payloads[0])]
    for change in changes:
        refused(
            forger, replacing(p.Results, change), lambda: executor.submit(pow, 2, 4).result(BOUND)
        )
        refused(forger, replacing(p.Results, change), lambda: list(executor.map(abs, [1])))
        refused(
            forger,
            replacing(p.Results, change),
            lambda: executor.submit(tasks.fail, "on purpose").result(BOUND),
        )
    for status in (ERROR, p.INIT_FAILED):
        for payload in (forger.evil, None):

            def alter(message: Any, status: int = status, payload: Any = payload) -> Any:
                if not isinstance(message, p.Results):
                    return message
                payloads = [payload or one for one in message.payloads]
                statuses = bytes([status]) * len(payloads)
                return msgspec.structs.replace(message, statuses=statuses, payloads=payloads)

            refused(forger, alter, lambda: executor.submit(pow, 2, 5).result(BOUND))
    assert executor.submit(pow, 2, 3).result(BOUND) == 8, "the executor is not broken"


@attack("T13")
def test_a_large_result_is_sealed_too(executor: DistributedExecutor, forger: Forger) -> None:
    array = bytes(LARGE)
    assert executor.submit(bytes, LARGE).result(BOUND) == array
    change = ways_to_replace(TAG_SIZE, forger)[3]
    refused(
        forger, replacing(p.Results, change), lambda: executor.submit(bytes, LARGE).result(BOUND)
    )


@attack("T13", "T14")
def test_a_task_that_submits_tasks_reads_no_forged_result(
    executor: DistributedExecutor, forger: Forger
) -> None:
    assert executor.submit(nested_tasks.fib, executor, 3).result(BOUND) == 2
    forge_result = replacing(p.Results, ways_to_replace(TAG_SIZE, forger)[1])
    forge_call = replacing(p.Run, ways_to_replace(CALL_SIZE, forger)[1])

    def alter_result(message: Any) -> Any:
        return forge_result(message) if forger.is_nested else message

    def alter_call(message: Any) -> Any:
        return forge_call(message) if getattr(message, "root", 0) else message

    for alter in (alter_result, alter_call):
        refused(forger, alter, lambda: executor.submit(nested_tasks.fib, executor, 4).result(BOUND))
    assert executor.submit(nested_tasks.fib, executor, 4).result(BOUND) == 3


# --- Letters --------------------------------------------------------------------------------------


@attack("T14")
def test_a_forged_module_is_not_run(
    executor: DistributedExecutor,
    forger: Forger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ours_one", "ours_two"):
        (tmp_path / f"{name}.py").write_text("def three():\n    return 3\n")
    import ours_one  # type: ignore[import-not-found]
    import ours_two  # type: ignore[import-not-found]

    source = f"import os\nos.mkdir({str(forger.canary)!r})\n"
    evil = __import__("marshal").dumps((source, "ours", False))

    def alter(message: Any) -> Any:
        if isinstance(message, p.Letter) and message.kind == p.IMPORT and len(message.body) > 60:
            body = message.body[:4] + evil + message.body[-TAG_SIZE:]
            return msgspec.structs.replace(message, body=body)
        return message

    refused(forger, alter, lambda: executor.submit(ours_one.three).result(BOUND))
    assert executor.submit(ours_two.three).result(BOUND) == 3


def test_nobody_else_prints_at_the_client(
    executor: DistributedExecutor, forger: Forger, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def say(text: str) -> str:
        executor.submit(print, text).result(BOUND)
        said.append(capsys.readouterr().out)
        return said[-1]

    assert say("one") == "one\n"
    older = [one for one in forger.seen if isinstance(one, p.Letter) and one.kind == p.OUTPUT]

    def alter(message: Any) -> Any:
        if isinstance(message, p.Letter) and message.kind == p.OUTPUT:
            return msgspec.structs.replace(message, body=bodies.pop())
        return message

    bodies = [older[-1].body, b"\x01\x1b[2Jforged", older[-1].body[:32] + b"\x01forged"]
    forger.alter = alter
    while bodies:
        assert say("two") == ""
    forger.alter = lambda message: message
    assert say("three") == "three\n"


def test_the_client_gives_its_modules_to_runners_of_its_cluster_only(
    executor: DistributedExecutor,
    broker: RunningBroker,
    forger: Forger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker asks in the name of a runner."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ours_three.py").write_text("def three():\n    return 3\n")
    import ours_three  # type: ignore[import-not-found]

    executor.submit(pow, 2, 3).result(BOUND)
    question = next(one for one in forger.seen if isinstance(one, p.Letter))
    name = b"tests.tasks"
    bodies = [
        question.body[:4] + name,
        question.body[:36] + name,
        question.body[:4] + bytes(32) + name,
    ]
    asked = len(bodies)

    def alter(message: Any) -> Any:
        if isinstance(message, p.Cluster) and bodies:
            return msgspec.structs.replace(question, body=bodies.pop())
        return message

    answers: list[bytes] = []
    scheduler = broker.broker._sessions.scheduler
    honest = scheduler._to_runner

    def note(client: Any, letter: p.Letter) -> Any:
        answers.append(letter.body)
        return honest(client, letter)

    scheduler._to_runner = note  # type: ignore[method-assign]
    forger.alter, forger.hits = alter, 0
    while bodies:  # each worker that comes changes the cluster
        with raw_peer(broker, "worker") as worker:
            worker.hello("worker")
    assert forger.hits == asked
    assert executor.submit(ours_three.three).result(BOUND) == 3  # asked for after those
    assert len([body for body in answers if b"def three" in body]) == 1
    assert not [body for body in answers if b"def add" in body]


# --- What was sealed once -------------------------------------------------------------------------


@attack("T14")
def test_what_a_client_sealed_is_not_run_when_it_is_gone(
    broker: RunningBroker, forger: Forger, tmp_path: Path
) -> None:
    """The runner asks whether that client lives, and nobody else can say so."""
    log = tmp_path / "log"
    with DistributedExecutor(address="auto") as executor:
        executor.submit(tasks.note, str(log), 1).result(BOUND)
        run, blob = forger.last(p.Run), forger.last(p.Blob)
    assert tasks.notes(log) == ["1"]

    def alter(message: Any) -> Any:
        if isinstance(message, p.Run):
            return msgspec.structs.replace(
                message, ids=run.ids, payloads=run.payloads, fn=run.fn, blobs=run.blobs
            )
        if isinstance(message, p.Blob):
            return msgspec.structs.replace(message, blob=blob.blob, payload=blob.payload)
        return message

    forger.alter = alter
    with raw_peer(broker, "client") as thief:
        thief.hello("client")
        thief.send(p.Blob(0, 1, b"anything"))
        thief.send(p.Submit(1, 0, [1], [b"anything"]))
        question = thief.expect(p.Letter)
        assert tasks.notes(log) == ["1"]
        answer = question.body[:4] + bytes(TAG_SIZE)
        thief.send(msgspec.structs.replace(question, body=answer))
        results = thief.expect(p.Results)
        assert results.statuses == bytes([ERROR])
        assert b"whether it lives" in joined(results.payloads[0])
    assert tasks.notes(log) == ["1"]


@attack("T14")
def test_a_client_without_the_code_key_runs_nothing(broker: RunningBroker, forger: Forger) -> None:
    with raw_peer(broker, "client") as thief:
        thief.send(hello("client"))
        thief.hello("client")
        thief.send(p.Submit(0, 0, [1], [b"\x02\x00\x00\x00\x00" + forger.evil]))
        results = thief.expect(p.Results)
        assert results.statuses == bytes([ERROR]) != bytes([VALUE])
        assert b"SealError" in joined(results.payloads[0])
    assert not forger.canary.exists()


def test_the_canary_sings(tmp_path: Path) -> None:
    pickle.loads(Forger(tmp_path / "canary").evil)
    wait_until((tmp_path / "canary").exists)


# --- What workers may return ----------------------------------------------------------------------


def test_with_an_allow_list_a_worker_runs_no_code_here(
    broker: RunningBroker, forger: Forger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACHILLES_CLIENT_RESULTS", "numpy")
    path = str(forger.canary)
    with DistributedExecutor(address="auto") as executor:
        for result in (
            executor.submit(tasks.return_maker, path).result,
            partial(next, executor.map(tasks.return_maker, [path])),
            executor.submit(tasks.raise_own, 1).result,
        ):
            with pytest.raises(ResultUnpickleError, match=r"names .*, which .* client.results"):
                result()
        assert executor.submit(pow, 2, 3).result(BOUND) == 8
    with Pool(1, address="auto") as pool:
        with pytest.raises(ResultUnpickleError, match=r"client\.results"):
            pool.map(tasks.raise_own, [1, 2, 3], chunksize=3)
        assert pool.map(abs, [-1]) == [1]
    assert not forger.canary.exists()
