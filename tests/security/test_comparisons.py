"""What is compared with a secret, and how."""

from __future__ import annotations

import _operator
import ast
from pathlib import Path

from achilles.runtime import seal
from tests.security.attacks import ROOT, attack

# Where a secret or a tag is at hand, and comparisons of anything with it by == would tell how far
# they agree.
SECRETIVE = ("runtime/seal.py", "letters.py", "runtime/imports.py", "core/sessions.py")
PUBLIC = {"names", "begun", "self._names", "self._begun"}  # of sessions, which travel in clear


def comparisons(path: Path) -> set[str]:
    """The texts that a module compares by == or !=, its invariants aside."""
    found: set[str] = set()
    tree = ast.parse(path.read_text("utf-8"))
    asserted = {
        one for node in ast.walk(tree) if isinstance(node, ast.Assert) for one in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            node not in asserted
            and isinstance(node, ast.Compare)
            and any(isinstance(one, ast.Eq | ast.NotEq) for one in node.ops)
        ):
            found |= {ast.unparse(side) for side in (node.left, *node.comparators)}
    return found


@attack("T38")
def test_tags_are_compared_in_constant_time() -> None:
    assert seal.is_same is _operator._compare_digest  # what hmac has where there is no OpenSSL
    for name in SECRETIVE:
        compared = comparisons(ROOT / "achilles" / name) - PUBLIC
        hasty = {
            text for text in compared if any(word in text for word in ("tag", "token", "code"))
        }
        assert not hasty, name


@attack("T38")
def test_a_token_is_only_ever_looked_up() -> None:
    """By its hash, which is keyed anew in each process:
    how long that takes tells nothing of how near a guess was.
    """
    text = (ROOT / "achilles/core/sessions.py").read_text("utf-8")
    assert "self._by_token.get(packet.header.token)" in text
