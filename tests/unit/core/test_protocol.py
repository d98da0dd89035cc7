"""Every message crosses the codec as it was, and nothing else does."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from math import inf, nan
from typing import Any, get_args

import msgspec
import pytest

from achilles.core import protocol as p
from achilles.errors import ProtocolError
from tests.unit.core.messages import OPTIONS, WIRE, example

HEADER = p.Header(b"t" * 16, 7, 2**64 - 1)
HEADER_SIZE = 36

each_message = pytest.mark.parametrize("message", WIRE, ids=lambda m: type(m).__name__)


def encoded(message: p.Wire) -> list[bytes]:
    """A message's frames as they arrive."""
    return [bytes(frame) for frame in p.encode(HEADER, message)]


def crossed(message: p.Wire) -> p.Wire:
    """The message after the codec; its header is as it was."""
    header, arrived = p.decode(encoded(message))
    assert header == HEADER
    return arrived


def refusal(*frames: bytes) -> str:
    """Why these frames are refused."""
    with pytest.raises(ProtocolError) as caught:
        p.decode(frames)
    assert len(str(caught.value)) < 400, "a peer may not fill our log"
    return str(caught.value)


def raw(body: object, *parts: bytes) -> list[bytes]:
    """Frames with a valid header, and any body that msgpack can hold."""
    return [encoded(p.Gone())[0][:HEADER_SIZE] + msgspec.msgpack.encode(body), *parts]


def fields(message: p.Wire) -> list[Any]:
    """The message's body as plain values: its tag, then its fields in order."""
    values: list[Any] = msgspec.msgpack.decode(encoded(message)[0][HEADER_SIZE:])
    return values


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    """What a field is that was left out."""
    makes = field.default_factory
    return field.default if makes is msgspec.NODEFAULT else makes()


def but(kind: type, /, **changes: Any) -> p.Wire:
    """The example of that kind with other values for some fields, valid or not."""
    return msgspec.structs.replace(example(kind), **changes)


# --- What crosses ---------------------------------------------------------------------------------


@each_message
def test_every_message_arrives_as_it_was(message: p.Wire) -> None:
    """In one frame, if it is small."""
    assert len(encoded(message)) == 1
    assert crossed(message) == message


def test_every_message_is_for_the_wire_or_for_runners() -> None:
    """Each under its own tag; what is for runners is refused on the wire."""
    of_runners = set(get_args(p.RunnerCommand | p.RunnerEvent))
    parts = {p.WorkerStatus, p.ClientStatus, p.Waiting}  # of a `Status`
    kinds: set[Any] = set(p.Message.__subclasses__())
    assert kinds == set(get_args(p.Wire)) | of_runners | parts
    tags = {kind: kind.__struct_config__.tag for kind in kinds}
    assert len(set(tags.values())) == len(kinds)
    for kind in of_runners | parts:
        assert "not a valid message" in refusal(*raw([tags[kind], 1]))


@each_message
def test_fields_with_defaults_may_be_left_out_and_no_others(message: p.Wire) -> None:
    """As a peer does that does not know them yet."""
    body = fields(message)
    info = msgspec.structs.fields(type(message))
    required = 1 + sum(field.required for field in info)
    for length in range(len(body)):
        if length < required:
            assert "not a valid message" in refusal(*raw(body[:length]))
        else:
            _, arrived = p.decode(raw(body[:length]))
            assert fields(arrived)[:length] == body[:length]
            for field in info[length - 1 :]:
                assert getattr(arrived, field.name) == default_of(field)


DEFAULTS: dict[type, dict[str, Any]] = {
    p.Options: {"timeout": 0.0, "retries": 0, "at_most_once": False, "priority": 0, "tags": ()},
    p.ClientHello: {"slots_max": 0},
    p.WorkerHello: {"tags": []},
    p.Goodbye: {"reason": ""},
    p.Submit: {"chunk_max": 0, "options": None, "blobs": ()},
    p.Cancel: {"kill": False},
    p.Run: {"timeout": 0.0, "attempt": 1, "blobs": ()},
    p.StatusRequest: {"task": 0, "client": "", "is_brief": False},
    p.Revoke: {"kill": False},
    p.Crashed: {"kind": p.CRASHED},
    p.Execute: {"attempt": 1, "blobs": ()},
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_what_is_left_out_asks_for_nothing_special(kind: type) -> None:
    """No limit, no kill, no retry: the defaults are part of the protocol."""
    defaults = {
        field.name: default_of(field)
        for field in msgspec.structs.fields(kind)
        if not field.required
    }
    assert {**defaults, **DEFAULTS[kind]} == defaults


def test_encoding_changes_nothing_in_the_message() -> None:
    """It may have to be sent again."""
    large = bytes(p.INLINE_MAX + 1)
    message = but(p.Submit, payloads=[b"small", large])
    assert isinstance(message, p.Submit)
    assert encoded(message) == encoded(message)
    assert message.payloads == [b"small", large]


def test_options_and_groups() -> None:
    """A group names what its tasks share, and all blobs that they need, of which 0 is none."""
    submit = example(p.Submit)
    assert isinstance(submit, p.Submit)
    assert submit.group == p.Group(fn=1, init=2, chunk_max=5, options=OPTIONS, blobs=(3, 4))
    assert submit.group.needs == (1, 2, 3, 4)
    assert p.Group(fn=0, init=0).needs == ()
    assert p.Group(fn=0, init=2, blobs=(1,)).needs == (2, 1)
    assert hash(submit.group) == hash(submit.group._replace(options=OPTIONS.but()))
    assert OPTIONS.but(retries=9) == p.Options(1.5, 9, True, -3, ("gpu", "big"))
    assert p.Options() == p.PLAIN


# --- What does not --------------------------------------------------------------------------------


@each_message
def test_a_message_that_is_cut_off_is_refused(message: p.Wire) -> None:
    """Wherever it is cut, in the header or behind it."""
    (frame,) = encoded(message)
    for length in range(len(frame)):
        reason = refusal(frame[:length])
        assert ("shorter than its header" in reason) == (length < HEADER_SIZE)


@each_message
def test_anything_behind_a_message_is_refused(message: p.Wire) -> None:
    """A byte, a field, or a frame."""
    (frame,) = encoded(message)
    assert "not a valid message" in refusal(frame + b"\0")
    assert "not a valid message" in refusal(*raw([*fields(message), *[None] * 9]))
    assert "2 frames where 1 were announced" in refusal(frame, b"")


@each_message
def test_a_field_of_the_wrong_type_is_refused(message: p.Wire) -> None:
    """A mapping is never right, neither as a field nor inside one."""
    body = fields(message)
    for at, value in enumerate(body):
        refusal(*raw([*body[:at], {}, *body[at + 1 :]]))
        refusal(*raw([*body[:at], [{}], *body[at + 1 :]]))
        if not isinstance(value, list):
            continue
        for inner in range(len(value)):
            bad = [*value[:inner], {}, *value[inner + 1 :]]
            refusal(*raw([*body[:at], bad, *body[at + 1 :]]))


@each_message
def test_garbled_messages_are_refused_or_are_messages(message: p.Wire) -> None:
    """Nothing else comes out, whatever a peer changes in one."""
    chance = random.Random(fields(message)[0])
    (frame,) = encoded(message)
    for _ in range(300):
        garbled = bytearray(frame)
        for _ in range(chance.randint(1, 3)):
            garbled[chance.randrange(HEADER_SIZE, len(frame))] = chance.randrange(256)
        try:
            _, arrived = p.decode([bytes(garbled)])
        except ProtocolError:
            continue
        assert crossed(arrived) == arrived


@pytest.mark.parametrize(
    "body",
    [None, 1, "beat", b"", {}, {"type": "beat"}, [], [None], [1], ["unknown"], [["beat"]]],
    ids=repr,
)
def test_what_is_no_message_is_refused(body: object) -> None:
    """Without a tag that we know, nothing is looked at."""
    assert "not a valid message" in refusal(*raw(body))


def test_nesting_without_end_is_refused() -> None:
    """It would otherwise be our stack that ends."""
    deep = encoded(p.Gone())[0][:HEADER_SIZE] + b"\x91" * 100_000
    assert "not a valid message" in refusal(deep)


def test_text_that_is_not_utf_8_is_refused() -> None:
    """The decoder says so in its own way."""
    (frame,) = encoded(p.Goodbye(reason="drained"))
    assert "not a valid message" in refusal(frame.replace(b"drained", b"dr\xffined"))


# --- The header -----------------------------------------------------------------------------------


def test_the_header_is_of_a_fixed_form() -> None:
    """Whoever speaks another version, or something else, is told so."""
    (frame,) = encoded(p.Heartbeat())
    assert frame[:HEADER_SIZE] == struct.pack(
        "<2sBx16sQQ", b"ac", p.VERSION, HEADER.token, HEADER.seq, HEADER.ack
    )
    assert refusal() == "a message of 0 bytes is shorter than its header"
    assert refusal(frame[:35]) == "a message of 35 bytes is shorter than its header"
    assert refusal(b"ca" + frame[2:]) == "not an achilles message"
    for version in (0, p.VERSION + 1, 255):
        other = frame[:2] + bytes([version]) + frame[3:]
        assert refusal(other) == f"protocol version {version}; this side speaks {p.VERSION}"


def test_frames_of_any_kind_of_buffer_are_read() -> None:
    """The transport hands out views."""
    frame = encoded(example(p.Results))[0]
    for buffer in (bytearray(frame), memoryview(frame)):
        assert p.decode([buffer]) == (HEADER, example(p.Results))


# --- Payloads -------------------------------------------------------------------------------------

LARGE = random.Random(0).randbytes(p.INLINE_MAX + 1)
HUGE = bytes(2 * p.PART_MAX) + b"end"


def joined(payload: p.Payload) -> bytes:
    """A payload's value."""
    return payload.join() if isinstance(payload, p.Parts) else bytes(payload)


@pytest.mark.parametrize(
    ("payload", "parts"),
    [
        (b"", 0),
        (LARGE[:-1], 0),
        (LARGE, 1),
        (memoryview(LARGE), 1),
        (memoryview(b"small"), 0),
        (p.Parts([b"a", bytearray(b"b"), memoryview(b"c")]), 0),
        (p.Parts([b"a", LARGE, b"", b"c"]), 3),
        (p.Parts([LARGE, LARGE]), 2),
        (memoryview(HUGE[: p.PART_MAX]), 1),
        (HUGE[: p.PART_MAX + 1], 2),
        (HUGE, 3),
        (memoryview(struct.pack("<20000d", *range(20000))).cast("d"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_large_payload_travels_in_parts(payload: p.Payload, parts: int) -> None:
    """Of bounded size; a small one is copied into the message, however many pieces it comes in."""
    message = p.Blob(client=1, blob=2, payload=payload)
    frames = encoded(message)
    assert len(frames) == 1 + parts
    assert all(len(frame) <= p.PART_MAX for frame in frames[1:])
    _, arrived = p.decode(frames)
    assert isinstance(arrived, p.Blob)
    assert type(arrived.payload) is (p.Parts if parts else bytes)
    assert joined(arrived.payload) == joined(payload)
    assert p.size_of(arrived.payload) == p.size_of(payload) == len(joined(payload))


def test_large_payloads_are_not_copied() -> None:
    """A part is a view of what the user's pickle is in."""
    _, part, *_ = p.encode(HEADER, p.Blob(client=1, blob=2, payload=HUGE))
    assert isinstance(part, memoryview)
    assert part.obj is HUGE


@pytest.mark.parametrize("kind", [p.Submit, p.Run, p.Results, p.Done])
def test_each_payload_gets_its_own_parts(kind: type) -> None:
    """Large and small ones, mixed, in their order; and on to the next peer as they came."""
    payloads: list[p.Payload] = [LARGE[:-1], LARGE, b"", HUGE, p.Parts([LARGE, b"x"])]
    count = len(payloads)
    columns = {"ids": [1] * count, "indexes": [1] * count, "statuses": bytes(count)}
    names = {field.name for field in msgspec.structs.fields(kind)}
    changes = {name: value for name, value in columns.items() if name in names}
    message = but(kind, payloads=payloads, **changes)
    for _ in range(2):
        frames = encoded(message)
        assert len(frames) == 1 + 1 + 3 + 2
        _, message = p.decode(frames)
        arrived: list[p.Payload] = message.payloads  # type: ignore[union-attr]
        assert [joined(payload) for payload in arrived] == [joined(it) for it in payloads]


@pytest.mark.parametrize("kind", [p.Submit, p.Run, p.Results, p.Done])
def test_many_small_payloads_make_no_large_frame(kind: type) -> None:
    """A socket refuses a frame beyond 16 MiB; what a body has no room for goes in parts."""
    payload = LARGE[:-1]
    count = 2 * p.BODY_MAX // p.INLINE_MAX + 1
    message = tasks(kind, count)
    message.payloads[:] = [b"", *[payload] * (count - 1)]  # type: ignore[union-attr]
    frames = encoded(message)
    assert max(len(frame) for frame in frames) < p.BODY_MAX + p.INLINE_MAX
    assert len(frames) == 1 + p.BODY_MAX // p.INLINE_MAX
    _, arrived = p.decode(frames)
    values = [joined(one) for one in arrived.payloads]  # type: ignore[union-attr]
    assert values == [b"", *[payload] * (count - 1)]
    fits = tasks(kind, p.BODY_MAX // p.INLINE_MAX)
    fits.payloads[:] = [payload] * (p.BODY_MAX // p.INLINE_MAX)  # type: ignore[union-attr]
    assert len(encoded(fits)) == 1


def with_payloads(*payloads: object) -> list[Any]:
    """The body of results with these in the place of payloads."""
    ids = list(range(len(payloads)))
    return ["results", ids, bytes(len(ids)), list(payloads)]


def test_parts_that_lack_or_are_too_many_are_refused() -> None:
    """Each frame belongs to one payload."""
    part = b"x"
    p.decode(raw(with_payloads(1, b"", 2), part, part, part))
    assert "payload 2 lacks parts" in refusal(*raw(with_payloads(1, b"", 2), part, part))
    assert "payload 0 lacks parts" in refusal(*raw(with_payloads(1)))
    assert "payload 0 lacks parts" in refusal(*raw(["blob", 1, 1, 1]))
    too_many = raw(with_payloads(1, b"", 2), *[part] * 4)
    assert "5 frames where 4 were announced" in refusal(*too_many)


@pytest.mark.parametrize("payload", [0, -1, p.PARTS_MAX + 1, 2**64 - 1, True, None, 1.0, "x", [1]])
def test_what_is_neither_bytes_nor_a_number_of_parts_is_refused(payload: object) -> None:
    """A number is one of frames, of which there is at least one and at most `PARTS_MAX`."""
    reason = "neither bytes nor a number of parts" if type(payload) is int else "`int | bytes`"
    frames = [b"x"] * (p.PARTS_MAX + 1)
    assert reason in refusal(*raw(with_payloads(payload), *frames))
    assert reason in refusal(*raw(["blob", 1, 1, payload], *frames))


def test_as_many_parts_as_possible() -> None:
    """The limit itself is allowed."""
    _, message = p.decode(raw(["blob", 1, 1, p.PARTS_MAX], *[b"x"] * p.PARTS_MAX))
    assert isinstance(message, p.Blob)
    assert p.size_of(message.payload) == p.PARTS_MAX


def test_frames_without_end_are_refused() -> None:
    """Before anything is looked at; more than the largest message has cannot be one."""
    body = raw(fields(p.Gone()))
    assert "1 were announced" in refusal(*body, *[b""] * (p.FRAMES_MAX - 1))
    assert refusal(*body, *[b""] * p.FRAMES_MAX) == f"a message of more than {p.FRAMES_MAX} frames"


# --- Limits ---------------------------------------------------------------------------------------


def tasks(kind: type, count: int) -> p.Wire:
    """A message of that kind about so many tasks."""
    ids = list(range(count))
    values: list[p.Payload] = [b""] * count
    columns = {"ids": ids, "indexes": ids, "payloads": values, "statuses": bytes(count)}
    names = {field.name for field in msgspec.structs.fields(kind)}
    if kind is p.Forget:
        columns["blobs"] = ids
    return but(kind, **{name: value for name, value in columns.items() if name in names})


WITH_PAYLOADS = (p.Submit, p.Run, p.Results, p.Done)
NUMBERS = (p.Cancel, p.Running, p.Revoke, p.Returned, p.Forget)
LONG_TAGS: Sequence[str] = ["x" * 64] * p.TAGS_MAX

GOOD = [
    *(tasks(kind, p.TASKS_MAX) for kind in WITH_PAYLOADS),
    *(tasks(kind, p.TASKS_MAX) for kind in NUMBERS),
    *(tasks(kind, 0) for kind in WITH_PAYLOADS),
    *(but(kind, ids=[]) for kind in (p.Cancel, p.Running)),
    *(but(kind, indexes=[]) for kind in (p.Revoke, p.Returned)),
    but(p.Done, seconds=0.0),
    *(but(kind, reason="x" * p.TEXT_MAX) for kind in (p.Goodbye, p.Refused, p.Crashed)),
    but(p.Crashed, kind=p.CRASHED, index=0),
    but(p.ClientHello, role="admin", slots_max=0, name="x" * 200, version="", python="ä"),
    but(p.WorkerHello, slots=1, tags=[]),
    but(p.WorkerHello, slots=4096, tags=LONG_TAGS),
    but(p.Submit, options=OPTIONS.but(timeout=0.0, retries=0, tags=tuple(LONG_TAGS))),
    but(p.Submit, blobs=(1,) * p.BLOBS_MAX),
    but(p.Run, blobs=(1,) * p.BLOBS_MAX),
    but(p.Letter, body=bytes(p.LETTER_MAX), kind=p.OUTPUT),
    but(p.Letter, worker=0, runner=0, client=0, kind=p.IMPORT),
]


@pytest.mark.parametrize("message", GOOD, ids=lambda m: type(m).__name__)
def test_the_limits_themselves_are_allowed(message: p.Wire) -> None:
    """So that both sides of each are known."""
    assert crossed(message) == message


BAD: list[tuple[p.Wire, str]] = [
    *((tasks(kind, p.TASKS_MAX + 1), "length <= 10000") for kind in WITH_PAYLOADS),
    *((tasks(kind, p.TASKS_MAX + 1), "length <= 10000") for kind in NUMBERS),
    *((but(kind, payloads=[b""]), "columns of different lengths") for kind in WITH_PAYLOADS),
    *((but(kind, statuses=b"\0"), "columns of different lengths") for kind in (p.Results, p.Done)),
    (but(p.Submit, ids=[1]), "columns of different lengths: 1, 2"),
    (but(p.Done, statuses=b"\0\4"), "unknown status"),
    (but(p.Results, statuses=b"\0\1\xff"), "unknown status"),
    *((but(kind, ids=[1, -1]), "a negative number") for kind in (p.Submit, p.Run)),
    *((but(kind, ids=[-1]), "a negative number") for kind in (p.Cancel, p.Running)),
    (but(p.Results, ids=[1, 2, -3]), "a negative number"),
    (but(p.Forget, blobs=[0, -1]), "a negative number"),
    (but(p.Done, indexes=[-1, 1]), "a negative number"),
    *((but(kind, indexes=[0, -1]), "a negative number") for kind in (p.Revoke, p.Returned)),
    (but(p.Crashed, index=-1), "a negative number"),
    *(
        (but(kind, seconds=bad), "tasks that took")
        for kind in (p.Done, p.Results)
        for bad in (-0.1, inf, nan)
    ),
    *((but(p.Letter, kind=kind), "a letter of an unknown kind") for kind in (0, 1, 5, -2)),
    (but(p.Letter, body=bytes(p.LETTER_MAX + 1)), "or an over-long one"),
    *(
        (but(p.Letter, **{whose: -1}), "a negative number")
        for whose in ("worker", "runner", "client")
    ),
    (but(p.StatusRequest, task=-1), "a negative number"),
    (but(p.StatusRequest, client="x" * (p.TEXT_MAX + 1)), "client of 4097 characters"),
    (but(p.Crashed, kind="bored"), "an unknown kind of crash"),
    (but(p.Crashed, kind=p.LOST), "an unknown kind of crash"),
    *(
        (but(kind, reason="x" * (p.TEXT_MAX + 1)), "reason of 4097 characters; the limit is 4096")
        for kind in (p.Goodbye, p.Refused, p.Crashed)
    ),
    *(
        (but(p.Welcome, **{field: b"x" * size}), "not 16 bytes long")
        for field in ("token", "epoch")
        for size in (0, 15, 17)
    ),
    *(
        (but(kind, incarnation=b"x" * size), "an incarnation that is not 16 bytes long")
        for kind in (p.ClientHello, p.WorkerHello)
        for size in (0, 15, 17)
    ),
    *(
        (but(kind, **{field: text}), f"{field} is over-long or has control characters")
        for kind in (p.ClientHello, p.WorkerHello)
        for field in ("name", "version", "python")
        for text in ("x" * 201, "a\nb", "\x1b[2K", "\u202e")
    ),
    *((but(p.ClientHello, role=role), "an unknown role") for role in ("worker", "", "ADMIN")),
    (but(p.ClientHello, slots_max=-1), "a negative number of slots"),
    *((but(p.WorkerHello, slots=slots), "from 1 to 4096") for slots in (0, -1, 4097)),
    *(
        (message, reason)
        for tags, reason in (
            (["x"] * (p.TAGS_MAX + 1), "length <= 64"),
            (["x" * 65], "over-long or unprintable tags"),
            (["a\n"], "over-long or unprintable tags"),
        )
        for message in (
            but(p.WorkerHello, tags=tags),
            but(p.Submit, options=OPTIONS.but(tags=tuple(tags))),
        )
    ),
    *(
        (but(p.Submit, options=OPTIONS.but(timeout=bad)), "a timeout of")
        for bad in (-0.1, inf, nan)
    ),
    (but(p.Submit, options=OPTIONS.but(retries=-1)), "a negative number of retries"),
    *(
        (but(kind, blobs=blobs), reason)
        for kind in (p.Submit, p.Run)
        for blobs, reason in (
            ((1,) * (p.BLOBS_MAX + 1), "length <= 64"),
            ((1, 0), "a blob with a number below 1"),
            ((-1,), "a blob with a number below 1"),
        )
    ),
]


@pytest.mark.bad_input(70)
@pytest.mark.parametrize(
    ("message", "reason"),
    BAD,
    ids=lambda it: type(it).__name__ if isinstance(it, p.Message) else it,
)
def test_what_is_beyond_the_limits_is_refused(message: p.Wire, reason: str) -> None:
    """Though its types are right."""
    assert reason in refusal(*encoded(message))
