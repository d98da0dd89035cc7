"""A worker's side of its leases: which runner runs what, and what is told to the broker.

Rules
    1. Each task of a lease is reported once: done, returned, or crashed.
    2. What waits for a runner goes back where no task ends for `AHEAD_SECONDS_MAX`.
    3. A task is ended (it took too long, or nobody wants it any more) when it is alone on its
       runner: then its runner is killed, and no neighbour with it.
    4. A task whose lease is lent waits for tasks of its own, and takes up no slot.
    5. A worker without a broker goes on with what it has, and holds its reports. A broker that
       follows the last one is told of all that; one that has given the worker up is not,
       and all is ended.
    6. A runner's death is charged to the task that it ran, and to nothing else. A runner that dies
       before it finished anything, in spite of having work, charges its first task:
       or nothing would ever end.

Picture
    Run ─▶ Chunk ─Execute─▶ runner ─RunnerDone─▶ Done
                    └─Recall─▶ RunnerRecalled ─▶ Returned

The agent decides what becomes of leases, its `Crew` which runner gets what; ``runtime.host`` does
what its runner commands say and answers with runner events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from achilles.core import envelope
from achilles.core import protocol as p
from achilles.core.budget import bounded
from achilles.core.chunking import AHEAD_SECONDS_MAX
from achilles.core.crew import Crew
from achilles.core.crew import Send as Send
from achilles.core.holding import Holding
from achilles.core.runners import Chunk, Runner, crossed, relayed, without_first
from achilles.errors import ProtocolError

UNWANTED = "unwanted"  # why a task is ended that nobody waits for


class Agent:
    """Runs leases on up to ``slots`` runners, each for at most ``tasks_max`` tasks
    (0: no limit).
    """

    def __init__(self, slots: int, *, tasks_max: int = 0) -> None:
        self._crew = self._make_crew(slots, tasks_max)
        self._runners = self._crew.runners
        self._chunks: dict[int, Chunk] = {}
        self._queue: deque[Chunk] = deque()  # chunks that no runner has yet
        self._moved_at = 0.0  # when a task was done last, or the first of them came
        self._blobs: dict[tuple[int, int], p.Payload] = {}
        self.is_draining = False  # it takes no more work
        self.is_drained = False  # goodbye was said
        self.result_max = 0  # bytes that the broker takes of one result; 0: no limit
        self._holding = Holding(slots)
        self._epoch = b""  # of the last broker

    def _make_crew(self, slots: int, tasks_max: int) -> Crew:
        return Crew(slots, tasks_max)

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
        """Give back what finds no runner free; call back what waits behind a task that runs long;
        end the one that ran for too long.
        """
        sends = self.reset() if self._holding.is_too_old(now) else []
        at = self._stale_at
        if at is not None and now >= at:
            sends += self._give_back_queue()
        return sends + self._crew.tick(now)

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called."""
        wanted = self._crew.next_deadline()
        if not self._queue:
            return wanted
        at = self._stale_at
        return at if wanted is None or (at is not None and at < wanted) else wanted

    @property
    def _stale_at(self) -> float | None:
        """When what waits here for a runner has waited for long enough,
        if anybody could give it out elsewhere.
        """
        is_away = self._holding.since is not None
        return self._moved_at + AHEAD_SECONDS_MAX if self._queue and not is_away else None

    def drain(self) -> list[Send]:
        """Take no more work, give back what has not started, say goodbye when the rest is done."""
        if self.is_draining:
            return []
        self.is_draining = True
        sends = [Send("broker", p.Drain())]
        sends += self._give_back_queue()
        sends += [Send("host", p.Recall(runner.number)) for runner in self._runners.values()]
        return [*sends, *self._goodbye_if_empty()]

    def give_back(self) -> list[Send]:
        """Give back what has not started, but a task for each runner that has begun none."""
        sends = self._give_back_queue()
        return sends + [Send("host", p.Recall(number, True)) for number in self._runners]

    def hold(self, messages: Iterable[p.Wire], now: float) -> None:
        """There is no session: these messages of the agent's were not, or perhaps not, received."""
        self._holding.add(messages, now)

    def join(self, epoch: bytes, now: float) -> list[Send]:
        """A session has begun: the first one, or one with another broker,
        or with the one that has given us up.
        """
        is_back, is_new = self._epoch != b"", self._epoch != epoch
        self._epoch = epoch
        if not is_back:
            self._holding.clear()
            return []
        sends = self._take_stock(now) if is_new else self.reset()
        ordered = sorted(self._chunks.values(), key=self._crew.is_behind)
        held, reports = self._holding.take(ordered, self._blobs)
        draining = [p.Drain()] if self.is_draining else []
        told = (*held, *draining, p.Resumed(), *reports)  # nobody waits for large reports
        return [*sends, *(Send("broker", one) for one in told), *self._goodbye_if_empty()]

    def _take_stock(self, now: float) -> list[Send]:
        """A new broker comes: end what it cannot take over,
        the tasks of runners that submitted tasks, and these.
        """
        sends: list[Send] = []
        for runner in list(self._runners.values()):
            if runner.has_submitted or any(chunk.run.root for chunk in runner.chunks):
                sends.append(Send("host", p.Kill(runner.number)))
                self._crew.remove(runner.number)
                for chunk in runner.chunks:
                    del self._chunks[chunk.run.lease]
                    self._crew.lent.discard(chunk.run.lease)
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
        """The session is over: end all work; nothing of it is reported any more.
        A drain ends with it.
        """
        sends = [Send("host", p.Kill(number)) for number in self._runners]
        self._crew.clear()
        self._chunks.clear()
        self._queue.clear()
        self._blobs.clear()
        self._holding.clear()
        self.is_drained = self.is_draining  # nobody is left to say it to
        return sends

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run and nothing to report."""
        return not self._chunks and not self._holding

    @property
    def running(self) -> int:
        """How many runners have work."""
        return self._crew.running

    def __repr__(self) -> str:
        return (
            f"<Agent {len(self._runners)}/{self._crew.slots} runners | {len(self._chunks)} leases>"
        )

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

        A runner's unstarted tasks are taken back together, so others may come back with them;
        the broker gives them out again.
        """
        chunk = self._chunks.get(revoke.lease)
        if chunk is None:
            return []
        if chunk in self._queue:
            self._queue.remove(chunk)
            return self._give_back(chunk, chunk.open)
        runner = self._crew.holder(chunk)
        if revoke.kill:
            for index in chunk.open.intersection(revoke.indexes):
                runner.condemned.setdefault((chunk.seq, index), UNWANTED)
            self._crew.watch(runner)
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
            self._crew.lent.discard(chunk.run.lease)
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
        """Kill a runner that cannot be trusted any more;
        ``kind`` is what its task is charged with.
        """
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
        """A task waits for others: what is behind it goes elsewhere, and its slot is free;
        or it goes on.
        """
        chunk = self._chunks.get(lease)
        if chunk is None or chunk in self._queue:
            return []
        runner = self._crew.holder(chunk)
        chunk.is_lent = is_lent
        if not is_lent:
            self._crew.lent.discard(lease)
            return []
        self._crew.lend(lease)
        recall = [Send("host", p.Recall(runner.number))] if runner.stuck_at is not None else []
        return [*recall, *self._assign(now)]

    # --- Runners ----------------------------------------------------------------------------------

    def _assign(self, now: float) -> list[Send]:
        """Give queued chunks to runners: idle ones first, then new ones,
        then one behind a running one.
        """
        sends: list[Send] = []
        while self._queue:
            chunk = self._queue[0]
            runner = self._crew.choose(chunk.run, sends, now)
            if runner is None:
                break
            self._queue.popleft()
            sends += self._execute(runner, chunk, now)
        return sends

    def _execute(self, runner: Runner, chunk: Chunk, now: float) -> list[Send]:
        run = chunk.run
        chunk.seq = runner.seq = runner.seq % 255 + 1
        if not runner.chunks:
            runner.progress_at = now
        runner.chunks.append(chunk)
        runner.given += len(run.ids)
        sends = []
        for blob in (run.fn, run.init, *run.blobs):
            key = (chunk.root if blob == run.init else run.client, blob)
            if blob and key not in runner.loaded and key in self._blobs:
                runner.loaded.add(key)
                sends.append(Send("host", p.Load(runner.number, *key, self._blobs[key])))
        self._crew.given(runner)
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
        self._crew.retire_if_worn(runner, sends)
        return sends

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
        self._crew.watch(runner)
        if self._queue:
            sends += self._assign(now)
        self._crew.plan_relief(runner, now)
        return [*sends, *self._goodbye_if_empty()] if self.is_draining else sends

    def _drop_finished(self, runner: Runner) -> None:
        chunks = runner.chunks
        while chunks and not chunks[0].open:
            chunks.popleft()
        if len(chunks) > 1 and not chunks[1].open:
            runner.chunks = deque(chunk for chunk in chunks if chunk.open)

    def _execute_sentence(self, runner: Runner) -> list[Send]:
        """Kill the runner if a condemned task is all that it has;
        forget those that have ended by themselves.

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
        self._crew.watch(runner)
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
        runner = self._crew.remove(message.runner)
        if runner is None:
            return []
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
        if not self.is_draining or self._chunks or self.is_drained or is_away:
            return []
        self.is_drained = True
        return [Send("broker", p.Goodbye("drained"))]

    # --- Invariants -------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Assert the rules of this module; tests call it after every step."""
        self._crew.check_invariants(has_queue=bool(self._queue))
        placed = [c for r in self._runners.values() for c in r.chunks] + list(self._queue)
        assert len(placed) == len(self._chunks), "a lease is nowhere, or in two places"
        is_known = all(self._chunks.get(chunk.run.lease) is chunk for chunk in placed)
        assert is_known, "a lease is held that was reported"
