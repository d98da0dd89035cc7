"""``achilles broker``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from achilles.cli.settings import Context, StopRequests, count, say
from achilles.config import Settings, home

if TYPE_CHECKING:
    from achilles.core.budget import Limits
    from achilles.core.liveness import Timings
    from achilles.net.broker import Broker
    from achilles.net.serve import Addresses


@click.command()
@click.option("--bind", metavar="ENDPOINT", help="Where to listen; port 0 is any free one.")
@click.option("--advertise", metavar="HOST", help="What other hosts call this one.")
@click.option("--print-address", is_flag=True, help="Print the bare address to stdout.")
@click.option("--ipc/--no-ipc", default=True, help="Whether peers on this host meet over ipc.")
@click.pass_obj
def broker(
    context: Context, bind: str | None, advertise: str | None, print_address: bool, ipc: bool
) -> None:
    """Run a broker: clients submit tasks to it, workers take them from it."""
    stop = StopRequests()
    context.override("broker.bind", bind, "--bind")
    context.override("broker.advertise", advertise, "--advertise")
    context.start_logging()
    settings = context.settings

    endpoint = str(context.endpoint("broker.bind", to_bind=True))
    context.check_host("broker.advertise")

    from achilles.net.serve import serve  # here, so that another serving process begins at once
    from achilles.net.supervisor import Supervisor

    serving = Supervisor(stop, say, restarts_max=settings["broker.restarts"]).start()

    def on_ready(addresses: Addresses, running: Broker) -> None:
        stop.wake = running.loop.wake
        if not serving.is_first:
            return
        _announce(addresses, serving.pid)
        if print_address:
            click.echo(str(addresses.clients))

    lost = serve(
        endpoint,
        home=home(),
        timings=_timings(settings),
        credit=settings["broker.credit"],
        limits=_limits(settings),
        with_ipc=ipc,
        advertise=settings["broker.advertise"],
        on_ready=on_ready,
        is_stopping=lambda: stop.count > 0,
        serving=serving,
    )
    serving.is_over()
    if lost and stop.count:
        say(f"achilles broker: {count(lost, 'task')} had no result yet")
        sys.exit(stop.exit_code)


def _announce(addresses: Addresses, pid: int) -> None:
    """Say where the broker listens, how to join it and how to connect."""
    address, far = addresses.clients, addresses.far_clients
    over = f" (and {addresses.ipc} for this host)" if addresses.ipc else ""
    lines = [
        f"achilles broker listens on {address}{over}, pid {pid}",
        f"  join a worker:        achilles worker {address}",
        f'  connect from Python:  DistributedExecutor(address="{address}")',
        "  look, and stop:       achilles status; achilles shutdown",
    ]
    if not far.is_loopback:
        lines[0] += f"; other hosts reach it at {far} and, for workers, {addresses.far_workers}"
        export = "achilles keys export worker --name HOST | ssh HOST achilles worker --join -"
        lines.insert(2, f"  join another host:    {export}")
    for line in lines:
        say(line)


def _timings(settings: Settings) -> Timings:
    from achilles.core.liveness import Timings

    return Timings(
        heartbeat_interval=settings["broker.heartbeat_interval"],
        suspect_after=settings["broker.suspect_after"],
        lost_after=settings["broker.lost_after"],
        grace=settings["broker.grace"],
        client_lost_after=2 * settings["broker.lost_after"],
        client_grace=5 * settings["broker.grace"],
    )


def _limits(settings: Settings) -> Limits:
    from achilles.core.budget import Limits

    return Limits(
        frame=settings["broker.frame_max"],
        argument=settings["broker.argument_max"],
        result=settings["broker.result_max"],
        client_bytes=settings["broker.client_bytes"],
        memory=settings["broker.memory"],
        sessions=settings["broker.sessions"],
        unauthenticated=settings["broker.unauthenticated"],
        hello_timeout=settings["broker.hello_timeout"],
    )
