"""How a pool uses its executor, with a backend that does nothing by itself."""

from __future__ import annotations

import gc
import os
import warnings
from typing import Any

import pytest

from achilles.executor import DistributedExecutor
from achilles.pool import BOX_SECONDS, Pool
from achilles.runtime.chunk import FOREVER, Chunk
from achilles.runtime.serialize import loads, split_inline
from tests import tasks
from tests.unit.silent import Backend


@pytest.fixture
def pool(backends: list[Backend]) -> Any:
    pool = Pool(2)
    yield pool
    pool.terminate()


def sent(backend: Backend) -> list[tuple[Any, tuple[Any, ...]]]:
    """Functions and arguments of what was submitted since the last look."""
    backend.batches.clear()
    backend.drain()
    calls = []
    for batch in backend.batches:
        for payload in batch.payloads:
            function, rest = (
                split_inline(payload) if not batch.group.fn else (loads(batch.blob), payload)
            )
            calls.append((function, loads(rest)[0]))
    return calls


def test_a_call_is_a_task(pool: Pool, backends: list[Backend]) -> None:
    pool.apply_async(tasks.add, [1], {"b": 2})
    assert sent(backends[0]) == [(tasks.add, (1,))]


@pytest.mark.parametrize(
    ("count", "chunksize", "sizes"),
    [
        (16, None, [2] * 8),
        (17, None, [3] * 5 + [2]),
        (3, None, []),
        (10, 4, [4, 4, 2]),
        (3, 100, [3]),
    ],
)
def test_a_map_is_cut(
    pool: Pool, backends: list[Backend], count: int, chunksize: int | None, sizes: list[int]
) -> None:
    pool.map_async(tasks.add, range(count), chunksize)
    calls = sent(backends[0])
    if not sizes:  # single calls travel as they are
        assert calls == [(tasks.add, (n,)) for n in range(count)]
        return
    assert [len(items) for _, (items,) in calls] == sizes
    assert [item for _, (items,) in calls for item in items] == list(range(count))
    for chunk, _ in calls:
        assert type(chunk) is Chunk
        assert chunk.func is tasks.add
        assert chunk.seconds == (BOX_SECONDS if chunksize is None else FOREVER)


def test_counted_tasks_are_not_cut_anew(backends: list[Backend]) -> None:
    pool = Pool(2, maxtasksperchild=3)
    assert backends[0].tasks_max == 3
    pool.map_async(tasks.add, range(16))
    assert {chunk.seconds for chunk, _ in sent(backends[0])} == {FOREVER}
    pool.terminate()


@pytest.mark.parametrize("chunksize", [0, -1])
def test_chunksize_that_cannot_be(pool: Pool, backends: list[Backend], chunksize: int) -> None:
    for call in (pool.map, pool.map_async, pool.starmap, pool.starmap_async):
        with pytest.raises(ValueError, match=r"Chunksize must be 1\+, not"):
            call(tasks.add, [(1,)], chunksize)
    with pytest.raises(TypeError):
        pool.imap(tasks.add, [1], "1")  # type: ignore[arg-type]
    assert sent(backends[0]) == []


def test_it_is_made_as_an_executor_is(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: list[Any] = []

    class Recorder(DistributedExecutor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            options.append((args, kwargs))
            super().__init__(1)

    monkeypatch.setattr("achilles.pool.DistributedExecutor", Recorder)
    Pool(
        3, tasks.set_state, [1, 2], 5, "context", address="tcp://here:1", config="file"
    ).terminate()
    Pool().terminate()
    assert options == [
        (
            (3, "context", tasks.set_state, (1, 2)),
            {"max_tasks_per_child": 5, "address": "tcp://here:1", "config": "file"},
        ),
        ((None, None, None, ()), {"max_tasks_per_child": None, "address": None, "config": None}),
    ]


def test_states(backends: list[Backend]) -> None:
    pool = Pool(2)
    assert repr(pool) == "<achilles.pool.Pool state=RUN pool_size=2>"
    pool.close()
    assert "state=CLOSE" in repr(pool)
    pool.terminate()
    pool.close()
    assert "state=TERMINATE" in repr(pool)
    pool.join()


def test_one_that_was_never_made_is_quiet(backends: list[Backend]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="at least 1"):
            Pool(0)
        gc.collect()


def test_in_a_forked_child_it_touches_nothing(
    pool: Pool, backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pool.map_async(tasks.add, range(3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        pool.terminate()
        pool.join()
        pool._state = "RUN"
        pool.close()
    assert not result.ready()
    assert len(sent(backends[0])) == 3
