"""Executors by mode, and one cluster for all of these tests."""

from tests.modes import cluster, make

__all__ = ["cluster", "make"]
