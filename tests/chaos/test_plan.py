from __future__ import annotations

import pytest

from tests.chaos.nemeses import GROUPS, KILLS, STOPS
from tests.chaos.plan import FULL_SECONDS, KINDS, LOADS, NEAR, NEMESES, plan, round_of

EFFECTS = {*KINDS, *GROUPS.values(), "faults", "requeued", "delayed", "flipped"}


def test_a_seed_gives_one_plan() -> None:
    assert plan(7, 20.0) == plan(7, 20.0)
    assert plan(7, 20.0).faults != plan(8, 20.0).faults


def test_what_is_named_is_not_drawn() -> None:
    named = plan(7, 20.0, "N3", "L5")
    assert (named.nemesis.name, named.load) == ("N3", "L5")
    assert {fault.kind for fault in named.faults} == {"kill broker"}


def test_all_nemeses_and_loads_are_drawn() -> None:
    drawn = [plan(seed, 1.0) for seed in range(400)]
    assert {one.nemesis.name for one in drawn} == set(NEMESES)
    assert {one.load for one in drawn} == set(LOADS)


def test_a_round_has_every_nemesis_and_load() -> None:
    plans = round_of(0, 20.0)
    assert [one.nemesis.name for one in plans] == list(NEMESES)
    assert {one.load for one in plans} == set(LOADS)
    turned = round_of(len(NEMESES), 20.0)
    assert [one.load for one in turned] != [one.load for one in plans]


@pytest.mark.parametrize("is_near", [False, True])
def test_the_replay_of_a_round_s_run_is_the_same_run(is_near: bool) -> None:
    for one in round_of(3, 5.0, is_near=is_near):
        words = one.command.split()
        seed, nemesis, load, seconds = (words[at] for at in (4, 6, 8, 10))
        assert words[11:] == ["--near"] * is_near
        assert plan(int(seed), float(seconds), nemesis, load, is_near=is_near) == one


def test_where_all_are_near_nothing_befalls_a_line() -> None:
    plans = round_of(0, 20.0, is_near=True) + [plan(n, 20.0, is_near=True) for n in range(200)]
    assert {one.nemesis.name for one in plans} == set(NEAR)
    kinds = {fault.kind for one in plans for fault in one.faults}
    assert kinds == {*KILLS, *STOPS, "drain worker", "no descriptors", "starve"} - {"memory killer"}
    assert all(one.needs["in pipes"] == 2 for one in plans)


@pytest.mark.parametrize("name", NEMESES)
def test_faults_are_in_order_within_the_run_and_healed_in_it(name: str) -> None:
    for seed in range(20):
        one = plan(seed, 20.0, name)
        times = [fault.at for fault in one.faults]
        assert times == sorted(times)
        assert all(0 < fault.at < 20.0 for fault in one.faults)
        assert all(fault.at + fault.seconds <= 20.001 for fault in one.faults)


@pytest.mark.parametrize("name", NEMESES)
def test_what_a_run_needs_can_be_had(name: str) -> None:
    """More is planned than is needed, because some faults find nobody."""
    nemesis = NEMESES[name]
    assert nemesis.needs
    assert set(nemesis.needs) <= EFFECTS
    for seed in range(50):
        one = plan(seed, FULL_SECONDS, name)
        kinds = [fault.kind for fault in one.faults]
        for need, least in nemesis.needs.items():
            planned = sum(need in (kind, GROUPS.get(kind)) for kind in kinds)
            assert planned >= least or need in ("faults", "requeued", "delayed", "flipped")


def test_every_kind_of_a_nemesis_comes_up() -> None:
    for name, nemesis in NEMESES.items():
        kinds = {fault.kind for fault in plan(1, 60.0, name, "L2").faults}
        assert kinds == set(nemesis.kinds)


def test_a_shorter_run_needs_less_but_something() -> None:
    needs = plan(0, FULL_SECONDS / 10, "N1").needs
    assert all(0 < needs[name] < least for name, least in NEMESES["N1"].needs.items())


def test_the_client_that_does_not_read_is_in_the_plan() -> None:
    assert any(fault.kind == "unread" for fault in plan(0, 20.0, "N1", "L7").faults)
