"""What goes wrong, and when."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.sim.nodes import Client, Worker
from tests.sim.oracle import OPEN
from tests.sim.world import World


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
            "client-leave": self._leave,
            "client-pause": self._pause_client,
            "broker-crash": self._crash_broker,
            "broker-pause": self._pause_broker,
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
        if chance.random() < 0.2:  # a partition of many
            peers = [peer for peer in peers if chance.random() < 0.5]
        elif peers:
            peers = [chance.choice(peers)]
        for peer in peers:
            self._world.note(f"{peer.name} is cut off")
            self._world.cut(peer)

    def _drop(self, chance: random.Random) -> None:
        self._world.drop = chance.choice((0.0, 0.01, 0.1, 0.5))
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
        self._world.note(f"{peer.name} is mute{' upwards' * up}{' downwards' * down}")
        if peer.connection and up:
            peer.connection.up_mute_until = until
        if peer.connection and down:
            peer.connection.down_mute_until = until

    def _slow(self, chance: random.Random) -> None:
        self._world.slowness = chance.choice((3.0, 30.0, 300.0))
        self._later(chance.uniform(0.1, 3.0), self._stop_slowness, None)

    def _stop_slowness(self, _: None) -> None:
        self._world.slowness = 1.0

    # --- Workers ----------------------------------------------------------------------------------

    def _crash_worker(self, chance: random.Random) -> None:
        if worker := self._worker(chance):
            self._world.note(f"{worker.name} crashes")
            worker.die()
            self._replace(chance, worker)

    def _drain_worker(self, chance: random.Random) -> None:
        if worker := self._worker(chance):
            self._world.note(f"{worker.name} drains")
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
            self._world.note(f"{worker.name} is stopped")
            worker.pause(self._nap(chance))

    def _crash_runner(self, chance: random.Random) -> None:
        worker = self._worker(chance)
        runners = list(worker.host.runners.values()) if worker else []
        if worker and runners:
            runner = chance.choice(runners)
            if not runner.is_dead:
                self._world.note(f"runner {runner.number} of {worker.name} crashes")
                if runner.is_busy and chance.random() < 0.5:
                    runner.is_doomed = True
                else:
                    worker.host.end(runner, is_asked=False)

    def _worker(self, chance: random.Random) -> Worker | None:
        workers = [worker for worker in self._world.workers if worker.is_up]
        return chance.choice(workers) if workers else None

    # --- Clients ----------------------------------------------------------------------------------

    def _cancel(self, chance: random.Random) -> None:
        client = self._client(chance)
        if client is None or client.paused_until > self._world.now:
            return
        mine = [
            truth
            for truth in self._world.oracle.tasks.values()
            if truth.client == client.number and truth.state == OPEN
        ]
        count = min(len(mine), chance.choice((1, 1, 3, 50, 1000)))
        client.deliver(client.cancel, chance.sample(mine, count))

    def _leave(self, chance: random.Random) -> None:
        client = self._client(chance)
        if client and chance.random() < 0.3 and client.paused_until <= self._world.now:
            self._world.note(f"{client.name} leaves")
            client.leave(chance.random() < 0.5)

    def _pause_client(self, chance: random.Random) -> None:
        if client := self._client(chance):
            self._world.note(f"{client.name} is stopped")
            client.pause(self._nap(chance))

    def _client(self, chance: random.Random) -> Client | None:
        clients = [client for client in self._world.clients if client.is_up]
        return chance.choice(clients) if clients else None

    # --- The broker -------------------------------------------------------------------------------

    def _crash_broker(self, chance: random.Random) -> None:
        self._world.note("the broker crashes")
        self._world.kill_broker()
        self._later(chance.uniform(0.1, 4.0), self._world.restart_broker, None)

    def _pause_broker(self, chance: random.Random) -> None:
        self._world.note("the broker is stopped")
        self._world.broker.pause(self._nap(chance))

    def _nap(self, chance: random.Random) -> float:
        return chance.choice((0.1, 1.0, 4.0, 60.0)) * chance.random() / self._world.plan.scale

    def _later(self, seconds: float, function: Callable[[Any], None], argument: Any) -> None:
        at = self._world.now + seconds / self._world.plan.scale
        self._world.at(at, function, argument)
