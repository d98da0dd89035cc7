"""What is true in a simulated world, noted where it happens, and what must therefore come out.

Every rule has a name, which a failure begins with, and most a number in the list of invariants
below. Rules about one step of a core are asserted in that core's ``check_invariants``; the
assertion's text is then the name.

    I1  a task is resolved at most once            "resolved once" (here)
    I2  the right value, an error that may be      "right outcome", "just failure" (here)
    I3  everything ends when faults have ended     "everything ends" (simulation)
    I4  one lease at a time, numbers are fresh     "a task has two leases" (scheduler); "fresh
    lease" (watch, nodes) I5  no slot leaks                              "a slot leaks" (dispatch);
    "nothing is left" (simulation) I6  each task is in one place                  "a task is
                                                   nowhere", "a task is queued twice" (tables); "a
                                                   lease is nowhere, or in two places" (agent)
    I7  charged with one's own crashes only        "just charge", "crash limit" (here); "charge on a
    drain", "nobody is given up" (watch) I8  work goes only to those who may have it    "ready
    workers only", "tags" (watch) I9  nothing is kept for ever                   "nothing is left"
    (simulation) I10 no more at the broker than the credit      "credit overdrawn" (submission);
    "slots_max" (nodes) I11 nobody is hurt by another's messages       all of these, beside the
    peers of `tests.sim.hostile` I12 no work but what something explains        "work bound", "at
    most once", "retries" (here) I13 no slot idles while a task waits           "a slot idles while
                                                   a task waits" (dispatch), "a runner idles while a
                                                   chunk waits" (agent), "nobody waits behind"
                                                   (runners)
    I14 no timer or task goes round in circles     "timers", "no circles" (nodes, world, watch)
    I15 a role says what it may                    "an honest peer is refused" (nodes), "a hostile
    peer is cut" (hostile) I16 the codec is exact                         "codec" (world)

and beyond these: "cancelled in time" and "killed in time" (here), "timeout enforced", "no task ends
early" and "neighbours of the killed" (here, by the runners), "priority", "oldest first", "fair
share", "alone after a charge", "chunk_max" and "attempt" (watch, here), "what is held runs once"
(here) and "back in time" (world).

Not simulated: budgets in bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from achilles.core import protocol as p
from achilles.core.charges import CRASHES_MAX
from achilles.core.runners import START_SECONDS

OPEN, DONE, CANCELLED, ABANDONED = "open", "done", "cancelled", "abandoned"
ALWAYS = 1 << 30
NEVER = float("inf")
TIMEOUT_SLACK = 0.1  # from when a task's time is up until its runner is gone, where all is well
EPSILON = 1e-6


class Violation(AssertionError):
    """The system did what it must not do; ``check`` names the rule."""

    def __init__(self, check: str, text: str) -> None:
        super().__init__(f"[{check}] {text}")
        self.check = check


@dataclass
class Truth:
    """One task: what it is, and what has happened to it."""

    client: int
    id: int
    group: p.Group
    seconds: float
    is_poison: bool
    raises_until: int  # its attempts up to this one raise
    payload: bytes
    state: str = OPEN
    has_failed: bool = False  # the broker gave it up
    was_sent: bool = False  # a broker may know it
    is_in_doubt: bool = False  # that broker may be gone, or its session
    is_unwanted: bool = False  # somebody may end it where it runs
    starts: int = 0
    stillborn: int = 0  # runners that died before they began it, which it is charged with
    excuses: int = 0  # what may have it start again
    crashes: int = 0  # runners that died in the middle of it
    charges: int = 0  # crashes that workers have charged it with
    pardons: int = 0  # crashes that were their worker's fault
    losses: int = 0  # workers' sessions that ended while they held it
    raises: int = 0
    timeouts: int = 0
    kills: int = 0  # of them or of others that befell it where it ran
    start_by: float = NEVER  # after this nobody should want it any more
    stop_by: float = NEVER  # nor should it run
    ends: int = 0  # sessions of its client that ended, each with its charges
    leases: int = 0
    is_held: bool = False  # begun under an earlier broker, and its worker still has it
    story: list[str] = field(default_factory=list)

    @property
    def options(self) -> p.Options:
        return self.group.options or p.PLAIN

    def __str__(self) -> str:
        kind = " poison" if self.is_poison else ""
        return (
            f"task {self.client}/{self.id} ({self.seconds:.4f} s{kind}, {self.state}, {self.starts} starts, "
            f"{self.excuses} excuses, {self.crashes} crashes, {self.losses} losses, {self.raises} raised, "
            f"{self.timeouts} timed out, {self.group.options})"
        )


def task_payload(client: int, id: int, padding: int) -> bytes:
    """A payload that says whose it is."""
    return b"%d/%d/" % (client, id) + b"." * padding


def blob_payload(client: int, blob: int) -> bytes:
    """A function's or an initializer's."""
    return b"blob %d of client %d" % (blob, client)


def join(payload: p.Payload) -> bytes:
    """The payload in one piece."""
    return payload.join() if isinstance(payload, p.Parts) else bytes(payload)


def outcome(
    blobs: Iterable[bytes], payload: bytes, attempt: int, truth: Truth
) -> tuple[int, bytes]:
    """What running it gives: status and payload."""
    status = p.ERROR if attempt <= truth.raises_until else p.VALUE
    return status, b"|".join((*blobs, payload, b"%d" % attempt))


class Oracle:
    """All tasks of a world."""

    def __init__(
        self, marks: Counter[str], losses_max: int, *, is_exact: bool, is_prompt: bool
    ) -> None:
        """``is_exact``: attempts are counted exactly; ``is_prompt``: no worker is ever stopped."""
        self.marks = marks
        self._losses_max = losses_max
        self._is_exact = is_exact
        self._is_prompt = is_prompt
        self.tasks: dict[tuple[int, int], Truth] = {}
        self.numbers: dict[int, int] = {}  # of the plan's clients, by those that brokers know
        self.open = 0

    def add(self, truth: Truth) -> None:
        self.tasks[truth.client, truth.id] = truth
        self.open += 1

    def of_payload(self, payload: p.Payload) -> Truth:
        client, id, _ = join(payload).split(b"/", 2)
        return self.tasks[int(client), int(id)]

    def of_result(self, payload: p.Payload) -> Truth:
        """The task whose outcome this is."""
        *_, task, _ = join(payload).split(b"|")
        return self.of_payload(task)

    # --- What happens -----------------------------------------------------------------------------

    def started(
        self, truth: Truth, attempt: int, where: str, now: float, *, is_fresh: bool = True
    ) -> None:
        """``is_fresh``: the present broker has given it,
        and not an earlier one whose worker has slept since.
        """
        if now > truth.start_by:
            late = now - truth.start_by
            raise Violation(
                "cancelled in time", f"{truth} started {late:.3f} s later than a cancel takes"
            )
        known = 1 + truth.crashes + truth.raises + truth.timeouts
        most = known + truth.losses
        if not 1 <= attempt <= most or (self._is_exact and attempt != known):
            raise Violation(
                "attempt", f"{truth} is told that it is attempt {attempt}: {truth.story}"
            )
        truth.starts += 1
        truth.story.append(f"started at {where}")
        if truth.is_held and not is_fresh:
            truth.excuses += 1
        elif truth.is_held:
            raise Violation("what is held runs once", f"{truth} was begun again: {truth.story}")
        if truth.options.at_most_once and truth.starts > 1:
            raise Violation("at most once", f"{truth} was begun again: {truth.story}")
        if truth.starts > 1 + truth.excuses:
            raise Violation(
                "work bound", f"{truth} started more often than anything explains: {truth.story}"
            )

    def finished(self, truth: Truth, attempt: int, now: float) -> None:
        """It came to its end by itself."""
        if now > truth.stop_by:
            raise Violation("killed in time", f"{truth} ran on though it was to be killed")
        timeout = truth.options.timeout
        limit = timeout + START_SECONDS + TIMEOUT_SLACK
        if self._is_prompt and timeout and truth.seconds > limit:
            raise Violation("timeout enforced", f"{truth} ran for all of its time")
        if attempt <= truth.raises_until:
            truth.raises += 1
            self._excuse_retry(truth, "it raised")

    def crashed(self, truth: Truth, *, is_stillborn: bool = False) -> None:
        truth.crashes += 1
        truth.is_held = False
        truth.stillborn += is_stillborn
        truth.excuses += 1
        truth.story.append("its runner died")
        if truth.crashes > CRASHES_MAX * (1 + truth.ends) + truth.losses + truth.pardons:
            raise Violation(
                "crash limit",
                f"{truth} was tried again after {CRASHES_MAX} crashes: {truth.story}",
            )

    def pardoned(self, client: int, id: int) -> None:
        """A crash of the task's was its worker's fault."""
        self.tasks[self.numbers[client], id].pardons += 1

    def killed(self, truth: Truth, seconds: float) -> None:
        """Its runner was killed on purpose when it had run for so long."""
        truth.kills += 1
        truth.is_held = False
        timeout = truth.options.timeout
        if timeout and seconds >= timeout - EPSILON:
            truth.timeouts += 1
            self._excuse_retry(truth, "it timed out")
        elif truth.is_unwanted:
            truth.story.append("killed")
        elif timeout:
            raise Violation(
                "no task ends early", f"{truth} was killed after {seconds:.3f} s: {truth.story}"
            )
        else:
            raise Violation("neighbours of the killed", f"{truth} was killed: {truth.story}")

    def _excuse_retry(self, truth: Truth, why: str) -> None:
        truth.story.append(why)
        truth.is_held = False
        # With each new session all again; and of one the broker may not have heard,
        # because the worker's session ended.
        tries = (1 + truth.options.retries) * (1 + truth.ends) + truth.losses
        if truth.raises + truth.timeouts < tries:
            truth.excuses += 1

    def charged(self, truth: Truth, kind: str) -> None:
        if kind == p.TIMEOUT:
            is_just = truth.timeouts > 0
        else:
            truth.charges += 1
            is_just = truth.charges <= truth.crashes
        if not is_just:
            raise Violation(
                "just charge",
                f"{truth} is charged as {kind}, in which it had no part: {truth.story}",
            )

    def worker_lost(self, is_charged: bool, truths: Iterable[Truth]) -> None:
        for truth in truths:
            truth.losses += is_charged
            truth.is_held = False
            truth.excuses += 1
            truth.story.append("its worker's session ended")

    def client_lost(self, client: int) -> None:
        """A client's session ended."""
        for truth in self.tasks.values():
            if client == truth.client:
                truth.is_unwanted = True  # its last session's attempts are
                truth.is_held = False
                if truth.state == OPEN:
                    truth.ends += 1
                    truth.excuses += 1
                    truth.story.append("its client's session ended")

    def broker_lost(self, held: Iterable[Truth]) -> None:
        """All sessions ended. A worker has begun each of the ``held`` ones,
        has it or its value still, and is the only one.
        """
        for truth in self.tasks.values():
            truth.is_unwanted = True  # if two workers have it
            truth.is_held = False
            if truth.state == OPEN:
                truth.ends += 1
                truth.excuses += 1
                truth.story.append("the broker was lost")
        for truth in held:
            if truth.state == OPEN and not truth.is_held:
                self.marks["recovery: a begun task is held"] += 1
                truth.is_held = True
                truth.excuses -= 1
                truth.story.append("and its worker held it")

    def let_go(self, truths: Iterable[Truth], why: str) -> None:
        """What was held may run elsewhere."""
        for truth in truths:
            if truth.is_held:
                truth.is_held = False
                truth.excuses += 1
                truth.story.append(why)

    def client_joined(self, client: int) -> None:
        """A client begins a new session; it cannot know what became of what it sent in the last
        one.
        """
        for truth in self.tasks.values():
            if truth.client == client and truth.was_sent:
                truth.is_in_doubt = True

    def close(self, truth: Truth, state: str) -> None:
        if truth.state == OPEN:
            self.open -= 1
            truth.state = state

    # --- What the user sees -----------------------------------------------------------------------

    def results(self, client: int, message: p.Results) -> None:
        rows = zip(message.ids, message.statuses, message.payloads, strict=True)
        for id, status, payload in rows:
            truth = self._resolve(client, id)
            given = join(payload)
            blobs = [blob_payload(client, blob) for blob in truth.group.needs]
            attempt = int(given.rpartition(b"|")[2]) if given[-1:].isdigit() else 0
            expected = outcome(blobs, truth.payload, attempt, truth)
            if (
                status,
                given,
            ) != expected or attempt > truth.starts + truth.stillborn + truth.losses:
                raise Violation(
                    "right outcome",
                    f"{truth} gave {status} {given[:200]!r}, not {expected[0]} {expected[1][:200]!r}",
                )
            if truth.is_poison:
                raise Violation("right outcome", f"{truth} kills its runner, and has a result")
            if status == p.ERROR and truth.raises + truth.timeouts <= truth.options.retries:
                raise Violation("retries", f"{truth} failed with retries left: {truth.story}")

    def failed(self, client: int, message: p.Failed) -> None:
        truth = self._resolve(client, message.id)
        truth.has_failed = True
        once = truth.options.at_most_once
        if message.kind == p.CRASHED:
            is_just = truth.crashes >= (1 if once else CRASHES_MAX)
        elif message.kind == p.TIMEOUT:
            retried = truth.raises + truth.timeouts - 1
            is_just = truth.timeouts > 0 and retried >= truth.options.retries
        elif once:
            is_just = truth.losses > 0 or truth.is_in_doubt
        else:
            is_just = message.kind == p.LOST and truth.losses >= self._losses_max
        if not is_just:
            raise Violation(
                "just failure",
                f"{truth} was given up as {message.kind}: {message.story}, {truth.story}",
            )
        most = truth.crashes + truth.losses + truth.timeouts + once
        least = CRASHES_MAX if message.kind == p.CRASHED and not once else 1
        if not least <= len(message.story) <= most:
            raise Violation(
                "just failure", f"{truth} failed with {len(message.story)} lines: {message.story}"
            )

    def _resolve(self, client: int, id: int) -> Truth:
        truth = self.tasks.get((client, id))
        if truth is None:
            raise Violation(
                "resolved once", f"an outcome of task {client}/{id}, which nobody submitted"
            )
        if truth.state != OPEN:
            raise Violation(
                "resolved once", f"{truth} got an outcome when it had one, or was not to get one"
            )
        self.close(truth, DONE)
        return truth

    def unresolved(self) -> list[str]:
        """The first few, in words."""
        unresolved = (truth for truth in self.tasks.values() if truth.state == OPEN)
        return [str(truth) for truth in islice(unresolved, 3)]
