"""The sessions' rules: known by tokens, numbered, watched while they last, and ended once."""

from __future__ import annotations

import pytest

from achilles.core import protocol as p
from achilles.core.link import UNACKED_MAX, Link, Packet
from achilles.core.liveness import RATE_MIN, STALL_SECONDS
from tests.unit.core.messages import WIRE, example
from tests.unit.core.peers import BEAT, ROLES, TIMINGS, SessionsBench, cut, submit

# --- Hello ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_hello_is_answered_with_a_token(role: str) -> None:
    """In a packet without one; clients hear how large the cluster is."""
    bench = SessionsBench(credit=7)
    peer = bench.peer("me", role)
    bench.hello(peer, role)
    sends: list[tuple[str, p.Wire]] = [("me", bench.welcome(peer))]
    if role != "worker":
        sends.append(("me", p.Cluster(workers=0, slots=0)))
    assert bench.sent() == sends
    assert peer.link.token == b"token%011d" % 1
    assert bench.headers[0] == p.Header(p.NO_TOKEN, 0, 0)
    assert not bench.core.is_alone
    assert repr(bench.core).startswith("<Sessions 1 | <Scheduler ")


@pytest.mark.parametrize("role", ROLES)
def test_a_route_that_does_not_speak_for_the_role_is_refused(role: str) -> None:
    """The transport knows whose key it is; a hello may say anything."""
    bench = SessionsBench()
    peer = bench.peer("me", role)
    bench.hello(peer, *(set(ROLES) - {role}))
    reason = f"this key or socket is not for the role {role}; export one with: achilles keys export {role}"
    refusal = p.Refused(reason=reason)
    assert bench.sent() == [("me", refusal)]
    assert bench.headers == [p.Header(p.NO_TOKEN, 0, 0)]
    assert bench.core.refused == 1
    assert bench.core.is_alone


def test_a_hello_that_is_repeated_gets_the_same_answer() -> None:
    """The answer was lost; nothing else happens twice."""
    bench = SessionsBench()
    client = bench.join("client")
    token = client.link.token
    bench.hello(client)
    assert bench.sent() == [("client", bench.welcome(client))]
    assert client.link.token == token
    worker = bench.join("worker", "worker")
    client.route = "elsewhere"
    bench.hello(worker)
    assert bench.sent() == [("worker", bench.welcome(worker))]
    assert bench.scheduler.status(bench.now).workers[0].name == "worker"


def test_a_hello_that_is_repeated_elsewhere_moves_the_session() -> None:
    """Its connection was lost with the answer."""
    bench = SessionsBench()
    client = bench.join("client")
    client.route = "elsewhere"
    bench.hello(client)
    assert bench.sent() == [("elsewhere", bench.welcome(client))]
    bench.say(client, BEAT)
    assert bench.sent() == [("elsewhere", BEAT)]


def test_a_peer_that_had_got_further_begins_anew() -> None:
    """It has forgotten its session, so what it had ends; the new session has another token."""
    bench = SessionsBench()
    worker = bench.join("worker", "worker")
    client = bench.join("client")
    bench.say(client, submit(1))
    ((_, run),) = bench.sent()
    old = client.link.token
    bench.hello(client)
    assert bench.sent() == [
        ("worker", p.Revoke(lease=run.lease, indexes=[0], kill=True)),
        ("client", bench.welcome(client)),
        ("client", p.Cluster(workers=1, slots=1)),
    ]
    assert client.link.token != old
    assert len(bench.scheduler.status(bench.now).clients) == 1
    bench.say(worker, p.Returned(lease=run.lease, indexes=[0]))
    bench.take("client", Packet(p.Header(old, 2, 0), submit(9)))
    assert bench.sent() == [("client", p.Gone())]


@pytest.mark.parametrize("role", ["client", "worker"])
def test_who_has_lost_a_session_that_it_never_spoke_in_begins_anew(role: str) -> None:
    """It tells what it had, which a session that began with nothing would not take;
    what it was given there comes again.
    """
    bench = SessionsBench()
    peer = bench.join("one", role)
    token = peer.link.token
    peer.hello.is_back = True
    bench.hello(peer)
    assert bench.sent()[0][0] == "one"
    assert peer.link.token != token
    bench.say(peer, p.Resumed())
    bench.sent()
    assert bench.core.refused == 0
    again = peer.link.token
    bench.join("two", "worker")
    assert peer.link.token == again


def test_an_incarnation_that_comes_in_another_role_is_another_peer() -> None:
    """The first one ends."""
    bench = SessionsBench()
    peer = bench.join("me")
    peer.hello = bench.peer("me", "admin").hello
    bench.peers.pop()
    bench.hello(peer)
    assert bench.sent() == [("me", bench.welcome(peer)), ("me", p.Cluster(workers=0, slots=0))]
    assert bench.scheduler.status(bench.now).clients == []


@pytest.mark.bad_input(56)
def test_another_python_is_refused() -> None:
    """Its pickles would be; an administrator exchanges none. Whoever is alone may have any."""
    bench = SessionsBench()
    first = bench.join("first")
    other = bench.peer("other", "worker", python="3.13")
    bench.hello(other)
    reason = (
        "Python 3.13 cannot exchange pickles with Python 3.11, which client first of this broker"
    )
    ((to, refusal),) = bench.sent()
    assert (to, refusal.reason) == ("other", f"{reason} runs; all of them need the same")
    admin = bench.peer("admin", "admin", python="3.12")
    bench.hello(admin)
    assert bench.sent()[0] == ("admin", bench.welcome(admin))
    bench.say(first, p.Goodbye())
    bench.hello(other)
    assert bench.sent()[0] == ("other", bench.welcome(other))


def test_nobody_joins_a_broker_that_shuts_down() -> None:
    """Not even to ask about it; who is there stays."""
    bench = SessionsBench()
    client, admin = bench.join("client"), bench.join("admin", "admin")
    assert not bench.core.is_shutting_down
    bench.say(admin, p.Shutdown())
    assert bench.sent() == [("admin", p.ShuttingDown())]
    assert bench.core.is_shutting_down
    bench.hello(bench.peer("late", "admin"))
    assert bench.sent() == [("late", p.Refused(reason="the broker is shutting down"))]
    bench.say(client, BEAT)
    assert bench.sent() == [("client", BEAT)]
    bench.step(bench.core.farewell("shut down"))
    goodbye = p.Goodbye(reason="shut down")
    assert bench.sent() == [("client", goodbye), ("admin", goodbye)]


def test_an_administrator_drains_a_worker_by_name() -> None:
    """And is told whether there is one; it gives back what waits, and says goodbye itself."""
    bench = SessionsBench()
    admin = bench.join("admin", "admin")
    for peer in ("one", "two"):
        bench.join(peer, "worker")
    bench.sent()
    bench.say(admin, p.DrainWorker(bench.core._by_number[2].hello.name))
    (who, drain), answer = bench.sent()
    assert (who, drain) == ("one", p.Drain())
    assert answer == ("admin", p.WorkerDrains(count=1))
    bench.say(admin, p.DrainWorker("nobody"))
    assert bench.sent() == [("admin", p.WorkerDrains(count=0))]


def test_of_workers_with_one_name_the_one_that_a_status_calls_so_is_drained() -> None:
    bench = SessionsBench()
    admin = bench.join("admin", "admin")
    for pid, route in enumerate(("one", "two"), 7):
        peer = bench.peer(route, "worker")
        assert isinstance(peer.hello, p.WorkerHello)
        peer.hello.name, peer.hello.pid = "twin", pid
        bench.hello(peer)
        bench.sent()
    bench.say(admin, p.DrainWorker("twin"))
    assert bench.sent() == [("admin", p.WorkerDrains(count=0))]
    bench.say(admin, p.DrainWorker("twin (8)"))
    assert bench.sent() == [("two", p.Drain()), ("admin", p.WorkerDrains(count=1))]


# --- Tokens and routes ----------------------------------------------------------------------------


def test_a_session_is_known_by_its_token() -> None:
    """Whatever route its messages come on; answers go there."""
    bench = SessionsBench()
    client = bench.join("client")
    bench.join("other")
    client.route = "second connection"
    bench.say(client, BEAT)
    assert bench.sent() == [("second connection", BEAT)]
    bench.join("worker", "worker")
    bench.say(client, submit(1))
    ((_, run),) = bench.sent()
    assert run.ids == [1]


def test_a_route_that_a_session_has_left_is_not_its_any_more() -> None:
    """What is said there, and its end, is not the session's."""
    bench = SessionsBench()
    client = bench.join("client")
    client.route = "second connection"
    bench.say(client, BEAT)
    bench.sent()
    bench.step(bench.core.malformed("client", "nonsense", bench.now))
    bench.core.closed("client", bench.now)
    bench.wait(TIMINGS.client_grace + 1.0)
    bench.say(client, BEAT)
    assert bench.sent() == [("second connection", BEAT)]


@pytest.mark.parametrize(
    "kind", [type(message) for message in WIRE], ids=lambda kind: kind.__name__
)
def test_an_unknown_token_is_told_so(kind: type) -> None:
    """With the token, so that the peer knows which; answers to answers there are none."""
    bench = SessionsBench()
    unknown = p.Header(b"?" * 16, 1, 0)
    bench.take("stranger", Packet(unknown, example(kind)))
    if kind in (p.ClientHello, p.WorkerHello):  # these need none
        assert isinstance(bench.sent()[0][1], p.Welcome)
    elif kind in (p.Gone, p.Refused, p.Welcome):
        assert bench.sent() == []
    else:
        assert bench.sent() == [("stranger", p.Gone())]
        assert bench.headers == [p.Header(b"?" * 16, 0, 0)]


def test_a_token_is_worth_nothing_on_a_route_of_another_role() -> None:
    """Whoever has stolen a worker's token with a client's key is told that it is gone,
    and nothing changes.
    """
    bench = SessionsBench()
    worker = bench.join("worker", "worker")
    bench.take("thief", Packet(p.Header(worker.link.token, 1, 0), p.Drain()), "client", "admin")
    assert bench.sent() == [("thief", p.Gone())]
    bench.say(worker, BEAT, "worker")
    assert bench.sent() == [("worker", BEAT)]
    assert bench.scheduler.status(bench.now).workers[0].state == "ready"


# --- Numbers --------------------------------------------------------------------------------------


def test_a_heartbeat_is_answered() -> None:
    """And acknowledges what came."""
    bench = SessionsBench()
    client = bench.join("client")
    bench.say(client, p.Cancel(ids=[1]))
    bench.say(client, BEAT)
    assert bench.sent() == [("client", BEAT)]
    assert bench.headers == [p.Header(client.link.token, 1, 1)]
    assert client.link.unacknowledged == 0


def test_a_heartbeat_shows_a_lost_tail() -> None:
    """It is answered as ever, and what is missing is asked for."""
    bench = SessionsBench()
    client = bench.join("client")
    client.link.wrap(p.Cancel(ids=[1]))
    bench.say(client, BEAT)
    assert bench.sent() == [("client", p.Resync()), ("client", BEAT)]


def test_a_peer_that_is_never_answered_is_acknowledged_now_and_then() -> None:
    """Or it would have to keep everything."""
    bench = SessionsBench()
    client = bench.join("client")
    for _ in range(UNACKED_MAX - 1):
        bench.say(client, p.Cancel(ids=[1]))
    assert client.link.unacknowledged == UNACKED_MAX - 1
    bench.say(client, p.Cancel(ids=[1]))
    assert bench.sent() == [("client", BEAT)]
    assert client.link.unacknowledged == 0


def test_a_message_that_comes_twice_counts_once() -> None:
    """The second one is not even looked at."""
    bench = SessionsBench()
    client = bench.join("client")
    asked = client.link.wrap(p.StatusRequest())
    bench.take("client", asked)
    assert len(bench.sent()) == 1
    bench.take("client", asked)


def test_a_gap_is_asked_for() -> None:
    """What came after it waits to be sent again."""
    bench = SessionsBench()
    client = bench.join("client")
    lost = client.link.wrap(p.StatusRequest())
    bench.say(client, p.StatusRequest())
    assert bench.sent() == [("client", p.Resync())]
    bench.take("client", lost)
    assert len(bench.sent()) == 1


def test_what_a_peer_has_lost_is_sent_again() -> None:
    """All from the number that it names, and to where it is now."""
    bench = SessionsBench()
    client = bench.join("client")
    client.route = "nowhere"
    bench.core.closed("client", bench.now)
    bench.join("worker", "worker")
    token = client.link.token
    client.link = Link(token)
    client.route = "back"
    bench.say(client, p.Resync())
    assert bench.sent() == [
        ("back", p.Cluster(workers=0, slots=0)),
        ("back", p.Cluster(workers=1, slots=1)),
    ]
    assert [header.seq for header in bench.headers] == [1, 2]


def test_acknowledging_what_was_never_sent_ends_the_session() -> None:
    """Such a peer is not ours."""
    bench = SessionsBench()
    client = bench.join("client")
    bench.take("client", Packet(p.Header(client.link.token, 0, 9), BEAT))
    assert bench.sent() == cut(client, "message 9 is acknowledged; 1 were sent")


# --- Ends -----------------------------------------------------------------------------------------


def test_a_goodbye_ends_the_session() -> None:
    """In the scheduler too; a worker that says it charges nobody."""
    bench = SessionsBench()
    client = bench.join("client")
    for _ in range(9):
        worker = bench.join("worker", "worker")
        bench.say(worker, p.Goodbye(reason="drained"))
        assert bench.sent() == [("client", p.Cluster(workers=0, slots=0))]
        bench.say(worker, BEAT)
        assert bench.sent() == [("worker", p.Gone())]
    bench.say(client, submit(1))
    for _ in range(9):
        worker = bench.join("worker", "worker")
        bench.say(worker, p.Goodbye(reason="drained"))
        assert bench.sent() == [("client", p.Cluster(workers=0, slots=0))]
    bench.say(client, p.Goodbye(reason="done"))
    assert bench.core.is_alone
    assert repr(bench.core) == "<Sessions 0 | <Scheduler 0 workers | 0 queued, 0 running>>"


LIMITS = {
    "worker": (TIMINGS.lost_after, TIMINGS.grace),
    "client": (TIMINGS.client_lost_after, TIMINGS.client_grace),
    "admin": (TIMINGS.client_lost_after, TIMINGS.grace),
}


@pytest.mark.parametrize("role", ROLES)
def test_who_is_silent_for_too_long_loses_the_session(role: str) -> None:
    """Each role has its limit; any message begins it anew."""
    bench = SessionsBench()
    peer = bench.join("me", role)
    limit, _ = LIMITS[role]
    bench.wait(limit - 1.0)
    bench.say(peer, BEAT)
    assert bench.sent() == [("me", BEAT)]
    bench.wait(limit - 0.5)
    assert not bench.core.is_alone
    bench.wait(0.5)
    assert bench.core.is_alone
    bench.say(peer, BEAT)
    assert bench.sent() == [("me", p.Gone())]


@pytest.mark.parametrize("role", ["worker", "client"])
def test_who_sends_much_may_be_silent_for_longer(role: str) -> None:
    """Nothing else is heard until a large message is there;
    a closed connection is one all the same.
    """
    bench = SessionsBench()
    peer = bench.join("me", role)
    limit, grace = LIMITS[role]
    size = int(3 * limit) * RATE_MIN
    bench.say(peer, p.Heartbeat(coming=size))
    assert bench.sent() == [("me", BEAT)]
    bench.wait(3 * limit - 0.5)
    assert not bench.core.is_alone
    if role == "worker":
        assert bench.scheduler.status(bench.now).workers[0].state == "ready"
    bench.say(peer, BEAT)  # it has come
    assert bench.sent() == [("me", BEAT)]
    bench.wait(limit)
    assert bench.core.is_alone
    other = bench.join("other", role)
    bench.say(other, p.Heartbeat(coming=size))
    assert bench.sent() == [("other", BEAT)]
    bench.core.closed("other", bench.now)
    bench.wait(grace)
    bench.say(other, BEAT)
    assert bench.sent() == [("other", p.Gone())]


@pytest.mark.parametrize("role", ROLES)
def test_whose_connection_closed_has_a_little_time_to_come_back(role: str) -> None:
    """On any route, and then it has all the time again."""
    bench = SessionsBench()
    peer = bench.join("me", role)
    _, grace = LIMITS[role]
    bench.core.closed("me", bench.now)
    assert bench.core.is_alone
    bench.wait(grace - 0.5)
    peer.route = "back"
    bench.say(peer, BEAT)
    assert bench.sent() == [("back", BEAT)]
    bench.wait(grace + 0.5)
    assert not bench.core.is_alone
    bench.core.closed("back", bench.now)
    bench.wait(grace - 0.5)
    bench.wait(0.5)
    bench.say(peer, BEAT)
    assert bench.sent() == [("back", p.Gone())]


def test_the_story_of_a_task_tells_why_its_workers_were_lost() -> None:
    """Closed connections and silence are different things to look into."""
    bench = SessionsBench()
    client = bench.join("client")
    bench.say(client, submit(1))
    sends = []
    for is_closed in (True, False, True, False, True):
        worker = bench.peer("worker", "worker")
        bench.hello(worker)
        assert bench.sent()[0] == ("worker", bench.welcome(worker))
        if is_closed:
            bench.core.closed("worker", bench.now)
        bench.say(client, BEAT)
        bench.sent()
        bench.tick_when_due()
        assert bench.sent() == [("client", p.Running(ids=[1]))]
        bench.lose(worker, TIMINGS.grace if is_closed else TIMINGS.lost_after)
        bench.peers.remove(worker)
        sends = bench.sent()
    (to, message), *cluster = sends
    lost = "worker worker was lost: "
    closed, silent = f"{lost}its connection closed", f"{lost}it fell silent"
    assert (to, message.kind) == ("client", p.LOST)
    assert message.story == [closed, silent, closed, silent, closed]
    assert cluster == [("client", p.Cluster(workers=0, slots=0))]


def test_a_suspect_gets_no_work_until_it_is_heard() -> None:
    """It may be gone; if it is not, it gets what waits at once."""
    bench = SessionsBench()
    client, worker = bench.join("client"), bench.join("worker", "worker")
    bench.wait(TIMINGS.suspect_after - 0.5)
    bench.say(worker, BEAT)
    bench.sent()
    bench.wait(TIMINGS.suspect_after)
    bench.say(client, submit(1))
    assert bench.scheduler.status(bench.now).workers[0].state == "suspect"
    bench.say(worker, BEAT)
    (to, run), answer = bench.sent()
    assert (to, run.ids) == ("worker", [1])
    assert answer == ("worker", BEAT)
    assert bench.scheduler.status(bench.now).workers[0].state == "ready"


def test_a_suspect_that_says_hello_again_is_heard() -> None:
    """It never got its welcome; now it gets work with it."""
    bench = SessionsBench()
    client, worker = bench.join("client"), bench.join("worker", "worker")
    bench.wait(TIMINGS.suspect_after)
    bench.say(client, submit(1))
    bench.hello(worker)
    welcome, (to, run) = bench.sent()
    assert welcome == ("worker", bench.welcome(worker))
    assert (to, run.ids) == ("worker", [1])


def test_the_status_tells_how_long_a_worker_has_been_silent() -> None:
    """Since its last message of any kind."""
    bench = SessionsBench()
    worker = bench.join("worker", "worker")
    bench.wait(2.0)
    bench.say(worker, BEAT)
    bench.sent()
    bench.wait(1.5)
    assert bench.scheduler.status(bench.now).workers[0].silent_for == 1.5


def test_what_is_heard_shows_that_the_broker_is_awake() -> None:
    """Between two ticks may lie any time, as long as it listens: that is no stall."""
    bench = SessionsBench()
    bench.join("worker", "worker")
    client = bench.join("client")
    for _ in range(int(TIMINGS.lost_after)):
        bench.now += 1.0
        bench.say(client, BEAT)
        assert bench.sent() == [("client", BEAT)]
    bench.tick(0.0)
    assert bench.sent() == [("client", p.Cluster(workers=0, slots=0))]


def test_a_short_sleep_is_no_stall() -> None:
    """Up to the limit itself."""
    bench = SessionsBench()
    bench.join("worker", "worker")
    bench.core.closed("worker", bench.now)
    bench.tick(STALL_SECONDS)
    assert bench.scheduler.status(bench.now).workers == []


def test_nothing_is_watched_after_a_session() -> None:
    """Neither it nor the one that it had before."""
    bench = SessionsBench()
    worker = bench.join("worker", "worker")
    bench.say(worker, p.Returned(lease=99, indexes=[]))
    bench.core.closed("worker", bench.now)
    bench.hello(worker)
    assert bench.sent() == [("worker", bench.welcome(worker))]
    bench.say(worker, p.Goodbye())
    assert bench.core.next_deadline() is None


@pytest.mark.bad_input(58)
def test_after_a_stall_of_its_own_the_broker_gives_up_nobody() -> None:
    """It heard nothing because it did not listen; all silences begin anew."""
    bench = SessionsBench()
    worker, client = bench.join("worker", "worker"), bench.join("client")
    bench.core.closed("worker", bench.now)
    bench.tick(max(STALL_SECONDS, TIMINGS.client_lost_after) + 1.0)
    assert bench.scheduler.status(bench.now).workers[0].state == "ready"
    bench.say(worker, BEAT)
    assert bench.sent() == [("worker", BEAT)]
    bench.now += 1e6
    bench.say(client, BEAT)
    assert bench.sent() == [("client", BEAT)]
    bench.tick(0.0)
    assert len(bench.scheduler.status(bench.now).workers) == 1


def test_who_has_the_keys_read_anew_is_answered_before_it_is_cut() -> None:
    """Its own key may be among those that are gone."""
    bench = SessionsBench()
    worker, admin = bench.join("worker", "worker"), bench.join("admin", "admin")
    bench.join("client")
    bench.sent()
    bench.say(admin, p.ReloadKeys())
    assert bench.core.reloaders
    bench.step(bench.core.cut_unless(lambda route, role: role == "client", bench.now))
    reason = "its key was revoked"
    assert bench.sent() == [
        ("admin", p.KeysReloaded(cut=1)),
        *cut(worker, reason),
        ("admin", p.Cluster(workers=0, slots=0)),
        ("client", p.Cluster(workers=0, slots=0)),
        *cut(admin, reason),
    ]
    assert not bench.core.reloaders


def test_the_deadline_is_the_next_of_all() -> None:
    """The scheduler's own among them."""
    bench = SessionsBench()
    assert bench.core.next_deadline() is None
    client = bench.join("client")
    assert bench.core.next_deadline() == bench.now + TIMINGS.client_lost_after
    worker = bench.join("worker", "worker")
    assert bench.core.next_deadline() == bench.now + TIMINGS.suspect_after
    bench.core.closed("worker", bench.now)
    assert bench.core.next_deadline() == bench.now + TIMINGS.grace
    bench.say(worker, BEAT)
    bench.sent()
    bench.say(client, submit(1))
    bench.sent()
    bench.tick_when_due()
    assert bench.sent() == [("client", p.Running(ids=[1]))]
    assert bench.now < 101.0
