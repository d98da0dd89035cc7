"""A worker's side of its leases: which runner runs what, and what is told to the broker.

Rules
    1. Each task of a lease is reported once: done, returned, or crashed.
    2. A runner holds at most two chunks: the one that it runs and one behind it.
    3. Nothing waits behind one task for more than `STUCK_SECONDS`, for `LATE_SECONDS` longer than its chunk should take, or for
       `IDLE_SECONDS` where a runner is idle: what has not started goes back.
    4. A task is ended (it took too long, or nobody wants it any more) when it is alone on its runner: then its
       runner is killed, and no neighbour with it.
    5. A task whose lease is lent waits for tasks of its own: it takes up no slot, and nothing waits behind it. There are as
       many runners more; those that are idle for long afterwards are let go.
    6. A worker without a broker goes on with what it has, and holds its reports. A broker that follows the last one is told
       of all that; one that has given the worker up is not, and all is ended.
    7. A runner's death is charged to the task that it ran, and to nothing else. A runner that dies before it
       finished anything, in spite of having work, charges its first task: or nothing would ever end.

Picture
    Run ─▶ Chunk ─Execute─▶ runner ─RunnerDone─▶ Done
                    └─Recall─▶ RunnerRecalled ─▶ Returned

The agent decides; ``runtime.host`` does what its runner commands say and answers with runner events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple, TypeAlias

from achilles.core import envelope
from achilles.core import protocol as p
from achilles.core.budget import bounded
from achilles.core.chunking import AHEAD_SECONDS_MAX
from achilles.core.chunking import IDLE_SECONDS as IDLE_SECONDS
from achilles.core.chunking import STUCK_SECONDS as STUCK_SECONDS
from achilles.core.holding import Holding
from achilles.core.runners import (
    CHUNKS_MAX,
    Chunk,
    Runner,
    crossed,
    overdue,
    relayed,
    surplus,
    without_first,
)
from achilles.core.runners import START_SECONDS as START_SECONDS
from achilles.errors import ProtocolError

SURPLUS_SECONDS = 5.0  # a runner beyond the slots may be idle for so long
UNWANTED = "unwanted"  # why a task is ended that nobody waits for

To: TypeAlias = Literal["broker", "host"]


class Send(NamedTuple):
    """A message to the broker, or a command to the host of the runners."""

    to: To
    message: p.FromWorker | p.RunnerCommand


class Agent:
    """Runs leases on up to ``slots`` runners, each for at most ``tasks_max`` tasks (0: no limit)."""

    def __init__(self, slots: int, *, tasks_max: int = 0) -> None:
        self._slots = slots
        self._tasks_max = tasks_max
        self._runners: dict[int, Runner] = {}
        self._chunks: dict[int, Chunk] = {}
        self._queue: deque[Chunk] = deque()  # chunks that no runner has yet
        self._moved_at = 0.0  # when a task was done last, or the first of them came
        self._blobs: dict[tuple[int, int], p.Payload] = {}
        self._next_runner = 1
        self._due: dict[int, float] = {}  # the runners that `tick` has to look at, and when
        self._relieve_at: float | None = None  # when to see what waits although a runner is idle
        self.is_draining = False  # it takes no more work
        self._said_goodbye = False
        self._lent: set[int] = set()  # leases
        self.result_max = 0  # bytes that the broker takes of one result; 0: no limit
        self._has_lent = False
        self._holding = Holding(slots)
        self._epoch = b""  # of the last broker

    # --- The core's contract ----------------------------------------------------------------------

    def receive(self, message: p.ToWorker | p.RunnerEvent, now: float) -> list[Send]:
        """Take in a message of the broker or an event of the runners' host."""
        match message:
            case p.Run():
                return self._run(message, now)
            case p.Blob(client=client, blob=blob, payload=payload):
                self._blobs[client, blob] = payload
                return []
            case p.Forget(client=client, blobs=blobs):
                return self._forget(client, blobs)
            case p.Revoke():
                return self._revoke(message)
            case p.Letter():
                return self._to_runner(message)
            case p.Lend(lease=lease, is_lent=is_lent):
                return self._lend(lease, is_lent, now)
            case p.Relay():
                return self._to_task(message)
            case p.Drain():
                return self.drain()
            case p.Goodbye():
                return self.reset()
            case p.RunnerDone():
                return self._done(message, now)
            case p.RunnerRecalled(runner=number, unstarted=unstarted):
                return self._recalled(self._runners.get(number), unstarted, now)
            case p.RunnerDied():
                return self._died(message, now)
            case p.RunnerGrown(runner=number, text=text):
                return self._blame(self._runners.get(number), text, p.MEMORY)
            case p.FromRunner():
                return self._letter(message)

    def tick(self, now: float) -> list[Send]:
        """Call back what waits behind a task that runs long; end the task that ran for too long; let surplus runners go."""
        sends = self.reset() if self._holding.is_too_old(now) else []
        for runner in self._surplus():
            if now >= runner.progress_at + SURPLUS_SECONDS:
                self._retire(runner, sends)
        if (
            self._queue
            and self._holding.since is None
            and now >= self._moved_at + AHEAD_SECONDS_MAX
        ):
            sends += self._give_back_queue()
        if not self._due:
            return sends
        if self._relieve_at is not None and now >= self._relieve_at:
            sends += self._relieve(now)
        for number in [number for number, at in self._due.items() if now >= at]:
            runner = self._runners[number]
            times_out_at = runner.times_out_at
            if times_out_at is not None and now >= times_out_at and runner.has_begun:
                chunk = runner.chunks[0]
                runner.condemned[chunk.seq, min(chunk.open)] = p.TIMEOUT
            runner.recalled_at, runner.is_wanted = now, False
            self._watch(runner)
            sends.append(Send("host", p.Recall(number)))
        return sends

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        wanted = min(self._due.values(), default=None)
        if wanted is not None and self._relieve_at is not None:
            wanted = min(wanted, self._relieve_at)
        if idle := self._surplus():
            at = idle[0].progress_at + SURPLUS_SECONDS
            wanted = at if wanted is None else min(at, wanted)
        if self._queue and self._holding.since is None:
            at = self._moved_at + AHEAD_SECONDS_MAX
            wanted = at if wanted is None else min(at, wanted)
        return wanted

    def drain(self) -> list[Send]:
        """Take no more work, give back what has not started, say goodbye when the rest is done."""
        if self.is_draining:
            return []
        self.is_draining = True
        sends = [Send("broker", p.Drain())]
        sends += self._give_back_queue()
        sends += [Send("host", p.Recall(runner.number)) for runner in self._runners.values()]
        return [*sends, *self._goodbye_if_empty()]

    def hold(self, messages: Iterable[p.Wire], now: float) -> None:
        """There is no session: these messages of the agent's were not, or perhaps not, received."""
        self._holding.add(messages, now)

    def join(self, epoch: bytes, now: float) -> list[Send]:
        """A session has begun: the first one, or one with another broker, or with the one that has given us up."""
        is_back, is_new = self._epoch != b"", self._epoch != epoch
        self._epoch = epoch
        if not is_back:
            self._holding.clear()
            return []
        sends = self._take_stock(now) if is_new else self.reset()
        ordered = sorted(self._chunks.values(), key=self._waits)
        held, reports = self._holding.take(ordered, self._blobs)
        draining = [p.Drain()] if self.is_draining else []
        told = (*held, *draining, p.Resumed(), *reports)  # nobody waits for large reports
        return [*sends, *(Send("broker", one) for one in told), *self._goodbye_if_empty()]

    def _waits(self, chunk: Chunk) -> bool:
        """Whether the chunk waits behind another one."""
        return all(
            not runner.chunks or runner.chunks[0] is not chunk for runner in self._runners.values()
        )

    def _take_stock(self, now: float) -> list[Send]:
        """A new broker comes: end what it cannot take over, the tasks of runners that submitted tasks, and these."""
        sends: list[Send] = []
        for runner in list(self._runners.values()):
            if runner.has_submitted or any(chunk.run.root for chunk in runner.chunks):
                sends.append(Send("host", p.Kill(runner.number)))
                del self._runners[runner.number]
                self._due.pop(runner.number, None)
                for chunk in runner.chunks:
                    del self._chunks[chunk.run.lease]
                    self._lent.discard(chunk.run.lease)
        for chunk in [chunk for chunk in self._queue if chunk.run.root]:
            self._queue.remove(chunk)
            del self._chunks[chunk.run.lease]
        needed = {(one.run.client, blob) for one in self._chunks.values() for blob in one.needs}
        for client in {client for client, _ in self._blobs}:
            blobs = [blob for one, blob in self._blobs if one == client]
            gone = [blob for blob in blobs if (client, blob) not in needed]
            is_served = any(chunk.run.client == client for chunk in self._chunks.values())
            if gone:
                sends += self._forget(client, gone if is_served else [])
        return [*sends, *self._assign(now)]

    def reset(self) -> list[Send]:
        """The session is over: end all work; nothing of it is reported any more. A drain ends with it."""
        sends = [Send("host", p.Kill(number)) for number in self._runners]
        self._runners.clear()
        self._chunks.clear()
        self._queue.clear()
        self._due.clear()
        self._relieve_at = None
        self._lent.clear()
        self._blobs.clear()
        self._holding.clear()
        self._said_goodbye = self.is_draining  # nobody is left to say it to
        return sends

    @property
    def is_drained(self) -> bool:
        """Whether a drain has come to its end."""
        return self._said_goodbye

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run and nothing to report."""
        return not self._chunks and not self._holding

    @property
    def running(self) -> int:
        """How many runners have work."""
        return sum(bool(runner.chunks) for runner in self._runners.values())

    @property
    def _busy(self) -> int:
        """How many runners work, each in a slot."""
        return self.running - len(self._lent)

    @property
    def _free(self) -> int:
        """How many runners have nothing to do, and a slot to do something in."""
        idle = sum(1 for runner in self._runners.values() if runner.is_open and not runner.chunks)
        return min(idle, self._slots - self._busy)

    def __repr__(self) -> str:
        return f"<Agent {len(self._runners)}/{self._slots} runners | {len(self._chunks)} leases>"

    # --- From the broker --------------------------------------------------------------------------

    def _run(self, run: p.Run, now: float) -> list[Send]:
        chunk = Chunk(run)
        if not run.ids:
            return []
        self._chunks[run.lease] = chunk
        if self.is_draining:
            return self._give_back(chunk, chunk.open)
        if not self._queue:
            self._moved_at = now
        self._queue.append(chunk)
        return self._assign(now)

    def _forget(self, client: int, blobs: list[int]) -> list[Send]:
        gone = [key for key in self._blobs if key[0] == client and (not blobs or key[1] in blobs)]
        for key in gone:
            del self._blobs[key]
        sends = []
        for runner in self._runners.values():
            has_submitted = runner.has_submitted and not blobs
            if has_submitted or runner.loaded.intersection(gone):
                runner.loaded.difference_update(gone)
                sends.append(Send("host", p.Unload(runner.number, client, blobs)))
        return sends

    def _revoke(self, revoke: p.Revoke) -> list[Send]:
        """Give back what of the lease has not started, and end what runs if that is wanted.

        A runner's unstarted tasks are taken back together, so others may come back with them; the broker gives them out again.
        """
        chunk = self._chunks.get(revoke.lease)
        if chunk is None:
            return []
        if chunk in self._queue:
            self._queue.remove(chunk)
            return self._give_back(chunk, chunk.open)
        runner = self._holder(chunk)
        if revoke.kill:
            for index in chunk.open.intersection(revoke.indexes):
                runner.condemned.setdefault((chunk.seq, index), UNWANTED)
            self._watch(runner)
        is_early = not revoke.indexes and not runner.results  # it may be starting: see `tick`
        runner.is_wanted = runner.is_wanted or is_early
        return [] if is_early else [Send("host", p.Recall(runner.number, not revoke.indexes))]

    def _give_back(self, chunk: Chunk, indexes: Collection[int]) -> list[Send]:
        back = sorted(indexes)
        self._close(chunk, back)
        return [Send("broker", p.Returned(chunk.run.lease, back))]

    def _give_back_queue(self) -> list[Send]:
        sends: list[Send] = []
        while self._queue:
            chunk = self._queue.popleft()
            sends += self._give_back(chunk, chunk.open)
        return sends

    def _close(self, chunk: Chunk, indexes: Iterable[int]) -> None:
        """Note that these tasks of the chunk were reported."""
        chunk.open.difference_update(indexes)
        if not chunk.open:
            del self._chunks[chunk.run.lease]
            self._lent.discard(chunk.run.lease)
            self._holding.ended(chunk)

    # --- Tasks that submit tasks ------------------------------------------------------------------

    def _letter(self, letter: p.FromRunner) -> list[Send]:
        """A runner has written on its side channel."""
        runner = self._runners.get(letter.runner)
        if runner is None:
            return []
        match letter.kind:
            case envelope.NESTED:
                try:
                    return [Send("broker", relayed(runner, letter))]
                except ProtocolError as error:  # user code can write anything there
                    return self._blame(runner, f"wrote to the worker's side channel: {error}")
            case p.IMPORT | p.OUTPUT | p.PARTS:
                return self._to_client(runner, letter)
            case _:
                return []

    def _to_client(self, runner: Runner, letter: p.FromRunner) -> list[Send]:
        """Pass a letter on, if it concerns the client that the runner works for."""
        if not runner.works_for(letter.client) or len(letter.body) > p.LETTER_MAX:
            return []
        passed = p.Letter(0, letter.runner, letter.client, letter.kind, letter.body)
        return [Send("broker", passed)]

    def _to_runner(self, letter: p.Letter) -> list[Send]:
        """Pass a client's letter to its runner: to one that works for that client, and no other."""
        runner = self._runners.get(letter.runner)
        if runner is None or not runner.works_for(letter.client):
            return []
        return [Send("host", p.ToRunner(letter.runner, letter.client, letter.kind, letter.body))]

    def _blame(self, runner: Runner | None, fault: str, kind: str = p.CRASHED) -> list[Send]:
        """Kill a runner that cannot be trusted any more; ``kind`` is what its task is charged with."""
        if runner is None or runner.is_killed:
            return []
        runner.is_killed = True
        runner.fault, runner.fault_kind = f"{fault}, and was killed", kind
        return [Send("host", p.Kill(runner.number))]

    def _to_task(self, relay: p.Relay) -> list[Send]:
        """What the broker tells a task that submitted tasks."""
        runner, client, message = self._runners.get(relay.runner), relay.client, relay.message
        if runner is None:
            return []
        if isinstance(message, p.Results):
            runner.submitted.difference_update([(client, id) for id in message.ids])
        elif isinstance(message, p.Failed):
            runner.submitted.discard((client, message.id))
        body = envelope.pack(0, message)
        return [Send("host", p.ToRunner(relay.runner, client, envelope.NESTED, body))]

    def _lend(self, lease: int, is_lent: bool, now: float) -> list[Send]:
        """A task waits for others: what is behind it goes elsewhere, and its slot is free; or it goes on."""
        chunk = self._chunks.get(lease)
        if chunk is None or chunk in self._queue:
            return []
        runner = self._holder(chunk)
        chunk.is_lent = is_lent
        if not is_lent:
            self._lent.discard(lease)
            return []
        self._lent.add(lease)
        self._has_lent = True
        recall = [Send("host", p.Recall(runner.number))] if runner.stuck_at is not None else []
        return [*recall, *self._assign(now)]

    def _holder(self, chunk: Chunk) -> Runner:
        return next(runner for runner in self._runners.values() if chunk in runner.chunks)

    def _surplus(self) -> list[Runner]:
        if len(self._runners) <= self._slots:
            return []
        return surplus(self._runners.values(), self._slots + len(self._lent))

    # --- Runners ----------------------------------------------------------------------------------

    def _assign(self, now: float) -> list[Send]:
        """Give queued chunks to runners: idle ones first, then new ones, then one behind a running one."""
        sends: list[Send] = []
        while self._queue:
            chunk = self._queue[0]
            runner = self._choose(chunk.run, sends, now)
            if runner is None:
                break
            self._queue.popleft()
            sends += self._execute(runner, chunk, now)
        return sends

    def _choose(self, run: p.Run, sends: list[Send], now: float) -> Runner | None:
        tasks = len(run.ids)
        busy = self._busy if len(self._runners) > self._slots else 0
        if busy < self._slots:
            for runner in self._runners.values():
                if runner.is_open and not runner.chunks and self._fits(runner, tasks, sends):
                    return runner
        if len(self._runners) < self._slots + len(self._lent):
            runner = self._runners[self._next_runner] = Runner(self._next_runner)
            self._next_runner += 1
            sends.append(Send("host", p.Spawn(runner.number)))
            return runner
        if any(runner.takes_long(run) for runner in self._runners.values()):
            return None  # it goes to whichever runner is free first
        # What waits behind a long task would come back.
        for runner in sorted(self._runners.values(), key=lambda runner: -runner.progress_at):
            has_room = runner.is_open and not runner.is_lent and not runner.is_late(now)
            if (
                has_room
                and 0 < len(runner.chunks) < CHUNKS_MAX
                and self._fits(runner, tasks, sends)
            ):
                return runner
        return None

    def _fits(self, runner: Runner, tasks: int, sends: list[Send]) -> bool:
        """Whether the runner may take so many more tasks; if not, it takes none any more."""
        if not self._tasks_max or not runner.given or runner.given + tasks <= self._tasks_max:
            return True
        self._retire(runner, sends)
        return False

    def _retire(self, runner: Runner, sends: list[Send]) -> None:
        runner.is_retiring = True
        sends.append(Send("host", p.Retire(runner.number)))

    def _execute(self, runner: Runner, chunk: Chunk, now: float) -> list[Send]:
        run = chunk.run
        chunk.seq = runner.seq = runner.seq % 255 + 1
        if not runner.chunks:
            runner.progress_at = now
        runner.chunks.append(chunk)
        if self._relieve_at is not None and not self._free:
            self._relieve_at = None
        runner.given += len(run.ids)
        sends = []
        for blob in (run.fn, run.init, *run.blobs):
            key = (chunk.root if blob == run.init else run.client, blob)
            if blob and key not in runner.loaded and key in self._blobs:
                runner.loaded.add(key)
                sends.append(Send("host", p.Load(runner.number, *key, self._blobs[key])))
        self._watch(runner)
        command = p.Execute(
            runner.number,
            runner.seq,
            run.client,
            run.fn,
            run.init,
            run.payloads,
            run.attempt,
            run.blobs,
            run.root,
            run.ids,
        )
        sends.append(Send("host", command))
        if self._tasks_max and runner.given >= self._tasks_max:
            self._retire(runner, sends)
        return sends

    def _watch(self, runner: Runner) -> None:
        """Note when `tick` has to look at a runner; after each change of it, so that no message costs all runners."""
        stuck_at, times_out_at = runner.stuck_at, runner.times_out_at
        if stuck_at is None and times_out_at is None:
            self._due.pop(runner.number, None)
        elif stuck_at is None or (times_out_at is not None and times_out_at < stuck_at):
            self._due[runner.number] = times_out_at  # type: ignore[assignment]
        else:
            self._due[runner.number] = stuck_at

    def _done(self, message: p.RunnerDone, now: float) -> list[Send]:
        runner = self._runners.get(message.runner)
        if runner is None:
            return []
        self._moved_at = runner.progress_at = now
        runner.has_begun = True
        runner.results += len(message.results)
        sends: list[Send] = []
        for chunk in list(runner.chunks):
            seq, open_tasks = chunk.seq, chunk.open
            rows = [row for row in message.results if row[0] == seq and row[1] in open_tasks]
            if rows:
                _, indexes, statuses, seconds, payloads = zip(*rows)
                outcomes = bounded(bytes(statuses), list(payloads), self.result_max)
                done = p.Done(chunk.run.lease, list(indexes), *outcomes, sum(seconds))
                runner.observe(chunk.run, len(indexes), done.seconds)
                sends.append(Send("broker", done))
                self._close(chunk, indexes)
        self._drop_finished(runner)
        if runner.condemned:
            sends += self._execute_sentence(runner)
        self._watch(runner)
        sends += self._assign(now)
        if self._due and not runner.chunks and (self._relieve_at or 0.0) < now:
            self._relieve_at = now + IDLE_SECONDS
        return [*sends, *self._goodbye_if_empty()]

    def _relieve(self, now: float) -> list[Send]:
        """Call back what waits behind tasks that run for long, from as many runners as are idle."""
        found, self._relieve_at = overdue(self._runners.values(), self._free, now)
        for runner in found:
            runner.recalled_at = now
            self._watch(runner)
        return [Send("host", p.Recall(runner.number, True)) for runner in found]

    def _drop_finished(self, runner: Runner) -> None:
        chunks = runner.chunks
        while chunks and not chunks[0].open:
            chunks.popleft()
        if len(chunks) > 1 and not chunks[1].open:
            runner.chunks = deque(chunk for chunk in chunks if chunk.open)

    def _execute_sentence(self, runner: Runner) -> list[Send]:
        """Kill the runner if a condemned task is all that it has; forget those that have ended by themselves.

        Until then its other started tasks have ended, which their results on the way will tell.
        """
        held = {(chunk.seq, index) for chunk in runner.chunks for index in chunk.open}
        for key in runner.condemned.keys() - held:
            del runner.condemned[key]
        if len(held) != 1 or not runner.condemned or runner.is_killed:
            return []
        runner.is_killed = True
        return [Send("host", p.Kill(runner.number))]

    def _recalled(
        self, runner: Runner | None, unstarted: list[tuple[int, int]], now: float
    ) -> list[Send]:
        """Give back what a runner has not started, and will not."""
        if runner is None:
            return []
        sends = self._take_back(runner, unstarted)
        self._drop_finished(runner)
        if runner.chunks and not runner.has_begun:
            runner.has_begun = True
            runner.progress_at = now
        if runner.condemned:
            sends += self._execute_sentence(runner)
        self._watch(runner)
        return [*sends, *self._assign(now), *self._goodbye_if_empty()]

    def _take_back(self, runner: Runner, unstarted: list[tuple[int, int]]) -> list[Send]:
        counts = dict(unstarted)
        sends: list[Send] = []
        for chunk in runner.chunks:
            back = chunk.open.intersection(chunk.take_last(counts.get(chunk.seq, 0)))
            if back:
                runner.given -= len(back)
                sends += self._give_back(chunk, back)
        return sends

    def _died(self, message: p.RunnerDied, now: float) -> list[Send]:
        runner = self._runners.pop(message.runner, None)
        if runner is None:
            return []
        self._due.pop(message.runner, None)
        unstarted = message.unstarted + crossed(runner.chunks, message.last_seq)
        held = sum(len(chunk.open) for chunk in runner.chunks)
        had_work = bool(message.unstarted) or not message.last_seq
        is_stillborn = bool(message.reason) and not runner.results and had_work
        if is_stillborn and sum(count for _, count in unstarted) == held:
            unstarted = without_first(unstarted)
        sends = self._take_back(runner, unstarted)
        reason = runner.fault or message.reason or "exited before it was done"
        if runner.has_submitted:
            goodbye = p.Goodbye("the runner has ended")
            sends.append(Send("broker", p.Relay(runner.number, 0, 0, goodbye)))
        for chunk in runner.chunks:
            started = sorted(chunk.open)
            why = runner.condemned.get((chunk.seq, started[0])) if started else None
            if why == p.TIMEOUT and runner.is_killed:
                text = f"ran for more than its {chunk.run.timeout:g} s"
                sends.append(Send("broker", p.Crashed(chunk.run.lease, started[0], text, why)))
                self._close(chunk, started[:1])
            elif started and why != UNWANTED:
                crashed_there = p.Crashed(chunk.run.lease, started[0], reason, runner.fault_kind)
                sends.append(Send("broker", crashed_there))
                self._close(chunk, started[:1])
            if chunk.open:
                sends += self._give_back(chunk, chunk.open)
        return [*sends, *self._assign(now), *self._goodbye_if_empty()]

    def _goodbye_if_empty(self) -> list[Send]:
        is_away = self._holding.since is not None
        if not self.is_draining or self._chunks or self._said_goodbye or is_away:
            return []
        self._said_goodbye = True
        return [Send("broker", p.Goodbye("drained"))]

    # --- Invariants -------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Assert the rules of this module; tests call it after every step."""
        if not self._has_lent:
            assert len(self._runners) <= self._slots, "more runners than slots"
        assert self._due.keys() <= self._runners.keys(), "a dead runner is looked at"
        for runner in self._runners.values():
            wanted = [at for at in (runner.stuck_at, runner.times_out_at) if at is not None]
            assert self._due.get(runner.number) == min(wanted, default=None), "a stale deadline"
            runner.check_invariants()
        placed = [c for r in self._runners.values() for c in r.chunks] + list(self._queue)
        assert len(placed) == len(self._chunks), "a lease is nowhere, or in two places"
        is_known = all(self._chunks.get(chunk.run.lease) is chunk for chunk in placed)
        assert is_known, "a lease is held that was reported"
        if self._queue:
            idle = [runner for runner in self._runners.values() if not runner.chunks]
            free = [runner for runner in idle if not (runner.is_retiring or runner.is_killed)]
            assert not free or self._busy >= self._slots, "a runner idles while a chunk waits"
