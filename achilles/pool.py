"""`Pool`: the surface of `multiprocessing.Pool`, on an executor.

What is asked of a pool becomes tasks of its executor:
    1. `apply` is a task.
    2. `map` cuts its input into chunks, each a task, as the standard's does: four for each slot.
       But a chunk of our own making gives up after `BOX_SECONDS`, and what is left of it is cut
       anew by how long its calls took: many short calls share a task,
       and a long one waits for no other.
    3. `imap` reads its input in a thread of its own, as the standard's does, but no further than a
       window beyond what was taken.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Any, Literal, TypeVar

from achilles.executor import DistributedExecutor
from achilles.pool_calls import (
    AsyncResult,
    IMapIterator,
    IMapUnorderedIterator,
    MapResult,
    Work,
)
from achilles.runtime.chunk import FOREVER

T = TypeVar("T")
P = TypeVar("P", bound="Pool")

CHUNKS_PER_SLOT = 4  # of a map's first cut; the standard library's number
BOX_SECONDS = 0.02  # a chunk that lasts longer is cut anew, into parts of half of that

State = Literal["INIT", "RUN", "CLOSE", "TERMINATE"]


class Pool:
    """A drop-in for `multiprocessing.Pool` that also runs on a cluster.

    Args:
        processes: how many calls run at once; None: as many as there are cores,
            or slots in the cluster.
        initializer: called with ``initargs`` on each runner before its first task of this pool.
        maxtasksperchild: a runner is replaced after so many tasks (embedded mode);
            a chunk of a map is one task.
        context: taken for compatibility, and ignored: runners are always fresh processes.
        address: ``tcp://host:port``, "auto", "embedded", or None, as with `DistributedExecutor`.
        config: path of an ``achilles.toml``.

    Raises:
        ValueError, TypeError: an argument that cannot be.
        ConfigError: a setting that cannot be.
        BrokerUnreachableError: no broker answers at the address.
    """

    _state: State = "INIT"

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: object = None,
        *,
        address: str | None = None,
        config: str | os.PathLike[str] | None = None,
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and not _is_positive(maxtasksperchild):
            raise ValueError("maxtasksperchild must be a positive int or None")
        executor = DistributedExecutor(
            processes,
            context,
            initializer,
            tuple(initargs),
            max_tasks_per_child=maxtasksperchild,
            address=address,
            config=config,
        )
        # To cut a chunk anew makes more tasks, and so would cost more runners where those are
        # counted.
        self._box_seconds = BOX_SECONDS if maxtasksperchild is None else FOREVER
        self._work = Work(executor)
        self._state = "RUN"

    def apply(
        self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}
    ) -> T:
        """The value of ``func(*args, **kwds)``."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[T]:
        """Have ``func(*args, **kwds)`` called.

        Args:
            callback: called with the value, in a thread of the pool, before the result is ready.
            error_callback: the same for an error.

        Raises:
            ValueError: the pool was closed.
        """
        self._check_running()
        task = self._work.submit(func, args, kwds)
        return AsyncResult(self._work, task, callback, error_callback)

    def map(
        self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int | None = None
    ) -> list[T]:
        """The values of ``func`` for each item, in order.

        All calls are made even if some raise; the error of the first of them, in order,
        is raised here.

        Args:
            chunksize: how many calls make a task; None leaves that to the pool.
        """
        return self.map_async(func, iterable, chunksize).get()

    def map_async(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[T]:
        """The same without waiting; the callback is called with the list of all values.

        Raises:
            ValueError: the pool was closed, or ``chunksize`` is below 1.
        """
        return self._map(func, iterable, False, chunksize, callback, error_callback)

    def starmap(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
    ) -> list[T]:
        """Like `map`, but each item is a sequence of arguments."""
        return self.starmap_async(func, iterable, chunksize).get()

    def starmap_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[T]:
        """The same without waiting."""
        return self._map(func, iterable, True, chunksize, callback, error_callback)

    def imap(
        self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int = 1
    ) -> IMapIterator[T]:
        """The values of ``func`` for each item, in order, while the input is read in a thread.

        Huge and endless inputs will do: they are read some way ahead of what was taken.

        Raises:
            ValueError: the pool was closed, or ``chunksize`` is below 1.
        """
        self._check_running()
        return IMapIterator(self._work, func, iterable, _chunksize(chunksize))

    def imap_unordered(
        self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int = 1
    ) -> IMapIterator[T]:
        """The same, with the values as they come."""
        self._check_running()
        return IMapUnorderedIterator(self._work, func, iterable, _chunksize(chunksize))

    def close(self) -> None:
        """Take no more calls; the runners end with the last one."""
        if self._state == "RUN":
            self._state = "CLOSE"
            self._work.close()

    def terminate(self) -> None:
        """End the runners now; what is under way fails."""
        self._state = "TERMINATE"
        self._work.terminate(wait=True)

    def join(self) -> None:
        """Wait for the last call and its callback, and for the runners' end.

        Raises:
            ValueError: the pool was neither closed nor terminated.
        """
        if self._state == "RUN":
            raise ValueError("Pool is still running")
        self._work.join()

    def _map(
        self,
        func: Callable[..., T],
        iterable: Iterable[Any],
        is_star: bool,
        chunksize: int | None,
        callback: Callable[[list[T]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> MapResult[T]:
        self._check_running()
        items = list(iterable)
        seconds = FOREVER
        if chunksize is None:
            chunksize = max(1, -(-len(items) // (CHUNKS_PER_SLOT * self._processes)))
            seconds = self._box_seconds
        return MapResult(
            self._work,
            func,
            items,
            is_star=is_star,
            chunksize=_chunksize(chunksize),
            seconds=seconds,
            callback=callback,
            error_callback=error_callback,
        )

    def _check_running(self) -> None:
        if self._state != "RUN":
            raise ValueError("Pool not running")
        self._work.check_process()

    @property
    def _processes(self) -> int:
        """How many calls can run at once: other libraries look for it."""
        return self._work.executor.size

    def __enter__(self: P) -> P:
        self._check_running()
        return self

    def __exit__(self, *exc: object) -> None:
        self.terminate()

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __repr__(self) -> str:
        kind = type(self)
        return f"<{kind.__module__}.{kind.__qualname__} state={self._state} pool_size={self._processes}>"

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if self._state == "RUN":
            _warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _chunksize(value: object) -> int:
    size = index(value)  # type: ignore[arg-type]
    if size < 1:
        raise ValueError(f"Chunksize must be 1+, not {size}")
    return size
