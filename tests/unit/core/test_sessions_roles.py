"""Who may say what to a broker, and what becomes of those who say something else."""

from __future__ import annotations

import pytest

from achilles.core import protocol as p
from achilles.core.recovery import stable_number
from tests.security.attacks import attack
from tests.unit.core.messages import WIRE, example
from tests.unit.core.peers import BEAT, ROLES, SessionsBench, cut, submit

# --- Roles ----------------------------------------------------------------------------------------

ALWAYS: set[type] = {p.Heartbeat, p.Resync, p.Goodbye}
BOTH = ALWAYS | {p.Letter, p.Resumed}
MAY: dict[str, set[type]] = {
    "client": BOTH | {p.Submit, p.Blob, p.Forget, p.Cancel, p.Finish, p.StatusRequest},
    "admin": ALWAYS | {p.StatusRequest, p.ReloadKeys, p.DrainWorker, p.Shutdown},
    "worker": BOTH | {p.Done, p.Returned, p.Crashed, p.Held, p.Relay, p.Drain},
}
KINDS = [type(m) for m in WIRE if not isinstance(m, p.ClientHello | p.WorkerHello)]


@attack("T11")
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_role_may_send_what_is_listed_for_it_and_nothing_else(kind: type, role: str) -> None:
    """Over every pair. Anything else costs the session, and is not looked at."""
    bench = SessionsBench()
    bench.join("witness")
    peer = bench.join("me", role, is_back=kind in (p.Held, p.Resumed))
    if kind in (p.Submit, p.Forget):
        for blob in (1, 2, 3, 4) if role == "client" else ():
            bench.say(peer, p.Blob(client=0, blob=blob, payload=b"b"))
    bench.say(peer, example(kind))
    sends = bench.sent()
    if kind in MAY[role]:
        assert not [message for _, message in sends if isinstance(message, p.Refused | p.Gone)]
        assert bench.core.refused == 0
    else:
        reason = f"the role {role} may not send {kind.__name__}"
        assert sends[:2] == cut(peer, reason)
        rest = [("witness", p.Cluster(workers=0, slots=0))] if role == "worker" else []
        assert sends[2:] == rest
        assert bench.core.refused == 1
        bench.say(peer, BEAT)
        assert bench.sent() == [("me", p.Gone())]


def test_each_allowed_message_reaches_the_scheduler() -> None:
    """What the role table lets through is heard."""
    bench = SessionsBench()
    client, worker = bench.join("client"), bench.join("worker", "worker")
    bench.sent()
    bench.say(client, p.Blob(client=0, blob=1, payload=b"f"))
    bench.say(client, submit(1, 2, fn=1))
    (_, blob), (_, run) = bench.sent()
    number = stable_number(client.hello.incarnation)
    assert blob == p.Blob(client=number, blob=1, payload=b"f")
    bench.say(worker, p.Crashed(lease=run.lease, index=0, reason="died"))
    ((_, run),) = bench.sent()
    bench.say(worker, p.Returned(lease=run.lease, indexes=[0]))
    ((_, run),) = bench.sent()
    bench.say(
        worker,
        p.Done(lease=run.lease, indexes=[0], statuses=b"\0", payloads=[b"v"], seconds=9.0),
    )
    (to, result), (_, run), (_, told) = bench.sent()
    assert (to, result) == ("client", p.Results([1], b"\0", [b"v"], 9.0))
    assert told == p.Running([2])
    bench.say(client, p.Cancel(ids=[2]))
    assert bench.sent() == [("worker", p.Revoke(lease=run.lease, indexes=[0]))]
    bench.say(client, p.Forget(client=0, blobs=[1]))
    assert bench.sent() == [("worker", p.Forget(client=number, blobs=[1]))]
    bench.say(worker, p.Drain())
    assert bench.sent() == [("client", p.Cluster(workers=0, slots=0))]
    bench.say(client, p.StatusRequest())
    ((to, status),) = bench.sent()
    assert (to, status.workers[0].state) == ("client", "draining")


# --- Whoever breaks the protocol ------------------------------------------------------------------


def test_what_the_scheduler_refuses_costs_the_session() -> None:
    """And nobody else notices."""
    bench = SessionsBench(credit=2)
    worker, other = bench.join("worker", "worker"), bench.join("other")
    client = bench.join("client")
    bench.say(client, submit(1, 2, 3))
    assert bench.sent() == cut(client, "more than 2 unresolved tasks")
    bench.say(other, submit(1))
    ((to, run),) = bench.sent()
    assert (to, run.ids) == ("worker", [1])
    bench.say(worker, p.Returned(lease=run.lease, indexes=[7]))
    sends = bench.sent()
    assert sends[:2] == cut(worker, f"lease {run.lease} does not hold those tasks")
    assert sends[2:] == [("other", p.Cluster(workers=0, slots=0))]
    assert bench.core.refused == 2


def test_a_worker_that_breaks_the_protocol_is_a_lost_one() -> None:
    """Its task is charged, and runs elsewhere."""
    bench = SessionsBench()
    bad, client = bench.join("bad", "worker"), bench.join("client")
    bench.say(client, submit(1))
    bench.sent()
    bench.join("good", "worker")
    bench.say(bad, p.StatusRequest())
    *sends, (to, run) = bench.sent()
    reason = "the role worker may not send StatusRequest"
    assert sends == [*cut(bad, reason), ("client", p.Cluster(workers=1, slots=1))]
    assert (to, run.ids) == ("good", [1])
    assert bench.scheduler.status(bench.now).reassigned == 1


def test_what_is_no_message_costs_the_session() -> None:
    """A stranger has none to lose, but is counted;
    a long reason is cut to what a message may hold.
    """
    bench = SessionsBench()
    client = bench.join("client")
    bench.step(bench.core.malformed("stranger", "nonsense", bench.now))
    assert bench.core.refused == 1
    bench.step(bench.core.malformed("client", "x" * 9999, bench.now))
    assert bench.sent() == cut(client, "x" * p.TEXT_MAX)
    assert bench.headers == [p.Header(p.NO_TOKEN, 0, 0), p.Header(client.link.token, 0, 0)]
    assert bench.core.refused == 2
    assert bench.core.is_alone
