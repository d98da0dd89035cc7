"""APScheduler and Tornado: servers that hand work to an executor."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED
from apscheduler.executors.pool import BasePoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from tornado.concurrent import run_on_executor
from tornado.ioloop import IOLoop

from tests import tasks
from tests.clients import work
from tests.modes import OURS, WAIT_SECONDS, Maker, of_modes


class Executor(BasePoolExecutor):  # type: ignore[misc]
    def __init__(self, executor: Any) -> None:
        super().__init__(executor)


@of_modes(*OURS)
def test_apscheduler(make: Maker) -> None:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    scheduler = BackgroundScheduler(executors={"default": Executor(make())}, timezone="UTC")
    scheduler.add_listener(events.put, EVENT_JOB_EXECUTED | EVENT_JOB_ERROR)
    scheduler.start()
    try:
        scheduler.add_job(tasks.add, args=(40, 2), id="good")
        scheduler.add_job(work.fail, id="bad")
        found = {event.job_id: event for event in [events.get(timeout=WAIT_SECONDS) for _ in "ab"]}
    finally:
        scheduler.shutdown()
    assert found["good"].retval == 42
    assert isinstance(found["bad"].exception, ArithmeticError)


class Service:
    """Its methods run where ``executor`` says."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor

    def __getstate__(self) -> dict[str, Any]:
        return {}

    @run_on_executor  # type: ignore[untyped-decorator]
    def add(self, a: int, b: int) -> int:
        return a + b


@of_modes(*OURS)
def test_tornado(make: Maker) -> None:
    executor = make()

    async def main() -> list[Any]:
        loop = IOLoop.current()
        calls = [loop.run_in_executor(executor, tasks.add, n, 1) for n in range(20)]
        return [await Service(executor).add(1, 2), *await asyncio.gather(*calls)]

    assert asyncio.run(main()) == [3, *range(1, 21)]
