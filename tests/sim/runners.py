"""The host of a worker's runners, in virtual time: what `runtime.host` and its child processes do.

Tasks run one after the other; a recall takes back all that have not started. A result that is not
its chunk's last is seen up to 86 ms later (5, if that was taken back), unless the runner has woken
its host for nothing in that time, as in the real thing. A killed runner is gone at once,
which is seen a little later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any

from achilles.core import protocol as p
from tests.sim.oracle import Oracle, Truth, Violation, join, outcome

STREAM_INTERVAL = 0.086  # runtime.runner.QUIET_SECONDS; only the cores are under test here
CUT_INTERVAL = 0.005  # runtime.hosted.LOOK_SECONDS
BURY_SECONDS = 0.003

Timer = Callable[[float, Callable[[Any], None], Any], None]  # seconds from now, function, argument


class Entry:
    """A task at a runner."""

    __slots__ = (
        "attempt",
        "blobs",
        "found",
        "index",
        "is_last",
        "payload",
        "placed_at",
        "seq",
        "started_at",
        "truth",
    )

    def __init__(self, command: p.Execute, index: int, truth: Truth, now: float) -> None:
        self.seq = command.seq
        needs = p.Group(command.fn, command.init, blobs=command.blobs).needs
        self.blobs = [(command.client, blob) for blob in needs]
        self.found: list[bytes] = []  # what those hold, when it starts
        self.attempt = command.attempt
        self.index = index
        self.is_last = index == len(command.payloads) - 1
        self.payload = command.payloads[index]
        self.truth = truth
        self.placed_at = now
        self.started_at = 0.0


class Runner:
    """A child process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_ready = False
        self.is_waking = False
        self.cut_until = 0.0
        self.woken_at = -inf  # its host, by a result
        self.is_dead = False
        self.is_retiring = False
        self.is_doomed = False  # it dies as soon as it has nothing to do
        self.is_killed = False
        self.is_written_off = False  # its worker's session has ended
        self.last_seq = 0
        # It died before it got to work: that is charged to its first task
        self.is_stillborn = False
        self.has_shown_life = False
        self.is_polled = False
        self.queue: deque[Entry] = deque()
        self.current: Entry | None = None
        self.crashed: Entry | None = None  # the task that it died in
        self.blobs: dict[tuple[int, int], bytes] = {}
        self.outbox: list[tuple[int, int, int, float, bytes]] = []

    @property
    def is_busy(self) -> bool:
        return self.current is not None or bool(self.queue)

    def counts(self) -> list[tuple[int, int]]:
        """Unstarted tasks by chunk, oldest chunk first."""
        counts: dict[int, int] = {}
        for entry in self.queue:
            counts[entry.seq] = counts.get(entry.seq, 0) + 1
        return list(counts.items())


class IdleWatch:
    """Nothing waits behind a running task for long while a slot idles, anywhere."""

    def __init__(self, bound: float, fresh_bound: float) -> None:
        self._bound = bound
        self._fresh_bound = fresh_bound  # while a runner has not shown yet that it works
        self._idle = 0
        self._idle_since = 0.0
        self.hosts: list[Host] = []

    def changed(self, idle: int, now: float) -> None:
        """So many slots more are idle, or fewer."""
        if not self._idle:
            self._idle_since = now
        self._idle += idle
        if idle < 0 and not self._idle:
            self._idle = -idle  # look at it once more as it was
            for host in self.hosts:
                for runner in host.runners.values():
                    for entry in runner.queue:
                        self.unblocked(runner, entry, now)
            self._idle = 0

    def unblocked(self, runner: Runner, entry: Entry, now: float) -> None:
        """The task waits no more, or its wait is looked at."""
        if not self._idle or runner.current is None:
            return
        waited = now - max(entry.placed_at, self._idle_since, runner.current.started_at)
        if waited > (self._bound if runner.has_shown_life else self._fresh_bound):
            raise Violation(
                "nobody waits behind",
                f"{entry.truth} waited for {waited:.3f} s behind {runner.current.truth} while a slot idled",
            )


class Host:
    """All runners of one worker. ``notify`` has the worker collect a runner's results."""

    def __init__(
        self,
        name: str,
        slots: int,
        oracle: Oracle,
        *,
        clock: Callable[[], float],
        timer: Timer,
        notify: Callable[[Runner], None],
        spawn_seconds: Callable[[], float],
        wake_seconds: Callable[[], float],
        watch: IdleWatch | None,
    ) -> None:
        self.name = name
        self.runners: dict[int, Runner] = {}
        self.is_black_hole = False
        self.is_present: Callable[[], bool] = lambda: True  # of a session with the present broker
        self._slots = slots
        self._oracle = oracle
        self._clock = clock
        self._timer = timer
        self._notify = notify
        self._spawn_seconds = spawn_seconds
        self._wake_seconds = wake_seconds
        self._watch = watch
        if watch:
            watch.hosts.append(self)
            watch.changed(slots, clock())

    def apply(self, command: p.RunnerCommand) -> list[p.RunnerEvent]:
        """Do what the agent says; recalls are answered at once, kills a little later."""
        if isinstance(command, p.Spawn):
            if sum(not runner.is_killed for runner in self.runners.values()) >= self._slots:
                raise Violation("slots", f"{self.name} is to start more runners than it has slots")
            runner = self.runners[command.runner] = Runner(command.runner)
            self._timer(self._spawn_seconds(), self._ready, runner)
            return []
        runner_or_none = self.runners.get(command.runner)
        if runner_or_none is None:
            return []
        runner = runner_or_none
        match command:
            case p.Load(client=client, blob=blob, payload=payload):
                runner.blobs[client, blob] = join(payload)
            case p.Unload(client=client, blobs=blobs):
                for key in list(runner.blobs):
                    if key[0] == client and (not blobs or key[1] in blobs):
                        del runner.blobs[key]
            case p.Execute():
                self._execute(runner, command)
            case p.Recall():
                kept = command.keeps_first and not runner.is_retiring and runner.current is None
                first = [runner.queue.popleft()] if kept and runner.queue else []
                counts = runner.counts()
                if counts:  # a chunk that is cut does not tell of its end
                    runner.cut_until = self._clock() + STREAM_INTERVAL
                    self._timer(0.0, self._poll, runner)
                self._take_all(runner)
                runner.queue.extend(first)
                self._timer(0.0, self._exit_if_over, runner)  # which is seen later
                return [p.RunnerRecalled(runner.number, counts)]
            case p.ToRunner():
                return []
            case p.Kill():
                self._kill(runner)
            case p.Retire():
                runner.is_retiring = True
                self._exit_if_over(runner)
        return []

    def collect(self, runner: Runner) -> list[p.RunnerEvent]:
        """Results that wait to be read, and the runner's end."""
        events: list[p.RunnerEvent] = []
        if runner.outbox:
            events.append(p.RunnerDone(runner.number, list(runner.outbox)))
            runner.outbox.clear()
        if runner.is_dead and runner.number in self.runners:
            del self.runners[runner.number]
            counts = runner.counts()
            if counts and runner.is_stillborn:
                self._oracle.crashed(runner.queue[0].truth, is_stillborn=True)
            self._take_all(runner)
            reason = "" if runner.is_retiring else "was killed by SIGSEGV"
            reason = "was killed" if runner.is_killed else reason
            events.append(p.RunnerDied(runner.number, reason, counts, runner.last_seq))
        return events

    def crash(self, runner: Runner) -> None:
        """The runner dies now by itself; what it wrote before can still be read."""
        entry = runner.crashed = self._end(runner)
        if entry is not None:
            self._oracle.crashed(entry.truth)
        elif not runner.has_shown_life and not runner.is_retiring:
            runner.is_stillborn = True
        self._notify(runner)

    def _kill(self, runner: Runner) -> None:
        """End it, perhaps when it has just died by itself, which the worker has not seen yet."""
        was_dead, runner.is_killed = runner.is_dead, True
        entry = runner.crashed if was_dead else self._end(runner)
        if entry is not None and not runner.is_written_off:
            self._oracle.killed(entry.truth, self._clock() - entry.started_at)
        if not was_dead:
            self._timer(BURY_SECONDS, self._notify, runner)

    def _end(self, runner: Runner) -> Entry | None:
        was_busy = runner.is_busy
        runner.is_dead = True
        entry, runner.current = runner.current, None
        if self._watch and was_busy and not runner.queue:
            self._watch.changed(1, self._clock())
        return entry

    def close(self) -> None:
        """All runners die with their worker."""
        for runner in self.runners.values():
            runner.is_dead = True
            runner.current = None
            runner.queue.clear()
        self.runners.clear()

    # --- Inside -----------------------------------------------------------------------------------

    def _execute(self, runner: Runner, command: p.Execute) -> None:
        now = self._clock()
        was_busy = runner.is_busy
        runner.last_seq = command.seq
        for index, payload in enumerate(command.payloads):
            truth = self._oracle.of_payload(payload)
            runner.queue.append(Entry(command, index, truth, now))
        if runner.is_dead:
            return
        if self._watch and not was_busy:
            self._watch.changed(-1, now)
        if not was_busy and (seconds := self._wake_seconds()):
            runner.is_waking = True
            self._timer(seconds, self._wake, runner)
        self._start_next(runner)

    def _wake(self, runner: Runner) -> None:
        runner.is_waking = False
        self._start_next(runner)

    def _ready(self, runner: Runner) -> None:
        runner.is_ready = True
        self._start_next(runner)
        self._exit_if_over(runner)

    def _start_next(self, runner: Runner) -> None:
        if runner.current or not runner.queue or runner.is_waking:
            return
        if not runner.is_ready or runner.is_dead:
            return
        entry = runner.current = runner.queue.popleft()
        entry.started_at = self._clock()
        entry.found = [runner.blobs[name] for name in entry.blobs if name in runner.blobs]
        truth = entry.truth
        is_fresh = self.is_present()
        self._oracle.started(truth, entry.attempt, self.name, entry.started_at, is_fresh=is_fresh)
        if truth.is_poison or self.is_black_hole:
            self._timer(
                min(truth.seconds / 2, BURY_SECONDS) if self.is_black_hole else truth.seconds / 2,
                self._poisoned,
                (runner, entry),
            )
        else:
            self._timer(truth.seconds, self._finished, (runner, entry))

    def _poisoned(self, what: tuple[Runner, Entry]) -> None:
        runner, entry = what
        if runner.current is entry:
            self._oracle.marks["fault: a task kills its runner"] += 1
            self.crash(runner)

    def _finished(self, what: tuple[Runner, Entry]) -> None:
        runner, entry = what
        if runner.current is not entry:
            return
        if self._watch and runner.queue:
            self._watch.unblocked(runner, runner.queue[0], self._clock())
        runner.current = None
        if self._watch and not runner.queue:
            self._watch.changed(1, self._clock())  # before its worker can give it more
        if not runner.is_written_off:
            self._oracle.finished(entry.truth, entry.attempt, self._clock())
        status, payload = self._run(entry)
        seconds = entry.truth.seconds
        runner.outbox.append((entry.seq, entry.index, status, seconds, payload))
        runner.has_shown_life = True
        if runner.is_doomed and not runner.queue:
            self.crash(runner)
            return
        now = self._clock()
        if entry.is_last or now - runner.woken_at >= STREAM_INTERVAL:
            runner.woken_at = now
            self._notify(runner)
        elif not runner.is_polled:
            runner.is_polled = True
            is_cut = now < runner.cut_until
            self._timer(CUT_INTERVAL if is_cut else STREAM_INTERVAL, self._poll, runner)
        self._start_next(runner)
        self._exit_if_over(runner)

    def _run(self, entry: Entry) -> tuple[int, bytes]:
        if len(entry.found) < len(entry.blobs):
            return p.ERROR, b"the runner lacks a blob"
        return outcome(entry.found, join(entry.payload), entry.attempt, entry.truth)

    def _poll(self, runner: Runner) -> None:
        runner.is_polled = False
        if runner.outbox:
            self._notify(runner)

    def _take_all(self, runner: Runner) -> None:
        if self._watch:
            now = self._clock()
            for entry in runner.queue:
                self._watch.unblocked(runner, entry, now)
            if runner.queue and runner.current is None:
                self._watch.changed(1, now)
        runner.queue.clear()

    def _exit_if_over(self, runner: Runner) -> None:
        if runner.is_retiring and runner.is_ready and not runner.is_busy and not runner.is_dead:
            runner.is_dead = True
            self._notify(runner)
