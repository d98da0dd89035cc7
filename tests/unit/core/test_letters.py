"""Letters between runners and clients pass the cores, and reach nobody else."""

from __future__ import annotations

import pytest

from achilles.core import protocol as p
from tests.unit.core.agents import HOST, busy
from tests.unit.core.bench import BROKER, CLIENT, OTHER, SECOND, WORKER, SchedulerBench, runs


def test_a_runners_letter_goes_to_the_broker_and_the_answer_back() -> None:
    bench = busy(1)
    bench.hear(p.FromRunner(runner=1, client=1, kind=p.IMPORT, body=b"question"))
    letter = p.Letter(worker=0, runner=1, client=1, kind=p.IMPORT, body=b"question")
    assert bench.sent() == [(BROKER, letter)]
    bench.hear(p.Letter(worker=0, runner=1, client=1, kind=p.IMPORT, body=b"answer"))
    answer = p.ToRunner(runner=1, client=1, kind=p.IMPORT, body=b"answer")
    assert bench.sent() == [(HOST, answer)]


@pytest.mark.parametrize(
    "letter",
    [
        p.FromRunner(runner=1, client=2, kind=p.IMPORT, body=b""),
        p.FromRunner(runner=2, client=1, kind=p.IMPORT, body=b""),
        p.FromRunner(runner=1, client=1, kind=99, body=b""),
        p.FromRunner(runner=1, client=1, kind=p.OUTPUT, body=bytes(p.LETTER_MAX + 1)),
    ],
    ids=["of another client", "of no runner", "of an unknown kind", "over-long"],
)
def test_what_user_code_makes_up_goes_nowhere(letter: p.FromRunner) -> None:
    bench = busy(1)
    bench.hear(letter)
    assert bench.sent() == []


def test_the_broker_passes_letters_between_those_who_work_together() -> None:
    bench = SchedulerBench()
    (run,) = runs(bench.submit(1))
    letter = p.Letter(worker=0, runner=3, client=run.client, kind=p.IMPORT, body=b"question")
    ((to, passed),) = bench.say(WORKER, letter)
    assert (to, passed.runner, passed.client, passed.body) == (CLIENT, 3, run.client, b"question")
    answer = p.Letter(passed.worker, passed.runner, passed.client, p.IMPORT, b"answer")
    expected = p.Letter(0, 3, run.client, p.IMPORT, b"answer")
    assert bench.say(CLIENT, answer) == [(WORKER, expected)]


def test_nobody_else_hears_or_answers() -> None:
    """Not another client, not by way of another worker, and not when the lease has ended."""
    bench = SchedulerBench(workers=2)
    bench.join_client(OTHER)
    (run,) = runs(bench.submit(1))
    question = p.Letter(worker=0, runner=1, client=run.client, kind=p.IMPORT, body=b"")
    assert bench.say(SECOND, question) == []
    assert bench.say(WORKER, p.Letter(0, 1, run.client + 1, p.IMPORT, b"")) == []
    ((_, passed),) = bench.say(WORKER, question)
    assert bench.say(OTHER, passed) == []
    assert bench.say(CLIENT, p.Letter(passed.worker + 9, 1, run.client, p.IMPORT, b"")) == []
    bench.done(WORKER, run)
    assert bench.say(CLIENT, passed) == []
    assert bench.say(WORKER, question) == []
