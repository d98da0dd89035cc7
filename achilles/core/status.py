"""A broker's status as plain values, and what it calls its workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from achilles.core.protocol import Status


def labels(workers: Sequence[tuple[str, int]]) -> list[str]:
    """What to call workers of these names and process ids, in their order: by name,
    and where several have one by both.
    """
    taken = Counter(name for name, _ in workers)
    found: dict[str, None] = {}
    for name, pid in workers:
        label = name if taken[name] == 1 else f"{name} ({pid})"
        while label in found:  # of another host
            label += "'"
        found[label] = None
    return list(found)


def status_dict(status: Status) -> dict[str, Any]:
    """A status as plain values, for printing and for JSON."""
    values: dict[str, Any] = msgspec.structs.asdict(status)
    workers = [msgspec.structs.asdict(worker) for worker in status.workers]
    values["clients"] = [msgspec.structs.asdict(client) for client in status.clients]
    values["waiting"] = [msgspec.structs.asdict(waiting) for waiting in status.waiting]
    del values["is_brief"]
    values["workers"] = len(workers)
    values["slots"] = sum(worker["slots"] for worker in workers)
    names = labels([(worker["name"], worker["pid"]) for worker in workers])
    values["workers_by_name"] = dict(zip(names, workers, strict=True))
    return values
