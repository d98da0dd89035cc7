"""``achilles worker``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from achilles.cli.settings import Context, StopRequests, count, escape, say
from achilles.config import SLOTS_MAX, cores, home

if TYPE_CHECKING:
    from achilles.net.keys import Join


@click.command()
@click.argument("address", required=False)
@click.option(
    "--slots",
    type=click.IntRange(1, SLOTS_MAX),
    metavar="N",
    help="Tasks at once; by default one for each core.",
)
@click.option(
    "--join", metavar="FILE", help="A join file of another host's broker; - reads it from stdin."
)
@click.option(
    "--output",
    type=click.Choice(["client", "worker"]),
    help="Where what tasks print goes: to their client, or where the worker prints.",
)
@click.option(
    "--memory-limit", metavar="SIZE", help="Memory that a runner may take for itself, as 4GiB."
)
@click.option("--name", metavar="NAME", help="What the worker is called.")
@click.option(
    "--tag", "tags", multiple=True, metavar="TAG", help="Something it offers; may repeat."
)
@click.pass_obj
def worker(
    context: Context,
    address: str | None,
    slots: int | None,
    join: str | None,
    output: str | None,
    memory_limit: str | None,
    name: str | None,
    tags: tuple[str, ...],
) -> None:
    """Lend this host's cores to the broker at ADDRESS (by default your own running one).

    SIGTERM or Ctrl-C lets running tasks finish and gives the others back; a second one ends them.
    """
    stop = StopRequests()
    context.override("address", address, "ADDRESS")
    context.override("join", join, "--join")
    context.override("worker.output", output, "--output")
    context.override("worker.memory_limit", memory_limit, "--memory-limit")
    context.override("worker.slots", slots, "--slots")
    context.override("worker.name", name, "--name")
    context.override("worker.tags", tags, "--tag")
    context.start_logging()

    from achilles.net.endpoint import hostname
    from achilles.net.keys import code_of
    from achilles.net.peer import dialer_to
    from achilles.net.worker import Worker

    settings = context.settings
    found = _read_join(context) if settings["join"] == "-" else context.join("worker")
    capacity = settings["worker.slots"] or cores()
    called = settings["worker.name"] or f"{hostname()}-{os.getpid()}"
    running = Worker(
        dialer_to(found),
        code=code_of(found, home()),
        slots=capacity,
        name=called,
        tags=settings["worker.tags"],
        captures=settings["worker.output"] == "client",
        memory_limit=settings["worker.memory_limit"],
        connect_timeout=settings["client.connect_timeout"],
        cluster=found.broker_public,
    )
    stop.wake = running.loop.wake
    is_first = True

    def on_joined() -> None:
        nonlocal is_first
        if is_first:
            _announce(called, found.address, capacity)
        is_first = False

    def on_draining(tasks: int) -> None:
        rest = f"; {count(tasks, 'task')} to finish (Ctrl-C ends it now)" if tasks else ""
        say(f"achilles worker {called} takes no more tasks{rest}")

    given_up = running.run(lambda: stop.count, on_joined, on_draining)
    if given_up and stop.count:
        say(f"achilles worker: gave up {count(given_up, 'running task')}")
        sys.exit(stop.exit_code)
    say(f"achilles worker {called} has ended: {escape(running.ended_by)}")


def _read_join(context: Context) -> Join:
    """The join file that comes on stdin, as from ``achilles keys export``."""
    from achilles.net.keys import check_join, parse_join
    from achilles.net.private import FILE_MAX

    data = sys.stdin.buffer.read(FILE_MAX)
    remedy = "it is what `achilles keys export worker` prints on the broker's host"
    join = parse_join(data, "the join file on stdin", remedy)
    return check_join(join, "the join file on stdin", "worker", context.address())


def _announce(name: str, address: str, slots: int) -> None:
    """Say where the worker has joined, how to connect and how to stop it."""
    say(
        f"achilles worker {name} joined the broker at {address} with {count(slots, 'slot')}, pid {os.getpid()}\n"
        f'  connect from Python:  DistributedExecutor(address="{address}")\n'
        "  stop it:              Ctrl-C (finishes what runs), twice to stop at once"
    )
