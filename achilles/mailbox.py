"""Between the user's threads and the one I/O thread: what was submitted, and who waits for what.

User threads call `submit`, `submit_item`, `submit_bundle`, `cancelled`; the I/O thread calls
`drain`, `receive` and `close`. The two meet in a deque, and in a dict of sinks that the I/O thread
changes and of which user threads take the length or a copy of the keys. The lock orders submissions
before `finish`: what has passed the check by then is in, and resolved by what comes after it.

A sink is where a task's outcome goes: a `Future`, or a place in a `MapRun`,
or many (`bundles.BundleSink`).
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from time import sleep
from typing import Any, NamedTuple, TypeAlias

from achilles.bundles import BundleSink
from achilles.callbacks import CallbackThread
from achilles.core import protocol as p
from achilles.core.protocol import Group
from achilles.core.submission import Send, Submission
from achilles.errors import SealError
from achilles.failures import failure, result_too_large
from achilles.futures import FAILED as FAILED
from achilles.futures import Future, MapRun, Pace
from achilles.runtime.allowed import Allowed, Guarded
from achilles.runtime.arguments import Attached
from achilles.runtime.bundle import TASK_ID
from achilles.runtime.functions import Pickled, bytes_of
from achilles.runtime.program import NAMES
from achilles.runtime.seal import ONCE_SIZE, TAG_SIZE, Sealer
from achilles.runtime.seal import PARTS as PARTS_LETTER
from achilles.runtime.serialize import load_outcome, loads
from achilles.runtime.shared import fill
from achilles.runtime.wakeups import Wakeup

Sink: TypeAlias = "Future | tuple[MapRun, int] | BundleSink"
# A task on its way to the I/O thread
Mail: TypeAlias = "tuple[int, Group, Pickled, p.Payload, Sink]"
INIT_BLOB = 1 << 31  # the initializer's number, beyond those of functions
# Who submits without a pause holds the interpreter, which gives another thread its turn after 5 ms,
# each time that this one has let go of it, as for a write. So the I/O thread is let in when there
# is as much in the inbox as runners have, and this more (some ten times until there are thousands),
YIELD_AT = 8
YIELD_EACH = 512  # and with each so many that wait there: else it is behind, and runners idle
YIELD_SECONDS = 1e-5  # asleep; it takes the system some 70 µs

_LOG = logging.getLogger("concurrent.futures")


class Batch(NamedTuple):
    """Tasks of one group, and the pickle of their function if it has a number,
    with all that they refer to.
    """

    group: Group
    blob: Pickled
    ids: list[int]
    payloads: list[p.Payload]


class Mailbox:
    """What user threads and the I/O thread share. ``wake`` interrupts the I/O thread's wait."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._ids = itertools.count(1)
        self._inbox: deque[Mail] = deque()
        self._cancels: deque[int] = deque()
        self._sinks: dict[int, Sink] = {}
        self._sleepers: list[Wakeup] = []  # who wait for what has come meanwhile
        self._running_items: set[int] = set()  # tasks of maps; a future knows it by itself
        self._groups: dict[tuple[Any, ...], Group] = {}
        self._paces: dict[int, Pace] = {}
        self.callbacks = CallbackThread()
        self.cluster = ""  # whose runners run the tasks, as in `context`
        self._io_thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.is_awake = False  # the I/O thread looks into the inbox before it waits
        self.is_closing = False  # no more submissions; end when everything is resolved
        self.outlasts = False  # all is, but something runs that was cancelled
        self.broken: BaseException | None = None
        self.init_blob = b""  # the pickle of (initializer, initargs)
        # Initargs: what a manager serves lives while it is referred to
        self.init_source: object = None
        self.sealer: Sealer | None = None  # where a broker is between us and the runners
        self.allowed: Allowed | None = None  # what results may name, where that is limited
        self.on_letter: Callable[[p.Letter], None] = lambda letter: None  # of a runner to us
        self.workers = -1  # unknown
        self.slots = 0
        self.credit = 0  # tasks that may be unresolved at the broker; 0: no limit

    # --- User threads -----------------------------------------------------------------------------

    def submit(self, group: Group, blob: Pickled, payload: p.Payload, name: str) -> Future:
        """Enqueue one task; ``blob`` is its function's pickle, if the function has a number.

        What the group's ``blobs`` are is attached to it.
        """
        id = next(self._ids)
        future = Future(self, id, name)
        self._put(id, group, blob, payload, future)
        return future

    def submit_item(
        self, group: Group, blob: Pickled, payload: p.Payload, run: MapRun, index: int
    ) -> int:
        """Enqueue one item of a map; its id."""
        id = next(self._ids)
        self._put(id, group, blob, payload, (run, index))
        return id

    def submit_bundle(
        self, id: int, group: Group, blob: Pickled, payload: p.Payload, sink: BundleSink
    ) -> None:
        """Enqueue many items of a map as one task, whose id is of `mark`."""
        self._put(id, group, blob, payload, sink)

    def _put(self, id: int, group: Group, blob: Pickled, payload: p.Payload, sink: Sink) -> None:
        """Seal a task and enqueue it."""
        if self.sealer is not None:
            payload = _seal(self.sealer, id, group, blob, payload)
        with self._lock:
            if self.broken is not None:
                raise self.broken_error()
            if self.is_closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._inbox.append((id, group, blob, payload, sink))
        if not self.is_awake:
            self.interrupt()
            return
        waiting = len(self._inbox)
        if waiting == YIELD_AT + len(self._sinks) or not (waiting + 1) % YIELD_EACH:
            sleep(YIELD_SECONDS)

    def resubmit(
        self, group: Group, blob: Pickled, payload: p.Payload, run: MapRun, index: int
    ) -> int:
        """In the I/O thread: enqueue an item that was in a bundle,
        also while no more are taken; its id.
        """
        id = next(self._ids)
        if self.sealer is not None:
            payload = _seal(self.sealer, id, group, blob, payload)
        self._inbox.append((id, group, blob, payload, (run, index)))
        return id

    def put_error(self, run: MapRun, index: int, error: BaseException) -> None:
        """An item of a map that could not even be submitted."""
        run.put(index, FAILED, error)
        run.notify()

    def group(
        self,
        fn: int,
        init: int,
        chunk_max: int = 0,
        options: p.Options | None = None,
        blobs: tuple[int, ...] = (),
    ) -> Group:
        """The group of that key, one object a key."""
        key = (fn, init, chunk_max, options, blobs)
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) > 10_000:
                self._groups.clear()
            group = self._groups[key] = Group(*key)
        return group

    def pace(self, fn: int) -> Pace:
        """How long the calls of that function take, so far as is known."""
        if len(self._paces) > 10_000:
            self._paces.clear()
        return self._paces.setdefault(fn, Pace())

    def finish(self) -> None:
        """Take no more; the I/O thread ends when all is resolved."""
        with self._lock:
            self.is_closing = True
        self.interrupt()

    def broken_error(self) -> BaseException:
        """A fresh error that says why nothing can be submitted any more."""
        from achilles.errors import AchillesError, BrokerLostError, InitializerError

        cause = self.broken
        if isinstance(cause, AchillesError):
            return type(cause)(*cause.args)
        kind = InitializerError if self.init_blob else BrokerLostError
        error = kind(f"the executor is broken and takes no more tasks: {cause!r}")
        error.__cause__ = cause
        return error

    def mark(self) -> int:
        """An id above those of all tasks so far, and below those to come."""
        return next(self._ids)

    def is_resolved_to(self, mark: int) -> bool:
        """Whether every task that was drained and is older than the mark has its outcome."""
        return min(list(self._sinks), default=mark) >= mark

    @property
    def unresolved(self) -> int:
        """How many tasks have no outcome yet."""
        return len(self._sinks) + len(self._inbox)

    def cancelled(self, ids: Iterable[int]) -> None:
        """The user wants no outcome of these tasks."""
        self._cancels.extend(ids)
        self.interrupt()

    def interrupt(self) -> None:
        """Let the I/O thread look."""
        if self.is_awake:
            return
        self.is_awake = True
        try:
            self._wake()
        except BaseException:  # Ctrl-C: it was perhaps not woken, and the next one has to
            self.is_awake = False
            raise

    def call_back(self, future: Future) -> bool:
        """Run a future's callbacks in the callback thread; False if the caller may do so itself."""
        if threading.current_thread() is not self._io_thread:
            return False
        return self.callbacks.put(future)

    # --- The I/O thread ---------------------------------------------------------------------------

    def start(self, thread: threading.Thread) -> None:
        """``thread`` is the I/O thread from here on."""
        self._io_thread = thread

    def drain(self) -> tuple[list[Batch], list[int]]:
        """What was submitted since the last call, by group and in order, and what was cancelled."""
        batches = self._batches() if self._inbox else []
        cancels = self._cancels
        return batches, [cancels.popleft() for _ in range(len(cancels))] if cancels else []

    def _batches(self) -> list[Batch]:
        """The tasks by group; from here on their outcomes have a place to go."""
        take = self._inbox.popleft
        if len(self._inbox) == 1:
            id, group, blob, payload, self._sinks[id] = take()
            return [Batch(group, blob, [id], [payload])]
        taken = [take() for _ in range(len(self._inbox))]
        ids, groups, blobs, payloads, sinks = zip(*taken)
        self._sinks.update(zip(ids, sinks))
        first = groups[0]
        if groups.count(first) == len(groups):
            return [Batch(first, blobs[0], list(ids), list(payloads))]
        batches: dict[Group, Batch] = {}
        for id, group, blob, payload, _ in taken:
            batch = batches.get(group)
            if batch is None:
                batch = batches[group] = Batch(group, blob, [], [])
            batch.ids.append(id)
            batch.payloads.append(payload)
        return list(batches.values())

    def submit_to(self, submission: Submission, batch: Batch) -> list[Send]:
        """Hand a batch to the submission, which must know its blobs."""
        group = batch.group
        blob = batch.blob
        if isinstance(blob, Attached):
            for one in blob.shared:
                payload = self._blob(one.number, one.payload)
                submission.add_blob(one.number, payload, is_kept=one.is_kept)
        if group.fn and not submission.knows_blob(group.fn):
            submission.add_blob(group.fn, self._blob(group.fn, bytes_of(blob)))
        if group.init and not submission.knows_blob(group.init):
            submission.add_blob(group.init, self._blob(group.init, self.init_blob))
        return submission.submit(group, batch.ids, batch.payloads)

    def _blob(self, number: int, payload: bytes | memoryview) -> p.Payload:
        """A blob as it travels."""
        if self.sealer is None:
            return payload
        return _behind(payload, self.sealer.blob(number, payload))

    def drop(self, ids: Sequence[int]) -> None:
        """The tasks were cancelled: let those who wait for their futures know."""
        self._running_items.difference_update(ids)
        for id in ids:
            sink = self._sinks.pop(id, None)
            if isinstance(sink, Future):
                sink.start()

    @property
    def has_mail(self) -> bool:
        """Whether `drain` would give something."""
        return bool(self._inbox or self._cancels)

    def wake_soon(self, sleepers: Iterable[Wakeup]) -> None:
        """Wake these threads as soon as all is done that can be without a wait:
        they take the interpreter.
        """
        self._sleepers += sleepers

    def wake_sleepers(self) -> None:
        """In the I/O thread: wake those who are to be woken soon."""
        while self._sleepers:
            self._sleepers.pop().wake()

    def is_idle(self) -> bool:
        """Whether the I/O thread may wait: from here on, whoever has something for it wakes it."""
        if self._sleepers:
            self.wake_sleepers()
        self.is_awake = False
        is_over = self.is_closing and not self._sinks and not self.outlasts
        if self._inbox or self._cancels or is_over:
            self.is_awake = True
            return False
        return True

    def receive(self, message: p.ToClient) -> list[int]:
        """Take in what the broker says; the ids of tasks of which no outcome is wanted any more."""
        match message:
            case p.Results():
                return self._deliver(message)
            case p.Running(ids=ids):
                return self._running(ids)
            case p.Failed():
                self._fail(message)
            case p.Cluster(workers=workers, slots=slots):
                self.workers, self.slots = workers, slots
            case p.Letter(kind=p.PARTS, body=body):
                self._take_parts(body)
            case p.Letter():
                self.on_letter(message)
            case p.Status() | p.Credit() | p.Finished() | p.ShuttingDown() | p.Goodbye():
                pass  # of no concern to tasks
        return []

    def _running(self, ids: list[int]) -> list[int]:
        """Tasks were dispatched; which of them had been cancelled before."""
        cancelled = []
        sinks = self._sinks
        for id in ids:
            sink = sinks.get(id)
            if type(sink) is tuple or type(sink) is BundleSink:
                self._running_items.add(id)
            elif type(sink) is Future and not sink.start():
                del sinks[id]
                cancelled.append(id)
        return cancelled

    def _deliver(self, results: p.Results) -> list[int]:
        """Resolve; the ids of tasks that failed because an initializer did."""
        pop = self._sinks.pop
        runs: set[MapRun] = set()
        broken: list[int] = []
        calls = 0  # of maps
        payload: Any
        for id, status, payload in zip(
            results.ids, results.statuses, results.payloads, strict=True
        ):
            if status > p.ERROR and status == p.TOO_LARGE:
                self._result_too_large(id, payload)
                continue
            if self.sealer is not None:
                if id not in self._sinks:
                    continue  # nobody waits for it
                try:
                    payload = self.sealer.open_result(id, status, payload)
                except SealError as error:
                    self.deliver_error(id, error)
                    continue
            if self.allowed is not None:
                payload = self.allowed.guard(payload)
            if status > p.ERROR:
                broken += self._break(payload)  # and with all others this task fails
                continue
            sink = pop(id, None)
            if type(sink) is tuple:
                run, index = sink
                run.put(index, status, payload)
                runs.add(run)
                calls += 1
            elif type(sink) is Future:
                if self._sleepers and (type(payload) is not bytes or NAMES in payload):
                    self.wake_sleepers()  # to load it may run code that waits for one of them
                if status == p.VALUE and type(payload) is bytes:
                    try:
                        value = loads(payload)
                    except BaseException:
                        pass  # below, with an error that says so
                    else:
                        sink.resolve(value, None)
                        continue
                sink.resolve(*load_outcome(status, payload))
            elif type(sink) is BundleSink:
                calls += self._take_bundle(sink, status, payload)
                runs.add(sink.run)
        for run in runs:
            if results.seconds:
                run.pace.observe(calls, results.seconds)
            run.notify()
        if self._running_items:
            self._running_items.difference_update(results.ids)
        return broken

    def _take_bundle(self, sink: BundleSink, status: int, payload: Any) -> int:
        """A bundle has ended; how many of its items have their outcome by that."""
        if status == p.VALUE:
            try:
                values, others = loads(payload)
                return sink.take(values, others, len(values))
            except Exception:
                pass  # not what a bundle returns: what it was to do is done again
        sink.split()
        return 0

    def _take_parts(self, body: bytes) -> None:
        """A bundle takes long: what came of it so far, and which of its items will not start."""
        if self.sealer is not None:
            once, tag = body[:ONCE_SIZE], body[ONCE_SIZE : ONCE_SIZE + TAG_SIZE]
            body = body[ONCE_SIZE + TAG_SIZE :]
            if not self.sealer.is_sealed(PARTS_LETTER, once, body, tag):
                return
        if len(body) <= TASK_ID.size or self.allowed is not None:
            return
        sink = self._sinks.get(TASK_ID.unpack_from(body)[0])
        if type(sink) is BundleSink:
            try:
                sink.take(*loads(memoryview(body)[TASK_ID.size :]))
            except Exception:
                return  # not what a runner writes; the task's result will tell
            sink.run.notify()

    def _split(self, id: int, *, crashes: int = 0, losses: int = 0) -> bool:
        """If the task is a bundle, its items go out again, each as a task of its own."""
        sink = self._sinks.get(id)
        if type(sink) is not BundleSink:
            return False
        del self._sinks[id]
        self._running_items.discard(id)
        sink.split(crashes=crashes, losses=losses)
        return True

    def deliver_error(self, id: int, error: BaseException) -> None:
        """A task will have no result."""
        sink = self._sinks.pop(id, None)
        self._running_items.discard(id)
        if isinstance(sink, tuple):
            self.put_error(*sink, error)
        elif sink is not None:
            sink.resolve(None, error)

    def _fail(self, message: p.Failed) -> None:
        """The broker gives a task up."""
        kind = message.kind
        if self._split(message.id, crashes=int(kind == p.CRASHED), losses=int(kind == p.LOST)):
            return
        task = self._describe(message.id)
        if task is None:
            return
        self.deliver_error(message.id, failure(message, task))

    def _result_too_large(self, id: int, sizes: p.Payload) -> None:
        """A worker did not send a result."""
        if self._split(id):
            return
        task = self._describe(id)
        if task is not None:
            text = sizes[:100].decode("ascii", "replace") if type(sizes) is bytes else ""
            self.deliver_error(id, result_too_large(text, task))

    def _describe(self, id: int) -> str | None:
        """The task as errors call it; None if nobody waits for it."""
        sink = self._sinks.get(id)
        if sink is None:
            return None
        if isinstance(sink, Future):
            return f"{sink._task_name}() (task {id})"
        if isinstance(sink, BundleSink):
            return f"{sink.run.name}(), items of a map (task {id})"
        return f"{sink[0].name}(), item {sink[1]} of a map (task {id})"

    def fail_all(self, make_error: Callable[[], BaseException]) -> list[int]:
        """Everything that is unresolved fails, each with an error of its own; the ids."""
        self.drain()
        ids = list(self._sinks)
        for id in ids:
            sink = self._sinks[id]
            if isinstance(sink, Future) and not sink.start():
                del self._sinks[id]
            else:
                self.deliver_error(id, make_error())
        return ids

    def abandon(self, make_error: Callable[[], BaseException]) -> None:
        """In a forked child, which has no I/O thread: everything unresolved fails,
        with an error of its own.

        Takes no lock: another thread of the parent may have held it at the fork.
        """
        self._wake = _wake_nobody
        for sink in [*self._sinks.values(), *(item[-1] for item in self._inbox)]:
            if isinstance(sink, Future):
                sink.abandon(make_error())
            elif isinstance(sink, BundleSink):
                sink.put_error(make_error())
            else:
                run, index = sink
                run.put(index, FAILED, make_error())

    def cancel_pending(self) -> list[int]:
        """Cancel every task that is not running; the ids."""
        cancelled = []
        for id, sink in list(self._sinks.items()):
            if isinstance(sink, Future):
                is_cancelled = sink.withdraw()
            else:
                is_cancelled = id not in self._running_items
                if is_cancelled:
                    self.deliver_error(id, CancelledError())
            if is_cancelled:
                cancelled.append(id)
        return cancelled

    def ends(self, submission: Submission) -> list[Send]:
        """What is to be said where all is resolved, and nothing comes any more,
        but something runs yet.
        """
        if not self.is_done:
            return []
        self.outlasts = not submission.is_finished
        return submission.finish()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is unresolved or waits to be looked at."""
        return not self._sinks and not self._inbox and not self._cancels

    @property
    def is_done(self) -> bool:
        """Whether that is so, and nothing comes any more."""
        return self.is_closing and self.is_empty

    def close(self) -> None:
        """The I/O thread ends."""
        self.callbacks.end()
        self.wake_sleepers()

    def _break(self, payload: p.Payload | Guarded) -> list[int]:
        """The initializer raised on a runner: nothing can run any more, as in the standard library.

        The ids of all tasks, which have failed.
        """
        from achilles.errors import InitializerError

        self.wake_sleepers()
        _, cause = load_outcome(p.ERROR, payload)
        if self.broken is None:
            _LOG.critical("Exception in initializer:", exc_info=cause)
            with self._lock:
                self.broken = cause

        def make_error() -> InitializerError:
            error = InitializerError(f"the initializer raised on a runner: {cause!r}")
            error.__cause__ = cause
            return error

        return self.fail_all(make_error)


def _seal(sealer: Sealer, id: int, group: Group, blob: Pickled, payload: Any) -> p.Payload:
    """A call's payload with its seal; in the caller's thread, for a large one takes its time."""
    return _behind(payload, sealer.call(id, group.seal_needs, blob, payload))


def _behind(payload: Any, seal: bytes) -> p.Payload:
    """The payload and its seal; what is large is not copied, and where there is room behind it,
    the seal goes there.
    """
    if type(payload) is bytes and len(payload) <= p.INLINE_MAX:
        return payload + seal
    return p.Parts((payload, fill(payload, seal) or seal))


def _wake_nobody() -> None:
    """For a process without an I/O thread."""
