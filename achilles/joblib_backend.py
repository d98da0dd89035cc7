"""The backend "achilles" of joblib: batches of `joblib.Parallel` run as tasks of a
`DistributedExecutor`.

Rules
    1. An executor serves one call of `Parallel` at a time, and outlives it: the next call that
       agrees in address, number of jobs and initializer finds warm runners. It ends when it was
       idle for `IDLE_SECONDS`, when one of another kind is wanted, or with the program.
    2. A call that is aborted while it has work ends its executor, so that nothing of it still runs.
    3. `submit` never raises: joblib calls it in a callback, where nobody would hear of it and all
       would wait. What is wrong is the outcome of the batch instead.
    4. Inside a task the backend is joblib's own for nested calls, threads or a plain loop: a runner
       is one slot, and more processes would compete with the other slots.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from time import monotonic, sleep
from typing import Any, NamedTuple

from joblib import cpu_count
from joblib.parallel import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
    ThreadingBackend,
)

from achilles.config import home, load
from achilles.executor import DistributedExecutor
from achilles.register import register_joblib
from achilles.runtime.context import current_attempt
from achilles.runtime.initialize import with_environ

NAME = "achilles"
IDLE_SECONDS = 300.0  # as long as joblib's own processes wait for more work
POLL_SECONDS = 0.05


class AchillesBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs `joblib.Parallel` on runners of this machine, or on a cluster.

    ``n_jobs`` limits how many batches run at once; without it, and for -1, it is all cores or all
    slots of the cluster. Further keywords, of `joblib.parallel_config` or of `joblib.Parallel`:

        address, config: as `DistributedExecutor` takes them.
        executor: an executor of yours to use, and not to shut down, instead of one that this
        backend makes. initializer, initargs: called on each runner before its first batch.
        wait_for_workers: how many seconds to wait for the first worker of a cluster that has none.

    ``inner_max_num_threads`` is for embedded mode. On a cluster the environment in which a worker
    is started says how many threads a numeric library uses there.
    """

    # Results are read by the callback; generators and timeouts follow from that
    supports_retrieve_callback = True

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        unknown = sorted(options.keys() - set(_Options._fields))
        if unknown:
            raise TypeError(f"the achilles backend takes no {unknown[0]!r}")
        self._given = _Options(**options)
        self._options = self._given
        self._lease: _Lease | None = None  # while a call of Parallel is under way
        self._batches: set[Future[Any]] = set()  # those without an outcome

    def __repr__(self) -> str:
        return f"<AchillesBackend {self._options.address or 'by the settings'} | {len(self._batches)} batches>"

    # --- How many jobs ----------------------------------------------------------------------------

    @property
    def default_n_jobs(self) -> int:
        """Who names this backend wants all there is; inside a task, that is one slot."""
        return 1 if current_attempt() else -1

    @property
    def supports_inner_max_num_threads(self) -> bool:
        """Whether the runners' environment is ours to set."""
        return self._options.executor is None and not self._options.cluster

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many jobs can run at once.

        Raises:
            ValueError: 0 jobs.
            TimeoutError: the cluster has no worker.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if current_attempt():
            return self._nested().effective_n_jobs(n_jobs)  # type: ignore[no-any-return]
        if n_jobs is None:
            n_jobs = self.default_n_jobs
        if n_jobs > 0:
            return int(n_jobs)
        # joblib does the work of a single job here; who names a cluster wants it there.
        least = 2 if self._options.cluster else 1
        return max(self._slots() + 1 + n_jobs, least)

    def _slots(self) -> int:
        options = self._options
        if options.executor is not None:
            return int(options.executor.size)
        if options.cluster:
            return _cluster_slots(options)
        return int(load(options.config)["client.max_workers"] or cpu_count())

    # --- One call of Parallel ---------------------------------------------------------------------

    def configure(
        self,
        n_jobs: int | None = 1,
        parallel: Any = None,
        prefer: str | None = None,
        require: str | None = None,
        **options: Any,
    ) -> int:
        """Get ready for a call of ``parallel``; how many jobs can run at once.

        Of the ``options`` those for joblib's own memory maps are passed over: large arrays reach a
        runner as memory that it may write to.
        """
        if current_attempt():
            raise FallbackToBackend(self._nested())
        ours = {name: value for name, value in options.items() if name in _Options._fields}
        self._options = self._given._replace(**ours)
        jobs = self.effective_n_jobs(n_jobs)
        if jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        is_all = n_jobs is None or n_jobs == -1
        limit = None if is_all and self._options.cluster else jobs
        environ = {}
        if self.supports_inner_max_num_threads:
            environ = self._prepare_worker_env(n_jobs=jobs)
        lease = _lease(self._options, limit, environ)
        with _lock:
            if self._lease is None:
                self._lease, self.parallel = lease, parallel
                return jobs
        # A call whose results come one by one is still under way;
        # this one gets an object of its own.
        lease.give_back()
        raise FallbackToBackend(
            AchillesBackend(self.nesting_level, self.inner_max_num_threads, **self._given._asdict())
        )

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Any], object] | None = None
    ) -> Future[Any]:
        """Run a batch, and call ``callback`` with the future when it is done."""
        try:
            assert self._lease is not None, "joblib has not called configure"
            future = self._lease.executor.submit(_run_batch, func)
        except Exception as error:  # broken, or the program ends
            future = Future()
            future.set_exception(error)
        self._batches.add(future)
        future.add_done_callback(self._batches.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """The results of a batch that is done."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel what is left of the call, and end what runs of it."""
        left = [future for future in list(self._batches) if not future.done()]
        for future in left:
            future.cancel()
        lease = self._lease
        if left and lease is not None and lease.end():
            self._lease = _lease(*lease.recipe) if ensure_ready else None

    def terminate(self) -> None:
        """The call is over."""
        if self._lease is not None:
            self._lease.give_back()
            self._lease = None
        self.reset_batch_stats()

    def _nested(self) -> Any:
        """What joblib itself would use at this level of nesting."""
        level = self.nesting_level or 0
        return (ThreadingBackend if level <= 1 else SequentialBackend)(nesting_level=level)


class _Options(NamedTuple):
    """The keywords of the backend."""

    address: str | None = None
    config: str | os.PathLike[str] | None = None
    executor: Any = None
    initializer: Callable[..., object] | None = None
    initargs: Sequence[Any] = ()
    wait_for_workers: float = 10.0

    @property
    def cluster(self) -> str | None:
        """The address of the broker, if the backend makes executors for one."""
        if self.executor is not None:
            return None
        return load(self.config).broker_address(self.address)


# --- Runners' side --------------------------------------------------------------------------------


def _run_batch(batch: Callable[[], Any]) -> Any:
    register_joblib()  # the batch may name the backend
    return batch()


# --- Executors that outlive a call ----------------------------------------------------------------


class _Lease:
    """An executor for one call at a time."""

    def __init__(self, options: _Options, limit: int | None, environ: Mapping[str, str]) -> None:
        self.recipe = (options, limit, environ)  # which also keeps alive what the key names by id
        self.key = _key(*self.recipe)
        self.timer: threading.Timer | None = None
        initializer, initargs = options.initializer, tuple(options.initargs)
        if environ:
            initializer, initargs = with_environ(environ, initializer, initargs)
        self.executor: DistributedExecutor = options.executor or DistributedExecutor(
            limit,
            None,
            initializer,
            initargs,
            address=options.address,
            config=options.config,
        )

    @property
    def is_usable(self) -> bool:
        return not self.executor._core.is_shut_down and not self.executor._broken

    def give_back(self) -> None:
        """The call is over; the executor waits for another one, for a while."""
        if self.recipe[0].executor is not None:
            return
        if (
            sys.is_finalizing()
        ):  # a generator that the program left behind; no thread can start any more
            self.executor.shutdown(wait=False)
            return
        self.timer = threading.Timer(IDLE_SECONDS, self._close_if_idle)
        self.timer.daemon = True
        with _lock:
            _idle.append(self)
            self.timer.start()

    def end(self) -> bool:
        """End what runs, and the executor with it; False if it is not ours to end."""
        if self.recipe[0].executor is not None:
            return False
        self.executor.terminate_workers()
        return True

    def _close_if_idle(self) -> None:
        with _lock:
            if self not in _idle:
                return
            _idle.remove(self)
        self.executor.shutdown(wait=False)


_idle: list[_Lease] = []
_lock = threading.Lock()


def _forked() -> None:
    """A forked child can use none of them."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


os.register_at_fork(after_in_child=_forked)


def _lease(options: _Options, limit: int | None, environ: Mapping[str, str]) -> _Lease:
    """An executor for one more call: one that is idle, or a new one."""
    if options.executor is not None:
        return _Lease(options, limit, environ)
    key = _key(options, limit, environ)
    lease = _take_idle(lambda one: one.key == key and one.is_usable)
    if lease is not None:
        return lease
    close_idle(wait=False)
    return _Lease(options, limit, environ)


def _take_idle(is_wanted: Callable[[_Lease], bool]) -> _Lease | None:
    with _lock:
        lease = next(filter(is_wanted, reversed(_idle)), None)
        if lease is None:
            return None
        _idle.remove(lease)
    if lease.timer is not None:
        lease.timer.cancel()
    return lease


def close_idle(wait: bool = True) -> None:
    """End the executors that were kept for further calls of `joblib.Parallel`,
    with their runners and connections.
    """
    while (lease := _take_idle(lambda _: True)) is not None:
        lease.executor.shutdown(wait=wait)


def _key(options: _Options, limit: int | None, environ: Mapping[str, str]) -> tuple[object, ...]:
    """What two calls must have in common to use the same executor."""
    return (
        *_place(options),
        limit,
        *sorted(environ.items()),
        id(options.initializer),
        *map(id, options.initargs),
    )


def _place(options: _Options) -> tuple[object, ...]:
    """Where the executor's tasks run."""
    return (options.cluster, os.fspath(options.config or ""), str(home()))


def _cluster_slots(options: _Options) -> int:
    """The slots of the cluster, once it has any.

    Raises:
        TimeoutError: it has no worker, and none came in time.
    """
    place = _place(options)
    lease = _take_idle(lambda one: one.key[: len(place)] == place and one.is_usable)
    if lease is None:
        lease = _lease(options, None, {})
    deadline = monotonic() + options.wait_for_workers
    try:
        while not (slots := lease.executor.status()["slots"]):
            if monotonic() >= deadline:
                raise TimeoutError(
                    f"the cluster at {options.cluster} has had no worker for {options.wait_for_workers:g} s; "
                    "start one with: achilles worker"
                )
            sleep(POLL_SECONDS)
    finally:
        lease.give_back()
    limit = load(options.config)["client.max_workers"]
    return int(min(slots, limit) if limit else slots)
