"""Pickles that tell where they are unpickled, and commands that tell whether they unpickled."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

from tests.commands import Command

# Runs the command with these arguments; what it unpickles, by whichever way,
# is in files that the first one names.
_WATCHED = """
import sys

events = []

def watch(event, arguments):
    if event == "pickle.find_class":
        events.append(f"find_class {arguments}")

sys.addaudithook(watch)

import json, _pickle, pickle

def recorder(name, original):
    def call(*args, **kwargs):
        events.append(name)
        return original(*args, **kwargs)
    return call

class Unpickler(_pickle.Unpickler):
    def __init__(self, *args, **kwargs):
        events.append("Unpickler")
        super().__init__(*args, **kwargs)

for module in (pickle, _pickle):
    for name in ("load", "loads"):
        setattr(module, name, recorder(name, getattr(module, name)))
    module.Unpickler = Unpickler

import os

file = sys.argv.pop(1)
if file == "check":  # that all this sees what it is to see
    pickle.loads(pickle.dumps(json.loads))
    print(json.dumps(events))
    raise SystemExit

from achilles.cli import main

try:
    main()
finally:
    with open(f"{file}.{os.getpid()}", "w") as opened:  # a broker is two processes
        json.dump(events, opened)
"""


class _Bomb:
    """Writes the number of the process in which it is unpickled into a file."""

    def __init__(self, path: Path) -> None:
        self._code = (
            f"import os\nwith open({str(path)!r}, 'a') as file: print(os.getpid(), file=file)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self._code,)


class Canary:
    """A file that unpickled bombs write to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def bomb(self) -> bytes:
        """A pickle whose reader is named in the file."""
        return pickle.dumps(_Bomb(self._path))

    def readers(self) -> set[int]:
        """The processes that unpickled one."""
        if not self._path.exists():
            return set()
        return {int(line) for line in self._path.read_text().split()}


def watched(report: Path | str, *arguments: str) -> list[str]:
    """The command line of a command of ours that notes at its end what it unpickled."""
    return [sys.executable, "-c", _WATCHED, str(report), *arguments]


def watched_command(report: Path, ready: str, *arguments: str) -> Command:
    """The same, running."""
    quiet = ("--log-level", "error")  # nobody reads what it says of each hostile message
    return Command(watched(report, *quiet, *arguments), ready=ready, environ={})


def unpickled(report: Path) -> list[list[str]]:
    """What each process of a watched command unpickled, now that it has ended."""
    files = sorted(report.parent.glob(f"{report.name}.*"))
    return [json.loads(file.read_text()) for file in files]
