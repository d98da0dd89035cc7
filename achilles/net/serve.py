"""Starting a broker: its keys, its sockets, its join files; and taking all that away again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zmq

from achilles.core.liveness import Timings
from achilles.core.sessions import ADMIN, CLIENT, WORKER
from achilles.errors import ConfigError, KeyFileError
from achilles.net.broker import Broker
from achilles.net.endpoint import (
    LOCAL_USER,
    Bound,
    Endpoint,
    Gatekeeper,
    bind_router,
    parse_endpoint,
    raise_descriptor_limit,
)
from achilles.net.keys import (
    join_path,
    key_pair,
    read_join,
    remove_joins,
    run_directory,
    write_joins,
)
from achilles.net.private import BrokerLock, private_directory

CLIENTS, WORKERS = "achilles-clients", "achilles-workers"  # the ZAP domains

# The roles of those whom the transport has authenticated, by the user that the gatekeeper made of their key.
_CLIENT_ROLES = {
    LOCAL_USER: frozenset({CLIENT, ADMIN}),
    CLIENT: frozenset({CLIENT}),
    ADMIN: frozenset({ADMIN}),
}
_WORKER_ROLES = {LOCAL_USER: frozenset({WORKER}), WORKER: frozenset({WORKER})}


class Addresses(NamedTuple):
    """Where a broker listens; the last two are None if it does so over TCP alone."""

    clients: Endpoint
    workers: Endpoint
    ipc: Endpoint | None
    worker_ipc: Endpoint | None


def serve(
    bind: str,
    *,
    home: Path,
    timings: Timings,
    credit: int,
    with_ipc: bool,
    on_ready: Callable[[Addresses, Broker], None],
    is_stopping: Callable[[], bool],
) -> int:
    """Run a broker until ``is_stopping()`` or a shutdown; how many tasks had no result then.

    Workers meet it on a port of its own, which their join file names: users never type it.

    Raises:
        ConfigError: the endpoint cannot be, is taken, or is not safe; a key file is not in order.
    """
    tcp = parse_endpoint(bind, to_bind=True)
    raise_descriptor_limit()
    # What is last in the list goes first: the sockets, what they leave, the join files, the lock.
    with contextlib.ExitStack() as leave:
        lock = BrokerLock(private_directory(private_directory(home) / "run") / "broker.lock")
        leave.callback(lock.release)
        run = run_directory(home)
        if run.parent != home:
            leave.callback(_remove_directory, run)
        leave.callback(remove_joins, home)
        addresses, broker = _start(tcp, home, run if with_ipc else None, timings, credit, leave)
        write_joins(
            home,
            address=str(addresses.clients),
            worker_address=str(addresses.workers),
            ipc=str(addresses.ipc or ""),
            worker_ipc=str(addresses.worker_ipc or ""),
        )
        on_ready(addresses, broker)
        return broker.run(is_stopping)


def _start(
    tcp: Endpoint,
    home: Path,
    run: Path | None,
    timings: Timings,
    credit: int,
    leave: contextlib.ExitStack,
) -> tuple[Addresses, Broker]:
    """A broker on its sockets; ``leave`` is told how to take it away."""
    secret = key_pair(home, "broker").secret
    users = {
        CLIENTS: {key_pair(home, role).raw_public: role for role in (CLIENT, ADMIN)},
        WORKERS: {key_pair(home, WORKER).raw_public: WORKER},
    }
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    leave.callback(context.destroy, 0)
    gatekeeper = Gatekeeper(context, users)
    bounds: list[Bound] = []
    for domain, name in ((CLIENTS, "clients.ipc"), (WORKERS, "workers.ipc")):
        ipc = None if run is None else parse_endpoint(f"ipc://{run / name}")
        if run is not None:
            leave.callback((run / name).unlink, missing_ok=True)
        bind = functools.partial(bind_router, context, ipc=ipc, domain=domain, broker_secret=secret)
        if domain == CLIENTS:
            bounds.append(bind(tcp=tcp))
            continue
        former = _former_worker_port(home, bounds[0].tcp)
        try:
            bounds.append(bind(tcp=tcp._replace(port=former)))
        except ConfigError:
            bounds.append(bind(tcp=tcp._replace(port=0)))
    clients, workers = bounds
    broker = Broker(
        [(clients.socket, _CLIENT_ROLES), (workers.socket, _WORKER_ROLES)],
        gatekeeper,
        timings=timings,
        credit=credit,
    )
    leave.callback(broker.close)
    return Addresses(clients.tcp or tcp, workers.tcp or tcp, clients.ipc, workers.ipc), broker


def _former_worker_port(home: Path, clients: Endpoint | None) -> int:
    """Where the workers of a broker that was killed at this place look for it; 0 if there was none."""
    try:
        join = read_join(join_path(home, WORKER))
        if clients is None or parse_endpoint(join.address) != clients:
            return 0
        return parse_endpoint(join.worker_address).port
    except (FileNotFoundError, KeyFileError):
        return 0


def _remove_directory(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()
