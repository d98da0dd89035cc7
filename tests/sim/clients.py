"""A client's process in a simulated cluster,
around its real core as the shell in `achilles.net` is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from achilles.core import protocol as p
from achilles.core import submission
from achilles.core.recovery import stable_number
from achilles.core.submission import Submission
from tests.sim.nodes import Peer
from tests.sim.oracle import (
    ABANDONED,
    CANCELLED,
    NEVER,
    OPEN,
    TIMEOUT_SLACK,
    Truth,
    Violation,
    blob_payload,
)

if TYPE_CHECKING:
    from tests.sim.world import World


class Client(Peer):
    """A client's process; its user submits what the plan says."""

    def __init__(self, world: World, number: int, slots_max: int) -> None:
        hello = p.ClientHello(
            world.fresh_token(), "client", "0", "3.11", f"client-{number}", slots_max
        )
        super().__init__(world, hello.name, hello)
        self.number = number
        world.oracle.numbers[stable_number(hello.incarnation)] = number
        self.submission = Submission()
        self._sends: list[submission.Send] = []

    def on_message(self, message: p.Wire) -> None:
        match message:
            case p.Welcome(credit=credit):
                self.world.oracle.client_joined(self.number)
                self._sends += self.submission.connect(credit)
            case p.Gone():
                self.submission.disconnect()
            case p.Running() | p.Results() | p.Failed() | p.Cluster():
                self._sends += self.submission.receive(message, self.world.now)
            case _:
                raise Violation("role", f"{self.name} got {message}")

    def submit(self, tasks: list[Truth]) -> None:
        """The user submits tasks, in runs of one group."""
        at = 0
        while at < len(tasks):
            group = tasks[at].group
            run = []
            while at < len(tasks) and tasks[at].group == group:
                run.append(tasks[at])
                at += 1
            for blob in group.needs:
                if not self.submission.knows_blob(blob):
                    self.submission.add_blob(blob, blob_payload(self.number, blob))
            ids = [truth.id for truth in run]
            payloads: list[p.Payload] = [truth.payload for truth in run]
            self._sends += self.submission.submit(group, ids, payloads)
        self.act()

    def cancel(self, what: tuple[list[Truth], bool]) -> None:
        """The user wants no result of these any more; or not even that they run on."""
        tasks, kill = what
        plan, now = self.world.plan, self.world.now
        for truth in tasks:
            self.world.oracle.close(truth, CANCELLED)
            truth.is_unwanted |= kill
            if plan.is_calm:
                truth.start_by = now + plan.round_trip
            if kill and (plan.is_calm or plan.is_heard):
                truth.stop_by = now + plan.round_trip + TIMEOUT_SLACK
        self._sends += self.submission.cancel([truth.id for truth in tasks], kill=kill)
        self.act()

    def leave(self, is_polite: bool) -> None:
        """The client ends, with tasks unresolved."""
        self.is_wanted = False
        plan = self.world.plan
        patience = 0.0 if is_polite else plan.timings.client_lost_after + 1.0
        start_by = self.world.now + patience + plan.round_trip
        for truth in self.world.oracle.tasks.values():
            if truth.client != self.number:
                continue
            truth.is_unwanted = True
            stop_by = start_by + TIMEOUT_SLACK if plan.is_calm else NEVER
            truth.stop_by = min(truth.stop_by, stop_by) if is_polite else stop_by
            if truth.state == OPEN:
                self.world.oracle.close(truth, ABANDONED)
                truth.start_by = start_by if plan.is_calm else truth.start_by
            elif not is_polite and self.world.now < truth.start_by < NEVER:
                truth.start_by = start_by  # the word of its cancel is lost
        if is_polite:
            self.transmit(self.dialer.send([p.Goodbye("done")]))
            self.world.linger(self)
        else:
            self.die()

    def act(self) -> None:
        if not self._sends:
            return
        outgoing: list[p.Wire] = []
        oracle = self.world.oracle
        for to, message in self._sends:
            if to == "broker":
                outgoing.append(message)
                if isinstance(message, p.Submit):
                    for id in message.ids:
                        oracle.tasks[self.number, id].was_sent = True
            elif isinstance(message, p.Results):
                oracle.results(self.number, message)
            elif isinstance(message, p.Failed):
                oracle.failed(self.number, message)
        self._sends.clear()
        self.transmit(self.dialer.send(outgoing))

    def check(self) -> None:
        self.submission.check_invariants()
