"""What an agent does where tasks submit tasks; the simulation runs it for the rest,
in every seed.
"""

from __future__ import annotations

from typing import Any

import pytest

from achilles.core import envelope
from achilles.core import protocol as p
from achilles.core.agent import Agent
from achilles.core.crew import SURPLUS_SECONDS, Send
from tests.unit.core.bench import crossed

CLIENT = 4


class Bench:
    """An agent; the broker's messages cross the codec, and the invariants hold after every step."""

    def __init__(self, slots: int = 1, **options: Any) -> None:
        self.now = 100.0
        self.core = Agent(slots, **options)
        self.leases = 0

    def say(self, message: Any, *, is_event: bool = False) -> list[Any]:
        """A message of the broker or an event of the host;
        what the agent says and commands in answer.
        """
        return self._check(self.core.receive(message if is_event else crossed(message), self.now))

    def run(self, tasks: int = 1, **options: Any) -> list[Any]:
        """The next lease."""
        self.leases += 1
        payloads: list[p.Payload] = [b"x"] * tasks
        return self.say(p.Run(self.leases, CLIENT, 0, 0, list(range(tasks)), payloads, **options))

    def lend(self, lease: int, is_lent: bool = True) -> list[Any]:
        return self.say(p.Lend(lease, is_lent))

    def write(self, runner: int, seq: int, message: Any, client: int = CLIENT) -> list[Any]:
        """A task writes a letter."""
        body = envelope.pack(seq, message)
        return self.event(p.FromRunner(runner, client, envelope.NESTED, body))

    def done(self, runner: int, seq: int, *indexes: int) -> list[Any]:
        rows = [(seq, index, p.VALUE, 0.01, b"value") for index in indexes or (0,)]
        return self.event(p.RunnerDone(runner, rows))

    def event(self, event: Any) -> list[Any]:
        return self.say(event, is_event=True)

    def tick(self, seconds: float) -> list[Any]:
        self.now += seconds
        return self._check(self.core.tick(self.now))

    def _check(self, sends: list[Send]) -> list[Any]:
        self.core.check_invariants()
        return [message for _, message in sends]


def of(messages: list[Any], kind: type) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


def test_a_lent_slot_is_a_runner_more() -> None:
    bench = Bench()
    bench.run()
    assert of(bench.run(), p.Spawn) == []  # it waits behind the first
    recall, *_ = bench.lend(1)
    assert recall == p.Recall(1)
    returned, *_ = bench.event(p.RunnerRecalled(1, [(2, 1)]))
    assert returned == p.Returned(2, [0])
    spawn, execute = bench.run()
    assert (spawn, execute.runner) == (p.Spawn(2), 2)


def test_the_rest_of_its_own_chunk_goes_back_as_well() -> None:
    bench = Bench()
    bench.run(tasks=3)
    assert bench.lend(1) == [p.Recall(1)]
    assert bench.event(p.RunnerRecalled(1, [(1, 2)])) == [p.Returned(1, [1, 2])]


def test_what_came_before_the_word_gets_the_new_runner() -> None:
    """Two behind one: the agent's own queue."""
    bench = Bench()
    for _ in range(3):
        bench.run()
    recall, spawn, execute = bench.lend(1)
    assert (recall, spawn) == (p.Recall(1), p.Spawn(2))
    assert execute.runner == 2


def test_nothing_is_put_behind_a_task_that_waits() -> None:
    bench = Bench()
    bench.run()
    bench.lend(1)
    bench.run()
    (execute,) = of(bench.run(), p.Execute)
    assert execute.runner == 2


def test_when_it_goes_on_the_slots_are_as_many_as_before() -> None:
    """An idle runner beyond them gets nothing to do, and is let go after some seconds."""
    bench = Bench()
    bench.run()
    bench.lend(1)
    bench.run()
    bench.done(2, 1)
    bench.lend(1, False)
    (execute,) = of(bench.run(), p.Execute)
    assert execute.runner == 1  # behind the one that goes on
    assert bench.core.next_deadline() is not None
    bench.event(p.RunnerRecalled(1, [(2, 1)]))
    assert bench.core.next_deadline() == bench.now + SURPLUS_SECONDS
    assert bench.tick(SURPLUS_SECONDS / 2) == []
    assert bench.tick(SURPLUS_SECONDS) == [p.Retire(2)]
    assert bench.core.next_deadline() is None
    assert bench.event(p.RunnerDied(2, "", [], 1)) == []


def test_a_runner_stays_while_something_that_it_submitted_is_under_way() -> None:
    bench = Bench()
    bench.run()
    bench.lend(1)
    bench.run()
    bench.write(2, 1, p.Submit(0, 0, [1, 2, 3], [b"x"] * 3))
    bench.done(2, 1)
    bench.lend(1, False)
    for settled in (p.Results([1], b"\0", [b"v"]), p.Failed(2, p.CRASHED, [])):
        assert bench.tick(2 * SURPLUS_SECONDS) == []
        bench.say(p.Relay(2, CLIENT, 0, settled))
    bench.write(2, 0, p.Cancel([3]))
    assert bench.tick(2 * SURPLUS_SECONDS) == [p.Retire(2)]


def test_letters_are_of_the_lease_whose_chunk_they_name() -> None:
    """Whether or not its predecessor's result has been seen; and for its client only."""
    bench = Bench()
    bench.run()
    bench.run(root=9)
    submit = p.Submit(1, 0, [1], [b"x"])
    assert bench.write(1, 2, submit, client=9) == [p.Relay(1, 9, 2, submit)]
    assert bench.write(1, 1, submit) == [p.Relay(1, CLIENT, 1, submit)]
    assert bench.write(1, 2, submit) == [p.Relay(1, CLIENT, 0, submit)]
    assert bench.write(1, 7, submit) == [p.Relay(1, CLIENT, 0, submit)]
    assert bench.write(5, 1, submit) == []


def test_answers_go_to_the_runner() -> None:
    bench = Bench()
    bench.run()
    results = p.Results([1], b"\0", [b"v"])
    (letter,) = bench.say(p.Relay(1, CLIENT, 0, results))
    assert letter == p.ToRunner(1, CLIENT, envelope.NESTED, envelope.pack(0, results))
    assert bench.say(p.Relay(5, CLIENT, 0, results)) == []


@pytest.mark.parametrize(
    "body",
    [b"", b"anything", envelope.pack(1, p.Cluster(1, 1)), envelope.pack(1, p.Goodbye("x"))],
)
def test_a_task_that_writes_nonsense_ends_its_runner(body: bytes) -> None:
    bench = Bench()
    bench.run()
    letter = p.FromRunner(1, CLIENT, envelope.NESTED, body)
    assert bench.event(letter) == [p.Kill(1)]
    assert bench.event(letter) == []
    (crashed,) = bench.event(p.RunnerDied(1, "was killed", [], 1))
    assert crashed.reason.startswith("wrote to the worker's side channel: ")


def test_the_end_of_a_runner_that_has_submitted_is_told() -> None:
    """Before the crash: what it had submitted is gone when its task runs again."""
    bench = Bench()
    bench.run()
    bench.write(1, 1, p.Submit(0, 0, [1], [b"x"]))
    bench.lend(1)
    goodbye, crashed = bench.event(p.RunnerDied(1, "was killed by SIGSEGV", [], 1))
    assert goodbye == p.Relay(1, 0, 0, p.Goodbye("the runner has ended"))
    assert crashed == p.Crashed(1, 0, "was killed by SIGSEGV")
    assert bench.core._crew.lent == set()


def test_an_initializer_is_loaded_once_for_a_client_and_all_that_its_tasks_submit() -> None:
    bench = Bench()
    bench.say(p.Blob(CLIENT, 5, b"init"))
    bench.say(p.Blob(6, 1, b"f"))
    bench.say(p.Run(1, CLIENT, 0, 5, [1], [b"x"]))
    (load, execute) = bench.say(p.Run(2, 6, 1, 5, [1], [b"x"], root=CLIENT))
    assert load == p.Load(1, 6, 1, b"f")
    assert (execute.client, execute.root) == (6, CLIENT)


def test_a_client_that_is_gone_is_forgotten_where_its_tasks_submitted() -> None:
    """Whether or not a blob of it was loaded there."""
    bench = Bench(slots=2)
    bench.run()
    bench.run()
    bench.write(1, 1, p.Submit(0, 0, [1], [b"x"]))
    assert bench.say(p.Forget(CLIENT, [])) == [p.Unload(1, CLIENT, [])]


def test_a_word_about_a_lease_that_has_ended_is_passed_over() -> None:
    bench = Bench()
    bench.run()
    bench.done(1, 1)
    assert bench.lend(1) == []
    assert bench.core._crew.lent == set()
