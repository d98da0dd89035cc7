"""One seed from its plan to its verdict."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from achilles.core import charges, sessions, submission
from tests.sim.clients import Client
from tests.sim.faults import Faults
from tests.sim.nodes import Node
from tests.sim.oracle import Truth, Violation
from tests.sim.plan import WHOLE, Plan, Trim, make_plan
from tests.sim.world import World

CHECK_INTERVAL = 0.25
_LIVENESS, _LIMITS = vars(sessions), vars(charges)


class Outcome(NamedTuple):
    """What a run was like."""

    trace: int  # of two runs of one seed, equal
    seconds: float  # virtual
    steps: int
    marks: Counter[str]  # how often what happened


class SimulationError(AssertionError):
    """A seed failed; ``check`` names the rule that was broken,
    the text says how to see it again.
    """

    def __init__(self, seed: int, trim: Trim, check: str, text: str) -> None:
        words = f"--seed {seed} {trim}".strip()
        super().__init__(f"{check}: {text}\nTo see it again: python -m tests.sim {words} --log")
        self.seed = seed
        self.trim = trim
        self.check = check


def name_of(error: Exception) -> str:
    """The name of the rule that this error says was broken."""
    if isinstance(error, Violation):
        return error.check
    if type(error) is AssertionError:
        return re.sub(r"^(worker|client)-[\d.]+ ", r"a \1 ", str(error))  # no matter which
    return f"{type(error).__name__}"


def simulate(
    seed: int,
    *,
    trim: Trim = WHOLE,
    stride: int | None = None,
    log: Callable[[str], None] | None = None,
) -> Outcome:
    """Run one seed.

    Raises:
        SimulationError: the system did not do what it promises.
    """
    plan = make_plan(seed, trim)
    if log:
        log(str(plan))
    kept = submission.BLOBS_KEPT, _LIVENESS["STALL_SECONDS"], _LIMITS["LOSSES_MAX"]
    submission.BLOBS_KEPT = plan.blobs_kept
    _LIVENESS["STALL_SECONDS"] /= plan.scale  # as all timings
    _LIMITS["LOSSES_MAX"] = plan.losses_max
    tasks = sum(len(batch) for _, batch in plan.batches)
    world = World(plan, stride=stride or 1 + tasks // 6, log=log)
    try:
        _run(world)
    except Exception as error:
        raise SimulationError(
            seed, trim, name_of(error), f"at {world.now:.4f} s: {error}\n{plan}"
        ) from error
    finally:
        submission.BLOBS_KEPT, _LIVENESS["STALL_SECONDS"], _LIMITS["LOSSES_MAX"] = kept
    return Outcome(world.trace, world.now, world.steps, _marks(world))


def _marks(world: World) -> Counter[str]:
    marks = world.marks
    for truth in world.oracle.tasks.values():
        marks[truth.state] += 1
        marks["run again"] += max(0, truth.starts - 1)
        marks["crashed"] += truth.crashes
        marks["raised"] += truth.raises
        marks["timed out"] += truth.timeouts
        marks["killed"] += truth.kills - truth.timeouts
        marks["lost"] += truth.losses
        marks["failed"] += truth.has_failed
    return marks


def _run(world: World) -> None:
    plan = world.plan
    world.broker.after_step()
    for peer in [*world.clients, *world.workers]:
        peer.start()
    for at, batch in plan.batches:
        world.at(at, _submit, (world, batch))
    Faults(world)
    world.run_until(plan.horizon)
    world.note("the faults end")
    world.heal()
    deadline = plan.horizon + _bound(plan)
    while remains := _remains(world):
        if world.now > deadline:
            text = f"{_bound(plan):.0f} s after the last fault: {remains}"
            raise Violation("everything ends", text)
        world.run_until(world.now + CHECK_INTERVAL / plan.scale)
    _check_clean(world)


def _submit(what: tuple[World, list[Truth]]) -> None:
    world, batch = what
    client = world.clients[batch[0].client]
    if client.is_up and client.is_wanted:
        for truth in batch:
            world.oracle.add(truth)
        client.deliver(client.submit, batch)


def _bound(plan: Plan) -> float:
    """How long everything may take when nothing goes wrong any more."""
    work = spawns = 0.0
    for truth in (truth for _, batch in plan.batches for truth in batch):
        tries = 1 + truth.options.retries
        work += tries * (truth.seconds + 12 * 3 * plan.delay)  # perhaps one by one
        if truth.is_poison or truth.options.timeout or plan.tasks_max:
            spawns += tries * 3 * plan.spawn_seconds
    patience = 2 * plan.timings.client_lost_after + plan.timings.lost_after
    return patience + 2 * work + 2 * spawns + 30.0


def _remains(world: World) -> str:
    """What there is still to do; empty when all is done and every session has noticed."""
    if world.oracle.open:
        return f"{world.oracle.open} tasks are unresolved: {world.oracle.unresolved()}"
    for worker in world.workers:
        if worker.is_draining:
            return f"{worker.name} is still draining"
        if worker.agent._chunks:
            return f"{worker.name} still has {worker.agent!r}"
    broker = world.broker.sessions
    alive = [peer for peer in [*world.clients, *world.workers] if peer.is_up]
    if broker._by_token.keys() != {peer.dialer._link.token for peer in alive}:
        return f"{broker!r} where {len(alive)} peers are up"
    status = world.broker.scheduler.status(world.now)
    if status.queued or status.running:
        return f"the broker still has {status.queued} queued and {status.running} running tasks"
    if any(worker.leases for worker in world.broker.scheduler._workers.values()):
        return "the broker still has leases"
    if world.broker.scheduler._recovery._absent:
        return "the broker waits for clients that will not come"
    kept = sum(peer.dialer._link.unacknowledged for peer in alive)
    kept += sum(session.link.unacknowledged for session in broker._by_token.values())
    if kept:
        return f"{kept} messages are unacknowledged"
    return ""


def _check_clean(world: World) -> None:
    """Nothing is left behind anywhere."""
    nodes: list[Node] = [world.broker, *world.clients, *world.workers]
    for node in nodes:
        if node.is_up:
            node.check()
    scheduler = world.broker.scheduler
    known = {client.number for client in scheduler._clients.values()}
    for worker in world.workers:
        held = {client for client, _ in worker.agent._blobs}
        held |= {client for runner in worker.host.runners.values() for client, _ in runner.blobs}
        if not held <= known:
            raise Violation("nothing is left", f"{worker.name} keeps blobs of clients that left")
    for client in scheduler._clients.values():
        if client.running or client.prefetched or client.live:
            raise Violation("nothing is left", f"{client.name} is thought to hold places")
    for client in scheduler._clients.values():
        if client.found is not None and client.name.startswith("client-"):
            raise Violation("nothing is left", f"{client.name} has not said that it has resumed")
    unknown: list[Client] = [
        client for client in world.clients if client.is_up and len(client.submission)
    ]
    if unknown:
        raise Violation("nothing is left", f"{unknown[0].submission!r} when all is done")
