"""What no limit of ZeroMQ's bounds: a message without an end, to a broker with little memory."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path

import psutil

from achilles.net.keys import find_join
from tests import commands
from tests.security.attacks import attack

MIB = 1 << 20
MEMORY, SLACK = 64 * MIB, 512 * MIB
SENT_MAX = 1500 * MIB

# ZMTP 3.0 by hand: libzmq itself sends nothing of a message before all of it is there.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
MORE_AND_LONG = 3


@attack("T21")
def test_a_message_without_an_end_costs_its_connection() -> None:
    environ = {"ACHILLES_BROKER_MEMORY": "64MiB", "ACHILLES_BROKER_HELLO_TIMEOUT": "10m"}
    with commands.broker(**environ) as broker:
        join = find_join(Path(os.environ["ACHILLES_HOME"]), "client", None)
        (serving,) = psutil.Process(broker.process.pid).children()
        frame = struct.pack(">BQ", MORE_AND_LONG, MIB // 2) + bytes(MIB // 2)
        sent = peak = 0
        pause = threading.Event()
        with socket.socket(socket.AF_UNIX) as raw, raw.makefile("rb") as said:
            raw.settimeout(20)
            raw.connect(join.ipc.removeprefix("ipc://"))
            raw.sendall(GREETING)
            assert len(said.read(len(GREETING))) == len(GREETING)
            raw.sendall(struct.pack(">BB", 4, len(READY)) + READY)
            _, size = said.read(2)
            assert said.read(size).startswith(b"\x05READY"), "not let in"
            with contextlib.suppress(ConnectionError):
                while sent < SENT_MAX:
                    raw.sendall(frame)
                    sent += len(frame)
                    peak = max(peak, serving.memory_info().rss)
                    pause.wait(0.003)  # some 150 MiB a second, for the broker to look in time
        assert MEMORY < sent < SENT_MAX, "it was not taken, or nobody has stopped it"
        assert peak < MEMORY + SLACK, f"{peak / MIB:.0f} MiB of {sent / MIB:.0f} sent"
        assert commands.run("status").returncode == 0
        assert broker.stop() == 0
        assert "(broker.memory): ended" in broker.said
