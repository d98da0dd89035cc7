"""`DistributedExecutor`: the contract of `concurrent.futures.Executor`, and nothing about wires.

What a call goes through: it is pickled here, in the caller's thread (so that its value is that of
the moment of the call), and put into a mailbox. One I/O thread, `local.LocalCluster` or
`net.client.Connection`, does the rest and resolves the future.
"""

from __future__ import annotations

import concurrent.futures
import html
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from achilles import backends
from achilles.backends import LIVE, Backend, Core, TaskCore
from achilles.bundles import are_containers
from achilles.core.status import status_dict
from achilles.errors import ExecutorForkedError, TerminatedError
from achilles.futures import Future, as_completed
from achilles.handles import Handle, restore
from achilles.mailbox import INIT_BLOB, Mailbox
from achilles.maps import name_of, results
from achilles.options import count, merge_options
from achilles.runtime import context
from achilles.runtime.arguments import ArgumentTable, Attached, join_attached
from achilles.runtime.functions import FunctionTable, bytes_of
from achilles.runtime.initialize import dumps_initializer
from achilles.runtime.serialize import dumps_call, join_inline

if TYPE_CHECKING:
    from types import TracebackType

    from achilles.core import protocol as p
    from achilles.runtime.functions import Pickled

T = TypeVar("T")


class Known(NamedTuple):
    """What calls of one function have in common, as long as ``entry`` holds, if there is one."""

    entry: Any
    group: p.Group
    blob: Pickled
    name: str


_CONNECTED = {"_arguments", "_core", "_finalizer", "_functions", "_mailbox", "_table_lock"}


class DistributedExecutor(concurrent.futures.Executor):
    """A drop-in for `concurrent.futures.ProcessPoolExecutor` that also runs on a cluster.

    Without an ``address`` it is embedded: tasks run on ``max_workers`` child processes of this
    program (by default one for each core), which start on demand. With one (the argument, or the
    setting ``address`` or ``join``, as in ``ACHILLES_ADDRESS``) they run on the workers of the
    broker there; "auto" is the join file's, or this user's running one, and ``max_workers`` then
    limits how many of this executor's tasks run at once. "embedded" is none, whatever is set.

    It can be pickled. In a task of its own it is the same executor: the task may submit and wait,
    and lends its slot meanwhile. So is one that a task makes of the same cluster, whatever its
    ``max_workers``, but for one with an initializer or ``client.results``. Elsewhere one with an
    address connects when it is first used.

    Args:
        max_workers: a positive integer, or None.
        mp_context: taken for compatibility, and ignored: runners are always fresh processes.
        initializer: called with ``initargs`` on each runner before its first task of this executor.
        max_tasks_per_child: a runner is replaced after so many tasks (embedded mode).
        address: ``tcp://host:port``, "auto", "embedded", or None: as the settings say.
        config: path of an ``achilles.toml``.

    Raises:
        ValueError, TypeError: an argument that cannot be.
        RuntimeError: in a child of `multiprocessing` that still imports the program's main module.
        ArgumentPickleError: the initializer, or one of its arguments, cannot be pickled.
        ConfigError: a setting that cannot be.
        BrokerUnreachableError: no broker answers at the address within ``connect_timeout`` seconds.
    """

    # For the function table: it pickles as the same while it is the same
    _is_pickled_by_identity = True
    _known: Known | None = None  # the function of the last call, which often is the next one's

    _prints: bool
    _results: tuple[str, ...] | None
    _mailbox: Mailbox
    _core: Core
    _arguments: ArgumentTable | None
    _functions: FunctionTable
    _table_lock: threading.RLock
    _finalizer: weakref.finalize[Any, Any]

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: object = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        address: str | None = None,
        config: str | os.PathLike[str] | None = None,
    ) -> None:
        backends.check_bootstrapped()
        max_workers = count("max_workers", max_workers, "greater than 0")
        max_tasks_per_child = count("max_tasks_per_child", max_tasks_per_child, ">= 1")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        from achilles.config import cores, load

        settings = load(config)
        max_workers = settings["client.max_workers"] if max_workers is None else max_workers
        self._join_file = settings["join"]
        self._prints = settings["client.output"] == "print"
        self._results = settings["client.results"]
        address = settings.broker_address(address)
        self._pid = os.getpid()
        self._options: p.Options | None = None
        self._base: DistributedExecutor | None = None  # of a view, what it is a view of
        self._init = INIT_BLOB if initializer is not None else 0
        self._max_tasks = max_tasks_per_child or 0
        self._is_embedded = not address
        self._max_workers_given = max_workers or (None if address else cores())
        self._address = address or ""
        self._timeouts = (settings["client.connect_timeout"], settings["client.broker_timeout"])
        initargs = tuple(initargs)
        self._open(dumps_initializer(initializer, initargs, is_far=bool(address)))
        if self._init:
            self._mailbox.init_source = initargs

    def _open(self, init_blob: bytes) -> None:
        """Make a backend of its own."""
        backend: Backend
        if self._address:
            from achilles.config import home
            from achilles.net.client import connection

            backend = connection(
                self._address,
                home=home(),
                join=self._join_file,
                slots_max=self._max_workers_given or 0,
                connect_timeout=self._timeouts[0],
                broker_timeout=self._timeouts[1],
                prints=self._prints,
                results=self._results,
            )
            if context.side is not None and not self._init and self._results is None:
                from achilles.nested import connection_to

                nested = connection_to(backend.mailbox.cluster)
                if nested is not None:
                    backend.discard()
                    self._attach(TaskCore(nested), nested.functions, nested.table_lock)
                    return
        else:
            from achilles.local import LocalCluster

            backend = LocalCluster(self._max_workers_given or 1, tasks_max=self._max_tasks)
        backend.mailbox.init_blob = init_blob
        self._attach(Core(backend), FunctionTable(backend.arguments), threading.RLock())
        if self._address:
            self._start()

    def _attach(self, core: Core, functions: FunctionTable, lock: threading.RLock) -> None:
        self._functions = functions
        self._arguments = functions.arguments
        self._table_lock = lock
        self._mailbox = core.backend.mailbox
        self._core = core
        self._finalizer = weakref.finalize(self, core.finish)
        self._finalizer.atexit = False

    # --- Pickled ----------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        handle: Handle = self.__dict__.get("_handle") or Handle(
            self._address,
            self._join_file,
            self._max_workers_given,
            self._max_tasks,
            self._init,
            self._timeouts,
            self._prints,
            self._results,
            (),
            self._mailbox.credit,
            self._mailbox.slots,
            b"" if self._is_embedded else self._mailbox.init_blob,
            self._mailbox.cluster,
        )
        return restore, (type(self), *handle.but(self._options))

    def __copy__(self) -> DistributedExecutor:
        return self

    def __deepcopy__(self, memo: object) -> DistributedExecutor:
        return self

    def __getattr__(self, name: str) -> Any:
        """What one that was unpickled lacks until it is used: then it connects."""
        if name in _CONNECTED and "_handle" in self.__dict__:
            with backends.connecting:
                if name not in self.__dict__:
                    self._connect(self._handle)
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _connect(self, handle: Handle) -> None:
        """Through the runner, in a task of the cluster; else as the pickled one was connected."""
        self._check_process()
        if self._was_shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if handle.is_here:
            from achilles.nested import connection as nested

            backend = nested(handle.credit, handle.slots)
            if backend is not None:
                self._attach(TaskCore(backend), backend.functions, backend.table_lock)
                return
        if self._is_embedded:
            raise RuntimeError(
                "this executor was pickled from one whose runners are children of another process: outside of its own "
                "tasks make a new DistributedExecutor, or use one with an address"
            )
        from achilles.config import load

        settings = load()  # which hold here, too, where the program's own say nothing else
        self._prints = self._prints and settings["client.output"] == "print"
        self._results = settings["client.results"] if self._results is None else self._results
        self._open(handle.init_blob)

    # --- The contract of concurrent.futures.Executor ----------------------------------------------

    def submit(
        self, fn: Callable[..., T], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[T]:
        """Schedule ``fn(*args, **kwargs)``; all keyword arguments are the function's.

        What cannot be pickled fails the future, with an `ArgumentPickleError` that names it; what
        is no callable, or is a coroutine function, fails it with a `TypeError`.

        Raises:
            RuntimeError: the executor was shut down.
            BrokenProcessPool: it is broken (a failed initializer, a broker that did not come back).
        """
        core = self._core
        if core.is_shut_down or backends.is_exiting or backends.process.pid != self._pid:
            self._check_usable()
        known = self._known
        try:
            payload = dumps_call(args, kwargs, fn, self._arguments)
            if known is None or not known.entry.is_valid(fn):
                known = self._know(fn)
        except Exception as error:
            self._check_usable()
            return self._failed(error, name_of(fn))
        _, group, blob, name = known
        if type(blob) is not bytes or isinstance(payload, Attached):
            payload, blob, blobs = join_attached(payload, blob)
            group = self._group(group.fn, group.chunk_max, blobs)
        if not group.fn:
            payload = join_inline(bytes_of(blob), payload)
        future = self._mailbox.submit(group, blob, payload, name)
        if not core.is_started:
            self._start()
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like `map`, in parallel, with results in order.

        The inputs are consumed at the call, unless ``buffersize`` is given: then at most so many
        items (times ``chunksize``) are under way or not taken yet, and endless inputs will do.

        Args:
            timeout: seconds from the call to the last result, or None.
            chunksize: at most so many items are one piece of work; 1 leaves that to the executor.

        Raises:
            ValueError: ``chunksize`` or ``buffersize`` below 1.
            TypeError: a ``buffersize`` that is no integer.
            concurrent.futures.TimeoutError: from the iterator, when the time is over.
        """
        return results(
            self,
            fn,
            zip(*iterables),
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
            is_bundled=are_containers(iterables),
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, and free what the executor holds when those that it has are done.

        Args:
            wait: return when that is so.
            cancel_futures: cancel what was not dispatched.
        """
        if os.getpid() != self._pid:
            return
        if not self._is_connected:
            self._was_shut_down = True
            return
        self._core.is_shut_down = True
        if cancel_futures and self._core.is_started:
            self._core.backend.cancel_pending()
        self._finalizer()
        if wait:
            self._core.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """`shutdown`. After Ctrl-C, which does not reach the runners, it cancels what is queued,
        and what runs has five seconds to end; a second one ends it at once.
        """
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.shutdown(wait=True)
            return None
        is_urgent = True
        try:
            self.shutdown(wait=False, cancel_futures=True)
            is_urgent = False
        finally:
            if self._is_connected and os.getpid() == self._pid:
                self._core.give_up(is_urgent=is_urgent)
        return None

    # --- Beyond it --------------------------------------------------------------------------------

    def map_unordered(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like `map`, with results as they come: a slow item holds up no other."""
        return results(
            self,
            fn,
            zip(*iterables),
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
            is_ordered=False,
            is_bundled=are_containers(iterables),
        )

    def starmap(
        self,
        fn: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like `map`, with the arguments of each call together: ``fn(*item)`` for each item."""
        return results(
            self,
            fn,
            map(tuple, iterable),
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
        )

    async def asubmit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """`submit`, and the result for a coroutine, when it is awaited.

        If the awaiting task is cancelled (by `asyncio.timeout` or `asyncio.wait_for`, for example),
        so is the future.
        """
        from achilles.aio import outcome

        value: T = await outcome(self.submit(fn, *args, **kwargs))
        return value

    def amap(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> AsyncGenerator[T, None]:
        """Like `map`, for ``async for``; what is not taken is cancelled when the iteration ends.

        The inputs are plain iterables, and are read in the event loop's thread.

        Raises:
            asyncio.TimeoutError: from the iterator, ``timeout`` seconds after the call.
        """
        from achilles.aio import results

        return results(
            self, fn, zip(*iterables), timeout=timeout, chunksize=chunksize, buffersize=buffersize
        )

    def as_completed(
        self,
        futures: Iterable[concurrent.futures.Future[T]],
        timeout: float | None = None,
        *,
        buffersize: int = 1000,
    ) -> Iterator[concurrent.futures.Future[T]]:
        """The futures as they are done; see `achilles.as_completed`."""
        return as_completed(futures, timeout, buffersize=buffersize)

    def status(self) -> dict[str, Any]:
        """The cluster in numbers: workers, slots, and tasks queued, running, done,
        failed, reassigned, late.

        ``workers_by_name`` holds a row for each worker.
        """
        self._check_process()
        if not self._core.is_started and not self._core.is_shut_down:
            self._start()
        return status_dict(self._core.backend.status())

    def terminate_workers(self) -> None:
        """End this executor's tasks and runners at once; what is unresolved fails."""
        self._kill("terminated")

    def kill_workers(self) -> None:
        """The same; runners are always killed."""
        self._kill("killed")

    @property
    def size(self) -> int:
        """How many tasks can run at once, at least 1."""
        return self._max_workers

    @property
    def _max_workers(self) -> int:
        slots = self._mailbox.slots
        given = self._max_workers_given
        if given is None:
            return max(1, slots)
        return given

    @property
    def _broken(self) -> bool | str:
        broken = self._mailbox.broken
        return str(broken) or repr(broken) if broken is not None else False

    def _repr_html_(self) -> str:
        """A table for notebooks, of what is known here: nobody is asked for it."""
        state = (
            "shut down"
            if self._core.is_shut_down
            else "running"
            if self._core.is_started
            else "unused"
        )
        rows = {
            "runs on": repr(self._core.backend),
            "state": f"broken: {self._broken}" if self._broken else state,
            "tasks at once": self.size,
            "tasks without a result": self._mailbox.unresolved,
        }
        if self._mailbox.workers >= 0:
            rows["workers"] = self._mailbox.workers
        cells = (
            f'<tr><th style="text-align: left">{name}</th>'
            f'<td style="text-align: left">{html.escape(str(value))}</td></tr>'
            for name, value in rows.items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{''.join(cells)}</table>"

    def __repr__(self) -> str:
        if not self._is_connected:
            return f"<DistributedExecutor {self._address or 'embedded'} | not connected yet>"
        state = "shut down" if self._core.is_shut_down else f"{self._mailbox.unresolved} tasks"
        return f"<DistributedExecutor {self._core.backend!r} | {state}>"

    def with_options(
        self,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        at_most_once: bool | None = None,
        priority: int | None = None,
        tags: str | Iterable[str] | None = None,
    ) -> DistributedExecutor:
        """The same executor with other options for what is submitted through it;
        None leaves one as it is here.

        It shares everything else: the tasks are one executor's, and a shutdown is one for both.

        Args:
            timeout: seconds that an attempt of a task may run; then its runner is killed and the
                task fails with a `TaskTimeoutError`, or has a retry. 0: no limit.
            retries: how often a task that raised, or took too long, is run again before it fails.
            at_most_once: a task of which nobody knows whether it ran, because its runner, worker or
                broker was lost, fails with a `TaskCrashedError` or `WorkerLostError` rather than
                runs again.
            priority: of its waiting tasks those with the highest one start first; 0 by default.
            tags: tasks run only on workers that were started with all of these tags; an embedded
                executor, whose only worker is this program, has every tag.

        Raises:
            TypeError, ValueError: an option that cannot be.
        """
        given = {
            "timeout": timeout,
            "retries": retries,
            "at_most_once": at_most_once,
            "priority": priority,
            "tags": tags,
        }
        if not self._is_connected:
            self._check_usable()  # it and its view share a connection
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._base = self  # which must not be collected before its view
        view._known = None  # its tasks are of other groups
        view._options = merge_options(
            self._options,
            {name: value for name, value in given.items() if value is not None},
            has_tags=not self._is_embedded,
        )
        return view

    # --- Inside -----------------------------------------------------------------------------------

    @property
    def _is_connected(self) -> bool:
        return "_core" in self.__dict__

    def _check_usable(self) -> None:
        if self._core.is_shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if backends.is_exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        self._check_process()
        broken = self._mailbox.broken
        if broken is not None:
            raise self._mailbox.broken_error()

    def _check_process(self) -> None:
        if backends.process.pid != self._pid:
            raise ExecutorForkedError(
                f"this executor was created in process {self._pid} and is used in {backends.process.pid}; "
                "create one after the fork"
            )

    def _know(self, fn: Callable[..., Any]) -> Known:
        """All that the calls of one function have in common.

        Raises:
            ArgumentPickleError, TypeError: it cannot be sent.
        """
        with self._table_lock:
            number, blob = self._functions.encode(fn)
            entry = self._functions.entry(fn)
        known = Known(entry, self._group(number, self._max_tasks), blob, name_of(fn))
        self._known = known if number and entry is not None else None
        return known

    def _group(self, fn: int, chunk_max: int, blobs: tuple[int, ...] = ()) -> p.Group:
        return self._mailbox.group(fn, self._init, chunk_max, self._options, blobs)

    def _start(self) -> None:
        with self._core.lock:
            if not self._core.is_started and not self._core.is_discarded:
                LIVE.add(self._core.backend)  # before, for Ctrl-C can interrupt it
                self._core.backend.start()
                self._core.is_started = True

    def _failed(self, error: Exception, name: str) -> concurrent.futures.Future[Any]:
        """A future for a call that could not be pickled."""
        future = Future(self._mailbox, 0, name)
        future.set_exception(error)
        return future

    def _kill(self, how: str) -> None:
        core, text = self._core, f"the executor's runners were {how} before the task was done"
        if core.is_started and not (core.is_shut_down and core.backend.thread is None):
            core.backend.kill(lambda: TerminatedError(text))
        self.shutdown(wait=False, cancel_futures=True)
