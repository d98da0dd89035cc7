"""The broker's process, as it runs: it never unpickles, and it starts fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from achilles import DistributedExecutor
from achilles.core import protocol as p
from achilles.net.keys import find_join
from tests import commands
from tests.brokers import RawPeer, frames_of
from tests.security.attacks import attack

# Runs `achilles broker` and says at its end what it has imported, and by whom pickle was.
WATCHED_BROKER = """
import json, sys

importers = {}

def watch(event, arguments):
    if event == "pickle.find_class":
        importers["something was unpickled"] = str(arguments)
    if event == "open" and "code.key" in str(arguments[0]):
        importers["the code key was opened"] = str(arguments)
    if event == "import" and arguments[0] in ("pickle", "cloudpickle"):
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].startswith("importlib"):
            frame = frame.f_back
        importers[arguments[0]] = frame.f_globals["__name__"]

sys.addaudithook(watch)

from achilles.cli import main

try:
    main(["broker", "--bind", "tcp://127.0.0.1:0"])
finally:
    print(json.dumps({"importers": importers, "modules": sorted(sys.modules)}))
"""


@attack("T10", "T35")
def test_it_never_unpickles_and_never_opens_the_code_key(achilles_home: Path) -> None:
    command = (sys.executable, "-c", WATCHED_BROKER)
    with commands.Command(command, ready="look, and stop", environ={}) as broker:
        with commands.worker() as worker:
            with DistributedExecutor(address="auto") as executor:
                assert list(executor.map(lambda x: x + 1, range(10))) == list(range(1, 11))
                with pytest.raises(ZeroDivisionError):
                    executor.submit(lambda: 1 / 0).result()
                assert executor.status()["done"] == 11
            assert worker.stop() == 0
        assert (achilles_home / "keys" / "code.key").exists()
        commands.run("keys", "rotate", "client")  # the broker reads its keys anew
        assert broker.stop() == 0
    serving, parent = map(json.loads, broker.output.splitlines())  # the parent ends last
    # pyzmq brings the module in, for `send_pyobj` and `recv_pyobj`, which test_tidy forbids.
    assert serving["importers"] == {"pickle": "zmq.sugar.socket"}
    assert parent["importers"] == serving["importers"]
    unwanted = {"cloudpickle", "multiprocessing", "psutil", "asyncio", "concurrent.futures"}
    for said in (serving, parent):
        assert not unwanted.intersection(said["modules"])
    ours = {name for name in serving["modules"] if name.startswith("achilles.")}
    assert {"achilles.net.broker", "achilles.core.scheduler"} <= ours
    assert not {
        name for name in ours if name.startswith(("achilles.executor", "achilles.runtime.ser"))
    }


def test_its_imports_are_few() -> None:
    """Counted, not timed: what a module costs depends on the machine,
    that it is needed does not.
    """
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import achilles.cli, achilles.net.serve"],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert len(imported) < 300
    slow = {"asyncio", "http", "ssl", "xml", "email", "sqlite3", "numpy", "unittest", "rich"}
    assert not slow.intersection(imported)


@attack("T26")
@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_peer_cannot_forge_a_line_of_the_log(kind: str) -> None:
    command = (*commands.ACHILLES, "--log-format", kind, "broker", "--bind", "tcp://127.0.0.1:0")
    with commands.Command(command, ready="look, and stop", environ={}) as broker:
        join = find_join(Path(os.environ["ACHILLES_HOME"]), "client", None)
        with RawPeer(join.endpoint(), join.keys) as peer:
            peer.hello("client")
            reason = "bye\n2026-01-01 00:00:00,000 INFO achilles.broker: all is well\x1b[2K"
            peer.send_frames(*frames_of(p.Goodbye(reason), peer.link.token, 1))
            peer.send_frames(*frames_of(p.Heartbeat(), peer.link.token))
            peer.expect(p.Gone)
        assert broker.stop() == 0
    assert "\x1b" not in broker.said
    assert not [line for line in broker.said.splitlines() if line.endswith("all is well")]
