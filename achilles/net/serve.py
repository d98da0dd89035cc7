"""Starting a broker: its keys, its sockets, its join files; and taking all that away again."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import zmq

from achilles.core.budget import Limits
from achilles.core.liveness import Timings
from achilles.core.sessions import ADMIN, CLIENT, WORKER
from achilles.errors import ConfigError, InsecureBindError, KeyFileError
from achilles.net import authorized, self_attack
from achilles.net.broker import Broker, Roles
from achilles.net.endpoint import (
    LOCAL_USER,
    Bound,
    Endpoint,
    Gatekeeper,
    bind_router,
    hostname,
    parse_endpoint,
    raise_descriptor_limit,
)
from achilles.net.keys import (
    ROLES,
    join_path,
    key_pair,
    read_join,
    remove_joins,
    run_directory,
    write_joins,
)
from achilles.net.private import BrokerLock, private_directory
from achilles.net.supervisor import Serving

BIND_SECONDS = 5.0  # for the ports of a broker that is about to end
CLIENTS, WORKERS = "achilles-clients", "achilles-workers"  # the ZAP domains
_DOORS = {CLIENTS: ("clients.ipc", (CLIENT, ADMIN)), WORKERS: ("workers.ipc", (WORKER,))}


class Addresses(NamedTuple):
    """Where a broker listens; ``ipc`` and ``worker_ipc`` are None if it does so over TCP alone.

    ``far_clients`` and ``far_workers`` are the same as ``clients`` and ``workers`` from other
    hosts.
    """

    clients: Endpoint
    workers: Endpoint
    ipc: Endpoint | None
    worker_ipc: Endpoint | None
    far_clients: Endpoint
    far_workers: Endpoint


def serve(
    bind: str,
    *,
    home: Path,
    timings: Timings,
    credit: int,
    limits: Limits,
    with_ipc: bool,
    advertise: str | None,
    on_ready: Callable[[Addresses, Broker], None],
    is_stopping: Callable[[], bool],
    serving: Serving | None = None,
) -> int:
    """Run a broker until ``is_stopping()`` or a shutdown; how many tasks had no result then.

    Workers meet it on a port of its own, which their join file names: users never type it.
    ``advertise`` is what other hosts call this one. ``serving``: what a supervisor tells,
    and is told.

    Raises:
        InsecureBindError: other machines could reach the endpoint, and its keys are not in order.
        SelfAttackError: a port does not refuse what it must.
        ConfigError: the endpoint cannot be, or is taken; a key file is not in order.
    """
    tcp = parse_endpoint(bind, to_bind=True)
    if serving and serving.port:
        tcp = tcp._replace(port=serving.port)  # where peers look for it
    _check_keys(home, tcp)
    raise_descriptor_limit()
    pid = serving.pid if serving else None
    awaited = serving.workers if serving else None
    if awaited is None and not join_path(home, WORKER).exists():
        awaited = frozenset()  # no broker was killed here
    # What is last in the list goes first: the sockets, what they leave, the join files, the lock.
    with contextlib.ExitStack() as leave:
        lock = BrokerLock(private_directory(private_directory(home) / "run") / "broker.lock", pid)
        leave.callback(lock.release)
        run = run_directory(home)
        if run.parent != home:
            leave.callback(_remove_directory, run)
        leave.callback(remove_joins, home)
        if not with_ipc:
            _remove_sockets(run)  # of a broker that was killed
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        leave.callback(context.destroy, 0)
        gatekeeper = Gatekeeper(context, _users(home))
        until = monotonic() + (BIND_SECONDS if lock.has_waited else 0.0)
        clients, workers = _bind(
            context, tcp, home, run if with_ipc else None, leave, limits.frame, until
        )
        addresses = _addresses(tcp, clients, workers, advertise)
        roles: dict[str, Roles] = {domain: _roles(home, domain) for domain in _DOORS}

        def reload() -> None:
            """Keys have come or gone."""
            gatekeeper.users = _users(home)
            for domain in _DOORS:
                roles[domain] = _roles(home, domain)
            _write_joins(home, addresses, pid)

        broker = Broker(
            [(clients.socket, lambda: roles[CLIENTS]), (workers.socket, lambda: roles[WORKERS])],
            gatekeeper,
            timings=timings,
            credit=credit,
            limits=limits,
            reload=reload,
            awaited=awaited,
            on_workers=serving.has_workers if serving else None,
        )
        leave.callback(broker.close)
        self_attack.attack(
            context, _doors(home, addresses), broker.loop, broker.step, frame_max=limits.frame
        )
        gatekeeper.refused = 0
        _write_joins(home, addresses, pid)
        if serving:
            serving.is_ready(addresses.clients.port)
        on_ready(addresses, broker)
        broker.log_refusals(gatekeeper)  # but not those of its own attack
        return broker.run(is_stopping)


# --- Keys -----------------------------------------------------------------------------------------


def _check_keys(home: Path, tcp: Endpoint) -> None:
    """Make or read every key before anything listens."""
    try:
        key_pair(home, "broker")
        authorized.entries(home)
    except KeyFileError as error:
        if tcp.is_loopback:
            raise
        raise InsecureBindError(
            f"{tcp} can be reached from other machines, and the keys that would protect it are not in order: {error}"
        ) from None


def _users(home: Path) -> dict[str, dict[bytes, str]]:
    return {domain: authorized.users(home, roles) for domain, (_, roles) in _DOORS.items()}


def _roles(home: Path, domain: str) -> Roles:
    """The roles of those whom the transport has authenticated,
    by the user that the gatekeeper made of their key.
    """
    _, roles = _DOORS[domain]
    found = {entry.user: frozenset({entry.role}) for entry in authorized.entries(home)}
    return {LOCAL_USER: frozenset(roles)} | {
        user: given for user, given in found.items() if given <= set(roles)
    }


def _doors(home: Path, addresses: Addresses) -> list[self_attack.Door]:
    """The ports with the keys that must not open them."""
    broker = key_pair(home, "broker").public
    pairs = {role: key_pair(home, role) for role in ROLES}
    return [
        self_attack.Door(
            endpoint,
            broker,
            {role: (pair.public, pair.secret) for role, pair in pairs.items() if role not in roles},
        )
        for endpoint, (_, roles) in zip(addresses[:2], _DOORS.values(), strict=True)
    ]


# --- Sockets --------------------------------------------------------------------------------------


def _bind(
    context: zmq.Context[zmq.Socket[bytes]],
    tcp: Endpoint,
    home: Path,
    run: Path | None,
    leave: contextlib.ExitStack,
    frame_max: int,
    deadline: float,
) -> list[Bound]:
    """The socket for clients, and that for workers; ``leave`` is told how to take them away.

    ``deadline``: until then what is taken may become free.
    """
    secret = key_pair(home, "broker").secret
    bounds: list[Bound] = []
    for domain, (name, _) in _DOORS.items():
        ipc = None if run is None else parse_endpoint(f"ipc://{run / name}")
        if run is not None:
            leave.callback((run / name).unlink, missing_ok=True)
        bind = functools.partial(
            bind_router,
            context,
            ipc=ipc,
            domain=domain,
            broker_secret=secret,
            frame_max=frame_max,
        )
        ports = _worker_ports(home, tcp, bounds[0].tcp) if bounds else [tcp.port]
        for port in ports[:-1]:
            with contextlib.suppress(ConfigError):
                bounds.append(bind(tcp=tcp._replace(port=port)))
                break
        else:
            bounds.append(
                _bind_soon(functools.partial(bind, tcp=tcp._replace(port=ports[-1])), deadline)
            )
    return bounds


def _bind_soon(bind: Callable[[], Bound], deadline: float) -> Bound:
    while True:
        try:
            return bind()
        except ConfigError:
            if monotonic() >= deadline:
                raise
        sleep(0.02)


def _worker_ports(home: Path, tcp: Endpoint, clients: Endpoint | None) -> list[int]:
    """The ports for workers to be tried in turn,
    so that they find the next broker where they have left this one.

    First the one of a broker that was killed here, then the next to the clients', then, where no
    firewall has to know it, any free one.
    """
    ports = [tcp.port + 1] if 0 < tcp.port < 65535 else []
    try:
        join = read_join(join_path(home, WORKER))
        if parse_endpoint(join.address).port == (clients or tcp).port:
            ports.insert(0, parse_endpoint(join.worker_address).port)
    except (FileNotFoundError, KeyFileError):
        pass
    return ports if ports and not tcp.is_loopback else [*ports, 0]


def _addresses(tcp: Endpoint, clients: Bound, workers: Bound, advertise: str | None) -> Addresses:
    """Where peers of this host, and those of others, find the sockets."""
    near, far = tcp.host, tcp.host
    if _is_wildcard(tcp.host):
        near = "::1" if ":" in tcp.host else "127.0.0.1"
        far = hostname()
    if advertise:
        far = parse_endpoint(f"tcp://{advertise}:1").host
    ports = [(bound.tcp or tcp).port for bound in (clients, workers)]
    places = [Endpoint("tcp", host, port, "") for host in (near, far) for port in ports]
    return Addresses(places[0], places[1], clients.ipc, workers.ipc, places[2], places[3])


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _write_joins(home: Path, addresses: Addresses, pid: int | None) -> None:
    write_joins(
        home,
        address=str(addresses.clients),
        worker_address=str(addresses.workers),
        ipc=str(addresses.ipc or ""),
        worker_ipc=str(addresses.worker_ipc or ""),
        far_address=str(addresses.far_clients),
        far_worker_address=str(addresses.far_workers),
        pid=pid,
    )


def _remove_sockets(run: Path) -> None:
    for name, _ in _DOORS.values():
        (run / name).unlink(missing_ok=True)


def _remove_directory(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()
