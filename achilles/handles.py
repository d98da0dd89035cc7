"""An executor as it is pickled: small, without secrets, and connected only when it is used."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, TypeVar

from achilles.core.protocol import Options
from achilles.runtime import context

E = TypeVar("E")


class Handle(NamedTuple):
    """What an executor needs to reach what the pickled one reached."""

    address: str  # empty: it was embedded
    join_file: Any  # the path of one, if it was named
    max_workers: int | None
    max_tasks: int
    init: int
    timeouts: tuple[float, float]  # to connect, and to give up a broker
    prints: bool  # what tasks print
    results: tuple[str, ...] | None  # what those may name, if that is limited
    options: tuple[Any, ...]  # the fields of `Options`, or none
    credit: int
    slots: int
    init_blob: bytes  # for a connection of its own
    cluster: str  # whose runners it used, as in `context`

    @property
    def is_here(self) -> bool:
        """Whether the runner in which this is belongs to the cluster that the pickled one had."""
        if context.side is None:
            return False
        if self.cluster and context.cluster:
            return self.cluster == context.cluster
        return context.is_embedded == (not self.address)

    def but(self, options: Options | None) -> Handle:
        """The same with these options."""
        if options is None:
            return self._replace(options=())
        names = options.__struct_fields__
        return self._replace(options=tuple(getattr(options, name) for name in names))


def restore(kind: type[E], *fields: Any) -> E:
    """An executor of that kind, not connected yet."""
    handle = Handle(*fields)
    executor = object.__new__(kind)
    executor.__dict__.update(
        _handle=handle,
        _was_shut_down=False,
        _pid=os.getpid(),
        _address=handle.address,
        _join_file=handle.join_file,
        _max_workers_given=handle.max_workers,
        _max_tasks=handle.max_tasks,
        _init=handle.init,
        _timeouts=handle.timeouts,
        _prints=handle.prints,
        _results=handle.results,
        _is_embedded=not handle.address,
        _base=None,
        _options=Options(*handle.options) if handle.options else None,
    )
    return executor
