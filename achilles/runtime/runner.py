"""The child process that runs user code: one task after the other, for as long as it gets tokens.

    host ── socket: commands ──▶ runner      a command is ``<I length>`` and a marshalled tuple
         ── tokens: one byte a task ──▶      the byte is the chunk's seq; whoever reads it owns the task
         ◀── socket: records ──              wakes the host: a chunk's last result, or news after a slow task
         ◀── stream: records ──              does not wake the host: the results in between
         ◀── handoff: memory ──▶             large payloads, in the order in which the other channels name them
         ◀── side: letters ──▶               all else: see `side`
         ── life ──▶                         closed when the host dies

Rules
    1. Without a token no task starts. The host takes tokens back to recall tasks,
       so what it took never runs.
    2. A token of another chunk means that the rest of this chunk was recalled. Commands are read
       only then, in order, up to the chunk that the token names; what is skipped on the way was
       recalled too. Token 0 names no chunk but the next ``sync`` command,
       which is answered by a record with seq 0.
    3. A result is on its way before the next task starts:
       a timer could not send it while a task holds the GIL.
    4. Nothing that a task raises ends the runner. A channel that does not work ends it at once.
    5. What a task changes in its process (directory, environment, signal handlers) stays for the
       next ones.
    6. What a task wrote to the side channel is there before its result, which says so (`LETTERS`).
    7. Where the setup brings a code key, nothing of a task is unpickled before its seal was found
       to be right.
    8. Start-up is the floor of every recovery, so this module imports next to nothing.
"""

from __future__ import annotations

import marshal
import os
import select
import sys
from _struct import Struct
from time import perf_counter, thread_time

from achilles.runtime import context
from achilles.runtime.life import die_with
from achilles.runtime.serialize import (
    ERROR,
    INIT_FAILED,
    LARGE,
    SHARING,
    Buffer,
    Encoded,
    dump_result,
    is_stateless,
    loads,
    split_inline,
)
from achilles.runtime.side import RunnerSide

TYPE_CHECKING = False  # as type checkers know it; importing typing takes longer than all the rest
if TYPE_CHECKING:
    from typing import Any, NoReturn, TypeAlias

    from achilles.runtime.arguments import Resolve
    from achilles.runtime.arrivals import Snapshot
    from achilles.runtime.imports import ClientModules
    from achilles.runtime.seal import Opener
    from achilles.runtime.shared import Handoff

RECORD = Struct("<BBxxIfQ")  # seq, status, index in the chunk, seconds, length of the payload
LENGTH = Struct("<I")
SHARED = 0x40  # in a record's status: the payload comes by handoff, not behind the record
LETTERS = 0x20  # the same: read the side channel first
STREAM_MAX = 4096 - RECORD.size  # of a payload: a write of up to PIPE_BUF is whole or not at all
# A chunk wakes the host before its end at most so often, and most are over by then; as often the
# host looks by itself, for results that lie in the stream pipe behind a task that takes long.
QUIET_SECONDS = 0.086
READ_MAX = 1 << 16
HOT_SECONDS = 0.001  # a shorter wait for a token than this is worth a core that nobody wants
RETRY_SECONDS = 0.005  # how long it is taken not to be worth it, when no token came for so long
BRIEF_SECONDS = 2e-5  # a shorter wait says nothing of the core
OWN_PART = 0.95  # of a wait has to pass on the core, for nobody else to want it
LEAVE_AT = 10  # waits in a row in which others took the core, until it is left to them
CROWDED_MAX = 200  # of those, until they are taken to want all cores
COLD_SECONDS = 0.05  # how long a core is taken to be wanted, or not worth it, once it was
ALIVE_SECONDS = 60.0  # for so long a client is taken to live that has shown it
NOBODY = (b"", 0.0)  # the name of a client that was not met, and until when it is taken to live
ARRIVALS = "achilles.runtime.arrivals"  # imported when the first function of a program comes
CHANNEL_LOST = 74  # exit code (EX_IOERR): the host is gone, or a task closed our descriptors

# seq, client, fn, init, payloads, attempt, blobs, root, ids
Chunk: TypeAlias = "tuple[int, int, int, int, list[Any], int, tuple[int, ...], int, list[int]]"

_offer_core = getattr(os, "sched_yield", lambda: None)


def _leave_core() -> None:
    """Go on on another core, if there is one."""
    try:
        with open("/proc/thread-self/stat", "rb") as file:
            here = int(file.read().rpartition(b")")[2].split()[36])
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, allowed - {here})
        os.sched_setaffinity(0, allowed)
    except (AttributeError, OSError):
        pass  # there is none, or no way to say so


class Runner:
    """Reads commands, runs tasks, writes results."""

    def __init__(self, sock: int, tokens: int, stream: int, handoff: int) -> None:
        self.sock = sock
        self.tokens = tokens
        poll = select.poll()
        poll.register(tokens, select.POLLIN)
        self.poll = poll.poll
        self.got_at = 0.0  # the last token
        self.is_hot = False  # the last wait for one was short
        self.cold_until = 0.0  # until then others want the core
        self.crowded = 0  # how often in a row they did
        self.stream = stream
        self.handoff_fd = handoff
        self.handoff: Handoff | None = None  # made on first use: large payloads are rare
        self.woken = 0.0  # when a record last went to the socket
        self.is_fork = False
        self.rest = b""  # what was read of the socket behind the last command
        self.blobs: dict[tuple[int, int], bytes] = {}
        self.functions: dict[tuple[int, int], Any] = {}  # values of blobs that hold no state
        self.snapshots: dict[tuple[int, int], Snapshot] = {}  # the globals that those want
        self.modules: ClientModules | None = None  # of those clients that are elsewhere
        self.inits: dict[tuple[int, int], bytes | None] = {}  # how the initializers ended
        self.opener: Opener | None = None  # where calls are sealed
        # By client, the name of its session, and until when that lives
        self.roots: dict[int, tuple[bytes, float]] = {}
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """In a task's forked child: it must neither answer nor keep the channel open."""
        self.is_fork = True
        fds = [self.sock, self.tokens, self.stream]
        if self.handoff is None:
            fds.append(self.handoff_fd)
        else:
            self.handoff.close()
        for fd in fds:
            try:
                os.close(fd)
            except OSError:
                pass
        if context.side is not None:
            context.side.close()
            context.side = None

    # --- Commands ---

    def serve(self) -> None:
        """Run tasks until the host closes the token pipe."""
        self._command()  # the setup comes first, and at once
        token = os.read(self.tokens, 1)
        while token:
            seq = token[0]
            chunk = self._command()
            while chunk is None or chunk[0] != seq:
                chunk = self._command()
            if seq:
                token = self._run(chunk)
            else:
                self._write(RECORD.pack(0, 0, 0, 0.0, 0))
                token = self._next_token()

    def _next_token(self) -> bytes:
        """Wait for the next token; empty if the host has no more work for this runner.

        Going to sleep and being woken costs more than a short task, so where tokens have been
        coming at short intervals, the runner looks for the next one for a moment before it sleeps.
        And where it keeps a core busy, the other threads that the next task passes through share
        the other cores, and are not sent to sleep and woken so often: that takes a third off the
        round trip through a broker on two cores. It offers the core to others all the while. Where
        they take it again and again, it goes to another core, for a thread that was last on this
        one is woken here until the kernel has seen that it is busy; where that does not help, or no
        token comes, it does not try again for some time.
        """
        started = perf_counter()
        if self.is_hot and started > self.cold_until and started - self.got_at < HOT_SECONDS:
            ran = thread_time()
            is_there = self.poll
            while not (is_found := is_there(0)) and perf_counter() - started < HOT_SECONDS:
                _offer_core()
            looked = perf_counter() - started
            if not is_found:
                self.cold_until = started + RETRY_SECONDS
            elif looked >= BRIEF_SECONDS:
                self._note_company(thread_time() - ran < OWN_PART * looked)
        token = os.read(self.tokens, 1)
        self.got_at = perf_counter()
        self.is_hot = self.got_at - started < HOT_SECONDS
        return token

    def _note_company(self, is_wanted: bool) -> None:
        """Whether others took the core during the last wait."""
        if not is_wanted:
            self.crowded = 0
            return
        self.crowded += 1
        if self.crowded % LEAVE_AT == 0:
            _leave_core()
        if self.crowded > CROWDED_MAX:
            self.crowded = 0
            self.cold_until = perf_counter() + COLD_SECONDS

    def _command(self) -> Chunk | None:
        """Obey the next command; a chunk (a sync: one with seq 0) is returned instead."""
        data = self.rest or os.read(self.sock, READ_MAX)
        if len(data) < 4:
            data = self._read_more(data, 4)
        size = 4 + LENGTH.unpack_from(data)[0]
        if len(data) < size:
            data = self._read_more(data, size)
        self.rest = data[size:]
        match marshal.loads(memoryview(data)[4:size]):
            case ("run", *chunk):
                payloads = chunk[4]
                if None in payloads:
                    payloads[:] = [self._receive() if one is None else one for one in payloads]
                return tuple(chunk)
            case ("load", client, blob, payload):
                if payload is None:  # each task has its own copy of what is in it
                    payload = self._receive(keep=True).toreadonly()
                self.blobs[client, blob] = payload
                if self.opener is not None:
                    self.functions.pop((client, blob), None)
                    self.opener.changed([(client, blob)])
            case ("forget", client, [*blobs]):
                self._forget([(client, blob) for blob in blobs])
            case ("forget_client", client):
                self._forget_client(client)
                self._forget(
                    [key for key in (*self.blobs, *self.functions, *self.inits) if key[0] == client]
                )
            case ("discard", count):
                for _ in range(count):
                    self._receive()
            case ("setup", setup):
                _setup(setup["path"], setup["argv"], setup["cwd"], setup["authkey"])
                context.cluster, context.credit = setup["cluster"], setup["credit"]
                if setup["captures"]:
                    _print_by_line()
                if setup["is_remote"]:
                    from achilles.runtime.imports import install

                    self.modules = install()
                if setup["code"] is not None:
                    from achilles.runtime.seal import Opener, Seal

                    context.seal = Seal(setup["code"])
                    self.opener = Opener(context.seal, self.blobs)
            case ("sync",):
                return (0, 0, 0, 0, [], 1, (), 0, [])
            case unknown:
                raise OSError(f"not a command: {str(unknown)[:200]}")
        return None

    def _read_more(self, data: bytes, size: int) -> bytes:
        """At least ``size`` bytes, of which ``data`` are the first."""
        parts = [data]
        missing = size - len(data)
        while missing > 0:
            part = os.read(self.sock, max(missing, READ_MAX))
            if not part:
                raise OSError("the host closed the socket")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _receive(self, *, keep: bool = False) -> Any:
        """The next payload that the host handed over."""
        return self._open_handoff().receive(keep=keep)

    def _open_handoff(self) -> Handoff:
        if self.handoff is None:
            import _socket

            from achilles.runtime.shared import Handoff

            self.handoff = Handoff(_socket.socket(fileno=self.handoff_fd))
        return self.handoff

    def _forget(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            self.blobs.pop(key, None)
            self.functions.pop(key, None)
            self.snapshots.pop(key, None)
            self.inits.pop(key, None)
        if self.opener is not None:
            self.opener.changed(keys)

    def _switch_to(self, client: int) -> None:
        """The next task is perhaps another client's, with modules and a program of its own."""
        if self.modules is not None:
            self.modules.switch_to(client)
        if (arrivals := sys.modules.get(ARRIVALS)) is not None:
            arrivals.switch_to(client)

    def _forget_client(self, client: int) -> None:
        """Drop what is kept of a client beside its blobs."""
        nested = sys.modules.get("achilles.nested")
        if nested is not None:
            nested.forget(client)
        if self.modules is not None:
            self.modules.forget(client)
        if (arrivals := sys.modules.get(ARRIVALS)) is not None:
            arrivals.forget(client)
        self.roots.pop(client, None)

    # --- Tasks ---

    def _run(self, chunk: Chunk) -> bytes:
        """Run the chunk's tasks while tokens are its own; the first token that is not
        (empty at the end).
        """
        seq, client, fn, init, payloads, attempt, blobs, root, ids = chunk
        read, write, pack, clock = os.read, os.write, RECORD.pack, perf_counter
        tokens, stream = self.tokens, self.stream
        own = bytes((seq,))
        last = len(payloads) - 1
        context.client, context.attempt, context.seq = root, attempt, seq
        side = context.side
        self._switch_to(root)
        opener, failed = self.opener, None
        if opener is not None:
            opener.begin(client, root, (fn, init, blobs))
            context.root = self.roots.get(root, NOBODY)[0]
        elif init:
            failed = self._initialize(root, init)
        shared = self.functions.get((client, fn))
        snapshot = self.snapshots.get((client, fn))
        if snapshot is not None and not snapshot.holds():
            shared = None  # tasks that were submitted with other globals came between
        resolve = self._resolver(client) if blobs else None
        call: Any = shared
        data: Encoded | None
        for index, payload in enumerate(payloads):
            if index:
                call, data = shared, None
                if blobs and not self.poll(0):  # what was to come was called back
                    _let_go_of_written()
                if (token := read(tokens, 1)) != own:
                    _flush()
                    return token
            payloads[index] = args = None
            if opener is not None:
                payload, failed = self._open(opener, root, init, ids[index], payload)
            started = clock()
            try:
                if failed is not None:
                    status, data = failed
                else:
                    if shared is None:
                        call, payload = self._function(client, fn, payload, resolve)
                        shared = self.functions.get((client, fn))
                    args, kwargs = loads(payload, resolve)
                    status, data = dump_result(call(*args, **kwargs), call)
            except BaseException as error:
                status, data = ERROR, _dump_error(error, is_loaded=args is not None)
            if self.is_fork:
                _leave_fork()
            payload = args = kwargs = None
            ended = clock()
            if opener is not None:
                data = opener.result(ids[index], status, data)
            if side is not None and side.is_used:
                side.settle()
                status |= LETTERS
            if (
                index != last
                and ended - self.woken < QUIET_SECONDS
                and type(data) is bytes
                and len(data) <= STREAM_MAX
            ):
                try:
                    write(stream, pack(seq, status, index, ended - started, len(data)) + data)
                    continue
                except BlockingIOError:
                    pass  # full, so it is high time to wake the host
            _flush()
            self._answer(seq, status, index, ended - started, data)
        payloads = call = shared = data = None  # type: ignore[assignment]
        _let_go_of_written()
        return self._next_token()

    def _open(
        self, opener: Opener, root: int, init: int, id: int, payload: Any
    ) -> tuple[Any, tuple[int, Encoded] | None]:
        """A sealed call's payload, and what is its result already:
        it is not as its client sealed it, or has no initializer.
        """
        try:
            payload = opener.open_call(id, payload)
            name, alive_until = self.roots.get(root, NOBODY)
            if name != opener.root or perf_counter() >= alive_until:
                self._meet(root, opener.root, known=name)
        except Exception as error:
            return None, (ERROR, _dump_error(error, is_loaded=True))
        return payload, self._initialize(root, init) if init else None

    def _meet(self, client: int, name: bytes, *, known: bytes) -> None:
        """See to it that the session for which a call was sealed lives,
        and that what is kept of the client is its own.

        Raises:
            SealError: somebody else says that it lives.
            OSError: the host is gone.
        """
        if known != name:  # the number was another client's, if anybody's
            self._forget_client(client)
            self.inits = {key: end for key, end in self.inits.items() if key[0] != client}
            self._switch_to(client)
        if self.modules is not None:
            self.modules.meet(name)
        self.roots[client] = name, perf_counter() + ALIVE_SECONDS
        context.root = name

    def _blob(self, key: tuple[int, int]) -> Any:
        """What was loaded under that number, without its seal."""
        return self.blobs[key] if self.opener is None else self.opener.body(key)

    def _resolver(self, client: int) -> Resolve:
        """What finds the large objects that calls of this client refer to:
        immutable ones once, others anew.
        """

        def resolve(kind: int, number: int) -> Any:
            key = (client, number)
            if key in self.functions:
                return self.functions[key]
            if key not in self.blobs:
                raise RuntimeError(f"the worker did not pass object {number} on to its runner")
            from achilles.runtime.arguments import BUFFER, take

            value = take(kind, self.blobs[key], 0 if self.opener is None else self.opener.behind)
            if kind != BUFFER:
                self.functions[key] = value
                del self.blobs[key]
            return value

        return resolve

    def _function(
        self, client: int, fn: int, payload: Any, resolve: Resolve | None
    ) -> tuple[Any, Any]:
        """The task's function, and its payload without it. A function without state is kept."""
        if fn == 0:
            return split_inline(payload, resolve)
        if (client, fn) not in self.blobs:
            raise RuntimeError(f"the worker did not pass function {fn} on to its runner")
        blob = self._blob((client, fn))
        if blob[0] == SHARING:  # what it has of these a task may write to
            return loads(blob, resolve), payload
        context.pickle = f"{client}-{fn}"
        try:
            call = loads(blob, resolve)
        finally:
            context.pickle = ""
            arrivals = sys.modules.get(ARRIVALS)
            snapshot = None if arrivals is None else arrivals.take_snapshot()
        if is_stateless(call) or hasattr(call, "cache_parameters"):  # or whose state is to stay
            self.functions[client, fn] = call
            if snapshot is not None:
                self.snapshots[client, fn] = snapshot
        return call, payload

    def _initialize(self, client: int, init: int) -> tuple[int, Encoded] | None:
        """Run the client's initializer unless it ran here; the result of every task if it raised.

        It is the one of the client that all is done for in the end,
        whichever task has submitted this one.
        """
        key = (client, init)
        if key not in self.inits:
            try:
                initializer, initargs = loads(self._blob(key))
                initializer(*initargs)
                self.inits[key] = None
            except BaseException as error:
                self.inits[key] = _dump_error(error, is_loaded=True)
            if self.is_fork:
                _leave_fork()
        failure = self.inits[key]
        return None if failure is None else (INIT_FAILED, failure)

    # --- Results ---

    def _answer(self, seq: int, status: int, index: int, seconds: float, data: Encoded) -> None:
        """Send one result, and wake the host."""
        parts = [data] if isinstance(data, bytes) else data
        size = sum(map(len, parts))
        if size >= LARGE and hasattr(os, "memfd_create") and self._open_handoff().send(parts):
            self._write(RECORD.pack(seq, status | SHARED, index, seconds, size))
            return
        self._write(RECORD.pack(seq, status, index, seconds, size), *parts)

    def _write(self, *parts: Buffer) -> None:
        """Write to the socket all there is, however long that takes."""
        data = b"".join(parts)
        sent = os.write(self.sock, data)
        while sent < len(data):
            sent += os.write(self.sock, memoryview(data)[sent:])
        self.woken = perf_counter()


def _setup(
    path: list[str] | None, argv: list[str] | None, cwd: str | None, authkey: bytes | None
) -> None:
    if path is not None:
        context.is_embedded = True
        sys.path[:] = path
    if argv is not None:
        sys.argv[:] = argv
    if cwd is not None:
        try:
            os.chdir(cwd)
        except OSError:
            pass  # it is gone, or not ours to enter; tasks that need it will say so
    if authkey is not None:
        from achilles.runtime.authkey import set_authkey

        set_authkey(authkey)


def _print_by_line() -> None:
    """Let each line that a task prints be seen at once, and as one,
    whatever PYTHONUNBUFFERED says.
    """
    for file in (sys.stdout, sys.stderr):
        reconfigure = getattr(file, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True, write_through=False)


def _dump_error(error: BaseException, *, is_loaded: bool) -> bytes:
    from achilles.runtime.tracebacks import dump_error

    return dump_error(error, is_loaded=is_loaded)


def _flush() -> None:
    """Let what a task printed be seen before its result is."""
    for file in (sys.stdout, sys.stderr):
        try:
            if file is not None:
                file.flush()
        except Exception:
            pass  # the user's own file object, or a closed one


def _let_go_of_written() -> None:
    """Free the memory of what tasks wrote to large arguments of theirs."""
    shared = sys.modules.get("achilles.runtime.shared")
    if shared is not None:
        shared.tidy()


def _leave_fork() -> NoReturn:
    """End a child that a task forked and that came back from the task."""
    _flush()
    os._exit(0)


def main(sock: int, tokens: int, stream: int, handoff: int, side: int, life: int) -> None:
    """Run tasks on these descriptors until the host closes the token pipe."""
    for fd in (sock, tokens, stream, handoff, side, life):
        os.set_inheritable(fd, False)
    die_with(life, CHANNEL_LOST)
    os.set_blocking(stream, False)
    try:
        import faulthandler

        faulthandler.enable()
    except Exception:
        pass  # no stderr to report to
    try:
        context.side = RunnerSide(side)
        Runner(sock, tokens, stream, handoff).serve()
        os.close(sock)
    except OSError:
        os._exit(CHANNEL_LOST)  # nobody waits for this process any more
    except BaseException:  # of a signal's handler that a task has left, say
        import traceback

        traceback.print_exc()
        os._exit(
            1
            # Python's own end waits for threads that tasks have left,
            # while its host waits for this process
        )
