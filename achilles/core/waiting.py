"""Why tasks wait: what a broker says of each, and when a client tells its user.

Rules
    1. That every slot is taken is no news: slots become free. News is what no other task's end will
       change: nobody connected may run the task, or the broker is silent.
    2. A client asks about its own tasks while it has some, now and then;
       an administrator about any.
    3. A condition is told of when it has lasted for `WARN_SECONDS`,
       and again every `REPEAT_SECONDS`.

That tasks wait for tasks of their own blocks nobody: they lend their slots (see `nesting`).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import TypeVar

from achilles.core.protocol import StatusRequest, Waiting
from achilles.core.tables import (
    DRAINING,
    QUARANTINED,
    READY,
    RETURNING,
    Client,
    Lease,
    Tags,
    Task,
    TaskQueue,
    Worker,
)

WARN_SECONDS = 10.0
REPEAT_SECONDS = 300.0
FIRST_QUESTION_SECONDS = 1.0  # most work is done by then, and never costs a question
QUESTION_SECONDS = 5.0

K = TypeVar("K", bound=Hashable)


# --- The broker's side ----------------------------------------------------------------------------


def answer(
    request: StatusRequest,
    asker: Client,
    clients: Collection[Client],
    workers: Collection[Worker],
    now: float,
) -> list[Waiting]:
    """What the request wants to know: about one task, which is for administrators,
    or about all that nobody may run.
    """
    if asker.role != "admin":
        return stuck([client for client in clients if client.root is asker], workers)
    if not request.task:
        return stuck(clients, workers)
    return [
        Waiting(
            client.root.name,
            request.task,
            1,
            _why(task, client, workers, now),
            *_remedy(task, client),
        )
        for client in clients
        if (task := client.tasks.get(request.task)) is not None
        and request.client in ("", client.root.name)
    ]


def stuck(clients: Iterable[Client], workers: Collection[Worker]) -> list[Waiting]:
    """The queued tasks that nobody who is connected may run, by client and reason."""
    obstacles: dict[Tags, str] = {}
    found: dict[tuple[int, Tags], Waiting] = {}
    for client in clients:
        for queue in client.queues.values() if client.live else ():
            tags = queue.options.tags
            if tags not in obstacles:
                obstacles[tags] = obstacle(tags, workers)
            if not queue.live or not obstacles[tags]:
                continue
            head = queue.head()
            id = head.id if head is not None and client is client.root else 0
            key = (client.root.number, tags)
            entry = found.get(key)
            if entry is None:
                reason = obstacles[tags]
                found[key] = Waiting(client.root.name, id, queue.live, reason, True, list(tags))
            else:
                entry.count += queue.live
                entry.id = min(entry.id or id, id or entry.id)
    return list(found.values())


def obstacle(tags: Tags, workers: Collection[Worker]) -> str:
    """Why nobody who is connected may run tasks that want these tags; empty if somebody may."""
    if not workers:
        return "no worker is connected"
    if any(worker.state == READY and worker.tags.issuperset(tags) for worker in workers):
        return ""
    able = [worker for worker in workers if worker.tags.issuperset(tags)]
    if not able:
        offered = sorted(set().union(*(worker.tags for worker in workers)))
        return f"no worker offers {_list(tags)} (what is offered: {_list(offered)})"
    states = ", ".join(f"{worker.name} {_state(worker)}" for worker in able[:3])
    return f"no worker that may run it takes new work ({states})"


def _why(task: Task, client: Client, workers: Collection[Worker], now: float) -> str:
    """In words, where the task is and what it waits for."""
    nested = " (it was submitted by a task)" if client is not client.root else ""
    if task.lease is None:
        text = _why_queued(task, client, workers)
    else:
        text = _why_leased(task, task.lease, now)
    story = "" if task.blame is None or not task.blame.story else "; ".join(task.blame.story)
    return f"{text}{nested}{f'; it was tried before: {story}' if story else ''}"


def _why_queued(task: Task, client: Client, workers: Collection[Worker]) -> str:
    queue = task.queue
    assert queue is not None, "a task that nobody waits for is no client's any more"
    if client.root.is_held_back:
        return "it is held back for a moment: a worker may come back that holds it, of an earlier broker's"
    if reason := obstacle(queue.options.tags, workers):
        return f"it waits: {reason}"
    root = client.root
    if root.has_all_its_slots:
        return (
            f"it waits: its executor has all the {root.slots_max} slots at once that it wants (max_workers); "
            f"{_ahead(task, queue, client)} of its tasks come first"
        )
    able = [
        worker
        for worker in workers
        if worker.state == READY and worker.tags.issuperset(queue.options.tags)
    ]
    slots = sum(worker.slots for worker in able)
    lent = sum(worker.lent for worker in able)
    return (
        f"it waits for a slot: {sum(worker.taken for worker in able)} of the {slots} where it may run are taken, "
        f"and {_ahead(task, queue, client)} of its client's tasks come first"
        + (f"; {lent} others wait for tasks of their own, and take up no slot" if lent else "")
    )


def _ahead(task: Task, queue: TaskQueue, client: Client) -> int:
    """How many of the client's queued tasks have their turn before this one."""
    own = (-queue.options.priority, task.id)
    return sum(
        (-other.options.priority, one.id) < own
        for other in client.queues.values()
        for one in other.tasks
        if one.queue is not None
    )


def _why_leased(task: Task, lease: Lease, now: float) -> str:
    worker = lease.worker
    first = next((one for one in lease.tasks if one is not None), task)
    since = max(0.0, now - lease.since)
    if first is not task:
        text = f"it waits on worker {worker.name}, in a chunk behind task {first.id}"
    elif lease.is_lent:
        text = f"it waits on worker {worker.name} for tasks of its own, and takes up no slot"
    elif lease.in_slot:
        text = f"it runs on worker {worker.name}, which has had it for {since:.1f} s"
    else:
        text = f"it waits on worker {worker.name}, behind what runs there"
    silent_for = max(0.0, now - worker.heard_at)
    return text if worker.state == READY else f"{text}; that worker {_state(worker, silent_for)}"


def _state(worker: Worker, silent_for: float | None = None) -> str:
    if worker.state == DRAINING:
        return "is draining"
    if worker.state == RETURNING:
        return "tells what it holds of an earlier broker's"
    if worker.state == QUARANTINED:
        return "is in quarantine, because runners kept crashing or initializers failing there"
    return "is silent" if silent_for is None else f"has been silent for {silent_for:.1f} s"


def _remedy(task: Task, client: Client) -> tuple[bool, list[str]]:
    """Whether another worker would help, and with which tags."""
    queue, root = task.queue, client.root
    if queue is None:
        return False, []
    is_queued = task.lease is None and not root.is_held_back
    return is_queued and not root.has_all_its_slots, list(queue.options.tags)


def _list(tags: Iterable[str]) -> str:
    names = ", ".join(tags)
    return f"the tags {names}" if "," in names else f"the tag {names}" if names else "no tags"


# --- The client's side ----------------------------------------------------------------------------


def advice(waiting: Waiting, address: str) -> str:
    """What to do about it; empty if nothing helps but time."""
    if not waiting.wants_worker:
        return ""
    tags = "".join(f" --tag {tag}" for tag in waiting.tags)
    return f"start one with: achilles worker {address}{tags}"


class Curiosity:
    """When a client asks: soon after its tasks have begun to wait,
    then now and then until all have their outcome.
    """

    def __init__(self) -> None:
        self._ask_at: float | None = None

    def is_due(self, now: float, *, is_waiting: bool) -> bool:
        """Whether to ask now."""
        if not is_waiting:
            self._ask_at = None
        elif self._ask_at is None:
            self._ask_at = now + FIRST_QUESTION_SECONDS
        elif now >= self._ask_at:
            self._ask_at = now + QUESTION_SECONDS
            return True
        return False


class Conditions:
    """Which of the conditions that hold are worth a word now."""

    def __init__(self, after: float = WARN_SECONDS) -> None:
        """``after``: seconds that one must have lasted."""
        self._after = after
        self._due: dict[Hashable, float] = {}

    def observe(self, holds: Mapping[K, float], now: float) -> list[K]:
        """Those that are due; ``holds`` has all that hold, with since when,
        as it is known now. What ends is forgotten.
        """
        self._due = {key: at for key, at in self._due.items() if key in holds}
        due = []
        for key, since in holds.items():
            if now >= self._due.setdefault(key, since + self._after):
                self._due[key] = now + REPEAT_SECONDS
                due.append(key)
        return due
