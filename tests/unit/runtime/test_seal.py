from __future__ import annotations

import _thread
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from achilles.errors import SealError
from achilles.runtime import seal as seal_module
from achilles.runtime.arguments import Attached, Shared
from achilles.runtime.seal import (
    ANSWER,
    CALL_SIZE,
    LARGE,
    LEAF,
    QUESTION,
    TAG_SIZE,
    Opener,
    Seal,
    Sealer,
    names_of,
    seal_result,
)
from tests.security.attacks import attack

CODE = bytes(range(32))
FN, OTHER_FN, INIT, BLOB = 1, 2, 3, 4
FUNCTION = b"the function"
SIZES = [0, 1, LARGE - 1, LARGE, LARGE + 1]


class Pair:
    """A client and a runner that has loaded what the client's calls need,
    under the client's number 7.
    """

    def __init__(self, *, code: bytes = CODE, root: bytes = b"") -> None:
        self.sealer = Sealer(Seal(CODE), root)
        self.blobs: dict[tuple[int, int], Any] = {}
        self.opener = Opener(Seal(code), self.blobs)
        self.load(FN, FUNCTION)
        self.load(OTHER_FN, b"another")
        self.load(INIT, b"the initializer")
        self.load(BLOB, b"a large one")

    def load(self, number: int, payload: bytes, sealer: Sealer | None = None) -> None:
        sealer = sealer or self.sealer
        self.blobs[7, number] = payload + sealer.blob(number, payload)
        self.opener.changed([(7, number)])

    def call(
        self, id: int = 5, payload: bytes = b"arguments", needs: Any = (FN, INIT, (BLOB,))
    ) -> bytes:
        shared = tuple(Shared(one, memoryview(b"a large one"), False) for one in needs[2])
        return payload + self.sealer.call(id, needs, Attached(FUNCTION, shared), payload)

    def open(
        self, call: Any, id: int = 5, needs: Any = (FN, INIT, (BLOB,)), client: int = 7
    ) -> Any:
        self.opener.begin(client, client, needs)
        return self.opener.open_call(id, call)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_a_call_is_opened(size: int, kind: Callable[[bytes], Any]) -> None:
    pair = Pair()
    payload = b"x" * size
    assert pair.open(kind(pair.call(payload=payload))) == payload
    assert pair.opener.root == pair.sealer.session
    assert bytes(pair.opener.body((7, FN))) == FUNCTION


def test_calls_of_one_chunk_and_of_the_next_are_opened() -> None:
    pair = Pair()
    needs = (FN, 0, ())
    for _ in range(2):
        pair.opener.begin(7, 7, needs)
        for id in range(3):
            assert pair.opener.open_call(id, pair.call(id, needs=needs)) == b"arguments"


def test_a_call_that_brings_its_function_needs_nothing() -> None:
    pair = Pair()
    pair.blobs.clear()
    payload = b"function and arguments"
    call = payload + pair.sealer.call(1, (0, 0, ()), b"a pickle", payload)
    assert pair.open(call, 1, (0, 0, ())) == payload


@attack("T14")
@pytest.mark.parametrize("size", [9, LARGE])
def test_every_bit_of_a_call_counts(size: int) -> None:
    pair = Pair()
    call = pair.call(payload=b"x" * size)
    for at in [*range(0, size, max(1, size // 10)), *range(size, len(call))]:
        changed = bytearray(call)
        changed[at] ^= 1
        with pytest.raises(SealError, match="does not carry the seal of a client"):
            pair.open(bytes(changed))
    assert pair.open(call) == b"x" * size


@pytest.mark.parametrize("cut", [1, TAG_SIZE, CALL_SIZE - 1, CALL_SIZE, CALL_SIZE + 5, 1000])
def test_a_call_that_was_cut_is_refused(cut: int) -> None:
    pair = Pair()
    call = pair.call()
    for damaged in (call[:-cut], call[cut:], call + bytes(cut)):
        with pytest.raises(SealError):
            pair.open(damaged)


def test_a_call_is_one_task_of_one_session_with_its_function_and_blobs() -> None:
    pair, other = Pair(), Pair()
    call = pair.call()
    for change in (
        {"id": 6},
        {"needs": (OTHER_FN, INIT, (BLOB,))},
        {"needs": (FN, 0, (BLOB,))},
        {"needs": (FN, INIT, ())},
        {"needs": (FN, INIT, (BLOB, OTHER_FN))},
        {"needs": (0, INIT, (BLOB,))},
    ):
        with pytest.raises(SealError):
            pair.open(call, **change)
    with pytest.raises(SealError):
        other.open(call)
    assert pair.open(call) == b"arguments"


@attack("T14")
@pytest.mark.parametrize("number", [FN, INIT, BLOB])
def test_what_a_call_needs_cannot_be_exchanged(number: int) -> None:
    """Not even for what the same client has sealed under another number,
    or another one under this.
    """
    pair, other = Pair(), Pair()
    good = pair.blobs[7, number]
    for bad in (
        b"evil",
        b"evil" + good[-TAG_SIZE:],
        pair.blobs[7, OTHER_FN],
        other.blobs[7, number],
        good[:-1],
        b"",
    ):
        pair.blobs[7, number] = bad
        pair.opener.changed([(7, number)])
        with pytest.raises(SealError):
            pair.open(pair.call())
    pair.blobs[7, number] = good
    pair.opener.changed([(7, number)])
    assert pair.open(pair.call()) == b"arguments"


def test_a_function_that_its_client_has_given_a_number_twice_is_not_taken_for_the_other() -> None:
    """The call is of the function's tag, not of its number alone."""
    pair = Pair()
    call = pair.call()
    tag = Seal(CODE).blob(pair.sealer.session, FN, b"later")
    pair.blobs[7, FN] = b"later" + tag
    pair.opener.changed([(7, FN)])
    with pytest.raises(SealError):
        pair.open(call)


def test_what_is_not_there_is_said() -> None:
    pair = Pair()
    del pair.blobs[7, FN]
    with pytest.raises(RuntimeError, match="did not pass function or object 1 on"):
        pair.open(pair.call())


def test_a_chunk_is_of_one_session() -> None:
    pair = Pair()
    other = Sealer(Seal(CODE))
    pair.opener.begin(7, 7, (0, 0, ()))
    first = b"a" + pair.sealer.call(1, (0, 0, ()), b"", b"a")
    second = b"a" + other.call(2, (0, 0, ()), b"", b"a")
    assert pair.opener.open_call(1, first) == b"a"
    for _ in range(2):
        with pytest.raises(SealError):
            pair.opener.open_call(2, second)
    pair.opener.begin(7, 7, (0, 0, ()))
    assert pair.opener.open_call(2, second) == b"a"


def test_another_code_key_opens_nothing() -> None:
    pair = Pair(code=bytes(32))
    with pytest.raises(SealError, match="client and worker do not hold the same one"):
        pair.open(pair.call())


def test_a_nested_client_has_its_roots_initializer() -> None:
    pair = Pair()
    nested = Sealer(Seal(CODE), pair.sealer.session)
    needs = (FN, INIT, ())
    pair.blobs[8, FN] = FUNCTION + nested.blob(FN, FUNCTION)
    call = b"x" + nested.call(1, needs, FUNCTION, b"x")
    pair.opener.begin(8, 7, needs)
    assert pair.opener.open_call(1, call) == b"x"
    assert pair.opener.root == pair.sealer.session
    assert names_of(call) == (nested.session, nested.root)
    pair.load(INIT, b"the initializer", nested)
    pair.opener.begin(8, 7, needs)
    with pytest.raises(SealError):
        pair.opener.open_call(1, call)


# --- Results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_result_is_opened(size: int) -> None:
    pair = Pair()
    pair.open(pair.call())
    data = b"r" * size
    whole = pair.opener.result(5, 0, data)
    assert isinstance(whole, bytes)
    assert pair.sealer.open_result(5, 0, whole) == data
    assert pair.sealer.open_result(5, 0, (whole[:3], memoryview(whole)[3:])) == data
    parts = pair.opener.result(5, 0, [data[:7], memoryview(data)[7:]])
    assert b"".join(bytes(part) for part in parts) == whole


@pytest.mark.parametrize("size", [LEAF - 1, LEAF, LEAF + 1, 3 * LEAF + 5])
@pytest.mark.parametrize("cores", [1, 4])
def test_what_is_very_large_has_the_same_tag_in_whatever_parts_and_on_how_many_cores(
    size: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = Seal(CODE)
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    monkeypatch.setattr(seal_module, "_cores", lambda: 1)
    whole = seal.blob(bytes(16), 1, data)
    monkeypatch.setattr(seal_module, "_cores", lambda: cores)
    state = seal.result(bytes(16))
    parts: list[Any] = [data[:100], b"", memoryview(data)[100 : LEAF - 7], data[LEAF - 7 :]]
    one = seal_result(state, 1, 0, data)
    several = seal_result(state, 1, 0, parts)
    assert one[-TAG_SIZE:] == several[-1]
    assert seal.blob(bytes(16), 1, memoryview(data)) == whole
    for at in (0, size // 2, size - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        assert seal.blob(bytes(16), 1, changed) != whole
    if size > LEAF:  # leaves in another order
        assert seal.blob(bytes(16), 1, data[LEAF:] + data[:LEAF]) != whole
    assert seal.blob(bytes(16), 1, data[:-1]) != whole


def test_without_more_threads_one_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    data = bytes(2 * LEAF)
    whole = Seal(CODE).blob(bytes(16), 1, data)
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    assert Seal(CODE).blob(bytes(16), 1, data) == whole


@attack("T13")
def test_a_result_is_that_of_one_task_and_status() -> None:
    pair, other = Pair(), Pair()
    pair.open(pair.call())
    sealed = pair.opener.result(5, 0, b"value")
    assert isinstance(sealed, bytes)
    for id, status in ((6, 0), (5, 1), (5, 2)):
        with pytest.raises(SealError, match=f"the result of task {id} does not carry the seal"):
            pair.sealer.open_result(id, status, sealed)
    with pytest.raises(SealError):
        other.sealer.open_result(5, 0, sealed)
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        with pytest.raises(SealError):
            pair.sealer.open_result(5, 0, bytes(changed))
        with pytest.raises(SealError):
            pair.sealer.open_result(5, 0, sealed[:at])
    assert pair.sealer.open_result(5, 0, sealed) == b"value"


def test_a_call_that_is_refused_has_a_result_that_its_client_reads() -> None:
    pair = Pair()
    call = bytearray(pair.call())
    call[0] ^= 1
    with pytest.raises(SealError):
        pair.open(bytes(call))
    assert pair.sealer.open_result(5, 1, pair.opener.result(5, 1, b"refused")) == b"refused"


def test_the_host_seals_what_it_says_itself() -> None:
    pair = Pair()
    session, root = names_of((b"long", pair.call()[:-3], pair.call()[-3:]))
    assert session == root == pair.sealer.session
    sealed = seal_result(Seal(CODE).result(session), 5, 1, b"too large")
    assert pair.sealer.open_result(5, 1, sealed) == b"too large"
    assert names_of(b"short") == (b"", b"")


# --- Letters --------------------------------------------------------------------------------------


def test_a_letter_is_of_one_kind_session_and_number() -> None:
    sealer = Sealer(Seal(CODE))
    once, other = bytes(16), bytes([1] * 16)
    tag = Seal(CODE).letter(QUESTION, sealer.root, once, b"numpy")
    assert sealer.is_sealed(QUESTION, once, b"numpy", tag)
    assert not sealer.is_sealed(ANSWER, once, b"numpy", tag)
    assert not sealer.is_sealed(QUESTION, other, b"numpy", tag)
    assert not sealer.is_sealed(QUESTION, once, b"numpx", tag)
    assert not sealer.is_sealed(QUESTION, once, b"numpy", tag[:-1])
    assert not Sealer(Seal(CODE)).is_sealed(QUESTION, once, b"numpy", tag)
    assert sealer.letter(QUESTION, once, b"numpy") == tag


# --- Secrets --------------------------------------------------------------------------------------


@attack("T9")
def test_no_key_is_in_a_text_or_a_pickle() -> None:
    pair = Pair()
    pair.open(pair.call())
    things = (Seal(CODE), pair.sealer, pair.opener)
    for thing in things:
        assert not any(CODE[at : at + 4].hex() in repr(thing) for at in range(28))
        assert repr(CODE) not in repr(thing)
        with pytest.raises(TypeError):
            pickle.dumps(thing)


def test_kinds_have_nothing_in_common() -> None:
    seal = Seal(CODE)
    states = [seal.calls, seal.blobs, seal.results, seal._letters, Seal(bytes(32)).calls]
    assert len({state.digest() for state in states}) == len(states)


def test_what_is_too_short_is_not_taken_for_one_of_the_chunk_before() -> None:
    pair = Pair()
    pair.open(pair.call())
    for size in range(TAG_SIZE + 1):
        with pytest.raises(SealError):
            pair.open(bytes(size))
        assert pair.open(pair.call()) == b"arguments"
