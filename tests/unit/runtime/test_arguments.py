"""What is known again, what is not mistaken for it, and what a task gets for it."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest

from achilles.runtime import arguments, shared, written
from achilles.runtime.arguments import (
    ATTACHED_MAX,
    FIRST_NUMBER,
    WATCH_AT_ONCE,
    ArgumentTable,
    Attached,
    join_attached,
    take,
)
from achilles.runtime.seal import CALL_SIZE, TAG_SIZE
from achilles.runtime.serialize import (
    LARGE,
    SHARE_MIN,
    dumps_call,
    join_inline,
    loads,
    split_inline,
)
from tests.unit.runtime import tasks

np = pytest.importorskip("numpy")

COUNT = SHARE_MIN // 8  # of floats


def array(fill: float = 1.0, count: int = COUNT) -> Any:
    return np.full(count, fill)


@pytest.fixture
def table() -> ArgumentTable:
    return ArgumentTable()


def attach(table: ArgumentTable, obj: object) -> Attached:
    encoded = table.encode(obj)
    assert isinstance(encoded, Attached)
    return encoded


def call(table: ArgumentTable, *args: object, **kwargs: object) -> Attached:
    payload = dumps_call(args, kwargs, None, table)
    assert isinstance(payload, Attached)
    return payload


@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.parametrize("store", [shared.store, shared.copy])
def test_the_store_of_a_table_makes_all_its_copies(store: Any, is_sealed: bool) -> None:
    made: list[int] = []
    rooms: list[int] = []

    def note(parts: Any, room: int) -> Any:
        made.append(sum(memoryview(part).nbytes for part in parts))
        rooms.append(room)
        return store(parts, room)

    table = ArgumentTable(store=note, is_sealed=is_sealed)
    large, text, small = array(3.0), "a" * SHARE_MIN, array(2.0, LARGE // 8)
    args, _ = load(call(table, large, text))
    assert (args[0] == 3.0).all()
    assert args[1] == text
    assert made == [SHARE_MIN, large.nbytes]
    payload = dumps_call((small,), {}, None, table)
    (again,), _ = loads(payload)
    assert (again == 2.0).all()
    assert len(made) == 3
    assert isinstance(payload, memoryview)  # what says that its buffers must stay aligned
    assert rooms == ([TAG_SIZE, TAG_SIZE, CALL_SIZE] if is_sealed else [0, 0, 0])


def load(attached: Attached, payload: Any = None) -> Any:
    payloads = {one.number: one.payload for one in attached.shared}
    return loads(
        attached.payload if payload is None else payload,
        lambda kind, number: take(kind, payloads[number]),
    )


# --- Buffers --------------------------------------------------------------------------------------


def test_an_array_given_again_keeps_its_number(table: ArgumentTable) -> None:
    x = array(3.0)
    first, second = call(table, x, 1), call(table, 2, [{"x": x}])
    assert first.numbers == second.numbers == (FIRST_NUMBER,)
    assert first.shared[0].payload is second.shared[0].payload
    assert len(first.payload) < 1000
    (loaded, one), _ = load(first)
    assert one == 1
    assert loaded.flags.writeable
    assert (loaded == x).all()


def test_the_value_is_that_of_the_call(table: ArgumentTable) -> None:
    x = array(0.0)
    calls = []
    for n in range(4):
        x[-1 if n % 2 else 0] = n
        calls.append(call(table, x))
    assert len({one.numbers for one in calls}) == 4
    assert [float(load(one)[0][0].sum()) for one in calls] == [0.0, 1.0, 3.0, 5.0]


def test_another_array_in_the_same_place_is_another(table: ArgumentTable) -> None:
    memory = bytearray(SHARE_MIN)
    calls = []
    for fill in range(3):
        memory[:] = bytes([fill]) * SHARE_MIN
        calls.append(call(table, np.frombuffer(memory, np.uint8)))
        calls.append(call(table, tasks.Buffer(memory)))
    assert len({one.numbers for one in calls}) == 3


def test_tasks_do_not_see_each_others_writes(table: ArgumentTable) -> None:
    attached = call(table, array(1.0))
    first, second = load(attached)[0][0], load(attached)[0][0]
    first[:] = 7
    assert (second == 1).all()
    assert (load(attached)[0][0] == 1).all()


def test_small_and_middling_arrays_travel_with_their_call(table: ArgumentTable) -> None:
    for size in (10, LARGE, SHARE_MIN - 1):
        assert not isinstance(table.encode(np.zeros(size, np.uint8)), Attached)
    mixed = attach(table, (np.arange(LARGE // 8), np.ones(COUNT), np.arange(LARGE // 8)))
    assert len(mixed.shared) == 1
    one, two, three = load(mixed)
    assert (one == np.arange(LARGE // 8)).all()
    assert (two == 1).all()
    assert (three == np.arange(LARGE // 8)).all()
    assert one.flags.writeable


def test_read_only_arrays_stay_so(table: ArgumentTable) -> None:
    x = array()
    x.flags.writeable = False
    attached = call(table, x)
    assert attached.numbers == call(table, x).numbers
    assert not load(attached)[0][0].flags.writeable


def test_arrays_in_columns_and_views(table: ArgumentTable) -> None:
    base = np.asfortranarray(np.random.default_rng(1).random((1000, 400)))
    attached = call(table, base)
    assert attached.numbers == call(table, base).numbers
    assert (load(attached)[0][0] == base).all()
    assert call(table, base[:, :200]).numbers != attached.numbers


def test_there_is_a_bound_for_one_call(table: ArgumentTable) -> None:
    many = [array(n) for n in range(ATTACHED_MAX + 3)]
    attached = call(table, many)
    assert len(attached.shared) == ATTACHED_MAX
    assert [one[0] for one in load(attached)[0][0]] == list(range(ATTACHED_MAX + 3))


@pytest.mark.parametrize("is_available", [True, False])
def test_with_and_without_shared_memory(
    table: ArgumentTable, monkeypatch: pytest.MonkeyPatch, is_available: bool
) -> None:
    monkeypatch.setattr(shared, "IS_AVAILABLE", is_available)
    x = array(2.0)
    attached = call(table, x)
    assert call(table, x).numbers == attached.numbers
    first, second = load(attached)[0][0], load(attached)[0][0]
    first[:] = 0
    assert (second == 2).all()


def test_with_what_only_cloudpickle_takes(table: ArgumentTable) -> None:
    x, y, text = array(1.0), array(2.0), "é" * SHARE_MIN
    (one, function, two, same), _ = load(call(table, x, lambda a: a + 1, y, text))
    assert (one == 1).all()
    assert (two == 2).all()
    assert function(1) == 2
    assert same == text


# --- Watched memory -------------------------------------------------------------------------------

LARGE_COUNT = WATCH_AT_ONCE // 8 + 1000


@pytest.fixture(params=["watched", "compared"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An array that is large enough to be watched from its first call on,
    and the same without the kernel's help.
    """
    if request.param == "compared":
        monkeypatch.setattr(arguments, "watch", lambda address, size: None)
    elif written._find_kernel() is None:
        pytest.skip("this kernel does not tell what was written to")
    return array(1.0, LARGE_COUNT)


@pytest.mark.parametrize("at", [0, 1, LARGE_COUNT // 2, LARGE_COUNT - 1])
def test_each_write_is_seen_wherever_it_is(table: ArgumentTable, large: Any, at: int) -> None:
    calls = [call(table, large), call(table, large)]
    for value in (2.0, 3.0, 3.0, 4.0):
        large[at] = value
        calls += [call(table, large), call(table, large), call(table, large)]
    loaded = [float(load(one)[0][0][at]) for one in calls]
    assert loaded == [1.0] * 2 + [2.0] * 3 + [3.0] * 6 + [4.0] * 3
    assert len({one.numbers for one in calls}) == 4


def test_a_write_that_is_undone_is_no_change(table: ArgumentTable, large: Any) -> None:
    first = call(table, large)
    large[7] = 2.0
    large[7] = 1.0
    assert call(table, large).numbers == first.numbers


def test_what_is_not_written_to_is_not_compared_again(
    table: ArgumentTable, large: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    is_equal = arguments._is_equal

    def count(one: memoryview, other: memoryview) -> bool:
        compared.append(one.nbytes)
        return is_equal(one, other)

    monkeypatch.setattr(arguments, "_is_equal", count)
    calls = [call(table, large) for _ in range(10)]
    assert len({one.numbers for one in calls}) == 1
    is_watched = arguments.watch is written.watch
    assert len(compared) == (0 if is_watched else 9)
    large[LARGE_COUNT // 2] = 2.0
    calls += [call(table, large) for _ in range(10)]
    # Once to find it changed; once more to find it equal, which has it watched again.
    assert len(compared) == (2 if is_watched else 19)
    assert len({one.numbers for one in calls}) == 2


def test_what_was_given_once_is_not_watched_after_its_task(table: ArgumentTable) -> None:
    if written._find_kernel() is None:
        pytest.skip("this kernel does not tell what was written to")
    large = array(1.0, LARGE_COUNT)
    attached = call(table, large)
    (entry,) = table._entries.values()
    assert entry.watch is not None
    del attached
    gc.collect()
    assert entry.watch is None


# --- Bytes and str --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"\x07" * SHARE_MIN, "ü" * SHARE_MIN, "\udc80" * SHARE_MIN])
def test_bytes_and_str_are_known_by_their_identity(table: ArgumentTable, value: Any) -> None:
    first, second = call(table, value, 1), call(table, [2, {"x": value}])
    assert first.numbers == second.numbers
    assert len(first.payload) < 1000
    assert load(first)[0] == (value, 1)
    assert load(second)[0] == ([2, {"x": value}],)
    same = bytes(bytearray(value)) if isinstance(value, bytes) else "".join([value[:1], value[1:]])
    assert call(table, same).numbers != first.numbers


def test_nobody_looks_for_bytes_before_there_were_large_ones(table: ArgumentTable) -> None:
    assert dumps_call((1, b"small"), {}, None, table) == dumps_call((1, b"small"), {})
    large = list(range(SHARE_MIN))
    assert dumps_call((large,), {}, None, table) == dumps_call((large,), {})
    assert not table.is_watching
    call(table, bytes(SHARE_MIN))
    assert table.is_watching
    assert dumps_call((1, b"small"), {}, None, table) == dumps_call((1, b"small"), {})


def test_an_object_is_kept_alive_only_while_its_copy_is(table: ArgumentTable) -> None:
    class Text(str):
        __slots__ = ("__weakref__",)

    value = bytes(SHARE_MIN)
    attached: Attached | None = call(table, value)
    (entry,) = table._entries.values()
    assert entry.obj is value
    attached = None
    gc.collect()
    assert attached is None
    assert entry.obj is None
    assert not isinstance(table.encode(Text("x" * SHARE_MIN)), Attached)  # it may have a state


# --- What is kept ---------------------------------------------------------------------------------


def test_what_was_given_once_goes_with_its_tasks(table: ArgumentTable) -> None:
    x = array(1.0)
    attached = call(table, x)
    assert not attached.shared[0].is_kept
    payload = weakref.ref(attached.shared[0].payload)
    del attached
    assert payload() is None
    again = call(table, x)
    assert again.shared[0].is_kept  # this time it stays
    payload = weakref.ref(again.shared[0].payload)
    numbers = again.numbers
    del again
    assert payload() is not None
    assert call(table, x).numbers == numbers


def test_other_content_is_not_taken_for_something_given_again(table: ArgumentTable) -> None:
    x = array(1.0)
    call(table, x)
    x[:] = 2
    assert not call(table, x).shared[0].is_kept


def test_so_many_bytes_are_kept() -> None:
    table = ArgumentTable(3 * SHARE_MIN)
    arrays = [array(n) for n in range(6)]
    kept = [call(table, x) for x in arrays]
    kept = [call(table, x) for x in arrays]
    assert [one.is_kept for one in call(table, arrays[0]).shared] == [True]
    assert table._kept == 3 * SHARE_MIN
    assert sum(entry.kept is not None for entry in table._entries.values()) == 3
    payloads = [weakref.ref(one.shared[0].payload) for one in kept]
    del kept
    assert sum(payload() is not None for payload in payloads) == 3
    assert payloads[0]() is not None


def test_so_many_entries_are_kept(table: ArgumentTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "ENTRIES_MAX", 2)
    arrays = [array(n) for n in range(4)]
    for _ in range(2):
        for x in arrays:
            call(table, x)
            call(table, x)
    assert len(table._entries) == 2
    assert table._kept == 2 * SHARE_MIN


# --- Calls and their functions --------------------------------------------------------------------


def test_calls_and_functions_share(table: ArgumentTable) -> None:
    x, y = array(1.0), array(2.0)
    function, payload = attach(table, partial(tasks.add, x)), call(table, y, x)
    joined, both, numbers = join_attached(
        payload, Attached(bytes(function.payload), function.shared)
    )
    assert numbers == tuple(sorted({*function.numbers, *payload.numbers}))
    assert isinstance(both, Attached)
    assert both.numbers == numbers
    payloads = {one.number: one.payload for one in both.shared}
    fn, rest = split_inline(
        join_inline(bytes(both.payload), joined), lambda kind, n: take(kind, payloads[n])
    )
    assert (fn.args[0] == 1).all()
    assert (load(both, rest)[0][0] == 2).all()
    assert join_attached(b"a", b"b") == (b"a", b"b", ())


def test_bytes_in_a_partial_are_found(table: ArgumentTable) -> None:
    data = b"x" * SHARE_MIN
    attached = attach(table, partial(print, data, end=data))
    assert len(attached.shared) == 1
    assert load(attached).args == (data,)


def test_what_cannot_be_pickled_is_named(table: ArgumentTable) -> None:
    from achilles.errors import ArgumentPickleError

    with pytest.raises(ArgumentPickleError, match="argument 2"):
        dumps_call((array(), (n for n in range(3))), {}, None, table)


def test_they_are_described(table: ArgumentTable) -> None:
    x = array()
    first = call(table, x)
    assert first.numbers == (FIRST_NUMBER,)
    assert repr(call(table, x).shared[0]) == f"<Shared 0: {SHARE_MIN} bytes>"
    assert repr(table) == f"<ArgumentTable 1 entries | {SHARE_MIN} bytes kept>"
