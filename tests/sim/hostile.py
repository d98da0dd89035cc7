"""A peer with a valid session of a client, that says whatever comes to its mind.

Nobody else may notice: the oracle goes on holding everything that it holds for the others. And
whoever says what its role may not, or what does not fit its session, loses that session.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from achilles.core import protocol as p
from achilles.core.dialer import JOINED
from achilles.core.link import Packet
from achilles.core.recovery import stable_number
from tests.sim.nodes import Peer
from tests.sim.oracle import ALWAYS, CANCELLED, Truth, task_payload

if TYPE_CHECKING:
    from tests.sim.world import World

IDS_MAX = 20


class Hostile(Peer):
    """The peer; ``number`` is that of a client which the plan does not have."""

    is_hostile = True

    def __init__(self, world: World, number: int) -> None:
        hello = p.ClientHello(world.fresh_token(), "client", "0", "3.11", f"client-{number}", 0)
        super().__init__(world, hello.name, hello)
        self.number = number
        world.oracle.numbers[stable_number(hello.incarnation)] = number
        for id in range(1, IDS_MAX + 1):
            payload = task_payload(number, id, 0)
            truth = Truth(number, id, p.Group(0, 0), 0.001, False, 0, payload, state=CANCELLED)
            truth.excuses = ALWAYS
            truth.is_unwanted = True
            world.oracle.tasks[number, id] = truth

    def misbehave(self, chance: random.Random) -> None:
        """Say a few things."""
        connection = self.connection
        if self.dialer.state != JOINED or connection is None:
            return
        for _ in range(chance.randint(1, 8)):
            if chance.random() < 0.1:
                self.world.fault("a hostile peer sends no message")
                self.world.send_frames(connection, [chance.randbytes(chance.randint(0, 60))])
            elif chance.random() < 0.1:
                self.world.fault("a hostile peer acknowledges what was never sent")
                header = p.Header(self.dialer._link.token, 1, chance.randint(1000, 1 << 60))
                self.world.send_up(connection, Packet(header, p.Heartbeat()))
            else:
                message = self._message(chance)
                is_allowed = isinstance(message, p.FromClient)
                self.world.fault(
                    "a hostile peer says what its role may"
                    if is_allowed
                    else "a hostile peer says what its role may not"
                )
                self.transmit(self.dialer.send([message]))

    def _message(self, chance: random.Random) -> p.Wire:
        ids = [chance.randint(1, IDS_MAX) for _ in range(chance.randint(0, 5))]
        number = chance.choice((0, 1, 2, 3, 1 << 40))
        payloads: list[p.Payload] = [task_payload(self.number, id, 0) for id in ids]
        statuses = bytes(len(ids))
        mischief: list[p.Wire] = [
            p.Submit(chance.choice((0, 0, number)), 0, ids, payloads),
            p.Submit(0, 0, ids, payloads, 0, p.Options(timeout=0.1, retries=2, tags=("none",))),
            p.Blob(number, number, b"blob"),
            p.Forget(number, ids),
            p.Cancel(ids, chance.random() < 0.5),
            p.StatusRequest(),
            p.Goodbye("for now"),
            p.Resumed(),
            p.Submit(0, 0, ids, payloads, is_again=True),
            p.Held(number, number, ids or [1], list(range(len(ids) or 1)), []),
            p.Done(number, ids, statuses, payloads, 0.0),
            p.Returned(number, ids),
            p.Crashed(number, 0, "died", chance.choice((p.CRASHED, p.TIMEOUT))),
            p.Drain(),
            p.Results(ids, statuses, payloads),
            p.Run(number, number, 0, 0, ids, payloads),
            p.Revoke(number, ids, True),
            p.Shutdown(),
        ]
        return chance.choice(mischief)

    def on_message(self, message: p.Wire) -> None:
        pass

    def act(self) -> None:
        pass

    def check(self) -> None:
        pass
