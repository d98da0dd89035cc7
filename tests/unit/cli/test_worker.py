from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from achilles import DistributedExecutor
from achilles.cli import main
from achilles.core.sessions import Sessions
from tests import commands, tasks
from tests.brokers import RunningBroker, wait_for


@pytest.fixture
def broker() -> Iterator[commands.Command]:
    with commands.broker() as broker:
        yield broker
        broker.stop()


@pytest.mark.bad_input(62)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_one(broker: commands.Command, number: signal.Signals) -> None:
    with commands.worker("--name", "alpha", "--tag", "gpu", "--tag", "big") as worker:
        assert "achilles worker alpha joined the broker at tcp://" in worker.said
        assert "with 1 slot, pid" in worker.said
        assert 'DistributedExecutor(address="tcp://' in worker.said
        assert worker.stop(number) == 0


@pytest.mark.bad_input(62)
def test_a_signal_lets_what_runs_finish(broker: commands.Command, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with commands.worker() as worker, DistributedExecutor(address="auto") as executor:
        running = executor.submit(tasks.note_and_pause, str(log), "started", 0.5)
        wait_for(log.exists, "the task to start")
        assert worker.stop() == 0
        assert running.result(5) is not None
        assert "takes no more tasks; 1 task to finish" in worker.said
        assert "has ended: it has finished what it ran" in worker.said


@pytest.mark.bad_input(62, 74)
def test_a_second_signal_ends_it_at_once(broker: commands.Command, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with commands.worker() as worker:
        executor = DistributedExecutor(address="auto")
        executor.submit(tasks.note_and_pause, str(log), "started", 60)
        wait_for(log.exists, "the task to start")
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "draining" in commands.run("status").stdout, "the first to be noticed")
        assert worker.stop() == 128 + signal.SIGTERM
        assert "gave up 1 running task" in worker.said
        executor.kill_workers()


def test_it_ends_with_its_broker(broker: commands.Command) -> None:
    with commands.worker() as worker:
        broker.stop()
        assert worker.wait() == 0
        assert "has ended: the broker was shut down" in worker.said


def test_what_a_broker_says_in_the_end_is_shown_without_what_a_terminal_would_obey(
    achilles_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    farewell = Sessions.farewell
    monkeypatch.setattr(Sessions, "farewell", lambda self, _: farewell(self, "bye\n\x1b[2Jforged"))
    with RunningBroker(achilles_home) as broker, commands.worker("--name", "alpha") as worker:
        broker.stop()
        assert worker.wait() == 0
        assert worker.said.endswith("alpha has ended: bye\\n\\x1b[2Jforged\n")


@pytest.mark.bad_input(71, 75)
@pytest.mark.parametrize(
    ("arguments", "environ", "code", "wanted"),
    [
        (["--slots", "0"], {}, 2, "'--slots': 0 is not in the range 1<=x<=4096"),
        (["--slots", "99999"], {}, 2, "'--slots': 99999 is not in the range"),
        (["--slots", "two"], {}, 2, "'--slots'"),
        (["--name", ""], {}, 2, "worker.name must be a line of text"),
        (["--name", "a\nb"], {}, 2, r"worker.name must be a line of text, not 'a\\nb'"),
        (["--name", "x" * 201], {}, 2, "worker.name must be at most 200 characters"),
        (["--tag", "x" * 65], {}, 2, "worker.tags must be a list of texts of 1 to 64"),
        (["--tag", ""], {}, 2, "worker.tags must be"),
        (["http://x"], {}, 2, "address from ADDRESS: 'http://x' is not an endpoint"),
        (["tcp://127.0.0.1:0"], {}, 2, "port 0"),
        ([""], {}, 2, "address must be a line of text"),
        ([], {"ACHILLES_WORKER_SLOTS": "0"}, 78, "worker.slots must be at least 1, not 0"),
        ([], {"ACHILLES_ADDRESS": "tcp://x"}, 78, "address from ACHILLES_ADDRESS: .* no port"),
        ([], {}, 69, "no achilles broker of yours is running .* achilles broker"),
        (["tcp://127.0.0.1:9"], {}, 69, "no achilles broker of yours .* at tcp://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    arguments: list[str], environ: dict[str, str], code: int, wanted: str
) -> None:
    done = CliRunner().invoke(main, ["worker", *arguments], env=environ)
    assert done.exit_code == code, done.output
    assert re.search(wanted, done.output)
    assert "Traceback" not in done.output


def test_a_killed_brokers_join_file_is_told(broker: commands.Command) -> None:
    broker.stop(signal.SIGKILL)
    done = commands.run("worker")
    assert done.returncode == 69
    assert (
        "has ended without removing its join file; start one with: achilles broker" in done.stderr
    )
    with commands.broker() as another:  # and nothing of it is in the way of the next
        assert commands.run("status").returncode == 0
        another.stop()
