from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from time import monotonic

import pytest
from click.testing import CliRunner

from achilles import DistributedExecutor
from achilles.cli import main
from achilles.core import protocol as p
from achilles.errors import SilentBrokerError
from achilles.net.keys import key_pair
from tests import commands
from tests.brokers import RunningBroker, raw_peer, wait_for


def invoke(*arguments: str, text: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(main, arguments, input=text)
    return done.exit_code, done.output


@pytest.mark.bad_input(71)
def test_the_status_is_a_table_or_json(achilles_home: Path) -> None:
    with RunningBroker(achilles_home) as broker:
        code, output = invoke("status")
        assert code == 0
        assert output == (
            f"broker {broker.addresses.clients}: 0 workers, 0 slots | tasks: 0 queued, 0 running, "
            "0 done, 0 failed, 0 reassigned, 0 late\n"
        )
        with raw_peer(broker, "worker") as one, raw_peer(broker, "worker") as other:
            one.hello("worker", name="alpha", slots=2, pid=7)
            other.hello("worker", name="alpha", slots=3, pid=8)
            code, output = invoke("status")
            assert code == 0
            assert "2 workers, 5 slots" in output
            rows = [line.split() for line in output.splitlines()[2:]]
            assert sorted(row[0] for row in rows) == ["alpha", "alpha"], output
            code, output = invoke("status", "-o", "json")
            values = json.loads(output)
            assert values["address"] == str(broker.addresses.clients)
            assert len(values["workers_by_name"]) == 2, "workers of one name are told apart"


def test_the_status_explains_why_a_task_waits(achilles_home: Path) -> None:
    with RunningBroker(achilles_home) as broker, raw_peer(broker, "client") as client:
        address = broker.addresses.clients
        client.hello("client", name="laptop-7")
        client.send(p.Submit(0, 0, [17, 18], [b"", b""], options=p.PLAIN.but(tags=("gpu",))))
        wait_for(lambda: " 2 queued" in invoke("status")[1], "the tasks to arrive")
        why = f"no worker is connected; start one with: achilles worker {address} --tag gpu\n"
        assert invoke("status")[1].endswith(f"client laptop-7: 2 tasks wait: {why}")
        assert invoke("status", "--explain", "18") == (0, f"task 18 of laptop-7: it waits: {why}")
        assert invoke("status", "--explain", "laptop-7/17")[1].endswith(why)
        code, output = invoke("status", "--explain", "17", "-o", "json")
        row = json.loads(output)["waiting"][0]
        assert (code, row["id"], row["tags"]) == (0, 17, ["gpu"])
        for unknown in ("19", "other/17"):
            code, output = invoke("status", "--explain", unknown)
            assert code == 1
            assert re.match(
                rf"achilles: the broker at {address} has no task 1[79] that is not", output
            )


@pytest.mark.bad_input(75)
@pytest.mark.parametrize("task", ["x", "0", "-1", "", "a/", "1/x", "9" * 30, "<Future>"])
def test_what_is_no_task(task: str) -> None:
    code, output = invoke("status", "--explain", task)
    assert code == 2
    assert f"{task!r} is no task: that is its number, as repr(future) shows it, or" in output


@pytest.mark.bad_input(72)
def test_the_status_of_a_busy_broker(achilles_home: Path) -> None:
    with RunningBroker(achilles_home, credit=100_000):
        executor = DistributedExecutor(address="auto")
        for _ in range(20_000):
            executor.submit(pow, 2, 3)
        code, output = invoke("status")
        assert code == 0
        assert " queued, 0 running" in output
        executor.kill_workers()


@pytest.mark.bad_input(72)
@pytest.mark.parametrize("command", [["status"], ["shutdown", "--yes"], ["shutdown"]])
def test_no_broker_is_a_named_error(command: list[str]) -> None:
    code, output = invoke(*command)
    assert code == 69
    assert output.startswith("achilles: no achilles broker of yours is running")
    assert "start one with: achilles broker" in output


@pytest.mark.bad_input(72)
@pytest.mark.parametrize("over", ["--ipc", "--no-ipc"])
def test_a_broker_that_hangs_is_a_named_error_in_time(
    monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    monkeypatch.setenv("ACHILLES_CLIENT_CONNECT_TIMEOUT", "300ms")
    with commands.broker(over) as broker:
        serving = broker.serving()
        serving.send_signal(signal.SIGSTOP)
        try:
            began = monotonic()
            code, output = invoke("status")
            assert monotonic() - began < 5
            with pytest.raises(SilentBrokerError) as caught:
                DistributedExecutor(address="auto")
        finally:
            serving.send_signal(signal.SIGCONT)
        assert broker.stop() == 0
    wanted = rf"the broker at \S+ \(pid {broker.process.pid}\) was reached, but does not answer"
    assert code == 69
    assert re.match(f"achilles: {wanted}", output)
    assert re.match(wanted, str(caught.value))


def test_a_drained_worker_ends_by_itself(achilles_home: Path) -> None:
    with commands.broker() as broker:
        with commands.worker("--name", "alpha") as worker:
            code, output = invoke("drain", "beta")
            assert code == 1
            assert "has no worker 'beta'; its workers: alpha" in output
            assert invoke("drain", "alpha")[0] == 0
            assert worker.wait() == 0
        code, output = invoke("drain", "alpha")
        assert code == 1
        assert "its workers: none" in output
        assert broker.stop() == 0


def test_a_shutdown_ends_all_and_waits_for_it(achilles_home: Path) -> None:
    with commands.broker() as broker, commands.worker() as worker:
        assert invoke("shutdown", "--yes")[0] == 0
        assert os.listdir(achilles_home / "run") == []
        assert broker.wait() == 0
        assert worker.wait() == 0
    with commands.broker() as another:
        assert another.stop() == 0


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_a_shutdown_from_elsewhere_says_ended_when_it_is(
    achilles_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_waited_for: bool
) -> None:
    """This user's own home, where no broker is,
    tells nothing of the one that the join file is for.
    """
    tmp_path.chmod(0o700)
    with RunningBroker(achilles_home) as broker, raw_peer(broker, "worker") as worker:
        worker.hello("worker")  # and it does not leave: the broker waits for it
        join = broker.join("admin")
        file = tmp_path / "admin.join"
        file.write_bytes(join.for_others(key_pair(achilles_home, "admin")).encode())
        file.chmod(0o600)
        monkeypatch.setenv("ACHILLES_HOME", str(tmp_path))
        monkeypatch.setenv("ACHILLES_JOIN", str(file))
        if not is_waited_for:
            monkeypatch.setattr("achilles.cli.control.END_SECONDS", 0.0)
        code, output = invoke("shutdown", "--yes")
        assert code == 0
        how = (
            "has ended, and its workers with it" if is_waited_for else "and its workers are ending"
        )
        assert output == f"the broker at {join.address} {how}\n"
        wait_for(lambda: not broker.is_alive, "the broker to end")


@pytest.mark.bad_input(73)
def test_a_shutdown_says_what_would_be_lost_and_asks(achilles_home: Path) -> None:
    with RunningBroker(achilles_home) as broker:
        address = broker.addresses.clients
        executor = DistributedExecutor(address="auto")
        executor.submit(pow, 2, 3)
        while not executor.status()["queued"]:
            pass
        question = f"End the broker at {address} and its 0 workers; 1 task without a result will"
        for answer in ("n\n", "\n", ""):
            code, output = invoke("shutdown", text=answer)
            assert code == 1
            assert question in output
            assert "Aborted" in output
        code, output = invoke("status")
        assert "1 queued" in output
        code, output = invoke("shutdown", text="y\n")
        assert code == 0
        assert "has ended" in output
        executor.shutdown(cancel_futures=True)
    assert broker.open_tasks == 1
