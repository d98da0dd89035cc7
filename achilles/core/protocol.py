"""Every message, its rules, and the codec; nothing else in achilles defines a message.

Rules
    1. A message is both an event and an effect: cores take messages in and give messages out.
    2. Payloads are opaque. No core looks inside one, and the broker could not if it wanted to.
    3. ``decode`` raises `ProtocolError` for anything a peer could send that is not a message,
       and nothing else.
    4. Counts and sizes that a peer controls are bounded here, before a core sees them.

On the wire a message is ``[header + body, part, part, ...]``: a fixed header (see `Header`), the
message in msgpack, and behind it the parts of payloads that are too large to be copied into the
body. A payload of the body that travels in parts is the number of its parts there.

    client  ──ClientHello Submit Blob Forget Cancel Finish──▶  broker  ──Run Blob Forget Revoke Lend──▶  worker
            ◀──Welcome Credit Running Results Failed Finished──        ◀──WorkerHello Done Returned Crashed──

    to a broker that follows another   client  ──Submit(is_again) … Resumed──▶  ◀──Held Done … Resumed──  worker

    a task, as a client  ── its worker ──Relay(Submit Blob Forget Cancel)──▶  broker
                                       ◀──Relay(Running Results Failed Cluster)──

A worker and its runners speak in messages too (`Spawn` … `RunnerDied`). They never cross a wire as
such: ``runtime.host`` turns them into what a child process reads and writes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

import msgspec

from achilles.errors import ProtocolError

VERSION = 1

# Parts keep a frame below the sockets' MAXMSGSIZE of 16 MiB, and small: libzmq's one thread
# encrypts a frame as a whole (2 ms a MiB), and all other peers wait for that. Below INLINE_MAX a
# copy is cheaper than a frame of its own.
INLINE_MAX = 64 * 1024
PART_MAX = 1024 * 1024
BODY_MAX = 4 * 1024 * 1024  # payloads in one body, of however many tasks
PARTS_MAX = 16_384
TASKS_MAX = 10_000
FRAMES_MAX = 1 + TASKS_MAX + PARTS_MAX  # of one message, whatever it is
BLOBS_MAX = 64  # of one group
TAGS_MAX, TAG_MAX = 64, 64  # of one worker or task, and characters of each
NAME_MAX = 200  # characters of what a peer says of itself
SLOTS_MAX = 4096  # of one worker
LETTER_MAX = 5 << 20
COMING_MAX = PART_MAX * PARTS_MAX
TEXT_MAX = 4096

Buffer: TypeAlias = "bytes | bytearray | memoryview"


class Parts(tuple["Buffer", ...]):
    """A payload in several buffers; its value is their concatenation."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return sum(memoryview(part).nbytes for part in self)

    def join(self) -> bytes:
        return b"".join(self)


if TYPE_CHECKING:
    Payload: TypeAlias = bytes | memoryview | Parts
else:
    Payload = bytes | int  # as msgspec decodes it: the bytes, or the number of parts

# Lengths are checked before an item is looked at: a hostile body holds up nobody.
Numbers: TypeAlias = Annotated[list[int], msgspec.Meta(max_length=TASKS_MAX)]
Payloads: TypeAlias = Annotated[list[Payload], msgspec.Meta(max_length=TASKS_MAX)]
Blobs: TypeAlias = Annotated[tuple[int, ...], msgspec.Meta(max_length=BLOBS_MAX)]


def size_of(payload: Payload) -> int:
    """The payload's size in bytes."""
    return len(payload) if type(payload) is bytes else payload.nbytes  # type: ignore[union-attr]


# --- Outcomes -------------------------------------------------------------------------------------

VALUE = 0  # payload: the pickled value
ERROR = 1  # payload: the pickled (exception, traceback text)
INIT_FAILED = 2  # the initializer raised; payload as for ERROR

TOO_LARGE = 3  # a worker did not send it; payload: `sizes`

STATUSES = frozenset({VALUE, ERROR, INIT_FAILED, TOO_LARGE})

# Why a task was given up (`Failed.kind`), or what ended its runner (`Crashed.kind`).
CRASHED = "crashed"  # the task ended its runner, too often
OVERSIZED = "oversized"  # its arguments are more than the broker takes; the client says so itself
LOST = "lost"  # the task started on too many workers that vanished
TIMEOUT = "timeout"  # the task ran longer than it was allowed to
MEMORY = "memory"  # its runner grew beyond what its worker allows
REFUSED = "refused"  # a task submitted it that was not (any more) in a position to


class Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all messages."""


class Options(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """What the user wants of each of some tasks."""

    timeout: float = 0.0  # seconds that one attempt may run; 0: no limit
    retries: int = 0  # further attempts after one that raised or took too long
    at_most_once: bool = False  # fails rather than runs again where nobody knows whether it ran
    priority: int = 0  # among this client's tasks the highest go first
    # Of the workers that may run it
    tags: Annotated[tuple[str, ...], msgspec.Meta(max_length=TAGS_MAX)] = ()
    # Many calls in one task: fails where another is charged, for its client to take apart
    is_bundle: bool = False
    crashes: int = 0  # behind it: it was in a bundle whose runner ended
    losses: int = 0  # the same of a bundle whose worker was lost

    def but(self, **changes: Any) -> Options:
        """The same, with other values for some."""
        return msgspec.structs.replace(self, **changes)


PLAIN = Options()


class _Group(NamedTuple):
    fn: int
    init: int
    chunk_max: int = 0
    options: Options | None = None
    blobs: tuple[int, ...] = ()


class Group(_Group):
    """What tasks have in common, and can be sent together for."""

    @cached_property
    def needs(self) -> tuple[int, ...]:
        """The numbers of all blobs that a runner must have before such a task."""
        return tuple(blob for blob in (self.fn, self.init, *self.blobs) if blob)

    @cached_property
    def seal_needs(self) -> tuple[int, int, tuple[int, ...]]:
        """The same as a seal names them: function, initializer, all others."""
        return self.fn, self.init, self.blobs


# Kinds of letters, as in ``runtime.side``, which must not know this module.
IMPORT = 2
OUTPUT = 3
PARTS = 4


# --- Sessions: either peer and the broker ---------------------------------------------------------


class ClientHello(Message, tag="hello-client"):
    """A client, or an administrator's command, wants a session."""

    incarnation: bytes
    role: str  # "client" or "admin"
    version: str
    python: str
    name: str
    slots_max: int = 0  # at most so many of its tasks at once; 0: no limit
    is_back: bool = False  # it had a session before, and submits again what it had submitted there


class WorkerHello(Message, tag="hello-worker"):
    """A worker wants a session."""

    incarnation: bytes
    version: str
    python: str
    name: str
    slots: int
    pid: int
    tags: Annotated[list[str], msgspec.Meta(max_length=TAGS_MAX)] = []
    is_back: bool = False  # it had a session before, and tells next what it still holds


class Welcome(Message, tag="welcome"):
    """The broker's answer to a hello: the session's token is in the header from here on."""

    token: bytes
    epoch: bytes
    name: str
    credit: int  # tasks that a client may have unresolved at the broker
    heartbeat_interval: float
    lost_after: float
    credit_bytes: int = 0  # of a client's unresolved tasks and of its blobs; 0: no limit
    argument_max: int = 0  # bytes of one task; 0: no limit
    result_max: int = 0  # bytes of one result; 0: no limit


class Refused(Message, tag="refused"):
    """The broker does not take this peer; ``reason`` is for people."""

    reason: str


class Gone(Message, tag="gone"):
    """The broker knows no session of that token (it ended, or the broker is a new one)."""


class Resumed(Message, tag="resumed"):
    """A peer that is back has said all that it has of its earlier session."""


class Heartbeat(Message, tag="beat"):
    """Says that its sender lives, and by its header what was sent and received.

    ``coming``: the bytes of the message behind it, where those are many: until it is there,
    nothing else can be heard.
    """

    coming: Annotated[int, msgspec.Meta(ge=0, le=COMING_MAX)] = 0


class Resync(Message, tag="resync"):
    """Messages were lost on the way; the header's ``ack`` says from where to send again."""


class Goodbye(Message, tag="bye"):
    """The sender ends the session on purpose."""

    reason: str = ""


class Letter(Message, tag="letter"):
    """From a runner to the client whose task it runs, and back; opaque to all in between.

    ``worker`` and ``client`` are the broker's numbers for them
    (``worker`` is 0 on the worker's side).
    """

    worker: int
    runner: int
    client: int
    kind: int  # IMPORT, OUTPUT or PARTS
    body: bytes


# --- Client and broker ----------------------------------------------------------------------------


class Submit(Message, tag="submit"):
    """Tasks of one function, in order. ``fn`` 0: each payload brings its function along."""

    fn: int
    init: int
    ids: Numbers
    payloads: Payloads
    chunk_max: int = 0  # at most so many in a chunk; 0: the broker decides
    options: Options | None = None
    blobs: Blobs = ()  # what else the payloads refer to
    is_again: bool = False  # an earlier broker had them, and perhaps a worker has

    @property
    def group(self) -> Group:
        return Group(self.fn, self.init, self.chunk_max, self.options, self.blobs)


class Blob(Message, tag="blob"):
    """Something that many tasks share, a function or an initializer,
    under the client's number for it.

    ``client`` is the broker's number for the client; it is 0 on the way from the client itself.
    """

    client: int
    blob: int
    payload: Payload


class Forget(Message, tag="forget"):
    """These blobs are needed no more (an empty list: none of this client's)."""

    client: int
    blobs: Numbers


class Cancel(Message, tag="cancel"):
    """The client wants no result of these tasks; ``kill``: not even that those that run go on."""

    ids: Numbers
    kill: bool = False


class Running(Message, tag="running"):
    """These tasks were dispatched."""

    ids: Numbers


class Results(Message, tag="results"):
    """Tasks that are done, with one status byte each."""

    ids: Numbers
    statuses: bytes
    payloads: Payloads
    seconds: float = 0.0  # that they took together; 0: not known


class Failed(Message, tag="failed"):
    """A task that the broker gives up on; ``story`` says what happened to it,
    one line an attempt.
    """

    id: int
    kind: str
    story: list[str]


class Cluster(Message, tag="cluster"):
    """How many workers and slots there are; sent when that changes."""

    workers: int
    slots: int


class Credit(Message, tag="credit"):
    """From now on the client may have so many bytes at the broker; never fewer than before."""

    bytes_max: int


class Finish(Message, tag="finish"):
    """The client wants no more outcomes; but what of it runs, though it was cancelled,
    is to come to its end.
    """


class Finished(Message, tag="finished"):
    """Nothing of the client runs any more."""


class StatusRequest(Message, tag="status?"):
    """Asks for a `Status`, and why tasks wait: the client's own,
    or any of ``client`` (empty: of all) by the number ``task``.
    """

    task: int = 0  # 0: none in particular
    client: str = ""
    is_brief: bool = False  # without the rows of workers and clients


class WorkerStatus(Message, tag="worker-status"):
    """One worker as the broker sees it; ``state`` is ready, suspect, draining,
    returning or quarantined.
    """

    name: str
    state: str
    slots: int
    running: int
    done: int
    silent_for: float
    pid: int


class ClientStatus(Message, tag="client-status"):
    """One client as the broker sees it."""

    name: str
    queued: int
    running: int
    done: int


class Waiting(Message, tag="waiting"):
    """Why tasks of a client wait: ``count`` of them; ``id`` is the first one's number,
    0 if it is a task's own.
    """

    client: str
    id: int
    count: int
    reason: str
    wants_worker: bool = False  # another worker would help, with these tags
    tags: list[str] = []


class Status(Message, tag="status"):
    """The broker's state in numbers of tasks since it started."""

    workers: list[WorkerStatus]
    clients: list[ClientStatus]
    queued: int
    running: int
    done: int
    failed: int
    reassigned: int
    late: int
    uptime: float
    waiting: list[Waiting] = []
    is_brief: bool = False


class Shutdown(Message, tag="shutdown"):
    """An administrator ends the cluster: the workers and the broker."""


class DrainWorker(Message, tag="drain-worker"):
    """An administrator wants the workers of that name to finish what they run, and end."""

    name: str


class WorkerDrains(Message, tag="worker-drains"):
    """The broker's answer: how many workers were told."""

    count: int


class ReloadKeys(Message, tag="reload-keys"):
    """An administrator has added or revoked keys."""


class KeysReloaded(Message, tag="keys-reloaded"):
    """The broker's answer: how many sessions it has cut because their key is gone;
    ``error``: why it could not.
    """

    cut: int
    error: str = ""


class ShuttingDown(Message, tag="shutting-down"):
    """The broker's answer to `Shutdown`."""


# --- Broker and worker ----------------------------------------------------------------------------


class Run(Message, tag="run"):
    """A chunk under a lease: tasks of one client and one function, to be run in order."""

    lease: int
    client: int
    fn: int
    init: int
    ids: Numbers
    payloads: Payloads
    timeout: float = 0.0  # seconds that each task may run; 0: no limit
    attempt: int = 1
    blobs: Blobs = ()
    # The client that all this is done for in the end, whose initializer it is; 0: ``client``
    root: int = 0


class Revoke(Message, tag="revoke"):
    """Give back those of the lease's tasks that have not started, listed by their index.

    None listed: whatever waits, because a slot is free elsewhere. ``kill``: and end the one among
    them that runs, which is given back then, too.
    """

    lease: int
    indexes: Numbers
    kill: bool = False


class Done(Message, tag="done"):
    """Results of some of a lease's tasks; ``seconds`` is the time that they took together."""

    lease: int
    indexes: Numbers
    statuses: bytes
    payloads: Payloads
    seconds: float


class Returned(Message, tag="returned"):
    """Tasks of a lease that did not start and will not."""

    lease: int
    indexes: Numbers


class Crashed(Message, tag="crashed"):
    """The runner of this task of the lease died while it ran,
    or was killed for its ``kind`` of fault.
    """

    lease: int
    index: int
    reason: str
    kind: str = CRASHED


class Held(Message, tag="held"):
    """A lease of an earlier broker's: the worker has still these tasks of it,
    or a report about them that follows.

    ``blobs``: those of the client that it has, too.
    """

    lease: int
    client: int
    ids: Numbers
    indexes: Numbers
    blobs: Numbers
    attempt: int = 1


class Lend(Message, tag="lend"):
    """The lease's task waits for tasks of its own, and takes up no slot; or it does so again."""

    lease: int
    is_lent: bool


class Relay(Message, tag="relay"):
    """What a task that submits tasks says, as a client, and what it is told.

    ``client`` is the broker's number for the client that the task belongs to, ``lease`` the one
    that is run (0 on the way back). A `Goodbye` says that the runner has ended,
    with all that its tasks had submitted.
    """

    runner: int
    client: int
    lease: int
    message: FromTask | ToTask


class Drain(Message, tag="drain"):
    """Broker to worker: take no more work, finish what runs, leave. Worker to broker:
    that is what I do.
    """


# --- Worker and runners (never on a wire) ---------------------------------------------------------


class Spawn(Message, tag="spawn"):
    """Start the runner of that number."""

    runner: int


class Load(Message, tag="load"):
    """Give a runner a blob."""

    runner: int
    client: int
    blob: int
    payload: Payload


class Unload(Message, tag="unload"):
    """A runner may drop these blobs (an empty list: all of the client's)."""

    runner: int
    client: int
    blobs: list[int]


class Execute(Message, tag="execute"):
    """Give a runner a chunk to run behind what it has; ``seq`` is 1..255 and names it there."""

    runner: int
    seq: int
    client: int
    fn: int
    init: int
    payloads: list[Payload]
    attempt: int = 1
    blobs: tuple[int, ...] = ()
    root: int = 0
    ids: list[int] = []  # of the tasks, at their client


class Recall(Message, tag="recall"):
    """Take back everything that a runner has not started; answered by `RunnerRecalled`.

    ``keeps_first``: but for its first task, if it has not started that yet.
    """

    runner: int
    keeps_first: bool = False


class Kill(Message, tag="kill"):
    """End a runner at once; answered by `RunnerDied`."""

    runner: int


class Retire(Message, tag="retire"):
    """A runner may exit when it has run what it has."""

    runner: int


class ToRunner(Message, tag="to-runner"):
    """A letter on a runner's side channel; the kinds are those of ``runtime.side``."""

    runner: int
    client: int
    kind: int
    body: bytes


class FromRunner(Message, tag="from-runner"):
    """The same from a runner. It may be anything: user code can write there."""

    runner: int
    client: int
    kind: int
    body: bytes


class RunnerDone(Message, tag="runner-done"):
    """Results, each ``(seq, index, status, seconds, payload)``."""

    runner: int
    results: list[Any]


class RunnerRecalled(Message, tag="runner-recalled"):
    """How many tasks of which chunk were taken back, each ``(seq, count)``:
    the last ones of that chunk.
    """

    runner: int
    unstarted: list[tuple[int, int]]


class RunnerDied(Message, tag="runner-died"):
    """A runner ended; every result it wrote came before. ``reason`` is empty where it was asked to.

    ``last_seq`` names the last chunk that the host was told to give it (0: none). What the agent
    sent later crossed with this event, and was not begun either.
    """

    runner: int
    reason: str
    unstarted: list[tuple[int, int]]
    last_seq: int


class RunnerGrown(Message, tag="runner-grown"):
    """A runner has more memory than it may; ``text`` says so for people."""

    runner: int
    text: str


RunnerCommand: TypeAlias = Spawn | Load | Unload | Execute | Recall | Kill | Retire | ToRunner
RunnerEvent: TypeAlias = RunnerDone | RunnerRecalled | RunnerDied | RunnerGrown | FromRunner

# What may cross the wire, by who sends it. The broker refuses the rest by role (default deny).
FromClient: TypeAlias = (
    Submit | Blob | Forget | Cancel | Finish | Letter | Resumed | StatusRequest | Goodbye
)
FromTask: TypeAlias = Submit | Blob | Forget | Cancel | StatusRequest | Goodbye
ToTask: TypeAlias = Running | Results | Failed | Cluster | Status
FromAdmin: TypeAlias = StatusRequest | ReloadKeys | DrainWorker | Shutdown | Goodbye
FromWorker: TypeAlias = (
    Done | Returned | Crashed | Letter | Relay | Held | Resumed | Drain | Goodbye
)
ToClient: TypeAlias = (
    Running
    | Results
    | Failed
    | Cluster
    | Credit
    | Finished
    | Letter
    | Status
    | ShuttingDown
    | Goodbye
)
ToAdmin: TypeAlias = Status | ShuttingDown | KeysReloaded | WorkerDrains | Goodbye
ToWorker: TypeAlias = Run | Revoke | Blob | Forget | Lend | Relay | Letter | Drain | Goodbye
Session: TypeAlias = ClientHello | WorkerHello | Welcome | Refused | Gone | Heartbeat | Resync
Wire: TypeAlias = FromClient | FromAdmin | FromWorker | ToClient | ToAdmin | ToWorker | Session


# --- The codec ------------------------------------------------------------------------------------


class Header(msgspec.Struct, frozen=True, gc=False):
    """Stands before each message: whose session it is and how far both sides are in it."""

    token: bytes  # 16 bytes; zero before the session exists
    seq: int  # this message's number in its direction; of an unnumbered one, the last number sent
    ack: int  # the last number received without a gap


_HEADER = struct.Struct("<2sBx16sQQ")
_MAGIC = b"ac"
NO_TOKEN = bytes(16)

_WITH_PAYLOADS = frozenset({Submit, Results, Run, Done})
_encode_body = msgspec.msgpack.Encoder().encode
_decode_body = msgspec.msgpack.Decoder(Wire).decode


def encode(header: Header, message: Wire) -> list[Buffer]:
    """The message's frames; large payloads are not copied."""
    head = _HEADER.pack(_MAGIC, VERSION, header.token, header.seq, header.ack)
    carrier = message.message if type(message) is Relay else message
    if type(carrier) in _WITH_PAYLOADS:
        for payload in carrier.payloads:  # type: ignore[union-attr]
            if type(payload) is not bytes or len(payload) > INLINE_MAX:
                return _encode_in_parts(head, message)
        if (
            len(carrier.payloads) > BODY_MAX // INLINE_MAX  # type: ignore[union-attr]
            and sum(map(len, carrier.payloads)) > BODY_MAX  # type: ignore[union-attr, arg-type]
        ):
            return _encode_in_parts(head, message)
    elif type(carrier) is Blob:
        return _encode_in_parts(head, message)
    return [head + _encode_body(message)]


def _encode_in_parts(head: bytes, message: Wire) -> list[Buffer]:
    parts: list[Buffer] = []
    inline: list[bytes | int] = []
    room = BODY_MAX
    for payload in _payloads_of(message):
        one = _scatter(payload, parts, min(room, INLINE_MAX))
        inline.append(one)
        if type(one) is bytes:
            room -= len(one)
    return [head + _encode_body(_with_payloads(message, inline)), *parts]


def sign_of_life(frame: Buffer) -> bytes:
    """A heartbeat with the header of the message whose first frame that is:
    its receiver sees that it lacks the message.

    Raises:
        ProtocolError: the frame is too short to have one.
    """
    head = bytes(memoryview(frame)[: _HEADER.size])
    if len(head) < _HEADER.size:
        raise ProtocolError(f"a message of {len(head)} bytes is shorter than its header")
    return head + _encode_body(Heartbeat())


def decode(frames: Sequence[Buffer]) -> tuple[Header, Wire]:
    """The header and message of ``frames``.

    Raises:
        ProtocolError: the frames are not a message of ours.
    """
    if len(frames) > FRAMES_MAX:
        raise ProtocolError(f"a message of more than {FRAMES_MAX} frames")
    first = memoryview(frames[0]) if frames else memoryview(b"")
    if len(first) < _HEADER.size:
        raise ProtocolError(f"a message of {len(first)} bytes is shorter than its header")
    magic, version, token, seq, ack = _HEADER.unpack_from(first)
    if magic != _MAGIC:
        raise ProtocolError("not an achilles message")
    if version != VERSION:
        raise ProtocolError(f"protocol version {version}; this side speaks {VERSION}")
    try:
        message = _decode_body(first[_HEADER.size :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a valid message: {str(error)[:200]}") from None
    _check(message, frames)
    return Header(token, seq, ack), message


def _payloads_of(message: Wire) -> list[Payload]:
    if isinstance(message, Relay):
        return _payloads_of(message.message)
    return [message.payload] if isinstance(message, Blob) else message.payloads  # type: ignore[union-attr]


def _with_payloads(message: Wire, payloads: list[Any]) -> Wire:
    if isinstance(message, Relay):
        inner = _with_payloads(message.message, payloads)
        return msgspec.structs.replace(message, message=inner)
    if isinstance(message, Blob):
        return msgspec.structs.replace(message, payload=payloads[0])
    return msgspec.structs.replace(message, payloads=payloads)


def _scatter(payload: Payload, parts: list[Buffer], inline_max: int) -> bytes | int:
    """Append the payload's parts, or return it as it is when it is small."""
    buffers: Iterable[Buffer] = payload if isinstance(payload, Parts) else (payload,)
    if size_of(payload) <= inline_max:
        return b"".join(buffers)
    before = len(parts)
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        parts.extend(view[at : at + PART_MAX] for at in range(0, len(view), PART_MAX))
    return len(parts) - before


def _gather(payloads: list[Any], frames: Sequence[Buffer], at: int) -> int:
    """Replace numbers of parts by the parts; the index of the next unused frame."""
    for index, payload in enumerate(payloads):
        if type(payload) is bytes:
            continue
        if type(payload) is not int or not 0 < payload <= PARTS_MAX:
            raise ProtocolError(f"payload {index} is neither bytes nor a number of parts")
        if at + payload > len(frames):
            raise ProtocolError(f"payload {index} lacks parts")
        payloads[index] = Parts(frames[at : at + payload])
        at += payload
    return at


def _check(message: Wire, frames: Sequence[Buffer]) -> None:
    """Bound what the types leave open, and put payloads that came in parts where they belong.

    Raises:
        ProtocolError: counts that disagree, or that are out of range.
    """
    used = 1
    carrier = message.message if type(message) is Relay else message
    if type(carrier) in _WITH_PAYLOADS:
        for payload in carrier.payloads:  # type: ignore[union-attr]
            if type(payload) is not bytes:
                used = _gather(carrier.payloads, frames, 1)  # type: ignore[union-attr]
                break
    elif type(carrier) is Blob:
        payloads = [carrier.payload]
        used = _gather(payloads, frames, 1)
        carrier.payload = payloads[0]
    if used != len(frames):
        raise ProtocolError(f"{len(frames)} frames where {used} were announced")
    _check_fields(message)


def _check_fields(message: Wire) -> None:
    match message:
        case Heartbeat():
            pass  # the most frequent one
        case Submit(ids=ids) | Run(ids=ids):
            if len(message.payloads) != len(ids) or (ids and min(ids) < 0):
                raise _uneven(ids, len(message.payloads))
            if message.blobs and min(message.blobs) < 1:
                raise ProtocolError("a blob with a number below 1")
            if isinstance(message, Submit) and message.options is not None:
                _check_options(message.options)
        case Held():
            _check_held(message)
        case Results(ids=ids, statuses=statuses) | Done(indexes=ids, statuses=statuses):
            count = len(ids)
            if not len(message.payloads) == len(statuses) == count or (ids and min(ids) < 0):
                raise _uneven(ids, len(message.payloads), len(statuses))
            if not STATUSES.issuperset(statuses):
                raise ProtocolError("an unknown status")
            if not 0 <= message.seconds < inf:
                raise ProtocolError(f"tasks that took {message.seconds} s")
        case Cancel(ids=ids) | Running(ids=ids) | Revoke(indexes=ids) | Returned(indexes=ids):
            _check_range(ids)
        case Forget(blobs=blobs):
            _check_range(blobs)
        case ClientHello() | WorkerHello():
            _check_hello(message)
        case DrainWorker(name=text):
            _check_text("name", text)
        case Crashed(index=index, reason=text, kind=kind):
            _check_range([index])
            _check_text("reason", text)
            if kind not in (CRASHED, TIMEOUT, MEMORY):
                raise ProtocolError("an unknown kind of crash")
        case StatusRequest(task=task, client=client):
            _check_range([task])
            _check_text("client", client)
        case Letter(kind=kind, body=body):
            if kind not in (IMPORT, OUTPUT, PARTS) or len(body) > LETTER_MAX:
                raise ProtocolError("a letter of an unknown kind, or an over-long one")
            _check_range([message.worker, message.runner, message.client])
        case Relay(message=inner):
            _check_range([message.runner, message.client, message.lease])
            _check_fields(inner)
        case Goodbye(reason=text) | Refused(reason=text):
            _check_text("reason", text)
        case Welcome():
            if len(message.token) != 16 or len(message.epoch) != 16:
                raise ProtocolError("a token or epoch that is not 16 bytes long")
        case (
            Blob()
            | Failed()
            | Cluster()
            | Credit()
            | Status()
            | Shutdown()
            | ReloadKeys()
            | KeysReloaded()
            | WorkerDrains()
            | ShuttingDown()
            | Drain()
            | Finish()
            | Finished()
            | Lend()
            | Resumed()
            | Gone()
            | Resync()
        ):
            pass  # what their types leave open, only a broker sends


def _uneven(ids: list[int], *lengths: int) -> ProtocolError:
    """What is wrong with columns of these lengths beside the one of numbers."""
    count = len(ids)
    for length in lengths:
        if length != count:
            return ProtocolError(f"columns of different lengths: {count}, {length}")
    return ProtocolError("a negative number")


def _check_held(held: Held) -> None:
    _check_range([held.lease, held.client, *held.blobs, *held.ids])
    if len(held.blobs) > BLOBS_MAX + 2 or held.attempt < 1:
        raise ProtocolError("too many blobs, or an attempt below 1")
    indexes = held.indexes
    if (
        sorted(set(indexes)) != indexes
        or not indexes
        or not 0 <= indexes[0] <= indexes[-1] < len(held.ids)
    ):
        raise ProtocolError("indexes that are not those of tasks, in order")


def _check_range(numbers: list[int]) -> None:
    if numbers and min(numbers) < 0:
        raise ProtocolError("a negative number")


def _check_text(field: str, text: str) -> None:
    if len(text) > TEXT_MAX:
        raise ProtocolError(f"{field} of {len(text)} characters; the limit is {TEXT_MAX}")


def _check_options(options: Options) -> None:
    if not 0 <= options.timeout < inf:
        raise ProtocolError(f"a timeout of {options.timeout} s")
    if options.retries < 0:
        raise ProtocolError("a negative number of retries")
    _check_range([options.crashes, options.losses])
    _check_tags(options.tags)


def _check_tags(tags: Sequence[str]) -> None:
    if any(len(tag) > TAG_MAX or not tag.isprintable() for tag in tags):
        raise ProtocolError("over-long or unprintable tags")


def _check_hello(hello: ClientHello | WorkerHello) -> None:
    if len(hello.incarnation) != 16:
        raise ProtocolError("an incarnation that is not 16 bytes long")
    for field in ("name", "version", "python"):
        text = getattr(hello, field)
        if len(text) > NAME_MAX or not text.isprintable():
            raise ProtocolError(f"{field} is over-long or has control characters")
    if isinstance(hello, WorkerHello):
        if not 1 <= hello.slots <= SLOTS_MAX:
            raise ProtocolError(f"{hello.slots} slots; from 1 to {SLOTS_MAX} are possible")
        _check_tags(hello.tags)
    elif hello.role not in ("client", "admin") or hello.slots_max < 0:
        raise ProtocolError("an unknown role, or a negative number of slots")
