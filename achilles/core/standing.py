"""Which workers may get work: not those that are silent, and not those at which everything fails.

Rules
    1. A worker whose runners crash in task after task, with nothing done in between, while others
       get on, is a *black hole*: it gets no work for `QUARANTINE_SECONDS`, twice as long each time,
       and those crashes are not the tasks'.
    2. Until that is certain it rests for a moment after such a crash, so that the task goes
       elsewhere; after the second crash of one task until it has gone there,
       for up to `ELSEWHERE_SECONDS`.
    3. A worker at which an initializer fails that another worker has run is put into quarantine at
       once.
    4. Nobody rests if no other worker is ready that can run the same tasks:
       then work goes on, however badly.

Theory
    What fails at once is idle at once, so a broken host draws all work to it. One bad task looks
    like that, too, but only to itself: it takes several tasks, and a worker that does well,
    to know that it is the host.
"""

from __future__ import annotations

from achilles.core.dispatch import Dispatcher
from achilles.core.tables import (
    QUARANTINED,
    READY,
    SUSPECT,
    Client,
    PeerId,
    Task,
    Worker,
)

FAULTS_MAX = 5  # crashes in a row
FAULTY_TASKS_MIN = 3  # so many tasks among them
REST_SECONDS = 0.25  # doubled with each crash
ELSEWHERE_SECONDS = 5.0
QUARANTINE_SECONDS = 60.0  # doubled with each time
DOUBLINGS_MAX = 6


class Standing:
    """Sets the state of a scheduler's workers."""

    def __init__(self, workers: dict[PeerId, Worker], dispatcher: Dispatcher) -> None:
        self._workers = workers
        self._dispatcher = dispatcher
        self.resting: dict[PeerId, Worker] = {}

    # --- Silence ----------------------------------------------------------------------------------

    def suspect(self, worker: Worker) -> None:
        """It has been silent for long."""
        worker.is_silent = True
        if worker.state == READY:
            self._set(worker, SUSPECT)

    def resume(self, worker: Worker) -> None:
        """It was heard again."""
        worker.is_silent = False
        if worker.state == SUSPECT:
            self._set(worker, READY)

    # --- Faults -----------------------------------------------------------------------------------

    def succeeded(self, worker: Worker, client: Client, init: int, now: float) -> None:
        """Tasks were done there, whatever they gave."""
        worker.succeeded_at = now
        if worker.faults:
            worker.faults.clear()
        worker.quarantines = 0
        if init:
            client.root.initialized.setdefault(init, set()).add(worker.number)

    def crashed(self, worker: Worker, task: Task, now: float) -> bool:
        """A task's runner died there; whether that is the worker's fault, and not the task's."""
        faults = worker.faults
        if not faults:
            worker.faulty_since = now
        faults.append(task)
        if not self._has_deputy(worker):
            return False
        others = (one for one in self._workers.values() if one is not worker)
        is_proven = len(faults) >= FAULTS_MAX and len(set(faults)) >= FAULTY_TASKS_MIN
        if is_proven and any(one.succeeded_at >= worker.faulty_since for one in others):
            faults.pop()  # which is not charged yet
            self._quarantine(worker, now)
            return True
        times = len(faults) - (1 if worker.done else 0)
        if times > 0:
            worker.avoids = task if faults.count(task) > 1 else None
            self._rest(worker, now + REST_SECONDS * 2 ** min(times - 1, DOUBLINGS_MAX))
        return False

    def init_failed(self, worker: Worker, client: Client, init: int, now: float) -> bool:
        """An initializer raised there; whether that is the worker's fault,
        and not the initializer's.
        """
        where = client.root.initialized.get(init)
        if not where or where == {worker.number} or not self._has_deputy(worker):
            return False
        self._quarantine(worker, now)
        return True

    def _has_deputy(self, worker: Worker) -> bool:
        """Whether another worker is ready that can run whatever this one can."""
        return any(
            one is not worker and one.state == READY and one.tags >= worker.tags
            for one in self._workers.values()
        )

    def _quarantine(self, worker: Worker, now: float) -> None:
        doublings = min(worker.quarantines, DOUBLINGS_MAX)
        worker.quarantines += 1
        for task in worker.faults:
            pardon(task)
        worker.faults.clear()
        worker.avoids = None
        self._rest(worker, now + QUARANTINE_SECONDS * 2**doublings)

    def _rest(self, worker: Worker, until: float) -> None:
        if worker.state == READY:
            worker.rests_until = until
            self.resting[worker.peer] = worker
            self._set(worker, QUARANTINED)

    # --- Time -------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let those get work again that have rested for long enough, or that are needed."""
        for peer, worker in list(self.resting.items()):
            is_over = worker.is_gone or worker.state != QUARANTINED
            if is_over or now >= _until(worker) or not self._has_deputy(worker):
                del self.resting[peer]
                if not is_over:
                    self._set(worker, SUSPECT if worker.is_silent else READY)

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called at the latest."""
        if not self.resting:
            return None
        return min(
            one.rests_until + (ELSEWHERE_SECONDS if one.avoids is not None else 0.0)
            for one in self.resting.values()
        )

    def _set(self, worker: Worker, state: str) -> None:
        worker.state = state
        self._dispatcher.place(worker)

    def check_invariants(self) -> None:
        """Assert the rules of this module; tests call it after every step."""
        for worker in self._workers.values():
            is_resting = worker.state == QUARANTINED
            assert not is_resting or worker.peer in self.resting, "a worker rests for ever"


def _until(worker: Worker) -> float:
    """When the worker has rested for long enough."""
    task = worker.avoids
    if task is None or task.lease is not None or task.queue is None:
        return worker.rests_until
    is_open = task.queue.client.tasks.get(task.id) is task
    return worker.rests_until + ELSEWHERE_SECONDS * is_open


def pardon(task: Task) -> None:
    """Take a crash off a task's account; it was begun all the same."""
    blame = task.blame
    if blame is not None and blame.crashes:
        blame.crashes -= 1
        blame.earlier += 1
