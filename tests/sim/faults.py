"""What goes wrong, and when."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.sim.clients import Client
from tests.sim.nodes import Worker
from tests.sim.oracle import OPEN, Truth
from tests.sim.world import World

ONE = "a task that runs is to be killed"
SOME = "some tasks that run are to be killed"
FEW = "some tasks are to be killed, running or not"
ALL = "all tasks are to be killed"


class Faults:
    """Each kind comes at random moments, at a rate of its own, until the world is healed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._actions: dict[str, Callable[[random.Random], None]] = {
            "cut": self._cut,
            "drop": self._drop,
            "mute": self._mute,
            "slow": self._slow,
            "worker-crash": self._crash_worker,
            "worker-pause": self._pause_worker,
            "worker-drain": self._drain_worker,
            "runner-crash": self._crash_runner,
            "cancel": self._cancel,
            "kill": self._kill,
            "client-leave": self._leave,
            "client-pause": self._pause_client,
            "hostile": self._misbehave,
            "broker-crash": self._crash_broker,
            "broker-pause": self._pause_broker,
            "black-hole": self._damage_worker,
        }
        plan = world.plan
        for kind, action in self._actions.items():
            if kind in plan.kinds:
                chance = plan.stream(kind)
                count = chance.choice((1, 2, 3, 5, 10))
                for _ in range(count):
                    world.at(chance.uniform(0.0, plan.horizon), self._happen, (action, chance))

    def _happen(self, what: tuple[Callable[[random.Random], None], random.Random]) -> None:
        action, chance = what
        if not self._world.is_healed:
            action(chance)

    # --- The network ------------------------------------------------------------------------------

    def _cut(self, chance: random.Random) -> None:
        peers = [peer for peer in [*self._world.clients, *self._world.workers] if peer.is_up]
        if chance.random() < 0.2:
            peers = [peer for peer in peers if chance.random() < 0.5]
            self._world.fault("a partition of many")
        elif peers:
            peers = [chance.choice(peers)]
            self._world.fault("a connection is cut", peers[0].name)
        for peer in peers:
            self._world.cut(peer)

    def _drop(self, chance: random.Random) -> None:
        self._world.fault("messages are dropped for a while")
        self._world.drop = chance.choice((0.01, 0.1, 0.5))
        self._later(chance.uniform(0.1, 2.0), self._stop_dropping, None)

    def _stop_dropping(self, _: None) -> None:
        self._world.drop = 0.0

    def _mute(self, chance: random.Random) -> None:
        peers = [peer for peer in [*self._world.clients, *self._world.workers] if peer.connection]
        if not peers:
            return
        peer = chance.choice(peers)
        until = self._world.now + chance.choice((1.0, 10.0, 60.0)) / self._world.plan.scale
        up, down = chance.choice(((True, True), (True, False), (False, True)))
        way = "both ways" if up and down else "upwards" if up else "downwards"
        self._world.fault(f"a connection is mute {way}", peer.name)
        if peer.connection and up:
            peer.connection.up_mute_until = until
        if peer.connection and down:
            peer.connection.down_mute_until = until

    def _slow(self, chance: random.Random) -> None:
        self._world.fault("the network is slow for a while")
        self._world.slowness = chance.choice((3.0, 30.0, 300.0))
        self._later(chance.uniform(0.1, 3.0), self._stop_slowness, None)

    def _stop_slowness(self, _: None) -> None:
        self._world.slowness = 1.0

    # --- Workers ----------------------------------------------------------------------------------

    def _crash_worker(self, chance: random.Random) -> None:
        if worker := self._worker(chance):
            self._world.fault("a worker crashes", worker.name)
            worker.die()
            self._replace(chance, worker)

    def _drain_worker(self, chance: random.Random) -> None:
        if worker := self._worker(chance):
            self._world.fault("a worker drains", worker.name)
            worker.deliver(worker.drain, None)
            self._replace(chance, worker)

    def _replace(self, chance: random.Random, worker: Worker) -> None:
        self._later(chance.expovariate(0.5), self._restart_if_gone, worker)

    def _restart_if_gone(self, worker: Worker) -> None:
        if worker.is_up:
            self._later(1.0, self._restart_if_gone, worker)
        else:
            self._world.restart_worker(worker)

    def _pause_worker(self, chance: random.Random) -> None:
        if worker := self._worker(chance):
            self._world.fault("a worker is stopped", worker.name)
            worker.pause(self._nap(chance))

    def _crash_runner(self, chance: random.Random) -> None:
        worker = self._worker(chance)
        runners = list(worker.host.runners.values()) if worker else []
        if not worker or not runners:
            return
        runner = chance.choice(runners)
        if runner.is_dead:
            return
        if runner.current and chance.random() < 0.5:
            self._world.fault("a runner dies between tasks", worker.name)
            runner.is_doomed = True
            return
        state = "in a task" if runner.current else "with work" if runner.is_busy else "idle"
        self._world.fault(f"a runner dies {state}", worker.name)
        worker.host.crash(runner)

    def _damage_worker(self, chance: random.Random) -> None:
        if worker := self._worker(chance):
            self._world.fault("a worker becomes a black hole", worker.name)
            worker.host.is_black_hole = True

    def _worker(self, chance: random.Random) -> Worker | None:
        workers = [worker for worker in self._world.workers if worker.is_up]
        return chance.choice(workers) if workers else None

    # --- Clients ----------------------------------------------------------------------------------

    def _cancel(self, chance: random.Random) -> None:
        client = self._client(chance)
        if client is None or client.paused_until > self._world.now:
            return
        mine = self._open_tasks(client)
        count = min(len(mine), chance.choice((1, 1, 3, 50, 1000)))
        self._world.fault("tasks are cancelled", client.name)
        client.deliver(client.cancel, (chance.sample(mine, count), False))

    def _kill(self, chance: random.Random) -> None:
        client = self._client(chance)
        if client is None or client.paused_until > self._world.now:
            return
        mine = self._open_tasks(client)
        held = [
            (runner.current.truth, worker)
            for worker in self._world.workers
            for runner in worker.host.runners.values()
            if runner.current and runner.current.truth.client == client.number
        ]
        running = [truth for truth, _ in held if truth.state == OPEN]
        what = chance.choice((ONE, ONE, SOME, FEW, FEW, ALL))
        if what == ONE and running:
            mine = [chance.choice(running)]
        elif what == SOME:
            mine = [truth for truth in running if chance.random() < 0.5]
        elif what == FEW:
            mine = [truth for truth in mine if chance.random() < 0.5]
        else:
            what = ALL
        if not mine:
            return
        self._world.fault(what, client.name)
        ids = {truth.id for truth in mine}
        hosts = [worker for truth, worker in held if truth.id in ids]
        if hosts and chance.random() < 0.5 and "worker-drain" in self._world.plan.kinds:
            self._world.fault("tasks are to be killed while their worker drains")
            at = self._world.now + chance.random() * 8 * self._world.plan.delay
            self._world.at(at, lambda worker: worker.deliver(worker.drain, None), hosts[0])
            self._replace(chance, hosts[0])
        client.deliver(client.cancel, (mine, True))

    def _open_tasks(self, client: Client) -> list[Truth]:
        return [
            truth
            for truth in self._world.oracle.tasks.values()
            if truth.client == client.number and truth.state == OPEN
        ]

    def _leave(self, chance: random.Random) -> None:
        client = self._client(chance)
        if client and chance.random() < 0.3 and client.paused_until <= self._world.now:
            is_polite = chance.random() < 0.5
            self._world.fault("a client leaves" if is_polite else "a client dies", client.name)
            client.leave(is_polite)

    def _pause_client(self, chance: random.Random) -> None:
        if client := self._client(chance):
            self._world.fault("a client is stopped", client.name)
            client.pause(self._nap(chance))

    def _client(self, chance: random.Random) -> Client | None:
        clients = [client for client in self._world.clients if client.is_up]
        return chance.choice(clients) if clients else None

    def _misbehave(self, chance: random.Random) -> None:
        self._world.misbehave(chance)

    # --- The broker -------------------------------------------------------------------------------

    def _crash_broker(self, chance: random.Random) -> None:
        is_up = self._world.broker.is_up
        self._world.fault("the broker crashes" if is_up else "the broker would crash again")
        self._world.kill_broker()
        self._later(chance.uniform(0.1, 4.0), self._world.restart_broker, None)

    def _pause_broker(self, chance: random.Random) -> None:
        self._world.fault("the broker is stopped")
        self._world.broker.pause(self._nap(chance))

    def _nap(self, chance: random.Random) -> float:
        return chance.choice((0.1, 1.0, 4.0, 60.0)) * chance.random() / self._world.plan.scale

    def _later(self, seconds: float, function: Callable[[Any], None], argument: Any) -> None:
        at = self._world.now + seconds / self._world.plan.scale
        self._world.at(at, function, argument)
