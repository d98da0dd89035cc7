"""Which items of a map travel together, and what becomes of them when their bundle ends in one way
or another.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from achilles import bundles, maps
from achilles.bundles import KNOWN_MIN, SHORT_SECONDS, TRIALS, are_containers
from achilles.core import protocol as p
from achilles.errors import AchillesError
from achilles.executor import DistributedExecutor
from achilles.maps import LOOKS, PATIENCE, PAUSE
from achilles.runtime.bundle import TASK_ID
from achilles.runtime.serialize import dumps, loads
from tests import tasks
from tests.unit.silent import Backend

SHORT = SHORT_SECONDS / 10


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very first items are enough to know that calls are short."""
    monkeypatch.setattr(bundles, "KNOWN_MIN", 0)
    monkeypatch.setattr(bundles, "FIRST_SIZE", 8)


def sent(backend: Backend) -> tuple[list[int], dict[int, list[Any]]]:
    """The ids of single items that were submitted since, and by id of each bundle its items."""
    start = len(backend.batches)
    backend.drain()
    singles: list[int] = []
    found: dict[int, list[Any]] = {}
    for batch in backend.batches[start:]:
        is_bundle = batch.group.options is not None and batch.group.options.is_bundle
        for id, payload in zip(batch.ids, batch.payloads, strict=True):
            if not is_bundle:
                singles.append(id)
                continue
            (flat, width, number), _ = loads(payload)
            assert number == id
            found[id] = [flat[at : at + width] for at in range(0, len(flat), width)]
    return singles, found


def tell(
    backend: Backend, id: int, value: object, *, status: int = p.VALUE, seconds: float = 0.0
) -> None:
    backend.mailbox.receive(p.Results([id], bytes([status]), [dumps(value)], seconds))


def bundled(backends: list[Backend], count: int = LOOKS + 8) -> tuple[Any, Backend, int]:
    """A map whose first items are done, and whose last eight are one bundle: its results,
    the backend and the bundle's id.
    """
    results = DistributedExecutor(2).map(tasks.add, range(count))
    backend = backends[-1]
    singles, found = sent(backend)
    assert len(singles) == LOOKS
    ((id, items),) = found.items()
    assert items == [[n] for n in range(LOOKS, count)]
    for n, single in enumerate(singles):
        tell(backend, single, n + 1)
    assert list(itertools.islice(results, LOOKS)) == list(range(1, LOOKS + 1))
    return results, backend, id


def test_a_bundle_comes_out_as_its_items(backends: list[Backend]) -> None:
    results, backend, id = bundled(backends)
    tell(backend, id, (list("abcdefgh"), {}))
    assert list(results) == list("abcdefgh")
    assert backend.mailbox.is_empty


def test_errors_and_other_outcomes_come_in_their_turn(backends: list[Backend]) -> None:
    results, backend, id = bundled(backends)
    others = {1: (p.VALUE, dumps([5])), 3: (p.ERROR, dumps((ValueError("bad"), "its traceback")))}
    tell(backend, id, (["a", None, "c", None, "e", "f", "g", "h"], others))
    assert [next(results) for _ in range(3)] == ["a", [5], "c"]
    with pytest.raises(ValueError, match="bad"):
        next(results)
    assert list(results) == []


def test_what_a_bundle_did_not_begin_goes_out_again(backends: list[Backend]) -> None:
    results, backend, id = bundled(backends)
    tell(backend, id, (["a", "b"], {}))
    singles, found = sent(backend)
    assert (len(singles), found) == (6, {})
    assert [next(results), next(results)] == ["a", "b"]
    for single in reversed(singles):
        tell(backend, single, single)
    assert list(results) == singles


@pytest.mark.parametrize("how", ["crashed", "error", "too large", "nonsense"])
def test_a_bundle_without_a_result_is_done_again_item_by_item(
    backends: list[Backend], how: str
) -> None:
    results, backend, id = bundled(backends)
    if how == "crashed":
        backend.mailbox.receive(p.Failed(id, p.CRASHED, ["its runner was killed"]))
    elif how == "nonsense":
        tell(backend, id, "nonsense")
    else:
        tell(backend, id, (ValueError(), ""), status=p.ERROR if how == "error" else p.TOO_LARGE)
    singles, found = sent(backend)
    assert (len(singles), found) == (8, {})
    options = backend.batches[-1].group.options
    assert options == (p.Options(crashes=1) if how == "crashed" else None)
    for single in singles:
        tell(backend, single, single)
    assert list(results) == singles


def letter(id: int, values: list[Any], others: dict[int, Any], end: int) -> p.Letter:
    body = TASK_ID.pack(id) + dumps((values, others, end))
    return p.Letter(1, 1, 1, p.PARTS, body)


def test_news_of_a_long_call_bring_what_is_done_and_free_what_waits(
    backends: list[Backend],
) -> None:
    results, backend, id = bundled(backends)
    backend.mailbox.receive(letter(id, ["a", None], {1: (p.VALUE, dumps([7]))}, 3))
    singles, _ = sent(backend)
    assert len(singles) == 5
    assert [next(results), next(results)] == ["a", [7]]
    backend.mailbox.receive(
        letter(id, ["a", None], {1: (p.VALUE, dumps([7]))}, 3)
    )  # it says nothing new
    tell(backend, id, (["a", None, "long"], {1: (p.VALUE, dumps([7]))}))
    assert next(results) == "long"
    for single in singles:
        tell(backend, single, single)
    assert list(results) == singles
    assert sent(backend) == ([], {})


def test_a_crash_after_the_news_repeats_only_what_is_open(backends: list[Backend]) -> None:
    results, backend, id = bundled(backends)
    backend.mailbox.receive(letter(id, ["a"], {}, 2))
    waiting, _ = sent(backend)
    backend.mailbox.receive(p.Failed(id, p.CRASHED, ["its runner was killed"]))
    again, _ = sent(backend)
    assert (len(waiting), len(again)) == (6, 1)
    for single in waiting + again:
        tell(backend, single, single)
    assert list(results) == ["a", *again, *waiting]


def test_a_rerun_that_comes_less_far_than_the_news_were_counts_no_calls(
    backends: list[Backend],
) -> None:
    results, backend, id = bundled(backends)
    sink = backend.mailbox._sinks[id]
    assert isinstance(sink, bundles.BundleSink)
    assert sink.take(["a", "b", "c"], {}, 8) == 3
    assert sink.take(["a"], {}, 1) == 0
    assert len(sent(backend)[0]) == 5
    assert list(itertools.islice(results, 3)) == ["a", "b", "c"]


def test_late_and_foreign_news_are_nothing(backends: list[Backend]) -> None:
    results, backend, id = bundled(backends)
    receive = backend.mailbox.receive
    receive(letter(id + 1000, ["x"], {}, 1))
    receive(p.Letter(1, 1, 1, p.PARTS, b"short"))
    receive(p.Letter(1, 1, 1, p.PARTS, TASK_ID.pack(id) + b"no pickle"))
    tell(backend, id, (list("abcdefgh"), {}))
    receive(letter(id, ["x"], {}, 1))
    assert list(results) == list("abcdefgh")
    assert sent(backend) == ([], {})


def test_a_cancelled_map_cancels_its_bundles(backends: list[Backend]) -> None:
    results, backend, id = bundled(backends)
    results.close()
    assert backend.drain() == ([], [id])
    tell(backend, id, (["a"], {}))
    assert sent(backend) == ([], {})


def test_all_items_fail_with_the_executor(backends: list[Backend]) -> None:
    results, backend, _ = bundled(backends)
    backend.kill(lambda: AchillesError("the end"))
    with pytest.raises(AchillesError, match="the end"):
        next(results)
    assert backend.mailbox.unresolved == 0


def test_a_bundle_that_runs_is_not_cancelled_by_a_shutdown(backends: list[Backend]) -> None:
    results, backend, id = bundled(backends)
    backend.mailbox.receive(p.Running([id]))
    backend.cancel_pending()
    tell(backend, id, (list("abcdefgh"), {}))
    assert list(results) == list("abcdefgh")


def test_results_as_they_come(backends: list[Backend]) -> None:
    results: Any = DistributedExecutor(2).map_unordered(tasks.add, range(LOOKS + 4))
    singles, found = sent(backends[0])
    (id,) = found
    tell(backends[0], id, (list("abcd"), {}))
    tell(backends[0], singles[3], "single")
    assert [next(results) for _ in range(5)] == ["a", "b", "c", "d", "single"]
    results.close()


@pytest.mark.parametrize(
    "timed", [(KNOWN_MIN, SHORT_SECONDS / 2), (LOOKS, SHORT_SECONDS * 2), None]
)
def test_only_calls_that_are_known_to_be_short_are_bundled(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch, timed: tuple[int, float] | None
) -> None:
    monkeypatch.setattr(bundles, "KNOWN_MIN", KNOWN_MIN)
    executor = DistributedExecutor(2)

    def items() -> Any:
        """All that the map sees of its input; results come when the first look is due."""
        for n in range(3 * LOOKS):
            if n == LOOKS - 1 and timed is not None:
                singles, _ = sent(backends[0])
                count = timed[0]
                some = singles[:count]
                payloads: list[p.Payload] = [dumps(0)] * len(some)
                took = len(some) * timed[1]
                backends[0].mailbox.receive(p.Results(some, bytes(len(some)), payloads, took))
            yield (n,)

    from achilles.maps import MapCall

    call = MapCall(executor, tasks.add, items(), is_bundled=True)
    _, found = sent(backends[0])
    assert bool(found) == (timed is not None and timed[1] < SHORT_SECONDS)
    call.cancel()


def test_what_one_map_has_found_the_next_one_knows(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several at once each would wait for the others' items before its own are timed."""
    monkeypatch.setattr(bundles, "KNOWN_MIN", KNOWN_MIN)
    executor = DistributedExecutor(2)
    first = executor.map(tasks.add, range(KNOWN_MIN))
    singles, _ = sent(backends[0])
    payloads: list[p.Payload] = [dumps(0)] * KNOWN_MIN
    backends[0].mailbox.receive(p.Results(singles, bytes(KNOWN_MIN), payloads, SHORT))
    others = [executor.map(fn, range(2 * LOOKS)) for fn in (tasks.add, tasks.echo)]
    singles, found = sent(backends[0])
    assert len(singles) == LOOKS + 2 * LOOKS  # of the other function nothing is known
    assert found
    del first, others


@pytest.mark.parametrize(
    "options", [{"retries": 1}, {"timeout": 5.0}, {"at_most_once": True}, {"priority": 3}]
)
def test_options_for_each_attempt_keep_items_apart(
    backends: list[Backend], options: dict[str, Any]
) -> None:
    executor = DistributedExecutor(2).with_options(**options)
    results = executor.map(tasks.add, range(2 * LOOKS))
    backends[0].drain()
    names = {(batch.group.fn, batch.group.options) for batch in backends[0].batches}
    assert len(names) == (2 if "priority" in options else 1)
    del results


@pytest.mark.parametrize("item", [("a", 1), (b"a", (2.5, None)), ()])
def test_tuples_of_what_is_plain_are_bundled(backends: list[Backend], item: object) -> None:
    inputs = [item if n % 3 else n for n in range(LOOKS + 8)]
    results = DistributedExecutor(2).map(tasks.echo, inputs)
    singles, found = sent(backends[0])
    assert len(singles) == LOOKS
    assert list(found.values()) == [[[one] for one in inputs[LOOKS:]]]
    del results


LARGE = "x" * bundles.BYTES_MAX


@pytest.mark.parametrize(
    "item",
    [
        *([1], ([1],), (1, (2, (3,))), (object,), p.Group(1, 0, 0, None, ())),
        *(LARGE, (LARGE,), tuple(range(bundles.ELEMENTS_MAX + 1))),
    ],
    ids=lambda item: repr(item)[:30],
)
def test_what_is_not_plain_travels_alone(backends: list[Backend], item: object) -> None:
    inputs = [item if n > LOOKS else n for n in range(LOOKS + 20)]
    results = DistributedExecutor(2).map(tasks.echo, inputs)
    singles, found = sent(backends[0])
    assert (len(singles), found) == (LOOKS + 20, {})
    del results


def test_a_stateful_callable_is_not_bundled(backends: list[Backend]) -> None:
    results = DistributedExecutor(2).map(tasks.Holder(1), range(2 * LOOKS))
    assert sent(backends[0])[1] == {}
    del results


def test_an_explicit_chunk_size_is_an_upper_bound(backends: list[Backend]) -> None:
    results = DistributedExecutor(2).map(tasks.add, range(LOOKS + 100), chunksize=3)
    _, found = sent(backends[0])
    assert {len(items) for items in found.values()} == {3, 1}
    del results


def test_bundles_grow_with_what_fits(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "BYTES_MAX", 300)
    results = DistributedExecutor(2).map(tasks.add, range(LOOKS + 1000))
    sizes = [len(items) for items in sent(backends[0])[1].values()]
    assert sizes[:3] == [8, 16, 32]
    assert max(sizes) <= 128
    del results


TRIED = sum(8 << n for n in range(TRIALS))  # items of the first bundles


def test_the_first_bundles_show_how_long_calls_take(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before most of the items are cut by what calls take alone,
    the I/O thread has time to hear of one bundle.
    """
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        _, found = sent(backends[-1])
        assert sum(map(len, found.values())) == TRIED
        id, items = next(iter(found.items()))
        tell(backends[-1], id, ([0] * len(items), {}), seconds=len(items) * 2 * SHORT_SECONDS)

    monkeypatch.setattr(maps, "sleep", pause)
    DistributedExecutor(2).map(tasks.add, range(2000))
    singles, found = sent(backends[-1])
    assert pauses == [PAUSE]
    assert not found, "calls that are long after all go on being bundled"
    assert len(singles) == 2000 - LOOKS - TRIED


def test_nobody_waits_for_a_bundle_for_long(
    backends: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runners may be busy with other things: the map goes on as before."""
    now = 0.0

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(maps, "sleep", pause)
    monkeypatch.setattr(maps, "monotonic", lambda: now)
    DistributedExecutor(2).map(tasks.add, range(2000))
    singles, found = sent(backends[-1])
    assert PATIENCE <= now < PATIENCE + 2 * PAUSE
    assert (len(singles), sum(map(len, found.values()))) == (LOOKS, 2000 - LOOKS)


def test_only_containers_are_taken_at_once() -> None:
    assert are_containers([range(3), [1], (2,), {3}, {4: 5}, "x", b"y", frozenset()])
    assert not are_containers([])
    assert not are_containers([iter([1])])
    assert not are_containers([[1], (n for n in range(3))])
    assert not are_containers([type("Mine", (list,), {})()])


def test_a_class_without_a_hash_is_none_of_those_that_are_known(backends: list[Backend]) -> None:
    class Meta(type):
        __hash__ = None  # type: ignore[assignment]

    odd: Any = Meta("Odd", (list,), {})
    assert not are_containers([odd()])
    results = DistributedExecutor(2).map(tasks.echo, [1] * LOOKS + [odd()] * 5)
    assert sent(backends[0])[1] == {}
    del results
