"""What a broker takes, on real processes: what is too large fails alone,
and ten times its memory goes through it.
"""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from achilles import DistributedExecutor
from achilles.errors import ArgumentTooLargeError, ResultTooLargeError
from tests import commands
from tests.security.attacks import attack

MIB = 1 << 20
MEMORY = 64 * MIB
SLACK = 128 * MIB


@pytest.fixture
def broker() -> Iterator[commands.Command]:
    environ = {
        "ACHILLES_BROKER_MEMORY": "64MiB",
        "ACHILLES_BROKER_ARGUMENT_MAX": "3MiB",
        "ACHILLES_BROKER_RESULT_MAX": "3MiB",
    }
    with commands.broker(**environ) as broker:
        yield broker
        assert broker.stop() == 0


def some_of(payload: bytes) -> bytes:
    """Every tenth comes back as it is."""
    return payload if payload[0] == 0 else payload[-8:]


@pytest.mark.bad_input(39, 40)
@attack("T25")
def test_what_is_too_large_fails_alone_and_names_the_limit(broker: commands.Command) -> None:
    with commands.worker() as worker, DistributedExecutor(address="auto") as executor:
        fits, too_large = b"x" * 2 * MIB, bytearray(b"x") * 4 * MIB
        futures = [executor.submit(len, payload) for payload in (fits, too_large, fits)]
        assert [futures[0].result(30), futures[2].result(30)] == [2 * MIB] * 2
        error = futures[1].exception(30)
        assert isinstance(error, ArgumentTooLargeError)
        assert "the arguments of len() (task 2) hold" in str(error)
        assert f"takes {3 * MIB} at most: the smaller of broker.argument_max and half" in str(error)
        made = [executor.submit(bytes, size) for size in (2 * MIB, 4 * MIB, 2 * MIB)]
        assert [len(made[at].result(30)) for at in (0, 2)] == [2 * MIB] * 2
        error = made[1].exception(30)
        assert isinstance(error, ResultTooLargeError)
        assert f"takes {3 * MIB} at most: broker.result_max" in str(error)
        results = executor.map(bytes, [10, 4 * MIB, 10])
        assert next(results) == bytes(10)
        with pytest.raises(ResultTooLargeError, match="item 1 of a map"):
            next(results)
        assert executor.submit(pow, 2, 3).result(30) == 8
        executor.shutdown()
        assert worker.stop() == 0


@attack("T29")
def test_ten_times_its_memory_goes_through_a_broker(broker: commands.Command) -> None:
    """Arguments wait at the client until there is room, and results at the worker;
    nobody loses anything.
    """
    payloads = [bytes([number % 251]) * (MIB // 4) for number in range(10)]
    count = 10 * MEMORY // len(payloads[0])
    (process,) = psutil.Process(broker.process.pid).children()
    peak = 0
    with DistributedExecutor(address="auto") as executor:
        futures = [executor.submit(some_of, payloads[n % 10] + b"%d" % n) for n in range(count)]
        for _ in range(20):
            assert executor.status()["queued"] > 0
            peak = max(peak, process.memory_info().rss)
        with commands.worker() as worker:
            for number, future in enumerate(futures):
                value = future.result(60)
                assert value == some_of(payloads[number % 10] + b"%d" % number)
                peak = max(peak, process.memory_info().rss)
            executor.shutdown()
            assert worker.stop() == 0
    assert peak < MEMORY + SLACK
