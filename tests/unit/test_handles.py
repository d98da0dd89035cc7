"""Executors as they are pickled."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from achilles import executor as module
from achilles.executor import DistributedExecutor
from achilles.handles import Handle
from achilles.runtime import context
from tests import tasks
from tests.unit.silent import Backend


def handle_of(executor: DistributedExecutor) -> Handle:
    handle: Any = pickle.loads(pickle.dumps(executor))
    return handle._handle  # type: ignore[no-any-return]


def test_a_pickled_executor_is_tiny_and_not_connected(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    data = pickle.dumps(executor)
    assert len(data) < 300
    handle = pickle.loads(data)
    assert isinstance(handle, DistributedExecutor)
    assert repr(handle) == "<DistributedExecutor embedded | not connected yet>"
    assert len(backends) == 1
    assert backends[0].starts == 0


@pytest.mark.bad_input(35)
def test_an_embedded_one_is_of_no_use_elsewhere_and_says_so(backends: list[Backend]) -> None:
    handle = pickle.loads(pickle.dumps(DistributedExecutor(2)))
    uses: list[Any] = [
        lambda: handle.submit(tasks.add, 1),
        lambda: handle.map(tasks.add, [1]),
        lambda: handle.with_options(retries=1),
        lambda: handle.size,
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="children of another process"):
            use()


def test_one_with_an_address_connects_when_it_is_used(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first one did; and once, whoever of its views is used."""
    given: list[dict[str, Any]] = []

    def connection(address: str, **options: Any) -> Backend:
        given.append({"address": address, **options})
        return Backend(1)

    monkeypatch.setattr("achilles.net.client.connection", connection)
    executor = DistributedExecutor(3, initializer=tasks.set_state, address="tcp://host:1")
    handle = pickle.loads(pickle.dumps(executor))
    assert repr(handle) == "<DistributedExecutor tcp://host:1 | not connected yet>"
    assert len(given) == 1
    view = handle.with_options(retries=2)
    assert given[0] == given[1]
    view.submit(tasks.add, 1)
    handle.submit(tasks.add, 1)
    assert len(given) == 2
    assert view._mailbox.init_blob == executor._mailbox.init_blob != b""
    assert view._mailbox.unresolved == 2


def test_what_results_may_hold_and_whether_output_is_printed_travel(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A list that stands in the file that was named must hold for whoever gets the executor;
    one that is in force there, too.
    """
    given: list[tuple[bool, Any]] = []

    def connection(address: str, *, prints: bool, results: Any, **options: Any) -> Backend:
        given.append((prints, results))
        return Backend(1)

    monkeypatch.setattr("achilles.net.client.connection", connection)
    config = tmp_path / "other.toml"
    config.write_text('[client]\noutput = "drop"\nresults = ["shapes"]\n')
    named = pickle.dumps(DistributedExecutor(address="tcp://host:1", config=config))
    plain = pickle.dumps(DistributedExecutor(address="tcp://host:1"))
    config.unlink()
    pickle.loads(pickle.dumps(pickle.loads(named))).submit(tasks.add, 1)
    pickle.loads(plain).submit(tasks.add, 1)
    assert given == [(False, ("shapes",)), (True, None)] * 2
    monkeypatch.setenv("ACHILLES_CLIENT_RESULTS", "numpy")
    monkeypatch.setenv("ACHILLES_CLIENT_OUTPUT", "drop")
    pickle.loads(named).submit(tasks.add, 1)
    pickle.loads(plain).submit(tasks.add, 1)
    assert given[4:] == [(False, ("shapes",)), (False, ("numpy",))]


def test_a_handle_of_a_handle_is_the_same(backends: list[Backend]) -> None:
    executor = DistributedExecutor(2)
    once = handle_of(executor)
    assert handle_of(pickle.loads(pickle.dumps(executor))) == once
    assert (once.max_workers, once.address, once.init_blob) == (2, "", b"")


def test_options_travel(backends: list[Backend]) -> None:
    view = DistributedExecutor(2).with_options(timeout=3.0, priority=4)
    again = pickle.loads(pickle.dumps(view))
    assert again._options == view._options
    assert pickle.loads(pickle.dumps(again))._options == view._options
    assert handle_of(view.with_options(timeout=0, priority=0)).options == ()


def test_a_handle_that_is_shut_down_unused_connects_no_more(backends: list[Backend]) -> None:
    handle = pickle.loads(pickle.dumps(DistributedExecutor(2)))
    with handle:
        pass
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        handle.submit(tasks.add, 1)


def test_a_copy_is_the_executor_itself(backends: list[Backend]) -> None:
    """What copies its parameters, as scikit-learn's clone does, goes on to use the same runners."""
    executor = DistributedExecutor(2)
    assert copy.copy(executor) is executor
    assert copy.deepcopy({"a": [executor]})["a"][0] is executor


def test_only_what_a_connection_brings_is_looked_up_late(backends: list[Backend]) -> None:
    handle = pickle.loads(pickle.dumps(DistributedExecutor(2)))
    for name in ("_processes", "_mp_context", "anything"):
        assert not hasattr(handle, name)
        assert not hasattr(DistributedExecutor(2), name)
    assert os.getpid() == handle._pid
    assert module.DistributedExecutor is type(handle)


@pytest.mark.parametrize(
    ("cluster", "address", "own", "is_embedded", "wanted"),
    [
        ("a", "", "a", True, True),
        ("a", "", "b", True, False),
        ("a", "tcp://h:1", "a", False, True),
        ("a", "tcp://h:1", "b", False, False),
        ("a", "tcp://h:1", "b", True, False),
        ("", "", "b", True, True),  # of one that does not tell
        ("", "tcp://h:1", "", False, True),
        ("", "tcp://h:1", "", True, False),
    ],
)
def test_it_is_at_home_with_runners_of_its_own_cluster(
    backends: list[Backend],
    monkeypatch: pytest.MonkeyPatch,
    cluster: str,
    address: str,
    own: str,
    is_embedded: bool,
    wanted: bool,
) -> None:
    handle = handle_of(DistributedExecutor(2))._replace(cluster=cluster, address=address)
    assert not handle.is_here, "this is no runner"
    monkeypatch.setattr(context, "side", object())
    monkeypatch.setattr(context, "cluster", own)
    monkeypatch.setattr(context, "is_embedded", is_embedded)
    assert handle.is_here is wanted
