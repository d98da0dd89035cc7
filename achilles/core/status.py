"""A broker's status as plain values."""

from __future__ import annotations

from typing import Any

import msgspec

from achilles.core.protocol import Status


def status_dict(status: Status) -> dict[str, Any]:
    """A status as plain values, for printing and for JSON."""
    values: dict[str, Any] = msgspec.structs.asdict(status)
    workers = [msgspec.structs.asdict(worker) for worker in status.workers]
    values["clients"] = [msgspec.structs.asdict(client) for client in status.clients]
    values["waiting"] = [msgspec.structs.asdict(waiting) for waiting in status.waiting]
    del values["is_brief"]
    values["workers"] = len(workers)
    values["slots"] = sum(worker["slots"] for worker in workers)
    by_name = values["workers_by_name"] = {}
    for worker in workers:
        name = worker["name"]
        by_name[f"{name} ({worker['pid']})" if name in by_name else name] = worker
    return values
