"""What becomes of tasks that failed: they run again, or they are given up.

Rules
    1. Only what befell a task itself is put on its account: its runner's crash,
       its worker's loss, or a retry that it took.
    2. A task that ended its runner, or was on a worker that vanished, runs again, until it has done
       so too often: then it is the task. One that may run at most once is given up as soon as
       nobody knows whether it ran; a bundle, as soon as it would be charged, because one of its
       calls is to be, and its client knows them.
    3. What raised, or took too long, has its retries.
"""

from __future__ import annotations

from achilles.core import protocol as p
from achilles.core.dispatch import Dispatcher, Send
from achilles.core.tables import Blame, Task, TaskQueue

CRASHES_MAX = 3
LOSSES_MAX = 5
ORDERED_MAX = 64  # tasks at the front of a queue, to find the place of one that is put back


class Charges:
    """Puts failures on tasks' accounts. ``failed`` and ``reassigned`` count tasks."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.failed = 0
        self.reassigned = 0

    def retry(self, queue: TaskQueue, held: list[Task], statuses: bytes) -> set[Task]:
        """Requeue those that raised and may try again."""
        again = [
            task
            for task, status in zip(held, statuses, strict=True)
            if status == p.ERROR and task.queue is not None and may_retry(task, queue)
        ]
        self.requeue(queue, again)
        return set(again)

    def exceeded(self, task: Task, kind: str, text: str) -> list[Send]:
        """A task was ended because it took more time or memory than it may: it has its retries,
        and no more.
        """
        queue = task.queue
        if queue is None:
            return []
        if not may_retry(task, queue):
            return self.give_up(task, queue, kind, text)
        blame_of(task).story.append(text[: p.TEXT_MAX])
        self.requeue(queue, [task])
        return []

    def charge(self, task: Task, text: str, *, is_crash: bool) -> list[Send]:
        """Put a crash or a loss on a task's account, and requeue it or give it up."""
        queue = task.queue
        if queue is None:
            return []
        blame = blame_of(task)
        if is_crash:
            blame.crashes += 1
        else:
            blame.losses += 1
        kind = p.CRASHED if is_crash else p.LOST
        if queue.options.at_most_once:
            return self.give_up(task, queue, kind, f"{text}; it may run at most once")
        if queue.options.is_bundle:
            return self.give_up(task, queue, kind, text)
        if blame.crashes >= CRASHES_MAX or blame.losses >= LOSSES_MAX:
            return self.give_up(task, queue, kind, text)
        blame.story.append(text[: p.TEXT_MAX])
        self.requeue(queue, [task], is_reassigned=True)
        return []

    def pardon(self, task: Task, text: str) -> list[Send]:
        """It was its worker that ended the task's runner: the task runs again,
        and is charged with nothing.
        """
        queue = task.queue
        assert queue is not None
        if queue.options.at_most_once:
            return self.charge(task, text, is_crash=True)
        blame_of(task).earlier += 1
        self.requeue(queue, [task], is_reassigned=True)
        return []

    def give_up(self, task: Task, queue: TaskQueue, kind: str, text: str) -> list[Send]:
        """The task fails; ``text`` is the last line of its story."""
        story = [*blame_of(task).story, text[: p.TEXT_MAX]]
        if task.payload is not None:
            queue.client.bytes -= p.size_of(task.payload)
        del queue.client.tasks[task.id]
        if queue.options.is_bundle:
            self.reassigned += 1
        else:
            self.failed += 1
        return [
            queue.client.tell(p.Failed(task.id, kind, story)),
            *self._dispatcher.lend(queue.client),
        ]

    def requeue(self, queue: TaskQueue, tasks: list[Task], *, is_reassigned: bool = False) -> None:
        """Put leased tasks back to where they stood in their queue, among its first ones,
        without those that nobody waits for.

        They come between others that were put back: the youngest, always in front,
        would go out and come back again and again.

        ``is_reassigned``: a runner or worker failed them, which the status counts.
        """
        for task in tasks:
            task.lease = None
        wanted = [task for task in tasks if task.queue is not None]
        waiting = len(wanted)
        queued = queue.tasks
        if wanted:
            last = wanted[-1].id
            while queued and queued[0].id < last and len(wanted) < waiting + ORDERED_MAX:
                wanted.append(queued.popleft())
            wanted.sort(key=_id_of)
        queued.extendleft(reversed(wanted))
        self.reassigned += waiting * is_reassigned
        self._dispatcher.requeue(queue, waiting)

    def unqueue(self, task: Task) -> None:
        """A queued task is wanted no more; it stays where it is for a while, and is passed over."""
        queue = task.queue
        if queue is not None:
            queue.live -= 1
            queue.client.live -= 1
            task.queue = None
            queue.forget_unwanted()
            queue.client.enqueue(queue)  # it may have stood before an older one: see `TaskQueue`


def _id_of(task: Task) -> int:
    return task.id


def blame_of(task: Task) -> Blame:
    """The task's account."""
    if task.blame is None:
        task.blame = Blame(task.queue.options if task.queue is not None else p.PLAIN)
    return task.blame


def may_retry(task: Task, queue: TaskQueue) -> bool:
    """Whether a task that failed has a retry left, which is then taken."""
    blame = blame_of(task)
    if blame.retries >= queue.options.retries:
        return False
    blame.retries += 1
    return True
