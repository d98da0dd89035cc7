"""One run: its processes are started, befallen, healed, and judged."""

from __future__ import annotations

import heapq
import itertools
import shutil
import signal
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from tests.chaos import history
from tests.chaos.history import CRASHES_MAX, Buckets
from tests.chaos.nemeses import KILLS, Heal, Nemeses, unavailable
from tests.chaos.plan import Plan
from tests.chaos.rig import Rig, Started

WORKERS, SLOTS = 2, 2
FIRST_SECONDS = 30.0  # until each client has its first value, with all being well
# Until all that is open when the faults end must be resolved, on a busy machine
DRAIN_SECONDS = 100.0
LIFE_SECONDS = 150.0  # a client's, beyond the time of the faults
TURNS_MAX = 3  # of the plan's faults, where a busy machine let too few of them befall anybody
IN_FLIGHT_SECONDS = 0.25  # results within it after a broker's death may be its own
LOSERS = ("stop worker", "partition", "flap", "reset")  # may cost a worker its session, too
VALUES_MIN = 50  # a run with fewer has not shown much
LOOK_SECONDS = 2.0
STEP = 0.02

Say = Callable[[str], None]


@dataclass
class Report:
    """What a run has shown. ``problems``: promises that were broken;
    ``vacuous``: what it lacks to prove anything.
    """

    plan: Plan
    buckets: Buckets = field(default_factory=Buckets)
    effects: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    vacuous: list[str] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)
    drain_seconds: float = 0.0  # from the end of the faults until all was resolved
    recovery_seconds: float = 0.0  # from the end of the faults until each client had something new
    first_after_kill: list[float] = field(
        default_factory=list
    )  # the first result of any client, after each kill of the broker

    @property
    def is_well(self) -> bool:
        """Whether it shows that the promises hold."""
        return not self.problems and not self.vacuous

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.problems:
            return "FAILED"
        if self.unavailable:
            return "not to be had here"
        return "proved nothing" if self.vacuous else "ok"


def run(plan: Plan, folder: Path, say: Say) -> Report:
    """Carry it out in ``folder``, which stays if it fails."""
    report = Report(plan)
    reasons = [unavailable(kind) for kind in plan.nemesis.kinds]
    if all(reasons):
        report.unavailable = reasons
        return report
    clock = folder / "clock" if "clock" in plan.nemesis.kinds else None
    folder.mkdir(mode=0o700, parents=True)
    if clock is not None:
        clock.write_bytes(struct.pack("d", 0.0))
    is_full = "full disk" in plan.nemesis.kinds
    rig = Rig(
        folder,
        workers=WORKERS,
        slots=SLOTS,
        is_full=is_full,
        clock=clock,
        is_near=plan.is_near,
    )
    try:
        with rig:
            _Run(plan, rig, report, say).carry_out()
    except AssertionError as error:
        report.problems.append(str(error))
    report.problems += rig.complaints()
    if report.problems:
        say(f"what the processes wrote is in {folder}")
    else:
        shutil.rmtree(folder)
    return report


class _Run:
    """The steps of a run."""

    def __init__(self, plan: Plan, rig: Rig, report: Report, say: Say) -> None:
        self.plan = plan
        self.rig = rig
        self.report = report
        self.say = say
        self.victims: list[Started] = []
        self.nemeses = Nemeses(rig, plan.seed, self._next_victim)
        self._seeds = itertools.count(plan.seed)
        self._seen: Counter[str] = Counter()  # numbers of the present broker, as last seen
        self._done_at: list[float] = []  # when clients had what results
        self._ended_at = 0.0

    def carry_out(self) -> None:
        """All of them."""
        loads = [self.plan.load, *(["L1"] if self.plan.load != "L1" else [])]
        for load in loads:
            self._add_client(load)
        try:
            for client in self.rig.clients:
                self.rig.wait_until(partial(_has_value, client), f"a first value of {client}")
            if self.plan.is_near:
                self.nemeses.counts["in pipes"] = self.rig.in_pipes()
            self._befall()
            self._drain()
        except AssertionError as error:
            self.report.problems.append(str(error))
        finally:
            self.nemeses.close()
        self._judge()

    def _add_client(self, load: str) -> Started:
        life = TURNS_MAX * self.plan.seconds + LIFE_SECONDS
        return self.rig.add_client(load, next(self._seeds), life)

    def _next_victim(self) -> Started | None:
        """A client that is to be killed, while another one starts."""
        if "kill client" not in self.plan.nemesis.kinds:
            return None
        ready = [client for client in self.victims if client.is_running and _has_value(client)]
        self.victims.append(self._add_client("L2"))
        return ready[0] if ready else None

    # --- Faults -----------------------------------------------------------------------------------

    def _befall(self) -> None:
        """The faults, each at its time, and what heals them; all are healed in the end.

        They come again if they have not yet had the effects that the run needs.
        """
        began = looked_at = time.monotonic()
        over_at = self.plan.seconds
        faults = deque(self.plan.faults)
        ticks = itertools.count()
        heals: list[tuple[float, int, Heal]] = []
        try:
            while (now := time.monotonic()) - began < over_at or self._is_vacuous(over_at):
                if now - began >= over_at:
                    faults.extend(one._replace(at=one.at + over_at) for one in self.plan.faults)
                    over_at += self.plan.seconds
                while heals and heals[0][0] <= now - began:
                    heapq.heappop(heals)[2]()
                while faults and faults[0].at <= now - began:
                    fault = faults.popleft()
                    if fault.kind == "kill broker":
                        self._look()  # its numbers end with it
                    heal = self.nemeses.apply(fault)
                    if heal is not None:
                        heapq.heappush(heals, (fault.at + fault.seconds, next(ticks), heal))
                if now - looked_at > LOOK_SECONDS:
                    self._look()
                    looked_at = time.monotonic()
                self.rig.tend(now)
                time.sleep(STEP)
        finally:
            for _, _, heal in sorted(heals, key=lambda entry: entry[:2]):
                heal()
            for proxy in self.rig.proxies():
                proxy.clear()
            self._ended_at = time.monotonic()

    def _is_vacuous(self, seconds: float) -> bool:
        """Whether faults of so many seconds have done too little, and there is time for more."""
        if seconds >= TURNS_MAX * self.plan.seconds:
            return False
        runs = history.by_number(history.executions(self.rig.log))
        return bool(history.vacuous(self.plan.needs, self._effects(runs)))

    def _effects(self, runs: Mapping[int, list[history.Execution]]) -> Counter[str]:
        """What the faults have done so far."""
        self.nemeses.count_network()
        return self.nemeses.counts + history.repeated(runs)

    def _look(self) -> None:
        """Add up what brokers have counted; each begins at nothing."""
        status = self.rig.status()
        if status is None:
            return
        for name in ("reassigned", "late", "done"):
            self.report.effects[name] += max(0, status[name] - self._seen[name])
            self._seen[name] = status[name]

    # --- The end ----------------------------------------------------------------------------------

    def _drain(self) -> None:
        """All that is open is to be resolved, and the cluster as good as new."""
        for client in self.rig.clients:
            self.rig.tell_to_end(client)
        deadline = time.monotonic() + DRAIN_SECONDS
        waiting = [client for client in self.rig.clients if not client.was_killed]
        while any(client.is_running for client in waiting) and time.monotonic() < deadline:
            self.rig.tend(time.monotonic())
            time.sleep(STEP)
        self.report.drain_seconds = time.monotonic() - self._ended_at
        for client in waiting:
            if client.is_running:
                client.process.send_signal(signal.SIGUSR1)  # it says where it hangs
                self.report.problems.append(
                    f"{client.name} has not ended {DRAIN_SECONDS:g} s later"
                )
            elif client.process.returncode:
                code = client.process.returncode
                self.report.problems.append(f"{client.name} ended with {code}")
        if not self.report.problems:
            # The last that was told to end may only end now.
            what = "workers, slots and queues as at the start"
            self.rig.await_status(_is_as_new, what, tends=True)
            self._look()
            self.report.problems += self.rig.stop()

    def _judge(self) -> None:
        report, rig = self.report, self.rig
        runs = history.by_number(history.executions(rig.log))
        effects = report.effects
        effects.update(self._effects(runs))
        effects["broker restarts"] = len(rig.restarted_at)
        effects["worker respawns"] = rig.respawns
        for client in rig.clients:
            killed = client.was_killed
            records = list(history.lines_of(client.history, may_be_cut=killed))
            report.buckets.add(history.judge(records, runs, was_killed=killed))
            if not killed:
                self._time(records)
        kills = [at for at, kind in self.nemeses.times if kind == "kill broker"]
        report.first_after_kill = first_after(kills, sorted(self._done_at), rig.restarted_at)
        if not report.buckets.is_well:
            report.problems.append(f"promises about tasks: {report.buckets}")
        report.problems += _forbidden(report)
        needs = {**self.plan.needs, "values": VALUES_MIN}
        effects["values"] = report.buckets.compared
        report.vacuous = history.vacuous(needs, effects)

    def _time(self, records: list[dict[str, Any]]) -> None:
        """How soon there was something new."""
        done = [record["at"] for record in records if record["op"] == "done"]
        after = [at - self._ended_at for at in done if at > self._ended_at]
        if after:
            self.report.recovery_seconds = max(self.report.recovery_seconds, after[0])
        self._done_at += done


def first_after(kills: list[float], done: list[float], restarts: list[float]) -> list[float]:
    """Seconds from each kill of a broker to the first result of the next one; all times are sorted.

    From the time that another one was started by hand, where its parent had given up by then. If a
    broker was killed before there was any, only the next kill counts.
    """
    found = []
    for killed_at, next_at in zip(kills, [*kills[1:], inf]):
        first = next((at for at in done if at > killed_at + IN_FLIGHT_SECONDS), None)
        if first is None or first > next_at:
            continue
        by_hand = [at for at in restarts if killed_at < at < first]
        found.append(first - max(by_hand, default=killed_at))
    return found


def _forbidden(report: Report) -> list[str]:
    """What must not happen under that nemesis alone."""
    kills = sum(report.effects[kind] for kind in (*KILLS, *LOSERS))
    if report.buckets.excused * CRASHES_MAX > kills * SLOTS:
        return [
            f"{report.buckets.excused} tasks were given up, and only {kills} faults can have been to blame"
        ]
    charged = report.buckets.charged
    if charged and report.plan.nemesis.name in ("N6", "N16"):
        return [f"{charged} attempts were charged, where nobody had died"]
    return []


def _has_value(client: Started) -> bool:
    """Whether it has seen one."""
    try:
        return '"what": "value"' in client.history.read_text()
    except OSError:
        assert client.is_running, f"{client} ended with {client.process.returncode}"
        return False


def _is_as_new(status: dict[str, Any]) -> bool:
    return (
        status["workers"] == WORKERS
        and status["slots"] == WORKERS * SLOTS
        and not status["running"]
        and not status["queued"]
    )
