"""What every contestant is measured by. Each workload checks its results,
and notes why a figure is missing or an estimate.

Slow systems get fewer tasks: short runs before say how many fit the time that the scale gives, and
a rate or a part of the ideal does not depend on how many there were.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import psutil

from benchmarks import work
from benchmarks.stats import Span, ideal_seconds, longest_idle, percentile
from benchmarks.systems import SLOTS, System

MIB = 1 << 20
SKEW = 100  # one task in so many is so many times longer
SEED = 0  # no long task comes so late that no schedule in this order could be ideal
CHUNKS = (32, 256, 2048)
SHARED_TASKS = 200
DRAIN_SECONDS = 60.0


class Scale(NamedTuple):
    """How much there is to do; the defaults are those of a full run."""

    seconds: float = 0.8  # for each measurement
    mib: int = 64  # a large argument
    tasks_max: int = 100_000
    trips: int = 2_000
    repeats: int = 3  # of what is one transfer
    million: int = 1_000_000
    words: int = 2_000_000
    skewed: int = 1_000  # tasks, one in a hundred a long one
    skewed_ms: float = 1.0  # a short one
    searches: int = 12


class Measurement:
    """What is found of one contestant in one round."""

    def __init__(self, system: System, scale: Scale) -> None:
        self.system = system
        self.scale = scale
        self.figures: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def check(self, holds: bool, what: str) -> None:
        """A wrong result is worse than a slow one: nothing of this workload counts then.

        Raises:
            WrongResult
        """
        if not holds:
            raise WrongResult(what)


class WrongResult(Exception):
    """A system returned what its task did not."""


def measured(
    count_max: int, seconds: float, run: Callable[[int], float], least: int
) -> tuple[int, float]:
    """How many tasks took how long, with so many tasks that it was about ``seconds``, or
    ``count_max``.

    ``run`` takes a number of tasks and returns their seconds. The first run is for what happens
    once: imports, connections, estimates; then come more tasks each time,
    because a few say little of many.
    """
    run(least)
    count = least
    while True:
        took = max(run(count), 1e-9)
        if took >= seconds / 2 or count == count_max:
            return count, took
        count = min(count_max, int(count * min(max(seconds / took, 2), 8)))


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def submits(bench: Measurement) -> None:
    """No-op tasks a second, submitted one by one; and the CPU time of each process role in them."""
    system = bench.system

    cpu: dict[str, float] = {}  # of the last run

    def run(count: int) -> float:
        roles = system.processes()
        before = cpu_seconds(roles)
        start = time.perf_counter()
        results = system.gather([system.submit(work.noop, index) for index in range(count)])
        seconds = time.perf_counter() - start
        after = cpu_seconds(roles)
        cpu.update({role: after[role] - before[role] for role in after})
        bench.check(results == list(range(count)), "no-op results")
        return seconds

    count, took = measured(bench.scale.tasks_max, bench.scale.seconds, run, least=50)
    bench.figures["submit_rate"] = count / took
    for role, seconds in cpu.items():
        bench.figures[f"cpu_{role}_us"] = seconds / count * 1e6


def cpu_seconds(roles: Mapping[str, list[int]]) -> dict[str, float]:
    """Of the processes that are still there."""
    return {role: sum(_of_each(numbers, _cpu)) for role, numbers in roles.items()}


def resident_bytes(roles: Mapping[str, list[int]]) -> dict[str, float]:
    return {role: sum(_of_each(numbers, _resident)) for role, numbers in roles.items()}


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _resident(process: psutil.Process) -> float:
    return float(process.memory_info().rss)


def _of_each(numbers: list[int], measure: Callable[[psutil.Process], float]) -> list[float]:
    found = []
    for number in numbers:
        try:
            found.append(measure(psutil.Process(number)))
        except psutil.NoSuchProcess:
            pass  # it ended meanwhile
    return found


def trips(bench: Measurement) -> None:
    """One no-op after the other."""
    times: list[float] = []
    deadline = time.perf_counter() + 2 * bench.scale.seconds
    while len(times) < bench.scale.trips and time.perf_counter() < deadline:
        start = time.perf_counter()
        results = bench.system.gather([bench.system.submit(work.noop, len(times))])
        end = time.perf_counter()
        bench.check(results == [len(times)], "a no-op's result")
        times.append(end - start)
    bench.figures["p50_us"] = percentile(times, 0.5) * 1e6
    bench.figures["p99_us"] = percentile(times, 0.99) * 1e6


def maps(bench: Measurement) -> None:
    """No-ops a second by `map`: as it is, and with the best of some chunk sizes."""

    def rate(run_map: Callable[[range], list[Any]], seconds: float) -> float:
        def run(count: int) -> float:
            start = time.perf_counter()
            results = run_map(range(count))
            took = time.perf_counter() - start
            bench.check(results == list(range(count)), "a map's results")
            return took

        count, took = measured(10 * bench.scale.tasks_max, seconds, run, least=50)
        return count / took

    system, seconds = bench.system, bench.scale.seconds
    rates = {0: rate(partial(system.map, work.noop), seconds)}
    bench.figures["map_rate"] = rates[0]
    for size in CHUNKS:

        def run_chunks(items: range, size: int = size) -> list[Any]:
            return system.map_chunks(work.noop, items, size)

        rates[size] = bench.figures[f"map_{size}_rate"] = rate(run_chunks, seconds / 2)
    bench.figures["map_best_rate"] = max(rates.values())
    if not system.takes_chunksize:
        bench.notes["map_best_rate"] = "its map takes no chunk size; chunks are cut by hand"


def efficiencies(bench: Measurement) -> None:
    """Tasks of a known CPU time, submitted one by one:
    the ideal schedule's time as a part of the time it took.
    """
    for name, length in (("0.1ms", 1e-4), ("1ms", 1e-3), ("10ms", 1e-2), ("100ms", 1e-1)):

        def run(count: int, length: float = length) -> float:
            def all_of_them() -> None:
                submit = bench.system.submit
                futures = [submit(work.burn, index, length) for index in range(count)]
                found = [result[0] for result in bench.system.gather(futures)]
                bench.check(found == list(range(count)), "results of tasks")

            return _timed(all_of_them)

        most = max(2 * SLOTS, int(2 * bench.scale.seconds * SLOTS / length))
        count, took = measured(most, 2 * bench.scale.seconds, run, least=2 * SLOTS)
        ideal = -(-count // SLOTS) * length
        bench.figures[f"efficiency_{name}"] = 100 * ideal / took


def skew(bench: Measurement) -> None:
    """One task in a hundred is 100 times longer, at places drawn by a fixed seed; by `map`,
    with nothing tuned.
    """
    short, count = bench.scale.skewed_ms / 1e3, bench.scale.skewed
    lengths = [short * SKEW if index % SKEW == 0 else short for index in range(count)]
    random.Random(SEED).shuffle(lengths)
    items = list(enumerate(lengths))
    since = time.monotonic()
    results = bench.system.map(work.burn_pair, items)
    total = time.monotonic() - since
    bench.check([result[0] for result in results] == list(range(len(items))), "skewed results")
    spans = [Span(start, end) for _, _, start, end in results]
    bench.figures["skew_ratio"] = total / ideal_seconds(lengths, SLOTS)
    bench.figures["skew_idle_ms"] = longest_idle(spans, SLOTS, since) * 1e3


def transfers(bench: Measurement) -> None:
    """Large arguments and results: arrays, new ones each time, so that no cache helps."""
    system, scale = bench.system, bench.scale
    size = scale.mib * MIB

    def argument() -> float:
        data = _random_array(size)
        start = time.perf_counter()
        found = system.gather([system.submit(work.last_byte, data, 7)])
        seconds = time.perf_counter() - start
        bench.check([tuple(one) for one in found] == [(7, int(data[-1]))], "a large argument")
        return seconds

    def result(value: int) -> float:
        start = time.perf_counter()
        (found,) = system.gather([system.submit(work.filled, size, value)])
        seconds = time.perf_counter() - start
        bench.check(len(found) == size and found[0] == found[-1] == value, "a large result")
        return seconds

    def pieces() -> float:
        data = _random_array(size).reshape(scale.mib, -1)
        start = time.perf_counter()
        futures = [system.submit(work.last_byte, data[row], row) for row in range(scale.mib)]
        found = system.gather(futures)
        seconds = time.perf_counter() - start
        wanted = [(row, int(data[row][-1])) for row in range(scale.mib)]
        bench.check([tuple(one) for one in found] == wanted, "pieces")
        return seconds

    repeats = range(scale.repeats)
    bench.figures["argument_ms"] = statistics.median(argument() for _ in repeats) * 1e3
    bench.figures["result_ms"] = statistics.median(result(n + 1) for n in repeats) * 1e3
    bench.figures["pieces_ms"] = statistics.median(pieces() for _ in repeats) * 1e3


def shared(bench: Measurement) -> None:
    """One large argument in many tasks, in the way that the system has for it."""
    system = bench.system

    def run(count: int) -> float:
        data = _random_array(bench.scale.mib * MIB)
        start = time.perf_counter()
        given = system.share(data)
        futures = [system.submit(work.last_byte, given, index) for index in range(count)]
        found = system.gather(futures)
        seconds = time.perf_counter() - start
        wanted = [(index, int(data[-1])) for index in range(count)]
        bench.check([tuple(one) for one in found] == wanted, "a shared argument")
        return seconds

    few, more = 4, 12
    first, second = run(few), run(more)
    each = max(0.0, second - first) / (more - few)
    estimate = second + each * (SHARED_TASKS - more)
    if estimate > 10 * bench.scale.seconds:
        bench.notes["shared_ms"] = (
            f"estimated from {few} tasks in {first:.2f} s, {more} in {second:.2f} s"
        )
    else:
        estimate = run(SHARED_TASKS)
    bench.figures["shared_ms"] = estimate * 1e3


def _random_array(size: int) -> Any:
    import numpy as np

    return np.frombuffer(bytearray(os.urandom(size)), np.uint8)


def words(bench: Measurement) -> None:
    """Count the words of 100 texts and add up what the tasks found."""
    texts = [work.text_of(seed, bench.scale.words // 100) for seed in range(100)]
    start = time.perf_counter()
    counts: dict[str, int] = {}
    for part in bench.system.map(work.count_words, texts):
        for word, count in part.items():
            counts[word] = counts.get(word, 0) + count
    bench.figures["words_s"] = time.perf_counter() - start
    bench.check(sum(counts.values()) == bench.scale.words // 100 * 100, "how many words")
    wanted = sum(text.split().count("w7") for text in texts)
    bench.check(counts["w7"] == wanted, "how often one word is there")


def search(bench: Measurement) -> None:
    """scikit-learn's grid search, on the system's joblib backend."""
    if bench.system.backend is None:
        bench.notes["search_s"] = "it has no backend for joblib"
        return
    if importlib.util.find_spec("sklearn") is None:
        bench.notes["search_s"] = "scikit-learn is not installed beside it"
        return
    import joblib
    from sklearn.datasets import load_digits
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    bench.system.register_backend()
    features, digits = load_digits(return_X_y=True)
    grid = {"C": [10.0**power for power in range(-2, bench.scale.searches // 3 - 2)]}
    found = GridSearchCV(SVC(), grid, cv=3, n_jobs=SLOTS)
    with joblib.parallel_config(bench.system.backend, **bench.system.backend_options):
        found.fit(features[:300], digits[:300])  # so that the slots have imported scikit-learn
        bench.figures["search_s"] = _timed(lambda: found.fit(features, digits))
    scores = found.cv_results_["mean_test_score"]
    bench.check(len(scores) == len(grid["C"]) and found.best_score_ > 0.9, "scores")


def queued(bench: Measurement) -> None:
    """Memory of tasks that wait: the slots are held by other tasks meanwhile."""
    rate = bench.figures.get("submit_rate", 0.0)
    count = max(1_000, min(bench.scale.tasks_max, int(rate * bench.scale.seconds)))
    for role, grown in _queue(bench, count).items():
        bench.figures[f"queued_{role}_bytes"] = grown / count


def million(bench: Measurement) -> None:
    """The same with so many that what does not grow with the queue is nothing beside what does."""
    count = bench.scale.million
    rate = bench.figures.get("submit_rate", 0.0)
    if count > rate * DRAIN_SECONDS:
        reason = f"at {rate:,.0f} tasks/s it would take longer than {DRAIN_SECONDS:.0f} s"
        bench.notes["million_s"] = reason
        return
    start = time.perf_counter()
    found = _queue(bench, count)
    bench.figures["million_s"] = time.perf_counter() - start
    payload = len(pickle.dumps((count,), 5))
    bench.figures["million_client_bytes"] = found["client"] / count
    if "broker" in found:
        bench.figures["million_broker_bytes"] = max(0.0, found["broker"] / count - payload)


def _queue(bench: Measurement, count: int) -> dict[str, float]:
    """By how many bytes each role grew while ``count`` no-ops were queued."""
    system = bench.system
    gate = os.path.abspath(f"gate-{time.monotonic_ns()}")
    holders = [system.submit(work.wait_for_file, gate, slot, 300.0) for slot in range(SLOTS)]
    try:
        _await(lambda: all(os.path.exists(f"{gate}.{slot}") for slot in range(SLOTS)))
        roles = system.processes()
        before = resident_bytes(roles)
        futures = [system.submit(work.noop, index) for index in range(count)]
        after = _settled(roles)
    finally:
        with open(gate, "w"):
            pass
    bench.check(sum(system.gather(futures)) == count * (count - 1) // 2, "queued results")
    bench.check(system.gather(holders) == list(range(SLOTS)), "the holders")
    return {role: after[role] - before[role] for role in before}


def _settled(roles: Mapping[str, list[int]]) -> dict[str, float]:
    """Resident bytes once they hardly change any more:
    what was submitted is on its way for a while.
    """
    last = resident_bytes(roles)
    for _ in range(100):
        time.sleep(0.3)
        now = resident_bytes(roles)
        if all(abs(now[role] - last[role]) < MIB / 4 for role in now):
            return now
        last = now
    return last


def _await(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.01)


# In this order: later ones use what earlier ones found.
# Those of the second table run in the first round alone.
EACH_ROUND: dict[str, Callable[[Measurement], None]] = {
    "submits": submits,
    "trips": trips,
    "maps": maps,
    "efficiencies": efficiencies,
    "skew": skew,
    "transfers": transfers,
    "shared": shared,
    "words": words,
    "search": search,
}
ONCE: dict[str, Callable[[Measurement], None]] = {"queued": queued, "million": million}
