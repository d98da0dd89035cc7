"""The attack table: what is tried, by whom, and what must come of it.

Rules
    1. A row is covered by the tests that carry its number, ``@attack("T7")``, wherever they are; or
       by `CANNOT_RUN`, which says why it cannot be run.
    2. `test_attacks` holds that no row is left out, and that no test names a row that there is not.
    3. ``python -m tests.security`` (``make attack``) runs the rows and prints the table.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# Who attacks.
PORT = "anyone who reaches the port"
LOCAL = "other users of the machine"
NETWORK = "whoever is between"
WORKER = "a stolen worker key"
CLIENT = "a stolen client key"
BROKER = "a compromised broker"
PAGE = "a web page in the operator's browser"
TASK = "a task's author"
SLIP = "a slip of the user's or ours"

REFUSED, HELD = "refused", "held"


class Attack(NamedTuple):
    """A row. ``end`` is how the attack ends where all is well: turned away, or without effect."""

    id: str
    what: str
    by: tuple[str, ...]
    must: str
    end: str


ATTACKS = [
    Attack(
        "T1",
        "connect with no security",
        (PORT, LOCAL),
        "refused in the handshake, counted, and not a byte of a message is parsed",
        REFUSED,
    ),
    Attack(
        "T2",
        "CURVE with an unknown key",
        (PORT,),
        "refused by the ZAP handler, and logged at a bounded rate",
        REFUSED,
    ),
    Attack(
        "T3",
        "stop the ZAP handler, then connect",
        (PORT,),
        "its death ends the broker, and without it nobody is let in",
        REFUSED,
    ),
    Attack(
        "T4",
        "bind beyond loopback without keys",
        (SLIP,),
        "exit 2 before any bind, with the command that fixes it",
        REFUSED,
    ),
    Attack(
        "T5",
        "scan a host for an embedded executor",
        (PORT,),
        "nothing of it listens anywhere",
        HELD,
    ),
    Attack(
        "T6",
        "connect to the ipc socket as another user",
        (LOCAL,),
        "stopped by the folder, and by the socket's filter where the folder is open",
        REFUSED,
    ),
    Attack(
        "T7",
        "put a folder, link or socket of one's own where a broker's will be; bind a second one",
        (LOCAL,),
        "refused by name; the first broker is unharmed",
        REFUSED,
    ),
    Attack(
        "T8",
        "loose, linked or foreign key files",
        (SLIP, LOCAL),
        "not used, with the command that fixes it",
        REFUSED,
    ),
    Attack(
        "T9",
        "look for keys in arguments, environments, logs, tracebacks and reprs",
        (LOCAL,),
        "they are in none",
        HELD,
    ),
    Attack(
        "T10",
        "send pickle bombs to the broker: every port, message and field",
        (PORT, LOCAL, WORKER, CLIENT),
        "nothing is unpickled",
        HELD,
    ),
    Attack(
        "T11",
        "say what another role may say",
        (WORKER, CLIENT),
        "the session is cut, over every pair of message and role",
        REFUSED,
    ),
    Attack(
        "T12",
        "results for leases of others, of the past, or of nobody",
        (WORKER,),
        "no future resolves; counted, and the session is cut at the third",
        REFUSED,
    ),
    Attack(
        "T13",
        "results with a wrong seal, or none",
        (BROKER, WORKER),
        "the client refuses them before it unpickles",
        REFUSED,
    ),
    Attack(
        "T14",
        "alter, replay or redirect a task on its way",
        (BROKER,),
        "the runner refuses it before it unpickles",
        REFUSED,
    ),
    Attack(
        "T15",
        "be somebody else's broker; talk peers down to less security",
        (NETWORK,),
        "the handshake fails, with an error that names the key; there is no fallback",
        REFUSED,
    ),
    Attack(
        "T16",
        "flip bits on the wire",
        (NETWORK,),
        "connections end, work is sent again, no value is wrong",
        HELD,
    ),
    Attack(
        "T17",
        "replay what an administrator sent",
        (NETWORK, WORKER),
        "refused: by CURVE's keys, and by the session's token",
        REFUSED,
    ),
    Attack(
        "T18",
        "take over the routing id of one that has gone",
        (WORKER, CLIENT),
        "without the token there is no session, and without the key no role",
        REFUSED,
    ),
    Attack(
        "T19",
        "claim the routing id that libzmq gives out next, which aborts it",
        (WORKER, CLIENT),
        "the broker that comes after has everything again; the key can be revoked",
        HELD,
    ),
    Attack(
        "T20",
        "frames that claim or are too much, before any key was shown",
        (PORT,),
        "the connection ends; memory grows by less than 32 MiB",
        REFUSED,
    ),
    Attack(
        "T21",
        "a message of endless parts",
        (WORKER, CLIENT),
        "the watchdog cuts whoever sends it; memory stays within its budget",
        REFUSED,
    ),
    Attack(
        "T22",
        "thousands of idle, slow and short connections",
        (PORT,),
        "honest peers are served, and idlers are closed",
        HELD,
    ),
    Attack(
        "T23",
        "a flood of handshakes",
        (PORT,),
        "honest sessions are not lost",
        HELD,
    ),
    Attack(
        "T24",
        "headers and bodies that are bombs for a parser",
        (WORKER, CLIENT),
        "refused before they are built, and the session is cut",
        REFUSED,
    ),
    Attack(
        "T25",
        "a result that becomes a huge one when it is read, or runs code",
        (WORKER,),
        "nothing is compressed, sizes are bounded, and with `client.results` nothing but what it lists is made",
        REFUSED,
    ),
    Attack(
        "T26",
        "names and texts that forge lines, move a terminal's cursor, or are endless",
        (WORKER, CLIENT, TASK),
        "logs keep one line an event, status is escaped, JSON stays valid",
        HELD,
    ),
    Attack(
        "T27",
        "ask for tokens and keys by way of errors and status",
        (WORKER, CLIENT),
        "they are in no answer",
        HELD,
    ),
    Attack(
        "T28",
        "a web page that posts to our ports",
        (PAGE,),
        "HTTP is refused, and nothing serves it",
        REFUSED,
    ),
    Attack(
        "T29",
        "submit without end and never read a result",
        (CLIENT, TASK),
        "that client alone is held up; memory stays within its budget",
        HELD,
    ),
    Attack(
        "T30",
        "tasks that leave processes, close descriptors, ignore signals, flood stdout",
        (TASK,),
        "they end with their runner; the worker is unharmed",
        HELD,
    ),
    Attack(
        "T31",
        "a task that looks for the worker's keys",
        (TASK,),
        "not in what it inherits, nor on the disk of a host that joined by stdin; the rest is documented",
        HELD,
    ),
    Attack(
        "T32",
        "a revoked key in an open session",
        (WORKER, CLIENT),
        "cut within a second, its work runs elsewhere uncharged",
        REFUSED,
    ),
    Attack(
        "T33",
        "a hostile host name for `achilles up --ssh`",
        (SLIP,),
        "refused by a pattern, and no shell",
        REFUSED,
    ),
    Attack(
        "T34",
        "hostile settings",
        (SLIP,),
        "a named error, and at most 1 MiB is read",
        REFUSED,
    ),
    Attack(
        "T35",
        "unpickle in the wrong process",
        (SLIP,),
        "neither broker nor worker ever does, in real and in hostile work",
        HELD,
    ),
    Attack(
        "T36",
        "end the cluster without a key for that",
        (PORT,),
        "impossible",
        REFUSED,
    ),
    Attack(
        "T37",
        "tokens and keys that repeat after a fork",
        (SLIP,),
        "no two are equal",
        HELD,
    ),
    Attack(
        "T38",
        "measure how long a comparison takes",
        (WORKER,),
        "seals are compared in constant time; a token is only ever looked up",
        HELD,
    ),
    Attack(
        "T39",
        "name memory or a file of the broker's host, to have it opened and given to a task",
        (CLIENT, WORKER, LOCAL),
        "over TCP refused; over ipc nothing but memory of the same user's that can change no more, and only the one that was meant",
        REFUSED,
    ),
]

# Rows that nothing can run, and why.
CANNOT_RUN = {
    "T33": "there is no `achilles up --ssh` yet: no command takes a host name to a shell",
}

_IDS = {one.id for one in ATTACKS}


def attack(*ids: str) -> pytest.MarkDecorator:
    """The test is one of these rows, or a part of it."""
    unknown = set(ids) - _IDS
    assert not unknown, f"no such row: {unknown}"
    return pytest.mark.attack(*ids)


def files_by_attack() -> dict[str, set[Path]]:
    """The test modules that cover each row, as the decorators of their tests say."""
    found: dict[str, set[Path]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for one in node.decorator_list:
                if isinstance(one, ast.Call) and ast.unparse(one.func).split(".")[-1] == "attack":
                    for argument in one.args:
                        found.setdefault(ast.literal_eval(argument), set()).add(path)
    return found
