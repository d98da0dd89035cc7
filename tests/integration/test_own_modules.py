"""Modules that are loaded, and that no import by name would find:
what they have travels by value, as that of `__main__` does.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.integration.test_scripts import RUN_SECONDS, environ, run
from tests.modes import CLUSTER, EMBEDDED, OURS, PROCESSES, Maker, of_modes

PLUGIN = """
import enum, threading
from dataclasses import dataclass
from typing import NewType, TypeVar

T = TypeVar("T")
Number = NewType("Number", int)
FACTOR, calls, model, lock = 2, 0, None, threading.Lock()

class Bad(ValueError):
    def __init__(self, code):
        super().__init__(code)
        self.code = code

class Color(enum.Enum):
    RED = 1

@dataclass
class Point:
    x: int
    def scaled(self):
        return Point(scale(self.x))

def scale(x):
    return Number(x) * FACTOR

def work(point, color=Color.RED):
    assert type(point) is Point and color is Color.RED and T.__name__ == "T"
    return point.scaled()

def fail(code):
    raise Bad(code)

def start(value):
    global model
    model = value

def started():
    return model

def outer(n):
    return lambda: (FACTOR, n)
"""


def load(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As programs load their plugins."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A plugin that was loaded from its file."""
    path = tmp_path / "plugin_of_a_test.py"
    path.write_text(PLUGIN)
    return load("plugin_of_a_test", path, monkeypatch)


@of_modes(PROCESSES, *OURS)
def test_a_plugin(make: Maker, plugin: Any) -> None:
    with make(2, initializer=plugin.start, initargs=(7,)) as executor:
        assert executor.submit(plugin.work, plugin.Point(1)).result() == plugin.Point(2)
        assert executor.submit(plugin.Point(3).scaled).result() == plugin.Point(6)
        assert list(executor.map(plugin.scale, range(20))) == [2 * n for n in range(20)]
        assert executor.submit(list, [plugin.Color.RED]).result() == [plugin.Color.RED]
        assert executor.submit(plugin.started).result() == 7
        with pytest.raises(plugin.Bad) as caught:
            executor.submit(plugin.fail, 5).result()
        assert caught.value.code == 5


@of_modes(*OURS)
def test_what_a_plugin_changes_is_seen(make: Maker, plugin: Any) -> None:
    with make(1) as executor:
        assert executor.submit(plugin.outer(1)).result() == (2, 1)
        plugin.FACTOR = 5
        assert executor.submit(plugin.outer(1)).result() == (5, 1)
        assert executor.submit(plugin.scale, 2).result() == 10


@of_modes(*OURS)
def test_functions_of_the_program_use_a_plugin(
    make: Maker, plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has what cannot be pickled, and is named by another plugin."""
    path = tmp_path / "second_plugin_of_a_test.py"
    path.write_text(
        "import plugin_of_a_test as one\ndef twice(x): return one.scale(one.scale(x))\n"
    )
    second = load("second_plugin_of_a_test", path, monkeypatch)
    with make(1) as executor:
        assert executor.submit(second.twice, 1).result() == 4
        assert executor.submit(lambda: plugin.work(plugin.Point(2))).result() == plugin.Point(4)
        plugin.FACTOR = 3
        assert executor.submit(second.twice, 1).result() == 9


@of_modes(PROCESSES, *OURS)
def test_a_module_that_was_made_by_hand(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("by_hand_in_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(PLUGIN, "<by hand>", "exec", dont_inherit=True), vars(module))
    with make(1) as executor:
        assert executor.submit(module.work, module.Point(1)).result() == module.Point(2)
        with pytest.raises(module.Bad):
            executor.submit(module.fail, 5).result()


@of_modes(PROCESSES, *OURS)
def test_a_file_that_is_run_by_another_name(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        f"""
from {"concurrent.futures" if make.mode == PROCESSES else "achilles"} import *
Executor = {"ProcessPoolExecutor" if make.mode == PROCESSES else "DistributedExecutor"}
def double(n):
    return 2 * n
if __name__ == "job":
    with Executor(1) as executor:
        print(list(executor.map(double, range(3))))
"""
    )
    out, _ = run(make, tmp_path, "import runpy\nrunpy.run_path('job.py', run_name='job')\n")
    assert out == "[0, 2, 4]\n"


@of_modes(EMBEDDED, CLUSTER)
def test_tests_that_pytest_has_not_imported_by_name(make: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "inner" / "unit"
    folder.mkdir(parents=True)
    (folder / "test_inner.py").write_text(
        """
from dataclasses import dataclass
from achilles import DistributedExecutor
@dataclass
class Point:
    x: int
def double(point):
    return Point(2 * point.x)
def test_it():
    with DistributedExecutor(1) as executor:
        assert executor.submit(double, Point(2)).result(20) == Point(4)
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"],
        cwd=folder.parent,
        env=environ(make),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- The main module in processes of multiprocessing, which has it by another name ------------------

CHILD = """
import multiprocessing, pickle
from concurrent.futures import ProcessPoolExecutor
FACTOR = 2
class Point:
    def __init__(self, x):
        self.x = x
class Bad(ValueError):
    pass
def double(point):
    if point.x < 0:
        raise Bad(point.x)
    pickle.dumps(point)
    return Point(FACTOR * point.x)
def use(n):
    with DistributedExecutor(1) as executor:
        found = [executor.submit(double, Point(n + k)).result() for k in range(3)]
        assert all(type(one) is Point for one in found)
        try:
            executor.submit(double, Point(-1)).result()
        except Bad as error:
            found.append(Point(str(error)))
        return [one.x for one in found]
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@of_modes(*OURS)
def test_an_executor_in_a_process_of_multiprocessing(
    make: Maker, method: str, tmp_path: Path
) -> None:
    text = f"""{CHILD}
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    with context.Pool(1) as pool:
        print(pool.apply(use, (1,)))
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        print(executor.submit(use, 2).result())
"""
    out, _ = run(make, tmp_path, text)
    assert out == "[2, 4, 6, '-1']\n[4, 6, 8, '-1']\n"


@of_modes(*OURS)
def test_a_program_without_a_guard_is_not_run_without_end(make: Maker, tmp_path: Path) -> None:
    """A process that a task spawns imports the program, which makes an executor."""
    text = """
import multiprocessing
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "runs"), "a") as file:
    print(__name__, file=file)
def target():
    pass
def work():
    process = multiprocessing.get_context("spawn").Process(target=target)
    process.start()
    process.join()
    return process.exitcode
with DistributedExecutor(1) as executor:
    print(executor.submit(work).result())
"""
    out, _ = run(make, tmp_path, text)
    assert out == "1\n"
    assert (tmp_path / "runs").read_text() == "__main__\n__mp_main__\n"
