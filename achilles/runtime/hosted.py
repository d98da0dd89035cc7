"""One runner as its host has it: what it was given, what it owes, and how it ends.

Rules
    1. A chunk's tokens are written after its command (or with it, if the socket is full). Whoever
       reads a token owns the task: one that comes back is a task that did not start,
       whatever the runner did meanwhile.
    2. All that a runner wrote is read before its death is told, and its process group dies with it.
    3. A recalled chunk's command may lie unread in the socket. Its seq must not be used again
       before the runner is past it, so then chunks are held back until the runner has answered a
       ``sync``.

``achilles.runtime.runner`` draws the channel.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, TypeAlias

from achilles.core.protocol import (
    Execute,
    FromRunner,
    Parts,
    Payload,
    RunnerDied,
    RunnerDone,
    size_of,
)
from achilles.runtime.output import print_own
from achilles.runtime.process import RunnerProcess, describe_exit
from achilles.runtime.runner import LENGTH, LETTERS, QUIET_SECONDS, RECORD, SHARED
from achilles.runtime.seal import names_of, seal_result
from achilles.runtime.serialize import ERROR, INIT_FAILED, LARGE
from achilles.runtime.shared import IS_AVAILABLE
from achilles.runtime.side import OUTPUT, PARTS

if TYPE_CHECKING:
    from achilles.runtime.host import RunnerHost

LOOK_SECONDS = 0.005  # between looks after the dying, and after what there was no room for
EXIT_SECONDS = 0.5  # from the end of a runner's channel to its exit
RETIRE_SECONDS = 5.0  # the same where it was asked to exit, and runs atexit handlers
READS_MAX = 16
STALE_MAX = 100
COMMAND_MAX = (1 << 31) - (1 << 20)  # marshal's limit, less what else is in a command
_BYTES = {bytes}
HANDOFFS_MAX = 64  # of one command: each takes a descriptor of the runner's

Counts: TypeAlias = list[tuple[int, int]]
Letter: TypeAlias = tuple[int, int, bytes]
Result: TypeAlias = tuple[int, int, int, float, Payload]  # as in RunnerDone


class Frame:
    """A command on its way to a runner, and the tokens to be written after it."""

    __slots__ = ("data", "tokens")

    def __init__(self, data: memoryview, tokens: bytes) -> None:
        self.data = data
        self.tokens = tokens


class HostedChunk:
    """A chunk with tasks whose results are awaited, and the client for whom all is done."""

    __slots__ = ("client", "count", "number", "outstanding", "root")

    def __init__(self, number: int, count: int, client: int) -> None:
        self.client = client
        self.number = number  # counts this runner's chunks
        self.count = count
        self.outstanding = count
        self.root = b""  # the session's name, where calls are sealed


class HostedRunner:
    """One runner, on behalf of its host."""

    def __init__(self, host: RunnerHost, number: int) -> None:
        self.host = host
        self.number = number
        self.outbox: deque[Frame] = deque()
        self.held: deque[Execute] = deque()  # chunks that wait for the sync
        self.chunks: dict[int, HostedChunk] = {}  # by seq
        self.stale: dict[int, int] = {}  # by seq, the numbers of chunks that were recalled
        self.sent = 0  # chunks
        self.inbox = bytearray()  # the beginning of a record
        self.stream_rest = b""  # the same of the stream pipe
        self.is_syncing = False
        self.is_retired = False
        self.is_killed = False
        self.is_write_watched = False
        self.is_unwatched = False
        self.is_gone = False
        self.poll_at = 0.0  # when to look for results that it did not wake the host for
        self.cut_until = 0.0  # until when to look more often
        self.owed: set[int | None] = set()  # the clients to be told that output was dropped
        self.last_seq = 0
        self.fault = ""  # what it did, or suffered, that made us kill it
        self.deadline: float | None = None  # when it is killed if it has not exited by then
        self.process = process = RunnerProcess(host.life_read, host.environ, captures=host.captures)
        self.pid = process.pid
        self.sock = process.sock
        self.tokens = process.tokens
        self.side = process.side
        host.register(self.sock.fileno(), self.read)
        host.register(self.side.fd, self.read_side)
        for output in process.outputs:
            host.register(output.fd, self.read_output)
        if process.pidfd >= 0:
            host.register(process.pidfd, self.bury)

    def __repr__(self) -> str:
        return f"<runner {self.number}, pid {self.pid} | {len(self.chunks)} chunks>"

    # --- To the runner ---

    def execute(self, effect: Execute) -> None:
        """Send a chunk and its tokens."""
        seq = self.last_seq = effect.seq
        if self.is_retired or self.is_syncing or seq in self.stale or len(self.stale) > STALE_MAX:
            self.held.append(effect)
            if not self.is_retired and not self.is_syncing:
                self.is_syncing = True
                self.send(("sync",), b"\0")
            return
        sent = self._hand_over(effect.payloads)
        if sent is None:
            self._refuse(effect)
            return
        count = len(sent)
        self.sent += 1
        chunk = self.chunks[seq] = HostedChunk(self.sent, count, effect.root or effect.client)
        if self.host.seal is not None:
            chunk.root = names_of(effect.payloads[0])[1]
        if count > 1:
            if self not in self.host.polled:
                self.poll_at = time.monotonic() + QUIET_SECONDS
            self.host.polled.add(self)
        command = (
            "run",
            *(seq, effect.client, effect.fn, effect.init),
            *(sent, effect.attempt, effect.blobs, effect.root or effect.client),
            effect.ids if self.host.seal is not None else (),
        )
        self.send(command, bytes((seq,)) * count)

    def load(self, client: int, blob: int, payload: Payload) -> None:
        """Send a blob. Without it (if it is too large) its tasks fail, and say so."""
        sent = self._hand_over([payload])
        if sent is not None:
            self.send(("load", client, blob, *sent))

    def unload(self, command: tuple[Any, ...]) -> None:
        """Have it forget something, soon: one without work would read that with its next chunk."""
        self.send(command)
        if not (self.chunks or self.outbox or self.is_syncing or self.is_retired):
            self.is_syncing = True
            self.send(("sync",), b"\0")

    def _hand_over(self, payloads: list[Payload]) -> list[bytes | None] | None:
        """The payloads as a command has them: None for each that was handed over in shared memory.

        None for all of them: a command cannot hold what could not be handed over.
        """
        if set(map(type, payloads)) == _BYTES and max(map(len, payloads)) < LARGE:
            return payloads  # type: ignore[return-value]
        left = HANDOFFS_MAX if IS_AVAILABLE else 0
        sent: list[bytes | None] = []
        size = 0
        for payload in payloads:
            parts = payload if isinstance(payload, Parts) else (payload,)
            if left and size_of(payload) >= LARGE and self.process.handoff.send(parts):
                left -= 1
                sent.append(None)
            else:
                size += size_of(payload)
                if size > COMMAND_MAX:
                    self.send(("discard", sent.count(None)))
                    return None
                sent.append(b"".join(parts))
        return sent

    def _refuse(self, effect: Execute) -> None:
        """Fail the tasks of a chunk that is too large to be sent."""
        from achilles.runtime.tracebacks import dump_error

        text = "more than 2 GiB of arguments at once, and no shared memory to hand them over"
        error = dump_error(OverflowError(text))
        errors: list[Any] = [error] * len(effect.payloads)
        if (seal := self.host.seal) is not None:
            errors = [
                seal_result(seal.result(names_of(payload)[0]), id, ERROR, error)
                for id, payload in zip(effect.ids, effect.payloads, strict=True)
            ]
        results = [(effect.seq, index, ERROR, 0.0, error) for index, error in enumerate(errors)]
        self.host.events.append(RunnerDone(self.number, results))

    def send(self, command: tuple[Any, ...], tokens: bytes = b"") -> None:
        """Send a command, and when it is out its tokens."""
        body = marshal.dumps(command)
        data = LENGTH.pack(len(body)) + body
        sent = given = 0
        if not self.outbox:
            try:
                sent = self.sock.send(data)
                if sent == len(data):
                    if not tokens:
                        return
                    given = self.tokens.write(tokens)
                    if given == len(tokens):
                        return
            except OSError:
                pass  # full, for now; or dead, as will be noticed
        self.outbox.append(Frame(memoryview(data)[sent:], tokens[given:]))
        self._flush()

    def _flush(self) -> None:
        """Write what the runner takes of the outbox."""
        outbox = self.outbox
        try:
            while outbox:
                frame = outbox[0]
                while frame.data:
                    frame.data = frame.data[self.sock.send(frame.data) :]
                self._give(frame)
                outbox.popleft()
        except BlockingIOError:
            with contextlib.suppress(BlockingIOError):
                for frame in outbox:  # an idle runner reads commands only when it gets a token
                    self._give(frame)
        except OSError:
            return  # it died, as will be noticed; what is in the outbox did not start
        self._watch_writes(bool(outbox and outbox[0].data))
        if outbox:
            self.host.polled.add(self)
        elif self.is_retired:
            self.tokens.end()

    def _give(self, frame: Frame) -> None:
        while frame.tokens:
            frame.tokens = frame.tokens[self.tokens.write(frame.tokens) :]

    def _watch_writes(self, is_wanted: bool) -> None:
        if is_wanted != self.is_write_watched and not self.is_unwatched:
            self.is_write_watched = is_wanted
            self.host.register(self.sock.fileno(), self.read, write=is_wanted)

    def recall(self, *, keeps_first: bool = False) -> Counts:
        """Take back what has not started, but the first task if none has; how many by chunk."""
        taken = self.tokens.take()
        if keeps_first and taken and not self.is_retired and self._has_started_nothing(taken):
            self.tokens.write(taken[:1])
            taken = taken[1:]
        counts = Counter(taken)
        for frame in self.outbox:
            counts.update(frame.tokens)
            frame.tokens = b""
        is_synced = counts.pop(0, 0) == 0
        if counts:  # a chunk that is cut does not tell of its end
            self.poll_at = time.monotonic()
            self.cut_until = self.poll_at + QUIET_SECONDS
        for seq, count in counts.items():
            chunk = self.chunks[seq]
            self.stale[seq] = chunk.number
            chunk.outstanding -= count
            self._settle(seq, chunk)
        unstarted = [*counts.items(), *((one.seq, len(one.payloads)) for one in self.held)]
        self.held.clear()
        if not is_synced:
            self.outbox.append(Frame(memoryview(b""), b"\0"))
            self._flush()
        return unstarted

    def _has_started_nothing(self, taken: bytes) -> bool:
        """Whether all that it has waits: what was ``taken`` back, and what is in the outbox."""
        waiting = len(taken) + sum(len(frame.tokens) for frame in self.outbox)
        is_syncing = 0 in taken or any(0 in frame.tokens for frame in self.outbox)
        outstanding = sum(chunk.outstanding for chunk in self.chunks.values())
        return not is_syncing and waiting == outstanding

    def retire(self) -> None:
        """Let it exit when it has run what it has."""
        self.is_retired = True
        if not self.outbox:
            self.tokens.end()

    def write(self, kind: int, client: int, body: bytes) -> None:
        """Send a letter on the side channel."""
        self.side.send(kind, client, body)
        if self.side.is_full and not self.is_unwatched:
            self.host.register(self.side.fd, self.read_side, write=True)

    # --- From the runner ---

    def read_side(self) -> None:
        """The side channel is ready."""
        if self.side.is_full:
            self.side.flush()
            if not self.side.is_full and not self.is_unwatched:
                self.host.register(self.side.fd, self.read_side)
        letters = self.side.receive()
        if letters is None:  # a task may have closed it
            self.host.unregister(self.side.fd)
        self._take_letters(letters or [])

    def _take_letters(self, letters: list[Letter]) -> None:
        for kind, client, body in letters:
            if kind == PARTS:  # what was done before that bundle is to be known first
                self._read_stream()
            if kind != OUTPUT:  # that comes through pipes, with a limit
                self.host.events.append(FromRunner(self.number, client, kind, body))

    def read_output(self, *, is_all: bool = False) -> None:
        """Take what was printed; it is that of the oldest chunk that has open tasks."""
        now = time.monotonic()
        chunk = next(iter(self.chunks.values()), None)
        client = None if chunk is None else chunk.client
        is_owed = False
        for output in self.process.outputs:
            if not output.is_open:
                continue
            for piece in output.read(now, client, is_all=is_all or chunk is None):
                self._pass_on(output.stream, piece, chunk)
            if not output.is_open:
                self.host.unregister(output.fd)
                self.process.printing.unregister(output.fd)
            is_owed = is_owed or output.owes(client)
        if is_owed != (client in self.owed):
            self.owed ^= {client}
            self._update_polled()

    def _pass_on(self, stream: int, piece: bytes, chunk: HostedChunk | None) -> None:
        """Tell the chunk's client what was printed; what is nobody's goes where we print."""
        if chunk is None:
            print_own(piece)
            return
        body = self.host.sealed(bytes((stream,)) + piece, chunk.root)
        self.host.events.append(FromRunner(self.number, chunk.client, OUTPUT, body))

    def _tell_dropped(self, chunk: HostedChunk | None) -> None:
        """The chunk's client hears no more of this runner: say how much output was dropped last."""
        client = None if chunk is None else chunk.client
        self.owed.discard(client)
        for output in self.process.outputs:
            if notice := output.last_notice(client):
                self._pass_on(output.stream, notice, chunk)

    def poll(self) -> None:
        """Do what no descriptor wakes the host for."""
        self._read_stream()
        if self.outbox:
            self._flush()
        if self.owed:
            self.read_output()
        self._update_polled()

    def read(self) -> None:
        """The socket is ready: read what it has, and the stream pipe's results, which are older."""
        if self.is_gone:
            return
        if self.outbox:
            self._flush()
        data, is_end = self._receive()
        if self in self.host.polled:
            self._read_stream()
        if data:
            self._take(data)
        if is_end:
            self._unwatch()
            self._expect_exit(RETIRE_SECONDS if self.is_retired else EXIT_SECONDS)

    def _receive(self) -> tuple[bytes, bool]:
        """What the socket has, up to a bound, and whether it has ended."""
        parts: list[bytes] = []
        buffer = self.host.buffer
        while len(parts) < READS_MAX:
            try:
                count = self.sock.recv_into(buffer)
            except BlockingIOError:
                break
            except OSError:
                count = 0  # it was reset
            if not count:
                return b"".join(parts), True
            parts.append(bytes(buffer[:count]))
            if count < len(buffer):
                break
        return (parts[0] if len(parts) == 1 else b"".join(parts)), False

    def _take(self, data: bytes) -> None:
        """Take records of the socket."""
        if self.inbox:
            self.inbox += data
            if len(self.inbox) < RECORD.size:
                return
            _, status, _, _, length = RECORD.unpack_from(self.inbox)
            if not status & SHARED and len(self.inbox) < RECORD.size + length:
                return
            data = bytes(self.inbox)
            self.inbox.clear()
        rest = self._parse(data)
        if rest:
            self.inbox += rest

    def _read_stream(self) -> None:
        """Take records of the stream pipe."""
        now = time.monotonic()
        self.poll_at = now + (LOOK_SECONDS if now < self.cut_until else QUIET_SECONDS)
        buffer, buffers = self.host.buffer, (self.host.buffer,)
        try:
            while count := os.readv(self.process.stream, buffers):
                self.stream_rest = self._parse(self.stream_rest + bytes(buffer[:count]))
        except BlockingIOError:
            pass

    def _parse(self, data: bytes) -> bytes:
        """Take whole records off ``data``; the rest."""
        if self.fault:
            return b""  # it is as good as dead
        if self.process.outputs and self.process.has_printed():
            self.read_output(is_all=True)  # what a task printed comes before its result
        results: list[Result] = []
        unpack, size = RECORD.unpack_from, RECORD.size
        chunks = self.chunks
        at, end = 0, len(data)
        while at + size <= end:
            seq, status, index, seconds, length = unpack(data, at)
            start = at + size
            at = start if status & SHARED else start + length
            if at > end:
                at = start - size
                break
            if not seq and self.is_syncing:
                self._synced()
                continue
            chunk = chunks.get(seq)
            payload: Payload = data[start:at]
            if status & LETTERS:
                status ^= LETTERS
                self._take_letters(self.side.drain())
            if status > INIT_FAILED:
                status ^= SHARED
                shared = self._receive_shared() if status <= INIT_FAILED else None
                if shared is None:
                    chunk = None
                else:
                    payload = shared
            if chunk is None or index >= chunk.count:
                self._fail("wrote something else than results to the worker's pipe")
                break
            results.append((seq, index, status, seconds, payload))
            chunk.outstanding -= 1
            if not chunk.outstanding:
                self._settle(seq, chunk)
                if self.stale:  # older chunks' commands were passed over
                    self.stale = {s: n for s, n in self.stale.items() if n >= chunk.number}
        if results:
            self._tell(results)
        return data[at:]

    def _tell(self, results: list[Result]) -> None:
        """Note results, with those that came just before: a chunk's last comes another way."""
        events = self.host.events
        last = events[-1] if events else None
        if type(last) is RunnerDone and last.runner == self.number:
            last.results += results
        else:
            events.append(RunnerDone(self.number, results))

    def _receive_shared(self) -> Payload | None:
        try:
            return Parts((self.process.handoff.receive(keep=self.host.hands_on),))
        except OSError as error:
            self._fail(f"gave a result that could not be received: {error}")
            return None

    def _settle(self, seq: int, chunk: HostedChunk) -> None:
        """A chunk may have no task outstanding any more."""
        if not chunk.outstanding:
            del self.chunks[seq]
            client = chunk.client
            is_last = client in self.owed and all(c.client != client for c in self.chunks.values())
            if is_last:
                self._tell_dropped(chunk)
            if is_last or chunk.count > 1:
                self._update_polled()

    def _update_polled(self) -> None:
        polled = self.host.polled
        if self.owed:
            if self not in polled:
                self.poll_at = time.monotonic() + QUIET_SECONDS
            polled.add(self)
        elif not self.outbox and all(chunk.count == 1 for chunk in self.chunks.values()):
            polled.discard(self)

    def _synced(self) -> None:
        self.is_syncing = False
        self.stale.clear()
        held, self.held = self.held, deque()
        for effect in held:
            self.execute(effect)

    # --- The end ---

    def kill(self) -> None:
        """End it and all that it started; it is buried as soon as it is gone."""
        self.is_killed = True
        self.process.signal_group()
        self._expect_exit(EXIT_SECONDS)

    def end(self, deadline: float) -> None:
        """Wait until it has exited, and kill it at the deadline."""
        watched = self.process.pidfd if self.process.pidfd >= 0 else self.sock.fileno()
        ready = select.poll()
        ready.register(watched, select.POLLIN)
        while not self.is_gone:
            left = deadline - time.monotonic()
            if left <= 0 and not self.is_killed:
                self.kill()
            is_sure = self.process.pidfd >= 0 and left > 0
            ready.poll(1000 * min(left, 1.0) if is_sure else 1000 * LOOK_SECONDS)
            self.poll()
            self.bury()

    def _fail(self, fault: str) -> None:
        """It cannot be trusted any more."""
        self.fault = self.fault or fault
        self._expect_exit(0.0)

    def _expect_exit(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.deadline = deadline if self.deadline is None else min(deadline, self.deadline)
        self.host.dying.add(self)

    def bury(self) -> None:
        """If it has exited, tell all it wrote and then its death; kill it if its time is up."""
        if self.is_gone:
            return
        if not self.process.has_exited():
            if self.deadline is not None and time.monotonic() >= self.deadline:
                if not self.fault and self.is_retired:
                    self.fault = "did not exit when it was asked to"
                elif not self.fault:
                    self.fault = "lost its pipe to the worker (did the task close it?)"
                self.process.signal_group()
            return
        self.process.signal_group()
        code = self.process.reap()
        self._read_last()
        unstarted = self.recall()
        for chunk in (*self.chunks.values(), None):
            self._tell_dropped(chunk)
        self.is_gone = True
        reason = self._reason(code)
        self.host.events.append(RunnerDied(self.number, reason, unstarted, self.last_seq))
        self._unwatch()
        if self.process.pidfd >= 0:
            self.host.unregister(self.process.pidfd)
        self.process.close()
        self.host.runners.pop(self.number, None)
        self.host.dying.discard(self)
        self.host.polled.discard(self)

    def _read_last(self) -> None:
        """Read what it left behind."""
        self.read_output(is_all=True)
        self._read_stream()
        is_end = False
        while not is_end:
            data, is_end = self._receive()
            if not data:
                break
            self._take(data)
        self._take_letters(self.side.drain())

    def _unwatch(self) -> None:
        if not self.is_unwatched:
            self.is_unwatched = True
            self.host.unregister(self.sock.fileno())
            self.host.unregister(self.side.fd)
            for output in self.process.outputs:
                self.host.unregister(output.fd)

    def _reason(self, code: int | None) -> str:
        """How it ended, for people; empty where it was asked to."""
        if self.is_killed:
            return "was killed"
        if self.fault:
            return f"{self.fault}, and was killed"
        if self.is_retired and code == 0:
            return ""
        return describe_exit(code)
