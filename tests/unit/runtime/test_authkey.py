from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest

from achilles.runtime.authkey import own_authkey

KEY = "from achilles.runtime.authkey import set_authkey; set_authkey(b'key')"
LOAD = "import sys, multiprocessing.process as process"
SHOW = "print(process.current_process().authkey == b'key')"


def run(*lines: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("lines", [(KEY, LOAD), (LOAD, KEY)], ids=["before", "after"])
def test_the_key_is_set_before_or_after_its_module_is_loaded(lines: tuple[str, str]) -> None:
    assert run(*lines, SHOW) == "True"


def test_the_key_does_not_load_its_module() -> None:
    show = "import sys; print(*(name for name in sys.modules if 'multiprocessing' in name))"
    assert run(KEY, "import json", show) == ""


def test_nothing_is_left_in_the_way_of_imports() -> None:
    show = (
        "print(len(sys.meta_path), type(process.__loader__).__name__, process.__spec__.loader"
        " is process.__loader__)"
    )
    assert run(KEY, LOAD, show) == run(LOAD, show)


def test_own_key_is_that_of_this_process() -> None:
    assert own_authkey() == bytes(multiprocessing.current_process().authkey)
