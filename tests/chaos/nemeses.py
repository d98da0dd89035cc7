"""What does the faults of a plan to the processes of a rig, heals them,
and counts what it really did.

A fault that found nobody to befall is not counted,
so that a run which harmed nothing cannot pass for a good one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from achilles.core import protocol as p
from achilles.net.endpoint import parse_endpoint
from tests.brokers import RawPeer
from tests.chaos.plan import Fault
from tests.chaos.proxy import Proxy
from tests.chaos.rig import Rig, Started

IDLE_CONNECTIONS = 60
FEW_DESCRIPTORS = 2
ENDLESS_PARTS = 5000
CLOCK_BYTES = 8

Heal = Callable[[], object]

STOPS = {"stop runner", "stop worker", "stop broker", "stop client"}
PARTITIONS = {"black hole", "black hole up", "black hole down", "half-open", "half-closed"}
HOSTILE = {"garbage", "idle connections", "bad frames", "endless message"}
GROUPS = {
    **dict.fromkeys(STOPS, "stopped"),
    **dict.fromkeys(PARTITIONS, "partition"),
    **dict.fromkeys(HOSTILE, "hostile"),
    **dict.fromkeys(("slow", "narrow"), "slowed"),
}
KILLS = ("kill runner", "kill worker", "kill broker", "kill client", "memory killer")

# Kinds that need Linux, or its /proc.
_LINUX = {"no descriptors", "full disk"}


def unavailable(kind: str) -> str:
    """Why a kind of fault cannot be had here; empty if it can."""
    if kind in _LINUX and not sys.platform.startswith("linux"):
        return f"{kind}: limits of another process are changed with prlimit, which is Linux's"
    return ""


class Nemeses:
    """``victims`` makes clients that may be killed."""

    def __init__(self, rig: Rig, seed: int, victim: Callable[[], Started | None]) -> None:
        self.counts: Counter[str] = Counter()
        self.times: list[tuple[float, str]] = []  # when what befell somebody
        self._rig = rig
        self._victim = victim
        self._random = random.Random(seed)
        self._clock = Path(rig.environ.get("CHAOS_CLOCK", os.devnull))
        self._busy: list[subprocess.Popen[bytes]] = []

    def apply(self, fault: Fault) -> Heal | None:
        """Do it; what ends it, where it lasts."""
        at = time.monotonic()
        try:
            healed = self._apply(fault)
        except (psutil.NoSuchProcess, ProcessLookupError):
            return None
        if healed is None:
            return None
        group = GROUPS.get(fault.kind)
        self.counts.update([fault.kind, "faults", *([group] if group else [])])
        self.times.append((at, fault.kind))
        return healed

    def _apply(self, fault: Fault) -> Heal | None:
        """As `apply`; None if there was nobody."""
        kind = fault.kind
        if kind in KILLS or kind == "drain worker":
            return self._end(kind, fault.target)
        if kind in STOPS:
            return self._stop(kind, fault.target)
        if kind in ("garbage", "idle connections"):
            return self._from_strangers(kind)
        if kind in ("bad frames", "endless message"):
            return self._from_a_peer(kind)
        if kind == "no descriptors":
            return self._take_descriptors()
        if kind == "full disk":
            return self._fill_disk()
        if kind == "starve":
            return self._starve(fault.seconds)
        if kind == "clock":
            self._clock.write_bytes(struct.pack("d", fault.amount))
            return _nothing
        return self._disturb(fault)

    def close(self) -> None:
        """End what faults have started."""
        for process in self._busy:
            process.kill()
            process.wait()

    # --- Processes --------------------------------------------------------------------------------

    def _end(self, kind: str, target: int) -> Heal | None:
        rig = self._rig
        if kind in ("kill runner", "memory killer"):
            runners = [runner for runner in rig.runners() if runner.is_running()]
            if not runners:
                return None
            if kind == "kill runner":
                runners[target % len(runners)].kill()
            else:
                max(runners, key=lambda runner: runner.memory_info().rss).kill()
        elif kind == "kill broker":
            pid = rig.serving_pid()
            if pid is None:
                return None
            os.kill(pid, signal.SIGKILL)
        else:
            victim = self._victim() if kind == "kill client" else _choose(rig.workers, target)
            if victim is None or not victim.is_running:
                return None
            if kind == "drain worker":
                victim.process.terminate()
            else:
                victim.was_killed = True
                victim.process.kill()
        return _nothing

    def _stop(self, kind: str, target: int) -> Heal | None:
        rig = self._rig
        process: psutil.Process
        if kind == "stop runner":
            runners = rig.runners()
            if not runners:
                return None
            process = runners[target % len(runners)]
        elif kind == "stop broker":
            pid = rig.serving_pid()
            if pid is None:
                return None
            process = psutil.Process(pid)
        else:
            peer = _choose(rig.clients if kind == "stop client" else rig.workers, target)
            if peer is None:
                return None
            process = psutil.Process(peer.process.pid)
        process.suspend()

        def go_on() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

        return go_on

    def _starve(self, seconds: float) -> Heal:
        program = f"import time; t = time.monotonic() + {seconds}\nwhile time.monotonic() < t: pass"
        for _ in range(2 * (os.cpu_count() or 1)):
            self._busy.append(subprocess.Popen([sys.executable, "-c", program]))
        return _nothing

    # --- The network ------------------------------------------------------------------------------

    def _disturb(self, fault: Fault) -> Heal | None:
        proxies = [proxy for proxy in self._rig.proxies() if proxy.connections]
        if not proxies:
            return None
        proxy = proxies[fault.target % len(proxies)]
        match fault.kind:
            case "reset":
                return _nothing if proxy.cut() else None
            case "half-open":
                return proxy.clear if proxy.forget() else None
            case "half-closed":
                return _nothing if proxy.finish() else None
            case "flap":
                proxy.refuse(True)
                proxy.cut()
            case "black hole":
                proxy.up.is_open = proxy.down.is_open = False
            case "black hole up":
                proxy.up.is_open = False
            case "black hole down":
                proxy.down.is_open = False
            case "unread":
                proxy = self._rig.clients[0].proxy
                proxy.down.is_open = False
            case "slow":
                proxy.up.delay = proxy.down.delay = fault.amount / 2
                proxy.up.jitter = proxy.down.jitter = fault.amount
            case "narrow":
                proxy.up.rate = proxy.down.rate = fault.amount
            case "flip":
                weather = proxy.up if fault.target % 2 else proxy.down
                weather.flips = int(fault.amount)
                return _nothing  # until a piece comes
            case _:
                raise AssertionError(fault.kind)
        return proxy.clear

    def count_network(self) -> None:
        """Add what the proxies have done."""
        peers = [*self._rig.workers, *self._rig.clients]
        for name in ("delayed", "flipped", "accepted"):
            self.counts[name] = sum(_counted(peer.proxy, name) for peer in peers)

    # --- Limits -----------------------------------------------------------------------------------

    def _take_descriptors(self) -> Heal | None:
        """The broker has as many as it uses, and a few, while strangers connect."""
        import resource

        pid = self._rig.serving_pid()
        if pid is None or unavailable("no descriptors"):
            return None
        used = len(os.listdir(f"/proc/{pid}/fd"))
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + FEW_DESCRIPTORS, before[1]))
        release = self._from_strangers("idle connections")

        def heal() -> None:
            if release is not None:
                release()
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

        return heal

    def _fill_disk(self) -> Heal | None:
        """Broker, workers and runners can write no byte to a file,
        and to no memory that is a file.
        """
        import resource

        if unavailable("full disk"):
            return None
        workers = [worker.process.pid for worker in self._rig.workers if worker.is_running]
        found = [self._rig.serving_pid(), *workers, *(one.pid for one in self._rig.runners())]
        pids = [pid for pid in found if pid is not None]

        def limit(soft: int) -> None:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

        limit(0)
        return lambda: limit(resource.RLIM_INFINITY)

    # --- Others on the network --------------------------------------------------------------------

    def _places(self) -> list[tuple[str, int]]:
        join = self._rig.join("worker")
        if join is None:
            return []
        found = map(parse_endpoint, (join.address, join.worker_address))
        return [(endpoint.host, endpoint.port) for endpoint in found]

    def _from_strangers(self, kind: str) -> Heal | None:
        """TCP connections without a key: silent ones, or such that say what is no ZeroMQ,
        or the beginning of it.
        """
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(48)
        words = [
            self._random.randbytes(1000),
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            greeting + self._random.randbytes(200),
            greeting[: self._random.randrange(1, 64)],
        ]
        found: list[socket.socket] = []
        count = IDLE_CONNECTIONS if kind == "idle connections" else len(words)
        for place in self._places():
            for at in range(count):
                try:
                    found.append(socket.create_connection(place, timeout=0.2))
                    if kind == "garbage":
                        found[-1].sendall(words[at])
                except OSError:
                    break  # it is full, or is gone
        if not found:
            return None

        def release() -> None:
            for one in found:
                one.close()

        if kind == "garbage":
            release()
        return release

    def _from_a_peer(self, kind: str) -> Heal | None:
        """Somebody who has a worker's key, and uses it badly."""
        join = self._rig.join("worker")
        if join is None:
            return None
        with RawPeer(parse_endpoint(join.worker_address), join.keys) as peer:
            try:
                peer.hello("worker", slots=2)
                if kind == "endless message":
                    self._send_endless(peer)
                else:
                    self._send_bad_frames(peer)
            except AssertionError:
                return None  # the broker is not there at present
        return _nothing

    def _send_bad_frames(self, peer: RawPeer) -> None:
        header = p.encode(p.Header(peer.link.token, 1, 0), p.Heartbeat())[0]
        for size in (0, 1, 50, 5000):
            junk = self._random.randbytes(size)
            for frames in ([junk], [bytes(header), junk], [bytes(header), junk, junk]):
                peer.send_frames(*frames)
        peer.send_frames(*[b"x"] * 1000)
        peer.send_frames(*p.encode(p.Header(peer.link.token, 7, 0), p.Shutdown()))

    def _send_endless(self, peer: RawPeer) -> None:
        import zmq

        for _ in range(ENDLESS_PARTS):
            try:
                peer.socket.send(bytes(1000), zmq.SNDMORE | zmq.NOBLOCK)
            except zmq.Again:
                return


def _counted(proxy: Proxy, name: str) -> int:
    return proxy.count(name)


def _choose(peers: list[Started], target: int) -> Started | None:
    running = [peer for peer in peers if peer.is_running]
    return running[target % len(running)] if running else None


def _nothing() -> None:
    """What needs no healing."""
