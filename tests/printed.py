"""What came of what tasks print."""

from __future__ import annotations

import re


def kept_and_told(text: str) -> tuple[int, list[int]]:
    """How many characters came, without the lines that say how many were dropped;
    and what each of those says.
    """
    pattern = r"\[achilles: (\d+) bytes of output were dropped here\]\n"
    return len(re.sub(pattern, "", text)), [int(count) for count in re.findall(pattern, text)]
