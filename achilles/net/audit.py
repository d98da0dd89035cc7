"""The broker's account of who came, who was refused and who left: one line an event.

Rules
    1. Payloads, keys and tokens are in none of them; a user is named by role and fingerprint. What
       names and reasons of peers hold is escaped where the line is written (`cli.settings`).
    2. What somebody can cause any number of times is counted: one line for each source and minute,
       and the next one says how many more there were.
"""

from __future__ import annotations

import logging

INTERVAL = 60.0  # seconds
SOURCES_MAX = 1000
OTHERS = "others"


class _Source:
    """Where refusals come from, since its last line."""

    __slots__ = ("more", "until", "why")

    def __init__(self, until: float) -> None:
        self.until = until
        self.more = 0
        self.why = ""


class Audit:
    """Writes to ``log``; times are the caller's."""

    def __init__(self, log: logging.Logger) -> None:
        self.refused = 0
        self._log = log
        self._sources: dict[str, _Source] = {}  # the oldest first

    def note(self, text: str) -> None:
        """Something permitted was done."""
        self._log.info("%s", text)

    def refuse(self, source: str, why: str, now: float) -> None:
        """Somebody was refused."""
        self.refused += 1
        if source not in self._sources and len(self._sources) >= SOURCES_MAX:
            source = OTHERS
        known = self._sources.get(source)
        if known is None:
            self._sources[source] = _Source(now + INTERVAL)
            self._log.warning("refused %s: %s", source, why)
        else:
            known.more += 1
            known.why = why

    def tick(self, now: float) -> None:
        """Tell of what was counted for long enough."""
        for source, known in list(self._sources.items()):
            if now < known.until:
                break
            del self._sources[source]
            if known.more:
                text = "refused %s %d times more within %.0f s, at last: %s"
                self._log.warning(text, source, known.more, INTERVAL, known.why)
                self._sources[source] = _Source(now + INTERVAL)
