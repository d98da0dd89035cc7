"""A status as plain values."""

from __future__ import annotations

import json

from achilles.core import protocol as p
from achilles.core.status import labels, status_dict

STATUS = p.Status(
    workers=[
        p.WorkerStatus("w", "ready", 4, 2, 7, 0.5, 42),
        p.WorkerStatus("v", "suspect", 2, 0, 0, 9.0, 43),
    ],
    clients=[p.ClientStatus("c", 1, 2, 3)],
    queued=1,
    running=2,
    done=3,
    failed=4,
    reassigned=5,
    late=6,
    uptime=7.0,
    waiting=[p.Waiting("c", 7, 1, "no worker offers the tag gpu", True, ["gpu"])],
)


def test_workers_are_counted_and_listed_by_name() -> None:
    """Programs ask for numbers, people for names."""
    values = status_dict(STATUS)
    assert values["workers"] == 2
    assert values["slots"] == 6
    assert values["workers_by_name"]["v"]["state"] == "suspect"
    assert values["clients"] == [{"name": "c", "queued": 1, "running": 2, "done": 3}]


def test_where_several_have_a_name_each_has_one_of_its_own() -> None:
    """What `achilles drain` takes, so nobody may be called what another one is called."""
    workers = [("twin", 7), ("alone", 7), ("twin", 8), ("twin", 8)]
    assert labels(workers) == ["twin (7)", "alone", "twin (8)", "twin (8)'"]
    assert labels([]) == []


def test_it_is_json() -> None:
    """``achilles status -o json`` prints it as it is."""
    values = json.loads(json.dumps(status_dict(STATUS)))
    assert values["reassigned"] == 5
    assert values["waiting"][0]["tags"] == ["gpu"]
