"""One line an event, and no flood of lines."""

from __future__ import annotations

import logging

import pytest

from achilles.net.audit import INTERVAL, OTHERS, SOURCES_MAX, Audit

LOG = logging.getLogger("achilles.test_audit")


@pytest.fixture
def audit(caplog: pytest.LogCaptureFixture) -> Audit:
    caplog.set_level(logging.INFO, LOG.name)
    return Audit(LOG)


def test_what_is_allowed_is_noted_each_time(audit: Audit, caplog: pytest.LogCaptureFixture) -> None:
    audit.note("session 1 begins: %s")
    audit.note("session 1 begins: %s")
    assert caplog.messages == ["session 1 begins: %s"] * 2


def test_refusals_of_one_source_are_one_line_a_minute(
    audit: Audit, caplog: pytest.LogCaptureFixture
) -> None:
    audit.refuse("client/ab", "too late", 0.0)
    for _ in range(5000):
        audit.refuse("client/ab", "junk", 1.0)
    audit.refuse("10.0.0.1", "no key", 2.0)
    audit.tick(INTERVAL - 0.1)
    assert caplog.messages == ["refused client/ab: too late", "refused 10.0.0.1: no key"]
    caplog.clear()
    audit.tick(INTERVAL)
    audit.tick(INTERVAL + 5)
    assert caplog.messages == ["refused client/ab 5000 times more within 60 s, at last: junk"]
    caplog.clear()
    audit.refuse("client/ab", "junk", INTERVAL + 6)
    assert caplog.messages == []  # its minute has begun anew
    audit.refuse("10.0.0.1", "no key", INTERVAL + 6)
    assert caplog.messages == ["refused 10.0.0.1: no key"]
    assert audit.refused == 5004


def test_any_number_of_sources_takes_bounded_memory(
    audit: Audit, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(SOURCES_MAX + 100):
        audit.refuse(f"10.0.{number}", "no key", 0.0)
    assert len(caplog.messages) == SOURCES_MAX + 1
    assert caplog.messages[-1] == f"refused {OTHERS}: no key"
    caplog.clear()
    audit.tick(INTERVAL)
    assert caplog.messages == [f"refused {OTHERS} 99 times more within 60 s, at last: no key"]
