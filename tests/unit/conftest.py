"""What unit tests of the user's side share."""

from tests.unit.silent import backends

__all__ = ["backends"]
