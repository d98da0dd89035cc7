"""Imports of modules that only the client has: a runner asks the client of the task that it runs.

Rules
    1. The finder is the last of all: what the worker has installed wins,
       and an import that succeeds costs nothing.
    2. A question waits for a bounded time; whoever does not answer has no such module.
    3. A client's modules are its own: when the runner works for another client they are put aside,
       and back in place when it works for theirs again.
    4. Where calls are sealed, so are questions and answers;
       each answer is one to its own question, and no older one.
"""

from __future__ import annotations

import marshal
import os
import sys
from _frozen_importlib import ModuleSpec
from _thread import allocate_lock
from itertools import count

from achilles.runtime import context
from achilles.runtime.seal import ANSWER, QUESTION, TAG_SIZE, is_same
from achilles.runtime.side import IMPORT

TYPE_CHECKING = False  # as in `runner`: every runner of a worker imports this module at its start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

    from achilles.runtime.side import RunnerSide

ANSWER_SECONDS = 20.0
ASKS_MAX = 8
MEET_SECONDS = 5.0  # after which the question may have been lost with a broker
_NUMBER_SIZE = 4


class ClientModules:
    """Finds modules at clients, and keeps those of different clients apart."""

    def __init__(self) -> None:
        self._client = 0
        self._aside: dict[int, dict[str, ModuleType]] = {}  # by client
        self._missing: set[str] = set()  # what the present client does not have
        self._numbers = count(1)  # which threads may draw from at once
        self._waiting: dict[bytes, _Answer] = {}

    def switch_to(self, client: int) -> None:
        """The next task is another client's."""
        if client == self._client:
            return
        # A thread that an earlier task has left may import meanwhile, or take modules out.
        fetched = {name: one for name, one in list(sys.modules.items()) if _is_fetched(one)}
        self._aside[self._client] = fetched
        for name in fetched:
            sys.modules.pop(name, None)
        sys.modules.update(self._aside.pop(client, {}))
        self._missing.clear()
        self._client = client

    def forget(self, client: int) -> None:
        """A client is gone."""
        self._aside.pop(client, None)
        if client == self._client:
            self.switch_to(0)
            self._aside.pop(client, None)

    # --- The protocol of sys.meta_path ------------------------------------------------------------

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Ask the client for a module."""
        if not context.client or context.side is None or name in self._missing:
            return None
        if context.seal is not None and not context.root:
            return None  # no call of the client was opened, so far
        try:
            found = self._ask(name, context.side, context.root)
        except OSError:
            return None  # no host, or a fork: there is nobody to ask
        if not found:
            if found is not None:  # nobody's answer is not an answer
                self._missing.add(name)
            return None
        text, origin, is_package = marshal.loads(found)
        spec = ModuleSpec(name, _Loader(text, origin), origin=origin, is_package=is_package)  # type: ignore[arg-type]
        spec.has_location = bool(text)
        return spec

    def invalidate_caches(self) -> None:
        """What was missing may be there now."""
        self._missing.clear()

    # --- Questions --------------------------------------------------------------------------------

    def meet(self, root: bytes) -> None:
        """Wait until the client whose session has that name has shown that it lives: what it once
        sealed is run again only as long as it does.

        It is asked for a module that nobody has.

        Raises:
            SealError: somebody else has answered.
            OSError: there is nobody to ask.
        """
        side = context.side
        if side is None:
            raise OSError("a fork of a runner")
        while self._ask("", side, root) is None:
            pass

    def _ask(self, name: str, side: RunnerSide, root: bytes) -> bytes | None:
        """The client's answer, empty if it has no such module; None if there was none in time.

        Raises:
            SealError: the answer is not the client's.
            OSError: there is no host.
        """
        number = (next(self._numbers) & 0xFFFFFFFF).to_bytes(_NUMBER_SIZE, "little")
        answer = self._waiting[number] = _Answer()
        seal, text = context.seal, name.encode()
        once = b""
        if seal is not None:
            once = os.urandom(16)
            text = once + seal.letter(QUESTION, root, once, text) + text
        try:
            if name:
                side.handle(IMPORT, self._take)
                for _ in range(ASKS_MAX):  # a question can be lost, with the broker that had it
                    side.send(IMPORT, context.client, number + text)
                    if answer.is_awaited.acquire(timeout=ANSWER_SECONDS / ASKS_MAX):
                        break
            else:
                side.send(IMPORT, context.client, number + text)
                side.read_until(IMPORT, self._take, answer.is_awaited, MEET_SECONDS)
        finally:
            self._waiting.pop(number, None)
        body = answer.body
        if seal is None or body is None:
            return body
        body, tag = body[:-TAG_SIZE], body[-TAG_SIZE:]
        if not is_same(seal.letter(ANSWER, root, once, body), tag):
            from achilles.errors import SealError

            what = f"for the module {name!r}" if name else "whether it lives"
            raise SealError(
                f"the answer to the question {what} does not carry the seal of the client"
            )
        return body

    def _take(self, client: int, body: bytes) -> None:
        """In the reading thread: an answer has come, perhaps the second one,
        as a question is asked again when nobody answers.
        """
        if client != context.client:
            return
        answer = self._waiting.pop(body[:_NUMBER_SIZE], None)
        if answer is not None:
            answer.body = body[_NUMBER_SIZE:]
            answer.is_awaited.release()


class _Answer:
    """What is awaited; the lock is held until it is there."""

    def __init__(self) -> None:
        self.body: bytes | None = None
        self.is_awaited = allocate_lock()
        self.is_awaited.acquire()


class _Loader:
    """Runs a source that came from the client; tracebacks and `inspect` find its lines here."""

    def __init__(self, text: str, origin: str) -> None:
        self._text = text
        self._origin = origin

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if self._text:
            exec(self.get_code(module.__name__), module.__dict__)

    def get_source(self, name: str) -> str:
        return self._text

    def get_code(self, name: str) -> CodeType:
        return compile(self._text, self._origin, "exec", dont_inherit=True)


def _is_fetched(module: ModuleType) -> bool:
    values = getattr(module, "__dict__", None)  # nothing that could run code of a lazy module
    return type(values) is dict and type(values.get("__loader__")) is _Loader


def install() -> ClientModules:
    """Put a finder behind all others."""
    modules = ClientModules()
    sys.meta_path.append(modules)
    return modules
