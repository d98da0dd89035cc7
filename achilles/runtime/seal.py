"""The seal on what passes through a broker:
whoever lacks the code key can neither make nor change what is unpickled.

A client and a runner hold the code key, and the broker between them does not. What one unpickles,
or runs, of the other ends in a *tag*: keyed BLAKE2b over it and over what it belongs to. It is
looked at first; without it, nothing is unpickled.

    a call      payload | session | root | tag   of: session, root, function (its tag), initializer
                                                 (its number), blobs (their tags), task id, payload
    a blob      payload | tag                    of: the session whose it is, its number, payload
    a result    payload | tag                    of: session, task id, status, payload
    a letter    see `Seal.letter`                of: root, a number used once, text

*session* names one client: an executor's connection, or a runner that submits for one; an
executor's is random, so its task ids and the numbers of its blobs mean the same for ever. *root* is
the session that all is done for in the end.

Rules
    1. Tags are behind what they are of, so that payloads stay aligned,
       and their parts where they are.
    2. One pass: BLAKE2b below `LARGE`; from there on it takes the SHA-256 of each `LEAF`, which
       costs 0.4 of it, and which several threads compute where there are cores for them
       (64 MiB: 38 ms with one, 20 with two).
    3. No key, and no key-dependent state, is in any text or pickle.

A runner imports this module: what it does not need at once is imported late.
"""

from __future__ import annotations

import os
from _blake2 import blake2b
from _operator import _compare_digest
from _struct import Struct

TYPE_CHECKING = False  # as type checkers know it; importing typing takes longer than all the rest
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Mapping, Sequence
    from typing import Any, NoReturn, TypeAlias

    from achilles.runtime.arguments import Attached
    from achilles.runtime.serialize import Buffer, Encoded

    State: TypeAlias = blake2b
    Needs: TypeAlias = tuple[int, int, tuple[int, ...]]  # numbers: function, initializer, blobs
    Key: TypeAlias = tuple[int, int]  # the host's number for a client, and its own for a blob

TAG_SIZE = 16
NAME_SIZE = 16  # of a session
CALL_SIZE = 2 * NAME_SIZE + TAG_SIZE  # of what is behind a call
LARGE = 64 * 1024
LEAF = 4 << 20
THREADS_MAX = 4
QUESTION, ANSWER, OUTPUT, PARTS = b"?", b"!", b">", b"%"  # the kinds of letters
ONCE_SIZE = 16
STATES_MAX = 256
TAGS_MAX = 4096

is_same = _compare_digest  # in a time that does not tell where they differ

_HEAD = Struct("<QQI")
_NUMBER = Struct("<Q")
_NUMBERED = Struct("<Qx")  # heads of tags end in a zero
_RESULT = Struct("<QBx")


class Seal:
    """One code key, ready for each thing that is sealed."""

    def __init__(self, code: bytes) -> None:
        def state(what: bytes) -> State:
            return blake2b(key=code, digest_size=TAG_SIZE, person=what)

        self.calls = state(b"achilles.call")
        self.blobs = state(b"achilles.blob")
        self.results = state(b"achilles.result")
        self._letters = state(b"achilles.letter")

    def __repr__(self) -> str:
        return "<Seal>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a seal is not pickled")

    def blob(self, session: bytes, number: int, payload: Buffer) -> bytes:
        """The tag of a blob."""
        return _tag(self.blobs, session + _NUMBERED.pack(number), payload)

    def result(self, session: bytes) -> State:
        """What the tags of all results for a session begin with."""
        state = self.results.copy()
        state.update(session)
        return state

    def letter(self, kind: bytes, root: bytes, once: bytes, text: Buffer) -> bytes:
        """The tag of a letter of that kind (one byte); ``once`` has 16 bytes,
        and no other letter has the same.
        """
        return _tag(self._letters, kind + root + once + b"\0", text)


def _tag(state: State, head: bytes, body: Buffer) -> bytes:
    """The tag of a body; ``head`` is as long for all of a kind, and ends in a zero."""
    if len(body) >= LARGE:
        return _tag_of_parts(state, head, (body,))
    state = state.copy()
    state.update(head + body)
    return state.digest()


def _tag_of_parts(state: State, head: bytes, parts: Sequence[Buffer]) -> bytes:
    """The tag of the body that consists of these parts."""
    state = state.copy()
    if sum(map(len, parts)) < LARGE:
        state.update(head + b"".join(parts))
    else:
        state.update(head[:-1] + b"\1" + _digests(parts))
    return state.digest()


def _digests(parts: Sequence[Buffer]) -> bytes:
    """The length of the parts together, and the digest of each leaf of what they are together."""
    from _thread import allocate_lock, start_new_thread
    from hashlib import sha256
    from itertools import count

    leaves: list[list[memoryview]] = [[]]
    room = LEAF
    for part in parts:
        view = memoryview(part)
        while view:
            if not room:
                leaves.append([])
                room = LEAF
            leaves[-1].append(view[:room])
            room, view = room - len(leaves[-1][-1]), view[room:]
    digests = [b""] * len(leaves)
    numbers = count()

    def work() -> None:
        while (number := next(numbers)) < len(leaves):
            digest = sha256()
            for view in leaves[number]:
                digest.update(view)
            digests[number] = digest.digest()

    def work_beside(done: LockType) -> None:
        try:
            work()
        finally:
            done.release()

    helpers = []
    for _ in range(min(len(leaves), _cores(), THREADS_MAX) - 1):
        done = allocate_lock()
        done.acquire()
        try:
            start_new_thread(work_beside, (done,))
        except RuntimeError:
            break  # there are as many threads as there may be
        helpers.append(done)
    work()
    for done in helpers:
        done.acquire()
    return _NUMBER.pack(sum(map(len, parts))) + b"".join(digests)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() or 1 if affinity is None else len(affinity(0))


class Sealer:
    """A client's side: seals what it sends, and opens the results. Threads may share it."""

    def __init__(self, seal: Seal, root: bytes = b"") -> None:
        """``root``: the name of the session on whose behalf this one is;
        by default it is its own.
        """
        self._seal = seal
        self.session = os.urandom(NAME_SIZE)
        self.root = root or self.session
        self._names = self.session + self.root
        self._states: dict[Needs, State] = {}
        self._last: tuple[Needs | None, State] = (None, seal.calls)  # of these
        self._tags: dict[int, bytes] = {}
        self._results = seal.result(self.session)

    def __repr__(self) -> str:
        return f"<Sealer {self.session.hex()[:8]}>"

    def call(self, id: int, needs: Needs, function: bytes | Attached, payload: Buffer) -> bytes:
        """What is to be put behind the payload of a call; ``function`` is its pickle,
        with the blobs attached to it.
        """
        last, state = self._last
        if last is not needs:
            state = self._states.get(needs) or self._begin(needs, function)
            self._last = needs, state
        return self._names + _tag(state, _NUMBERED.pack(id), payload)

    def blob(self, number: int, payload: Buffer) -> bytes:
        """What is to be put behind a blob: its tag."""
        tag = self._tags.get(number)
        if tag is None:
            tag = self._seal.blob(self.session, number, payload)
            if len(self._tags) >= TAGS_MAX:
                self._tags.clear()
            self._tags[number] = tag
        return tag

    def _begin(self, needs: Needs, function: bytes | Attached) -> State:
        shared = () if isinstance(function, bytes) else function.shared
        tags = [self.blob(one.number, one.payload) for one in shared]
        if needs[0]:
            data = function if isinstance(function, bytes) else bytes(function.payload)
            tags.insert(0, self.blob(needs[0], data))
        state = _begin_call(self._seal, self._names, needs, tags)
        if len(self._states) >= STATES_MAX:
            self._states.clear()
        self._states[needs] = state
        return state

    def open_result(self, id: int, status: int, payload: Any) -> Any:
        """The payload of a result without its tag.

        Raises:
            SealError: it is not one that a runner of this cluster gave for that task.
        """
        if type(payload) is not bytes:
            from achilles.runtime.serialize import one_view

            payload = one_view(payload)
        body = payload[:-TAG_SIZE]
        if not is_same(_tag(self._results, _RESULT.pack(id, status), body), payload[-TAG_SIZE:]):
            _refuse(f"the result of task {id}", "a worker")
        return body

    def is_sealed(self, kind: bytes, once: bytes, text: Buffer, tag: Buffer) -> bool:
        """Whether a letter to this client is one of this cluster's."""
        return is_same(self._seal.letter(kind, self.root, once, text), tag)

    def letter(self, kind: bytes, once: bytes, text: Buffer) -> bytes:
        """The tag of a letter of this client's."""
        return self._seal.letter(kind, self.root, once, text)


class Opener:
    """A runner's side: opens calls and what they need, and seals their results.
    One chunk after the other.
    """

    behind = TAG_SIZE  # so many bytes are behind what a blob holds

    def __init__(self, seal: Seal, blobs: Mapping[Key, Any]) -> None:
        """``blobs``: what the host has loaded, as it came."""
        self.seal = seal
        self.root = b""  # which the last call names; to be relied upon once it was opened
        self._blobs = blobs
        self._tags: dict[Key, tuple[bytes, bytes]] = {}  # whose blob it is, and its tag
        self._chunk: tuple[Any, ...] = ()
        # Of the chunk's session and root; None before its first call
        self._names: bytes | None = None
        self._state: State | None = None
        self._results = seal.results
        self._begun: tuple[Any, ...] = ()  # the chunk and the names that the states are for

    def __repr__(self) -> str:
        return f"<Opener {len(self._tags)} blobs>"

    def begin(self, client: int, root: int, needs: Needs) -> None:
        """A chunk comes, of calls that all need the same and are of one session."""
        self._chunk = (client, root, needs)
        self._names = None

    def changed(self, keys: Any) -> None:
        """These blobs were loaded, or are gone."""
        for key in keys:
            self._tags.pop(key, None)
        self._begun = ()

    def open_call(self, id: int, payload: Any) -> Any:
        """The payload of a call without what is behind it.

        Raises:
            SealError: it is not that task's call, or what it needs is not what its client meant.
            RuntimeError: something that it needs is not there.
        """
        names = payload[-CALL_SIZE:-TAG_SIZE]
        if names != self._names or self._state is None:
            self._meet(bytes(names))
        body = payload[:-CALL_SIZE]
        assert self._state is not None
        if not is_same(_tag(self._state, _NUMBERED.pack(id), body), payload[-TAG_SIZE:]):
            _refuse(f"the call of task {id}", "a client")
        return body

    def result(self, id: int, status: int, data: Encoded) -> Encoded:
        """A result with its tag."""
        return seal_result(self._results, id, status, data)

    def body(self, key: Key) -> Any:
        """A blob without its tag; only of what a call that was opened needs."""
        return memoryview(self._blobs[key])[:-TAG_SIZE]

    def _meet(self, names: bytes) -> None:
        """The first call of a chunk: see to what it needs."""
        is_first, self._names, self.root = self._names is None, names, names[NAME_SIZE:]
        begun = (self._chunk, names)
        if is_first and begun == self._begun:
            return
        self._state, self._begun = None, ()
        self._results = self.seal.result(names[:NAME_SIZE])
        if len(names) != 2 * NAME_SIZE or not is_first:
            _refuse("a call", "a client")
        session, root_name = names[:NAME_SIZE], names[NAME_SIZE:]
        client, root, needs = self._chunk
        fn, init, blobs = needs
        tags = [self._check(session, (client, one)) for one in ((fn, *blobs) if fn else blobs)]
        if init:
            self._check(root_name, (root, init))
        self._state = _begin_call(self.seal, names, needs, tags)
        self._begun = begun

    def _check(self, session: bytes, key: Key) -> bytes:
        """The tag of a blob that is what the session meant by its number."""
        found = self._tags.get(key)
        if found is not None and found[0] == session:
            return found[1]
        blob = self._blobs.get(key)
        if blob is None:
            raise RuntimeError(
                f"the worker did not pass function or object {key[1]} on to its runner"
            )
        view = memoryview(blob)
        tag = bytes(view[-TAG_SIZE:])
        if not is_same(self.seal.blob(session, key[1], view[:-TAG_SIZE]), tag):
            _refuse(f"blob {key[1]} (a function or a large argument)", "a client")
        self._tags[key] = session, tag
        return tag


def seal_result(state: State, id: int, status: int, data: Encoded) -> Encoded:
    """A result with its tag; ``state`` is its session's."""
    head = _RESULT.pack(id, status)
    if isinstance(data, bytes):
        return data + _tag(state, head, data)
    return [*data, _tag_of_parts(state, head, data)]


def names_of(payload: Any) -> tuple[bytes, bytes]:
    """The session and the root that a call says it is of: bytes, or a tuple of parts;
    nothing is checked.
    """
    end = b""
    for part in reversed(payload if isinstance(payload, tuple) else (payload,)):
        end = bytes(memoryview(part)[-CALL_SIZE:]) + end
        if len(end) >= CALL_SIZE:
            break
    names = end[-CALL_SIZE:-TAG_SIZE]
    return names[:NAME_SIZE], names[NAME_SIZE:]


def _begin_call(seal: Seal, names: bytes, needs: Needs, tags: list[bytes]) -> State:
    """The state that the calls of these needs have in common;
    the numbers say how many tags there are.
    """
    fn, init, blobs = needs
    state = seal.calls.copy()
    state.update(names + _HEAD.pack(fn, init, len(blobs)) + b"".join(tags))
    return state


def _refuse(what: str, whose: str) -> NoReturn:
    from achilles.errors import SealError

    raise SealError(
        f"{what} does not carry the seal of {whose} of this cluster: the broker, or whoever changed it on the way, does not "
        "hold the code key, or client and worker do not hold the same one (achilles keys export). Nothing of it was unpickled"
    )
