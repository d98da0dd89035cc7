"""`python -m tests.reliability.alarms`: no live worker is declared lost,
and long calls into C run once (R5, R6).

Shipped timings: a worker is lost after 15 s of silence. Tasks hold the interpreter for four times
as long (or, ``--quick``, all times are a fifth), beside values of up to a gibibyte and processes
that take all cores. Two hours of workers are 24 of them for five minutes. In the end one is frozen
until it is given up, and must be the only one whose alarm is heard: that it is heard at all is what
makes silence worth something.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

from tests.chaos import work
from tests.chaos.rig import Rig
from tests.reliability import measure

WORKERS, SLOTS = 24, 1
MINUTES_MIN = 120  # of workers
HOLDERS = 20  # the slots beyond are for large values
HOLD_SECONDS = 60.0
GIBIBYTE = (1 << 30) - (
    1 << 10
)  # less what is around it: a broker takes no larger results (broker.result_max)
BUSY = "import os, time\nos.nice(5)\nt = time.monotonic() + {}\nwhile time.monotonic() < t: pass"


def main() -> int:
    """Measure; 1 if a worker was given up, or a task ran twice."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.alarms")
    parser.add_argument("--seconds", type=float, default=60.0 * MINUTES_MIN / WORKERS + 5.0)
    parser.add_argument("--largest", type=int, default=GIBIBYTE, help="value, in bytes")
    parser.add_argument("--quick", action="store_true", help="a fifth of all times")
    options = parser.parse_args()
    hold_seconds = HOLD_SECONDS / 5 if options.quick else HOLD_SECONDS
    timings = None if options.quick else measure.SHIPPED
    numbers = itertools.count(1)
    failures = []
    with (
        measure.rig(WORKERS, SLOTS, timings, worker_level="warning") as rig,
        measure.executor(rig) as executor,
    ):
        log = str(rig.log)
        began = time.monotonic()
        program = BUSY.format(options.seconds)
        busy = [
            subprocess.Popen([sys.executable, "-c", program]) for _ in range(os.cpu_count() or 1)
        ]
        try:
            held = fat = 0
            holding: dict[int, Future[int]] = {}
            while holding or time.monotonic() - began < options.seconds:
                for number in [n for n, future in holding.items() if future.done()]:
                    if holding.pop(number).result() != work.mix(number):
                        failures.append("a value is wrong")
                left = options.seconds - (time.monotonic() - began)
                while len(holding) < HOLDERS and (left > hold_seconds or held < HOLDERS):
                    number = next(numbers)
                    holding[number] = executor.submit(work.hold_gil, number, log, hold_seconds)
                    held += 1
                number = next(numbers)
                size = options.largest if fat % 8 == 0 else options.largest // 16
                value = executor.submit(work.fat, number, log, b"", size)
                if value.result(measure.WAIT_SECONDS) != work.blob(number + 1, size):
                    failures.append("a large value is wrong")
                fat += 1
        finally:
            for process in busy:
                process.kill()
                process.wait()
        minutes = (time.monotonic() - began) / 60 * WORKERS
        again = sum(sum(r.is_begin for r in runs) - 1 for runs in measure.runs_of(rig).values())
        if minutes < MINUTES_MIN and not options.quick:
            failures.append(f"{minutes:.0f} worker-minutes are too few")
        alarms = _alarms(rig)
        _freeze_one(rig)
    if alarms or again:
        failures.append(f"{alarms} workers were declared lost, {again} tasks ran again")
    return measure.finish(
        f"{alarms} false alarms in {minutes:.0f} worker-minutes; {held} tasks held the GIL for {hold_seconds:g} s, "
        f"{again} ran again; {fat} values of up to {options.largest / (1 << 20):.0f} MiB",
        failures,
    )


def _alarms(rig: Rig) -> int:
    """How often a worker was told that it had been given up."""
    texts = [(rig.folder / f"{worker.name}.err").read_text() for worker in rig.workers]
    return sum(text.count("given this session up") for text in texts)


def _freeze_one(rig: Rig) -> None:
    """Have a worker given up for good reason: that is heard."""
    before = _alarms(rig)
    process = rig.workers[0].process
    process.send_signal(signal.SIGSTOP)
    try:
        rig.await_status(lambda status: status["workers"] < WORKERS, "a frozen worker is given up")
    finally:
        process.send_signal(signal.SIGCONT)
    rig.wait_until(lambda: _alarms(rig) == before + 1, "its alarm is heard")


if __name__ == "__main__":
    sys.exit(main())
