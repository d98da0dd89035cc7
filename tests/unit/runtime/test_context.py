"""What a task may ask about itself."""

from __future__ import annotations

from achilles import current_attempt


def test_there_is_no_attempt_outside_of_tasks() -> None:
    assert current_attempt() == 0
