"""What a runner does for its tasks, seen from outside, and what its start costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from achilles.core.protocol import (
    ERROR,
    INIT_FAILED,
    VALUE,
    Execute,
    Load,
    Recall,
    ToRunner,
    Unload,
)
from achilles.errors import RemoteError, ResultPickleError, SealError
from achilles.runtime import runner as runner_module
from achilles.runtime.functions import FunctionTable, bytes_of
from achilles.runtime.seal import ANSWER, TAG_SIZE, Seal, Sealer
from achilles.runtime.serialize import LARGE, dumps, dumps_call, join_inline, load_outcome
from achilles.runtime.side import IMPORT
from tests.unit.runtime import tasks
from tests.unit.runtime.driver import CLIENT, Driver, Gate, driving

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there are no such masks here")
def test_who_leaves_a_core_may_come_back() -> None:
    """What it may run on stays as it is, also where that is one core alone."""
    allowed = os.sched_getaffinity(0)
    try:
        for wanted in (allowed, {min(allowed)}):
            os.sched_setaffinity(0, wanted)
            runner_module._leave_core()
            assert os.sched_getaffinity(0) == wanted
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_runner_without_tasks_sleeps(driver: Driver) -> None:
    """After short tasks it looks out for the next one, but not for long."""
    fn = driver.load(int)
    for seq in range(1, 101):
        driver.execute(seq, fn, ())
        assert driver.outcome(seq) == 0
    runner = psutil.Process(driver.host.pids()[1])
    driver.until(lambda: runner.status() == psutil.STATUS_SLEEPING)
    before = runner.cpu_times()
    driver.step(0.3)
    after = runner.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) < 0.1


# --- Functions ------------------------------------------------------------------------------------


def test_a_function_that_comes_with_its_call(driver: Driver) -> None:
    fn = dumps(lambda x: x + 1)
    calls: list[Any] = [dumps_call((n,), {}) for n in range(3)]
    payloads: list[Any] = [join_inline(fn, call) for call in calls]
    driver.apply(Execute(1, 1, CLIENT, 0, 0, payloads))
    assert [driver.outcome(1, index) for index in range(3)] == [1, 2, 3]


def test_a_function_that_comes_with_a_large_call(driver: Driver) -> None:
    for extra in range(2):
        data = bytes(LARGE + extra)
        payload: Any = dumps_call((tasks.Buffer(bytearray(data)), 3), {})
        driver.apply(Execute(1, 1, CLIENT, 0, 0, [join_inline(dumps(tasks.fill), payload)]))
        assert bytes(driver.outcome(1).data) == b"\3" * len(data)
        driver.results.clear()


def test_plain_functions_are_kept_and_callables_with_state_are_not(driver: Driver) -> None:
    driver.execute(1, driver.load(tasks.Counter()), (), (), ())
    assert [driver.outcome(1, index) for index in range(3)] == [1, 1, 1]
    driver.execute(2, driver.load(tasks.count_calls), (), (), ())
    assert [driver.outcome(2, index) for index in range(3)] == [1, 2, 3]
    driver.execute(3, driver.load([].append), (1,), (2,))
    assert driver.outcome(3, 1) is None


def test_blobs_are_forgotten(driver: Driver) -> None:
    first, second = driver.load(tasks.add), driver.load(tasks.identity)
    driver.execute(1, first, (1,))
    driver.execute(2, second, (1,))
    driver.apply(Unload(1, CLIENT, [first]))
    driver.execute(3, first, (1,))
    driver.execute(4, second, (1,))
    driver.apply(Unload(1, CLIENT, []))
    driver.execute(5, second, (1,))
    assert driver.outcome(1) == driver.outcome(2) == driver.outcome(4) == 1
    assert isinstance(driver.outcome(3), RuntimeError)
    assert isinstance(driver.outcome(5), RuntimeError)


def test_clients_have_numbers_of_their_own(driver: Driver) -> None:
    driver.apply(Load(1, 1, 1, dumps(tasks.add)), Load(1, 2, 1, dumps(tasks.identity)))
    payload: Any = dumps_call(("x",), {})
    driver.apply(Execute(1, 1, 2, 1, 0, [payload]))
    assert driver.outcome(1) == "x"
    driver.apply(Unload(1, 1, []), Execute(1, 2, 2, 1, 0, [payload]))
    assert driver.outcome(2) == "x"


# --- Initializers ---------------------------------------------------------------------------------


def test_an_initializer_runs_once(driver: Driver) -> None:
    init = driver.load((tasks.count_calls, ()))
    fn = driver.load(tasks.calls)
    for seq in (1, 2):
        driver.execute(seq, fn, (), (), init=init)
        assert [driver.outcome(seq, index) for index in range(2)] == [1, 1]


def test_an_initializer_runs_once_for_a_client_and_all_that_its_tasks_submit(
    driver: Driver,
) -> None:
    """It is found under the root's number, and so is what a task is told of its client."""
    init = driver.load((tasks.count_calls, ()))
    fn = driver.load(tasks.calls_and_client, client=7)
    for seq in (1, 2):
        payloads: list[Any] = [dumps_call((), {})]
        driver.apply(Execute(1, seq, 7, fn, init, payloads, root=CLIENT))
    assert [driver.outcome(1), driver.outcome(2)] == [(1, CLIENT), (1, CLIENT)]


def test_a_failed_initializer_is_told_to_each_task(driver: Driver) -> None:
    init = driver.load((tasks.fail_to_initialize, ("no licence",)))
    fn = driver.load(tasks.calls)
    for seq in (1, 2):
        driver.execute(seq, fn, (), (), init=init)
        for index in range(2):
            error = driver.outcome(seq, index)
            assert (type(error), str(error)) == (ValueError, "no licence")
            assert driver.results[1, seq, index][0] == INIT_FAILED
    assert driver.run(tasks.calls) == 1


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.bad_input(15)
@pytest.mark.parametrize(
    "error",
    [
        ValueError("a", 1),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        StopIteration(7),
        BaseException("base"),
    ],
    ids=repr,
)
def test_whatever_a_task_raises_comes_back(driver: Driver, error: BaseException) -> None:
    back = driver.run(tasks.raise_it, error)
    assert type(back) is type(error)
    assert back.args == error.args
    assert "in raise_it" in str(back.__cause__)
    assert "runner.py" not in str(back.__cause__)
    assert driver.run(tasks.add, 1) == 1


@pytest.mark.bad_input(21)
def test_endless_recursion_is_an_error(driver: Driver) -> None:
    assert isinstance(driver.run(tasks.recurse), RecursionError)
    assert driver.run(tasks.add, 1) == 1


def test_a_signal_that_interrupts_a_task(driver: Driver) -> None:
    assert isinstance(driver.run(tasks.interrupt), KeyboardInterrupt)
    assert driver.run(tasks.add, 1) == 1


@pytest.mark.parametrize("error", [None, SystemExit(2), KeyboardInterrupt()], ids=repr)
def test_a_result_that_cannot_be_pickled(driver: Driver, error: BaseException | None) -> None:
    back = driver.run(tasks.make_unpicklable, error)
    assert type(back) is ResultPickleError
    assert "returned by make_unpicklable() cannot be pickled" in str(back)
    assert driver.results[1, 200, 0][0] == ERROR
    assert driver.run(tasks.add, 1) == 1


def test_arguments_that_cannot_be_unpickled(driver: Driver) -> None:
    fn = driver.load(tasks.identity)
    missing = b"\x80\x05cno.such.module\nf\n."
    driver.apply(Execute(1, 1, CLIENT, fn, 0, [missing]))
    error = driver.outcome(1)
    assert isinstance(error, ModuleNotFoundError)
    assert "'no' cannot be imported in a runner" in str(error)
    assert sys.executable in str(error)
    assert driver.run(tasks.add, 1) == 1


def test_a_function_that_cannot_be_unpickled(driver: Driver) -> None:
    driver.apply(Load(1, CLIENT, 50, b"\x80\x05cno_such_module\nf\n."))
    driver.execute(1, 50, (1,), (2,))
    for index in range(2):
        assert "'no_such_module' cannot be imported" in str(driver.outcome(1, index))


def test_an_exception_that_cannot_travel(driver: Driver) -> None:
    error = driver.run(_raise_picky)
    assert type(error) is RemoteError
    assert "Picky: lock (`except Picky` does not catch" in str(error)
    assert "in _raise_picky" in str(error.__cause__)


def _raise_picky() -> None:
    class Picky(Exception):
        def __init__(self, *, name: str) -> None:
            super().__init__(name)

    raise Picky(name="lock")


# --- The world around a task ----------------------------------------------------------------------


def test_path_and_directory(tmp_path: Path) -> None:
    path = [*sys.path, "/a path of its own"]
    with driving(path=path, cwd=str(tmp_path)) as driver:
        driver.spawn()
        assert driver.run(tasks.where) == (str(tmp_path), path)


def test_a_directory_that_is_gone_is_not_fatal() -> None:
    with driving(cwd="/no such directory") as driver:
        driver.spawn()
        assert driver.run(tasks.add, 1) == 1


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with driving(environ={**os.environ, "COLOUR": "green"}) as driver:
        driver.spawn()
        assert driver.run(os.getenv, "COLOUR") == "green"


def test_without_a_path_achilles_is_found_and_the_directory_is_searched(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text("def f(): return 'found'\n")
    (tmp_path / "struct.py").write_text("raise RuntimeError('hides the standard library')\n")
    script = """if True:
        from tests.unit.runtime.driver import driving
        from achilles.core.protocol import Load
        import os, sys
        os.chdir(sys.argv[1])
        with driving(path=None) as driver:
            driver.spawn()
            driver.apply(Load(1, 1, 50, b"\\x80\\x05chere\\nf\\n."))
            driver.execute(1, 50, ())
            print(driver.outcome(1))
    """
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "found\n", done.stderr


def test_prints_are_seen_before_the_result(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with driving() as driver:
        driver.spawn()
        for text in ("one", "two"):
            driver.run(tasks.say, text)
            assert capfd.readouterr().out == f"{text}\n"


@pytest.mark.bad_input(27)
@pytest.mark.parametrize("file", [None, "not a file"])
def test_a_task_may_replace_stdout(driver: Driver, file: object) -> None:
    assert driver.run(tasks.replace_stdout, file) is None
    assert driver.run(tasks.add, 1) == 1


@pytest.mark.bad_input(26)
def test_stdin_is_empty(driver: Driver) -> None:
    assert driver.run(tasks.read_stdin) == ""


@pytest.mark.bad_input(23)
def test_a_task_that_forks_answers_once(driver: Driver) -> None:
    assert driver.run(tasks.fork_and_return) == "parent"
    assert driver.run(tasks.add, 1) == 1


def test_descriptors_do_not_leak_in_the_runner(driver: Driver) -> None:
    fn = driver.load(tasks.identity)
    before = driver.run(tasks.descriptors)
    for _ in range(3):
        driver.execute(1, fn, *((bytes(LARGE),) for _ in range(20)))
        driver.until(lambda: sum(key[1] == 1 for key in driver.results) == 20)
        driver.results.clear()
    assert driver.run(tasks.descriptors) <= before + 2  # the hand-over's, made on first use


def test_recalled_memory_is_given_back(driver: Driver, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    fn = driver.load(tasks.identity)
    before = driver.run(tasks.descriptors)
    driver.execute(1, driver.load(tasks.wait_at), (gate.path,))
    driver.until(gate.is_reached)
    driver.execute(2, fn, (bytes(LARGE),), (bytes(LARGE),))
    driver.apply(Recall(1))
    gate.open()
    assert driver.outcome(1) == "open"
    assert driver.run(tasks.descriptors) <= before + 2


# --- Speed and weight -----------------------------------------------------------------------------


def test_nothing_heavy_is_imported(driver: Driver) -> None:
    heavy = ["zmq", "msgspec", "click", "cloudpickle", "traceback", "concurrent.futures", "re"]
    heavy += ["threading", "subprocess", "socket", "typing_extensions", "inspect", "logging"]
    clean = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import achilles, sys; print([n for n in {heavy} if n in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    by_site_and_package = clean.stdout.strip()
    driver.apply(Load(1, CLIENT, 60, b"\x80\x05cbuiltins\neval\n."))
    driver.execute(1, 60, (f"[n for n in {heavy} if n in __import__('sys').modules]",))
    assert str(driver.outcome(1)) == by_site_and_package


def test_many_short_results_wake_the_host_seldom(driver: Driver) -> None:
    fn = driver.load(tasks.add)
    driver.run(tasks.add, 1)
    reads: list[float] = []
    runner = driver.host.runners[1]
    original = runner.read

    def read() -> None:
        reads.append(time.monotonic())
        original()

    driver.loop.register(runner.sock.fileno(), read)
    driver.execute(1, fn, *((n,) for n in range(1000)))
    driver.until(lambda: len(driver.results) == 1001)
    assert len(reads) < 300, "each result woke the host"
    assert all(driver.results[1, 1, index][0] == VALUE for index in range(1000))


def test_a_lambda_of_the_clients_main_module(driver: Driver) -> None:
    scope: dict[str, Any] = {"__name__": "__main__", "offset": 5}
    exec("def shift(x): return x + offset", scope)
    number, data = FunctionTable().encode(scope["shift"], shared=True)
    driver.apply(Load(1, CLIENT, number, bytes_of(data)))
    driver.execute(1, number, (1,))
    assert driver.outcome(1) == 6


def test_results_survive_the_round_trip_as_their_own_type(driver: Driver) -> None:
    status, payload = 0, dumps({"a": (1, 2)})
    assert load_outcome(status, payload) == ({"a": (1, 2)}, None)
    assert driver.run(tasks.identity, {"a": (1, 2)}) == {"a": (1, 2)}


# --- Sealed calls ---------------------------------------------------------------------------------

CODE = bytes(range(32))


class SealingClient:
    """A client that seals its calls, and says that it lives when a runner asks."""

    def __init__(self, driver: Driver, number: int = CLIENT) -> None:
        self.driver = driver
        self.number = number
        self.sealer = Sealer(Seal(CODE))
        self.is_alive = True
        self.asked = 0

    def run(
        self, seq: int, fn: Any, *args: Any, init: Any = None, change: Any = None, id: int = 1
    ) -> Any:
        """The outcome of one call; ``change`` alters its payload."""
        function, payload = dumps(fn), dumps_call(args, {})
        assert isinstance(payload, bytes)
        number, init_number = seq, 100 + seq if init is not None else 0
        self.load(number, function)
        if init is not None:
            self.load(init_number, dumps((init, ())))
        payload += self.sealer.call(id, (number, init_number, ()), function, payload)
        if change is not None:
            payload = change(payload)
        key = (1, seq, 0)
        self.driver.results.pop(key, None)
        sent = Execute(1, seq, self.number, number, init_number, [payload], ids=[id])
        self.driver.apply(sent)
        self.driver.until(lambda: self.answer(key))
        status, result = self.driver.results[key]
        value, error = load_outcome(status, self.sealer.open_result(id, status, result))
        return value if error is None else error

    def load(self, number: int, payload: bytes) -> None:
        sealed = payload + self.sealer.blob(number, payload)
        self.driver.apply(Load(1, self.number, number, sealed))

    def answer(self, key: tuple[int, int, int]) -> bool:
        """Answer the questions of this client's runner, as `letters.Desk` does;
        whether the result is there.
        """
        letters, self.driver.letters = self.driver.letters, []
        for letter in letters:
            assert (letter.client, letter.kind) == (self.number, IMPORT)
            number, once, tag, name = (
                *(letter.body[:4], letter.body[4:20], letter.body[20:36], letter.body[36:]),
            )
            assert self.sealer.is_sealed(b"?", once, name, tag)
            self.asked += name == b""  # it has no module either
            tag = self.sealer.letter(ANSWER, once, b"") if self.is_alive else bytes(TAG_SIZE)
            self.driver.apply(ToRunner(1, letter.client, IMPORT, number + tag))
        return key in self.driver.results


@pytest.fixture
def sealed() -> Iterator[Driver]:
    with driving(code=CODE, is_remote=True) as driver:
        driver.spawn()
        yield driver


def test_a_sealed_call_is_run_and_its_client_is_asked_once_whether_it_lives(
    sealed: Driver,
) -> None:
    client = SealingClient(sealed)
    assert [client.run(seq, tasks.add, seq, 1, id=seq) for seq in (1, 2, 3)] == [2, 3, 4]
    assert client.asked == 1


def test_a_call_that_is_not_sealed_is_not_unpickled(sealed: Driver, tmp_path: Path) -> None:
    client = SealingClient(sealed)
    canary = tmp_path / "canary"
    evil = dumps_call((tasks.Makes(str(canary)),), {})
    assert isinstance(evil, bytes)
    for seq, change in enumerate(
        (lambda call: evil, lambda call: evil + call[-48:], lambda call: b""), 1
    ):
        if seq == 2:
            assert isinstance(client.run(seq, tasks.identity, seq, change=change), SealError)
        else:  # nobody's call, so the refusal is nobody's result
            with pytest.raises(SealError):
                client.run(seq, tasks.identity, seq, change=change)
    assert not canary.exists()
    assert client.run(9, tasks.identity, 9) == 9
    assert client.run(10, tasks.identity, tasks.Makes(str(canary))) is None
    assert canary.exists()  # it would have been made


def test_an_initializer_is_run_behind_its_seal(sealed: Driver) -> None:
    client = SealingClient(sealed)
    assert client.run(1, tasks.calls, init=tasks.count_calls) == 1
    error = client.run(2, tasks.calls, init=tasks.count_calls, change=lambda call: b"x" + call)
    assert isinstance(error, SealError)


def test_a_client_that_does_not_live_is_not_run_for(sealed: Driver) -> None:
    client = SealingClient(sealed)
    client.is_alive = False
    error = client.run(1, tasks.add, 1, 1)
    assert isinstance(error, SealError)
    assert "whether it lives" in str(error)
    client.is_alive = True
    assert client.run(2, tasks.add, 1, 1) == 2


def test_a_number_that_is_another_clients_now_has_nothing_of_the_old_one(sealed: Driver) -> None:
    """As after a broker's restart."""
    assert SealingClient(sealed).run(1, tasks.calls, init=tasks.count_calls) == 1
    other = SealingClient(sealed)
    assert other.run(1, tasks.calls, init=tasks.count_calls) == 2, "its own initializer ran"
    assert other.asked == 1


def test_clients_take_turns_without_being_asked_again(sealed: Driver) -> None:
    one, two = SealingClient(sealed, 1), SealingClient(sealed, 2)
    for seq in (1, 2, 3):
        assert one.run(seq, tasks.add, 1, 1) == two.run(seq + 10, tasks.add, 1, 1) == 2
    assert (one.asked, two.asked) == (1, 1)
