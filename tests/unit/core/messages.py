"""One valid message of each kind, with every field other than its default."""

from __future__ import annotations

from typing import get_args

from achilles.core import protocol as p

OPTIONS = p.Options(timeout=1.5, retries=2, at_most_once=True, priority=-3, tags=("gpu", "big"))

WIRE: list[p.Wire] = [
    p.ClientHello(
        incarnation=b"i" * 16,
        role="client",
        version="0.1",
        python="3.11",
        name="laptop-7",
        slots_max=3,
        is_back=True,
    ),
    p.WorkerHello(
        incarnation=b"i" * 16,
        version="0.1",
        python="3.11",
        name="node-1",
        slots=4,
        pid=42,
        tags=["gpu"],
        is_back=True,
    ),
    p.Welcome(
        token=b"t" * 16,
        epoch=b"e" * 16,
        name="laptop-7",
        credit=1000,
        heartbeat_interval=1.0,
        lost_after=15.0,
        credit_bytes=1 << 28,
        argument_max=1 << 30,
        result_max=1 << 31,
    ),
    p.Refused(reason="the broker is shutting down"),
    p.Gone(),
    p.Heartbeat(coming=5_000_000),
    p.Resync(),
    p.Goodbye(reason="drained"),
    p.Submit(
        fn=1,
        init=2,
        ids=[7, 8],
        payloads=[b"a", b""],
        chunk_max=5,
        options=OPTIONS,
        blobs=(3, 4),
        is_again=True,
    ),
    p.Blob(client=1, blob=2, payload=b"function"),
    p.Forget(client=1, blobs=[1, 2]),
    p.Cancel(ids=[7, 8], kill=True),
    p.Running(ids=[7, 8]),
    p.Results(ids=[7, 8, 9], statuses=b"\0\1\2", payloads=[b"a", b"b", b""], seconds=0.25),
    p.Failed(id=7, kind=p.CRASHED, story=["it crashed", "again"]),
    p.Cluster(workers=2, slots=8),
    p.Credit(bytes_max=1 << 40),
    p.StatusRequest(task=7, client="laptop-7", is_brief=True),
    p.Status(
        workers=[p.WorkerStatus("node-1", "ready", 4, 1, 2, 0.5, 42)],
        clients=[p.ClientStatus("laptop-7", 1, 2, 3)],
        queued=1,
        running=2,
        done=3,
        failed=4,
        reassigned=5,
        late=6,
        uptime=7.5,
        waiting=[p.Waiting("laptop-7", 7, 2, "no worker offers the tag gpu", True, ["gpu"])],
        is_brief=True,
    ),
    p.Shutdown(),
    p.ShuttingDown(),
    p.DrainWorker(name="alpha"),
    p.WorkerDrains(count=1),
    p.ReloadKeys(),
    p.KeysReloaded(cut=2, error="damaged"),
    p.Run(
        lease=5,
        client=1,
        fn=1,
        init=2,
        ids=[7, 8],
        payloads=[b"a", b""],
        timeout=1.5,
        attempt=2,
        blobs=(3, 4),
        root=9,
    ),
    p.Held(lease=5, client=1, ids=[7, 8], indexes=[0, 1], blobs=[3, 4], attempt=2),
    p.Resumed(),
    p.Lend(lease=5, is_lent=True),
    p.Relay(runner=2, client=3, lease=5, message=p.Cancel(ids=[7, 8], kill=True)),
    p.Revoke(lease=5, indexes=[0, 1], kill=True),
    p.Done(lease=5, indexes=[0, 1], statuses=b"\0\1", payloads=[b"a", b"b"], seconds=0.5),
    p.Returned(lease=5, indexes=[1]),
    p.Crashed(lease=5, index=1, reason="was killed", kind=p.TIMEOUT),
    p.Letter(worker=1, runner=2, client=3, kind=p.IMPORT, body=b"letter"),
    p.Drain(),
    p.Finish(),
    p.Finished(),
]

assert {type(message) for message in WIRE} == set(get_args(p.Wire)), "a kind has no message here"
assert len({type(message) for message in WIRE}) == len(WIRE)


def example(kind: type) -> p.Wire:
    """The message of that kind."""
    (message,) = (message for message in WIRE if type(message) is kind)
    return message
