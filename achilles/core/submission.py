"""The client's side of its tasks: what was submitted, what the broker has,
what is still owed an outcome.

Rules
    1. A task is kept, payload and all, until its outcome came: a new broker gets everything again.
    2. The broker holds at most its credit of this client's tasks, and of their bytes; the rest wait
       here, in order. One task may always go, alone, whatever it holds, up to what any may;
       one that holds more fails here.
    3. Each task gets one outcome; what comes after it (a late result, a second one), or for a task
       that the broker does not have, is dropped here.
    4. What an earlier broker had is marked as such: workers may hold it.
    5. A blob is sent before the first task that names it, once a session.

Ids are the caller's, ascending from 1, and never used twice.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import repeat
from math import inf
from typing import Literal, NamedTuple, TypeAlias

from achilles.core import protocol as p
from achilles.core.budget import bytes_of
from achilles.core.protocol import Group

BLOBS_KEPT = 256  # unused blobs that stay at the broker, for functions that come back
BYTES_KEPT = 256 << 20  # the same in bytes, of those of `LARGE` and more
LARGE = 1 << 20

To: TypeAlias = Literal["broker", "user"]


class Send(NamedTuple):
    """A message to the broker, or one for the user's futures."""

    to: To
    message: p.FromClient | p.ToClient


class _Blob:
    """A blob and how many unresolved tasks name it."""

    __slots__ = ("is_kept", "payload", "size", "tasks")

    def __init__(self, payload: p.Payload, is_kept: bool) -> None:
        self.payload = payload
        self.size = p.size_of(payload)
        self.tasks = 0
        self.is_kept = is_kept  # for a while, when no task names it any more


class Submission:
    """One client's unresolved tasks. Sessions with a broker begin by `connect` and end by
    `disconnect`.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, tuple[Group, p.Payload]] = {}
        self._backlog: deque[int] = deque()  # ids that the broker does not have yet, oldest first
        self._unsent: set[int] = set()  # the same ids, to be looked up
        self._at_broker = 0  # unresolved tasks that it has
        self._blobs: OrderedDict[int, _Blob] = OrderedDict()
        self._sent_blobs: set[int] = set()
        self._idle: OrderedDict[int, int] = OrderedDict()  # sizes of large blobs that no task names
        self._idle_bytes = 0
        self._credit: int | None = None  # None: no session
        self._again: set[int] = set()  # in the backlog, and an earlier broker had them
        self._was_connected = False
        self._is_resuming = False
        self._bytes_max = 0  # at the broker; 0: no limit
        self._bytes = 0  # of the tasks and blobs that it has
        self._argument_max = 0  # of one task; 0: no limit
        self._may_run = False  # something that was cancelled while the broker had it
        self._is_finishing = False

    # --- Sessions ---------------------------------------------------------------------------------

    def connect(self, credit: int, *, credit_bytes: int = 0, argument_max: int = 0) -> list[Send]:
        """A new session: the broker knows nothing. Of each limit, 0 means that there is none."""
        self._credit = credit
        self._bytes_max = credit_bytes
        self._argument_max = argument_max
        self._sent_blobs.clear()
        self._bytes = 0
        if self._was_connected:
            self._is_resuming = True
            self._again |= self._tasks.keys() - self._unsent
        self._was_connected = True
        self._backlog = deque(sorted(self._tasks))
        self._unsent = set(self._tasks)
        self._at_broker = 0
        asks = [Send("broker", p.Finish())] if self._is_finishing else []
        return [*self._advance(), *asks]

    def disconnect(self) -> None:
        """The session is over; tasks stay until another one begins."""
        self._credit = None

    # --- From the user ----------------------------------------------------------------------------

    def add_blob(self, blob: int, payload: p.Payload, *, is_kept: bool = True) -> None:
        """Make a blob known; it travels with the first task that names it.

        One that is large and not ``is_kept`` is forgotten with the last task that names it.
        """
        entry = self._blobs.get(blob)
        if entry is None:
            self._blobs[blob] = _Blob(payload, is_kept)
        elif is_kept:
            entry.is_kept = True

    def knows_blob(self, blob: int) -> bool:
        return blob in self._blobs

    def submit(self, group: Group, ids: list[int], payloads: list[p.Payload]) -> list[Send]:
        """New tasks, in order; their blobs must be known."""
        self._tasks.update(zip(ids, zip(repeat(group), payloads), strict=True))
        for blob in group.needs:
            self._blobs[blob].tasks += len(ids)
            if blob in self._idle:
                self._idle_bytes -= self._idle.pop(blob)
        if self._credit is None:
            self._wait(ids)
            return []
        size = bytes_of(payloads)
        if self._backlog or len(ids) > p.TASKS_MAX or not self._has_room(group, len(ids), size):
            self._wait(ids)
            return self._advance()
        self._at_broker += len(ids)
        self._bytes += size
        sends = self._new_blobs(group)
        sends.append(_submit(group, ids, payloads))
        return sends

    def _has_room(self, group: Group, count: int, size: int) -> bool:
        """Whether so many tasks may go at once, and none of them may be too large."""
        if 0 < self._credit < self._at_broker + count:  # type: ignore[operator]
            return False
        shared, new = self._sizes_of_blobs(group)
        if 0 < self._bytes_max < self._bytes + new + size:
            return False
        return not 0 < self._argument_max < size + shared

    def cancel(self, ids: list[int], *, kill: bool = False) -> list[Send]:
        """The user wants no outcome of these tasks; unknown ones are passed over.

        ``kill``: nor should those that run go on.
        """
        at_broker = []
        dropped = set()
        for id in ids:
            if self._forget(id):
                if id in self._unsent:
                    dropped.add(id)
                else:
                    at_broker.append(id)
        if dropped:
            self._backlog = deque(id for id in self._backlog if id not in dropped)
            self._unsent -= dropped
        self._at_broker -= len(at_broker)
        self._may_run = self._may_run or bool(at_broker)
        if self._credit is None:
            return []
        cancels = [Send("broker", p.Cancel(ids, kill)) for ids in _runs(at_broker)]
        return [*cancels, *self._advance()]

    def finish(self) -> list[Send]:
        """The user wants nothing any more: ask the broker to tell when nothing runs."""
        if self._is_finishing or not self._may_run:
            return []
        self._is_finishing = True
        return [] if self._credit is None else [Send("broker", p.Finish())]

    @property
    def is_finished(self) -> bool:
        """Whether nothing runs that was cancelled, so far as is known."""
        return not self._may_run

    def _resumed(self) -> list[Send]:
        """Say so once all is sent again that an earlier broker had."""
        if not self._is_resuming or self._again or self._credit is None:
            return []
        self._is_resuming = False
        return [Send("broker", p.Resumed())]

    # --- The core's contract ----------------------------------------------------------------------

    def receive(self, message: p.ToClient, now: float) -> list[Send]:
        """Take in a message of the broker."""
        match message:
            case p.Results():
                return self._results(message)
            case p.Failed(id=id):
                if id in self._unsent or not self._forget(id):
                    return []
                self._at_broker -= 1
                return [Send("user", message), *self._advance()]
            case p.Credit(bytes_max=bytes_max):
                self._bytes_max = bytes_max
                return self._advance()
            case p.Finished():
                self._may_run = self._is_finishing = False
                return []
            case (
                p.Running() | p.Cluster() | p.Letter() | p.Status() | p.ShuttingDown() | p.Goodbye()
            ):
                return [Send("user", message)]

    def tick(self, now: float) -> list[Send]:
        """Time has passed; nothing here waits for it."""
        return []

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        return None

    @property
    def has_backlog(self) -> bool:
        """Whether tasks wait until the broker takes them."""
        return bool(self._backlog)

    def __len__(self) -> int:
        """How many tasks have no outcome yet."""
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<Submission {len(self._tasks)} tasks | {len(self._backlog)} not sent>"

    # --- Inside -----------------------------------------------------------------------------------

    def _results(self, message: p.Results) -> list[Send]:
        unsent, pop = self._unsent, self._tasks.pop
        # A broken broker may have outcomes of what it never had.
        ended = [None if id in unsent else pop(id, None) for id in message.ids]
        fresh = [entry for entry in ended if entry is not None]
        self._at_broker -= len(fresh)
        if not fresh:
            return []
        groups, payloads = zip(*fresh)
        self._bytes -= bytes_of(payloads)
        if groups.count(groups[0]) == len(groups):
            for blob in groups[0].needs:
                self._release(blob, len(groups))
        else:
            for group in groups:
                for blob in group.needs:
                    self._release(blob)
        if len(fresh) == len(ended):
            return [Send("user", message), *self._advance()]
        kept = [at for at, entry in enumerate(ended) if entry is not None]
        return [
            Send(
                "user",
                p.Results(
                    [message.ids[at] for at in kept],
                    bytes(message.statuses[at] for at in kept),
                    [message.payloads[at] for at in kept],
                ),
            ),
            *self._advance(),
        ]

    def _wait(self, ids: list[int]) -> None:
        """The broker gets these later."""
        self._backlog.extend(ids)
        self._unsent.update(ids)

    def _forget(self, id: int) -> bool:
        """Drop a task; False if it was not there."""
        entry = self._tasks.pop(id, None)
        if entry is None:
            return False
        self._again.discard(id)
        (fn, init, _, _, blobs), payload = entry
        if id not in self._unsent:
            self._bytes -= len(payload) if type(payload) is bytes else payload.nbytes  # type: ignore[union-attr]
        if fn:
            self._release(fn)
        if init:
            self._release(init)
        for blob in blobs:
            self._release(blob)
        return True

    def _release(self, blob: int, tasks: int = 1) -> None:
        """So many tasks fewer name the blob."""
        entry = self._blobs[blob]
        entry.tasks -= tasks
        if not entry.tasks and entry.size >= LARGE:
            self._idle[blob] = entry.size
            self._idle_bytes += entry.size
            if not entry.is_kept:
                self._idle.move_to_end(blob, last=False)

    def _room(self, wanted: int) -> int:
        """How many of ``wanted`` tasks the broker takes now."""
        if self._credit is None:
            return 0
        return wanted if self._credit == 0 else max(0, self._credit - self._at_broker)

    def _advance(self) -> list[Send]:
        """Send what waits, as far as the credit goes, in runs of one group."""
        sends: list[Send] = []
        backlog = self._backlog
        room = self._room(len(backlog)) if backlog else 0
        is_full = False
        while backlog and room and not is_full:
            group = self._tasks[backlog[0]][0]
            blob_bytes, _ = self._sizes_of_blobs(group)
            made, spare = self._make_room(group, blob_bytes)
            sends += made
            ids: list[int] = []
            payloads: list[p.Payload] = []
            is_again = backlog[0] in self._again
            while backlog and room and len(ids) < p.TASKS_MAX:
                id = backlog[0]
                task_group, payload = self._tasks[id]
                if task_group != group or (id in self._again) != is_again:
                    break
                size = p.size_of(payload)
                if 0 < self._argument_max < size + blob_bytes:
                    sends.append(self._refuse(id, size + blob_bytes))
                    continue
                if size > spare and (ids or self._at_broker):
                    is_full = not ids  # else look once more, perhaps something can be forgotten
                    break
                spare -= size
                self._bytes += size
                ids.append(backlog.popleft())
                payloads.append(payload)
                room -= 1
            if ids:
                self._at_broker += len(ids)
                self._unsent.difference_update(ids)
                sends += self._new_blobs(group)
                sends.append(_submit(group, ids, payloads, is_again))
                self._again.difference_update(ids)
        if self._is_resuming:
            sends += self._resumed()
        has_unused = self._idle or len(self._blobs) > BLOBS_KEPT
        if has_unused and not backlog and self._credit is not None:
            sends += self._drop_blobs()
        return sends

    def _refuse(self, id: int, size: int) -> Send:
        """The oldest task that waits holds more than the broker takes."""
        self._backlog.popleft()
        self._forget(id)
        self._unsent.discard(id)
        return Send("user", p.Failed(id, p.OVERSIZED, [f"{size} {self._argument_max}"]))

    def _make_room(self, group: Group, blob_bytes: int) -> tuple[list[Send], float]:
        """Have the broker forget what nobody needs, if a group's blobs find no room else;
        how many bytes are left for tasks.
        """
        if not self._bytes_max:
            return [], inf
        _, new = self._sizes_of_blobs(group)
        first = p.size_of(self._tasks[self._backlog[0]][1])
        if self._bytes + new + first <= self._bytes_max:
            return [], self._bytes_max - self._bytes - new
        needed = set(group.needs)
        dropped = [
            blob
            for blob in self._sent_blobs
            if blob not in needed and (not self._at_broker or not self._blobs[blob].tasks)
        ]
        for blob in dropped:
            self._sent_blobs.discard(blob)
            self._bytes -= self._blobs[blob].size
        forgets = [Send("broker", p.Forget(0, blobs)) for blobs in _runs(sorted(dropped))]
        _, new = self._sizes_of_blobs(group)
        return list(forgets), self._bytes_max - self._bytes - new

    def _sizes_of_blobs(self, group: Group) -> tuple[int, int]:
        """The bytes of what a group's tasks share,
        and of that of it which the broker does not have.
        """
        shared = new = 0
        for blob in group.needs:
            size = self._blobs[blob].size
            shared += size
            if blob not in self._sent_blobs:
                new += size
        return shared, new

    def _new_blobs(self, group: Group) -> list[Send]:
        sends = []
        for blob in group.needs:
            self._blobs.move_to_end(blob)
            if blob not in self._sent_blobs:
                self._sent_blobs.add(blob)
                self._bytes += self._blobs[blob].size
                sends.append(Send("broker", p.Blob(0, blob, self._blobs[blob].payload)))
        return sends

    def _drop_blobs(self) -> list[Send]:
        """Forget the oldest blobs that no task names, beyond those that may stay."""
        unused = self._drop_idle() if self._idle else []
        surplus = len(self._blobs) - BLOBS_KEPT
        if surplus > 0:
            small = [blob for blob, entry in self._blobs.items() if not entry.tasks][:surplus]
            unused += small
            for blob in small:
                self._forget_blob(blob)
                self._idle_bytes -= self._idle.pop(blob, 0)
        if not unused:
            return []
        sent = [blob for blob in unused if blob in self._sent_blobs]
        self._sent_blobs.difference_update(sent)
        return [Send("broker", p.Forget(0, blobs)) for blobs in _runs(sent)]

    def _drop_idle(self) -> list[int]:
        """Drop large blobs that no task names: those not to be kept,
        and the oldest beyond the bound.
        """
        dropped = []
        while self._idle:
            blob = next(iter(self._idle))
            if self._idle_bytes <= BYTES_KEPT and self._blobs[blob].is_kept:
                break
            self._idle_bytes -= self._idle.pop(blob)
            self._forget_blob(blob)
            dropped.append(blob)
        return dropped

    def _forget_blob(self, blob: int) -> None:
        """Drop a blob that no task names; whether the broker has it is for the caller to tell
        it.
        """
        entry = self._blobs.pop(blob)
        if blob in self._sent_blobs:
            self._bytes -= entry.size

    def check_invariants(self) -> None:
        """Assert the rules of this module; tests call it after every step."""
        assert len(set(self._backlog)) == len(self._backlog), "a task waits twice"
        assert self._unsent == set(self._backlog), "what waits is not what counts as waiting"
        assert all(id in self._tasks for id in self._backlog), "a resolved task waits"
        assert self._again <= set(self._backlog), "a task is sent again that is not to be sent"
        if self._credit is not None:
            assert self._at_broker == len(self._tasks) - len(self._backlog), "tasks miscounted"
            assert not self._credit or self._at_broker <= self._credit, "credit overdrawn"
            sent = [payload for id, (_, payload) in self._tasks.items() if id not in self._unsent]
            blobs = sum(self._blobs[blob].size for blob in self._sent_blobs)
            assert self._bytes == bytes_of(sent) + blobs, "bytes miscounted"
            is_alone = self._at_broker <= 1
            assert is_alone or not self._bytes_max or self._bytes <= self._bytes_max, (
                "credit in bytes overdrawn"
            )
        counts: dict[int, int] = {}
        for group, _ in self._tasks.values():
            for blob in group.needs:
                counts[blob] = counts.get(blob, 0) + 1
        for blob, entry in self._blobs.items():
            assert entry.tasks == counts.get(blob, 0), "a blob's tasks are miscounted"
        assert self._idle_bytes == sum(self._idle.values()), "idle blobs are miscounted"
        assert not any(self._blobs[blob].tasks for blob in self._idle), "a needed blob is idle"
        assert self._sent_blobs <= self._blobs.keys(), "a forgotten blob counts as sent"


def _submit(
    group: Group, ids: list[int], payloads: list[p.Payload], is_again: bool = False
) -> Send:
    fn, init, chunk_max, options, blobs = group
    return Send("broker", p.Submit(fn, init, ids, payloads, chunk_max, options, blobs, is_again))


def _runs(numbers: list[int]) -> list[list[int]]:
    """The numbers in lists that a message can hold."""
    return [numbers[at : at + p.TASKS_MAX] for at in range(0, len(numbers), p.TASKS_MAX)]
