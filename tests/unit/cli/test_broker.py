from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from achilles import DistributedExecutor
from achilles.cli import main
from tests import commands


@pytest.mark.bad_input(62)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(achilles_home: Path, number: signal.Signals) -> None:
    with commands.broker("--print-address") as broker:
        assert broker.stop(number) == 0
    assert os.listdir(achilles_home / "run") == []
    assert re.fullmatch(r"tcp://127\.0\.0\.1:\d+\n", broker.output)


def test_it_says_where_it_listens_how_to_join_and_how_to_connect() -> None:
    with commands.broker() as broker:
        address = re.findall(r"tcp://127\.0\.0\.1:\d+", broker.said)[0]
        assert f"listens on {address} (and ipc://" in broker.said
        assert f"pid {broker.process.pid}" in broker.said
        assert f"achilles worker {address}" in broker.said
        assert f'DistributedExecutor(address="{address}")' in broker.said
        assert broker.stop() == 0
    assert broker.output == ""


@pytest.mark.bad_input(62)
def test_its_end_with_open_tasks_says_that_work_was_lost() -> None:
    with commands.broker() as broker:
        executor = DistributedExecutor(address="auto")
        future = executor.submit(pow, 2, 3)
        while not executor.status()["queued"]:
            pass
        assert broker.stop() == 128 + signal.SIGTERM
        assert "1 task had no result yet" in broker.said
        assert "gone" in str(future.exception(10))
        executor.shutdown()


@pytest.mark.bad_input(45)
def test_a_second_one_is_refused_and_the_first_unharmed(achilles_home: Path) -> None:
    with commands.broker() as broker:
        for flags in ((), ("--no-ipc",), ("--bind", "tcp://127.0.0.1:0")):
            second = commands.run("broker", *flags)
            assert second.returncode == 78
            assert f"runs already (pid {broker.process.pid}" in second.stderr
        assert commands.run("status").returncode == 0
        other = {"ACHILLES_HOME": str(achilles_home / "other")}
        with commands.broker(**other) as beside:
            one, another = commands.run("status"), commands.run("status", **other)
            assert one.returncode == another.returncode == 0
            assert one.stdout != another.stdout
            assert beside.stop() == 0
        assert commands.run("status").returncode == 0
        assert broker.stop() == 0


@pytest.mark.bad_input(43, 75)
@pytest.mark.parametrize(
    ("arguments", "environ", "code", "wanted"),
    [
        (["--bind", "http://x"], {}, 2, "broker.bind from --bind: 'http://x' is not an endpoint"),
        (["--bind", "tcp://127.0.0.1:99999"], {}, 2, "'99999' in"),
        (["--bind", ""], {}, 2, "broker.bind must be a line of text, not ''"),
        (["--bind", "ipc:///x/y"], {}, 2, "broker.bind from --bind: .* bind to tcp://"),
        ([], {"ACHILLES_BROKER_BIND": "tcp://x"}, 78, "broker.bind from ACHILLES_BROKER_BIND"),
        ([], {"ACHILLES_BROKER_LOST_AFTER": "1s"}, 78, "at least three times"),
        (["--no-such-flag"], {}, 2, "No such option"),
        (["argument"], {}, 2, "unexpected extra argument"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    arguments: list[str], environ: dict[str, str], code: int, wanted: str
) -> None:
    done = CliRunner().invoke(main, ["broker", *arguments], env=environ)
    assert done.exit_code == code, done.output
    assert re.search(wanted, done.output)
    assert "Traceback" not in done.output


@pytest.mark.bad_input(45)
def test_a_taken_port_is_a_bad_configuration(achilles_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        done = commands.run("broker", "--bind", taken)
    assert done.returncode == 78
    assert f"cannot listen on {taken}: Address already in use" in done.stderr
    assert os.listdir(achilles_home / "run") == []


def test_a_loose_home_is_refused_with_the_command_that_closes_it(achilles_home: Path) -> None:
    achilles_home.chmod(0o755)
    done = commands.run("broker")
    assert done.returncode == 78
    assert f"close it with: chmod 700 {achilles_home}" in done.stderr


@pytest.mark.bad_input(60)
@pytest.mark.parametrize("place", ["/proc/achilles", "~nobody-of-that-name/x", "/dev/null"])
def test_a_home_that_cannot_be_is_refused(place: str) -> None:
    done = commands.run("broker", "--bind", "tcp://127.0.0.1:0", ACHILLES_HOME=place)
    assert done.returncode == 78
    assert done.stderr.startswith("achilles: ")
    assert done.stderr.count("\n") == 1
