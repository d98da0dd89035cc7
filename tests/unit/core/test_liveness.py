"""Silence is measured on one side, and a stall of one's own is nobody's fault."""

from __future__ import annotations

from achilles.core.liveness import Silence


def test_who_is_silent_for_the_limit_expires_once() -> None:
    """At the limit, not before, and in order."""
    silence: Silence[str] = Silence(5.0)
    silence.heard("a", 0.0)
    silence.heard("b", 1.0)
    assert silence.next_deadline() == 5.0
    assert silence.expired(4.9) == []
    assert silence.expired(5.5) == ["a"]
    assert silence.expired(5.5) == []
    assert "a" not in silence
    assert "b" in silence


def test_any_sign_of_life_begins_anew() -> None:
    """Whoever was heard last expires last."""
    silence: Silence[str] = Silence(5.0)
    silence.heard("a", 0.0)
    silence.heard("b", 1.0)
    silence.heard("a", 4.0)
    assert silence.expired(6.0) == ["b"]
    assert silence.next_deadline() == 9.0


def test_amnesty_restarts_everybody() -> None:
    """After a sleep of our own nobody is called dead for it."""
    silence: Silence[str] = Silence(5.0)
    silence.heard("a", 0.0)
    silence.amnesty(100.0)
    assert silence.expired(104.0) == []
    assert silence.expired(105.0) == ["a"]


def test_the_forgotten_are_not_watched() -> None:
    """Neither those that were never known."""
    silence: Silence[str] = Silence(5.0)
    silence.heard("a", 0.0)
    silence.forget("a")
    silence.forget("stranger")
    assert silence.next_deadline() is None
    assert silence.expired(99.0) == []


def test_an_excused_silence_may_last_longer() -> None:
    """Once, and for no longer than a limit beyond what was said; others expire meanwhile."""
    silence: Silence[str] = Silence(5.0)
    silence.heard("a", 0.0)
    silence.heard("b", 1.0)
    silence.excuse("a", 12.0)
    assert silence.expired(6.0) == ["b"]
    assert silence.expired(11.5) == []
    assert silence.next_deadline() == 16.5
    assert silence.expired(16.5) == ["a"]
    assert silence.next_deadline() is None


def test_an_excuse_ends_when_it_is_heard_again() -> None:
    """What was announced has come; and nobody is excused who is not watched."""
    silence: Silence[str] = Silence(5.0)
    silence.heard("a", 0.0)
    silence.excuse("a", 100.0)
    silence.excuse("stranger", 100.0)
    silence.heard("a", 1.0)
    assert silence.expired(6.0) == ["a"]
    silence.heard("stranger", 10.0)
    assert silence.expired(15.0) == ["stranger"]
