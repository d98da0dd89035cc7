"""A runner finds modules at its client, and keeps those of different clients apart."""

from __future__ import annotations

import importlib
import inspect
import marshal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from achilles.core import protocol as p
from achilles.errors import SealError
from achilles.runtime import context, imports, side
from achilles.runtime.imports import ClientModules, install
from achilles.runtime.seal import ANSWER, QUESTION, Seal, Sealer
from achilles.runtime.side import IMPORT, Reader, RunnerSide, pack
from tests.modes import wait_until

MODULES: dict[int, dict[str, tuple[str, str, bool]]] = {
    1: {
        "far": ("WHO = 1\n\ndef fail():\n    raise KeyError('here')\n", "/client/far.py", False),
        "farpack": ("from farpack import leaf", "/client/farpack/__init__.py", True),
        "farpack.leaf": ("from . import other\nWHO = 'leaf'", "/client/farpack/leaf.py", False),
        "farpack.other": ("", "/client/farpack/other.py", False),
        "farspace": ("", "/client/farspace", True),
        "farspace.inner": ("WHO = __package__", "/client/farspace/inner.py", False),
    },
    2: {"far": ("WHO = 2\n", "/client/far.py", False)},
}


class Host:
    """Answers from `MODULES`, in a thread; keeps the names that were asked for."""

    def __init__(self, sock: socket.socket) -> None:
        self.asked: list[tuple[int, str]] = []
        self.is_mute = False
        self.sealer: Sealer | None = None
        self.forge: Callable[[bytes], bytes] = lambda body: body
        self._sock = sock
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        reader = Reader()
        while data := self._sock.recv(4096):
            for kind, client, body in reader.feed(data):
                number, body, once = body[:4], body[4:], b""
                if self.sealer is not None:
                    once, tag, body = body[:16], body[16:32], body[32:]
                    assert self.sealer.is_sealed(QUESTION, once, body, tag)
                name = body.decode()
                self.asked.append((client, name))
                found = MODULES[client].get(name)
                if not self.is_mute:
                    answer = b"" if found is None else marshal.dumps(found)
                    if self.sealer is not None:
                        answer += self.sealer.letter(ANSWER, once, answer)
                    self._sock.sendall(pack(kind, client, number + self.forge(answer)))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    near, far = socket.socketpair()
    with near, far:
        host = Host(near)
        monkeypatch.setattr(context, "side", RunnerSide(far.fileno()))
        monkeypatch.setattr(context, "client", 1)
        yield host
        far.shutdown(socket.SHUT_RDWR)
        host.thread.join()


@pytest.fixture
def modules(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClientModules]:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    found = install()
    found.switch_to(1)
    yield found
    for name in set(sys.modules) - before:
        if name.startswith("far"):
            del sys.modules[name]


def load(name: str) -> Any:
    return importlib.import_module(name)


def test_kinds_are_the_same_on_both_sides() -> None:
    assert (p.IMPORT, p.OUTPUT) == (side.IMPORT, side.OUTPUT)


def test_a_module_is_asked_for_once(host: Host, modules: ClientModules) -> None:
    assert load("far").WHO == 1
    assert load("far").__file__ == "/client/far.py"
    assert host.asked == [(1, "far")]


def test_packages_and_relative_imports(host: Host, modules: ClientModules) -> None:
    assert load("farpack").leaf.WHO == "leaf"
    assert load("farpack").__path__ == []
    assert load("farspace.inner").WHO == "farspace"
    assert not hasattr(load("farspace"), "__file__") or load("farspace").__file__ is None


def test_what_nobody_has_is_asked_for_once(host: Host, modules: ClientModules) -> None:
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="No module named 'farther'"):
            load("farther")
    assert host.asked == [(1, "farther")]
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError):
        load("farther")
    assert len(host.asked) == 2


def test_sources_are_shown(host: Host, modules: ClientModules) -> None:
    far = load("far")
    assert "raise KeyError('here')" in inspect.getsource(far.fail)
    with pytest.raises(KeyError) as caught:
        far.fail()
    assert "raise KeyError('here')" in "".join(traceback.format_exception(caught.value))


def test_clients_do_not_see_each_others(
    host: Host, modules: ClientModules, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load("far")
    monkeypatch.setattr(context, "client", 2)
    modules.switch_to(2)
    assert load("far").WHO == 2
    with pytest.raises(ModuleNotFoundError):
        load("farpack")
    monkeypatch.setattr(context, "client", 1)
    modules.switch_to(1)
    assert load("far") is first
    modules.forget(2)
    modules.forget(1)
    assert "far" not in sys.modules
    modules.switch_to(1)
    assert load("far") is not first


def test_without_a_client_nobody_is_asked(
    host: Host, modules: ClientModules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "client", 0)
    with pytest.raises(ModuleNotFoundError):
        load("far")
    assert host.asked == []


def test_a_client_that_does_not_answer_has_none(
    host: Host, modules: ClientModules, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.is_mute = True
    monkeypatch.setattr(imports, "ANSWER_SECONDS", 0.01)
    with pytest.raises(ModuleNotFoundError):
        load("far")


def test_a_lost_host_is_no_error_of_its_own(
    host: Host, modules: ClientModules, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        def handle(self, *_: object) -> None:
            pass

        def send(self, *_: object) -> None:
            raise OSError("gone")

    monkeypatch.setattr(context, "side", Gone())
    with pytest.raises(ModuleNotFoundError):
        load("far")


def test_answers_of_another_client_are_not_taken(host: Host, modules: ClientModules) -> None:
    assert IMPORT == p.IMPORT
    modules._take(2, b"\1\0\0\0whatever")  # nobody waits
    assert load("far").WHO == 1


def test_of_two_answers_to_one_question_the_first_is_taken(modules: ClientModules) -> None:
    """It is asked again when a broker sleeps; what it was asked before,
    is answered all the same.
    """
    number = b"\7\0\0\0"
    answer = modules._waiting[number] = imports._Answer()
    for body in (b"first", b"second"):
        modules._take(1, number + body)
    assert answer.body == b"first"
    assert answer.is_awaited.acquire(blocking=False)
    assert not answer.is_awaited.acquire(blocking=False)


# --- Sealed ---------------------------------------------------------------------------------------


@pytest.fixture
def sealer(host: Host, monkeypatch: pytest.MonkeyPatch) -> Sealer:
    """The client's, whose call was opened."""
    seal = Seal(bytes(32))
    host.sealer = Sealer(seal)
    monkeypatch.setattr(context, "seal", seal)
    monkeypatch.setattr(context, "root", host.sealer.root)
    return host.sealer


def test_sealed_answers_are_taken(host: Host, modules: ClientModules, sealer: Sealer) -> None:
    assert load("far").WHO == 1
    with pytest.raises(ModuleNotFoundError):
        load("farther")
    assert host.asked == [(1, "far"), (1, "farther")]


def test_an_answer_that_is_not_the_clients_is_not_read(
    host: Host, modules: ClientModules, sealer: Sealer
) -> None:
    for forge in (
        lambda body: b"x" + body[1:],
        lambda body: body[:-16],
        lambda body: b"",
        lambda body: body[:-1] + bytes([body[-1] ^ 1]),
        lambda body: body[:-16] + sealer.letter(ANSWER, bytes(16), body[:-16]),
    ):
        host.forge = forge
        with pytest.raises(SealError, match="for the module 'far' does not carry the seal"):
            load("far")
    host.forge = lambda body: body
    assert load("far").WHO == 1


def test_before_a_call_was_opened_nobody_is_asked(
    host: Host, modules: ClientModules, sealer: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "root", b"")
    with pytest.raises(ModuleNotFoundError):
        load("far")
    assert not host.asked


def test_a_client_shows_that_it_lives(
    host: Host,
    modules: ClientModules,
    sealer: Sealer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = threading.active_count()
    modules.meet(sealer.root)
    assert host.asked == [(1, "")]
    assert threading.active_count() == threads, "a task that forks must not be warned of a thread"
    host.forge = lambda body: bytes(16)
    with pytest.raises(SealError, match="whether it lives"):
        modules.meet(sealer.root)
    monkeypatch.setattr(context, "side", None)
    with pytest.raises(OSError, match="a fork of a runner"):
        modules.meet(sealer.root)


def test_a_question_that_was_lost_is_asked_again(
    host: Host, modules: ClientModules, sealer: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "MEET_SECONDS", 0.02)
    host.is_mute = True
    thread = threading.Thread(target=modules.meet, args=(sealer.root,))
    thread.start()
    wait_until(lambda: len(host.asked) >= 2, "it asks again")
    host.is_mute = False
    thread.join(20)
    assert not thread.is_alive()
