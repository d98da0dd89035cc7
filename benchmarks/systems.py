"""The contestants: each system with two slots on this machine,
started the way its own users would, behind one surface.

A system is started by a context manager that is told a directory for what it writes. Peers are
imported by name when they are started:
each lives in an environment of its own (`benchmarks.environments`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

from benchmarks.work import noop, run_many

SLOTS = 2


def module(name: str) -> Any:
    """A peer's module; untyped, because style is checked without the peers."""
    return importlib.import_module(name)


class System:
    """Runs work on a `concurrent.futures` executor;
    the others override what they do in another way.
    """

    takes_chunksize = True  # its `map` does
    backend: str | None = None  # of joblib

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.backend_options: dict[str, Any] = {}

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A future of one call, of whichever kind the system has."""
        return self.executor.submit(function, *arguments)

    def gather(self, futures: Sequence[Any]) -> list[Any]:
        """The results of all of them, in order."""
        return [future.result() for future in futures]

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """All results, in order, as its users get them without tuning."""
        return list(self.executor.map(function, items))

    def map_chunks(
        self, function: Callable[[Any], Any], items: Sequence[Any], size: int
    ) -> list[Any]:
        """The same in chunks of that size; cut by hand if its `map` takes no size."""
        if self.takes_chunksize:
            return list(self.executor.map(function, items, chunksize=size))
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        together = self.map(functools.partial(run_many, function), parts)
        return [result for part in together for result in part]

    def share(self, data: Any) -> Any:
        """What its users give to many tasks instead of one large argument."""
        return data

    def register_backend(self) -> None:
        """Make its backend known to joblib, if it is not joblib's own."""

    def processes(self) -> dict[str, list[int]]:
        """Its processes by role: this one is the client, all that it started the rest,
        if no more is known of them.
        """
        return {"client": [os.getpid()], "rest": descendants(os.getpid())}


def descendants(number: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    # Not above: it is slow to import, and would be missing in the start-up of those who need it
    import psutil

    return [child.pid for child in psutil.Process(number).children(recursive=True)]


class Embedded(System):
    backend = "achilles"

    def register_backend(self) -> None:
        from achilles import register_joblib

        register_joblib()

    def processes(self) -> dict[str, list[int]]:
        return {"client": [os.getpid()], "runner": descendants(os.getpid())}


class Clustered(Embedded):
    """A broker and a worker, which are children of this process."""

    def __init__(self, executor: Any, cluster: Any) -> None:
        super().__init__(executor)
        self._cluster = cluster
        self.backend_options = {"address": cluster.address}

    def processes(self) -> dict[str, list[int]]:
        broker, worker = self._cluster.broker.pid, self._cluster.workers[0].pid
        return {
            "client": [os.getpid()],
            "broker": [broker, *descendants(broker)],
            "worker": [worker],
            "runner": descendants(worker),
        }


@contextmanager
def embedded(directory: str) -> Iterator[System]:
    from achilles import DistributedExecutor

    with DistributedExecutor(SLOTS) as executor:
        yield Embedded(executor)


@contextmanager
def _clustered(directory: str, *, tcp: bool) -> Iterator[System]:
    from achilles import DistributedExecutor
    from benchmarks.cluster import Cluster

    with Cluster(slots=SLOTS, tcp=tcp, awaits_workers=False) as cluster:
        os.environ["ACHILLES_HOME"] = cluster.home
        with DistributedExecutor(address=cluster.address) as executor:
            yield Clustered(executor, cluster)


def ipc(directory: str) -> AbstractContextManager[System]:
    return _clustered(directory, tcp=False)


def tcp(directory: str) -> AbstractContextManager[System]:
    return _clustered(directory, tcp=True)


@contextmanager
def processpool(directory: str) -> Iterator[System]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(SLOTS) as executor:
        system = System(executor)
        system.backend = "multiprocessing"
        yield system


@contextmanager
def loky(directory: str) -> Iterator[System]:
    executor = module("loky").get_reusable_executor(max_workers=SLOTS)
    try:
        system = System(executor)
        system.backend = "loky"
        yield system
    finally:
        executor.shutdown(wait=True)


class Dask(System):
    """Its own client: `get_executor` would hide what it can do.
    ``pure``: else equal calls run once.
    """

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.executor.submit(function, *arguments, pure=False)

    def gather(self, futures: Sequence[Any]) -> list[Any]:
        return list(self.executor.gather(futures))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return self.gather(self.executor.map(function, items, pure=False))

    def map_chunks(
        self, function: Callable[[Any], Any], items: Sequence[Any], size: int
    ) -> list[Any]:
        return self.gather(self.executor.map(function, items, pure=False, batch_size=size))

    def share(self, data: Any) -> Any:
        return self.executor.scatter(data, broadcast=True, hash=False)


@contextmanager
def dask(directory: str) -> Iterator[System]:
    distributed = module("distributed")
    with (
        distributed.LocalCluster(
            n_workers=SLOTS,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=directory,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        system = Dask(client)
        system.backend = "dask"
        yield system


class Ray(System):
    """Remote functions, made once for each function, as its users do by a decorator."""

    takes_chunksize = False
    backend = "ray"

    def register_backend(self) -> None:
        module("ray.util.joblib").register_ray()

    def __init__(self, ray: Any) -> None:
        super().__init__(None)
        self._ray = ray
        self._remote: dict[Any, Any] = {}

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        key = function if isinstance(function, type(noop)) else None
        remote = self._remote.get(key)
        if remote is None:
            if key is None:  # a partial: ray wants a function
                return self.submit(_call, function, *arguments)
            remote = self._remote[key] = self._ray.remote(function)
        return remote.remote(*arguments)

    def gather(self, futures: Sequence[Any]) -> list[Any]:
        return list(self._ray.get(list(futures)))

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return self.gather([self.submit(function, item) for item in items])

    def share(self, data: Any) -> Any:
        return self._ray.put(data)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@contextmanager
def ray(directory: str) -> Iterator[System]:
    peer = module("ray")
    peer.init(
        num_cpus=SLOTS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=2 << 30,
        _temp_dir=directory,
    )
    try:
        yield Ray(peer)
    finally:
        peer.shutdown()


@contextmanager
def parsl(directory: str) -> Iterator[System]:
    executors, providers = module("parsl.executors"), module("parsl.providers")
    htex = executors.HighThroughputExecutor(
        label="htex",
        address="127.0.0.1",
        loopback_address="127.0.0.1",
        max_workers_per_node=SLOTS,
        cores_per_worker=1e-6,  # or it starts as many workers as cores, if those are fewer
        provider=providers.LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    )
    config = module("parsl.config").Config(
        executors=[htex],
        run_dir=directory,
        strategy="none",
        initialize_logging=False,
        usage_tracking=0,
    )
    with module("parsl.concurrent").ParslPoolExecutor(config) as executor:
        system = System(executor)
        system.takes_chunksize = False
        yield system


class IPyParallel(System):
    """A load-balanced view; its `map` is asked for lists."""

    backend = "ipyparallel"

    def register_backend(self) -> None:
        self.executor.register_joblib_backend()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        return list(self.executor.map_sync(function, items))

    def map_chunks(
        self, function: Callable[[Any], Any], items: Sequence[Any], size: int
    ) -> list[Any]:
        return list(self.executor.map(function, items, block=True, chunksize=size))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.executor.apply_async(function, *arguments)

    def gather(self, futures: Sequence[Any]) -> list[Any]:
        return [future.get() for future in futures]


@contextmanager
def ipyparallel(directory: str) -> Iterator[System]:
    peer = module("ipyparallel")
    cluster = peer.Cluster(
        n=SLOTS, engines="local", controller_ip="127.0.0.1", log_level=40, profile_dir=directory
    )
    try:
        client = cluster.start_and_connect_sync()
        yield IPyParallel(client.load_balanced_view())
    finally:
        cluster.stop_cluster_sync()


@contextmanager
def scaler(directory: str) -> Iterator[System]:
    peer = module("scaler")
    combo = peer.SchedulerClusterCombo(n_workers=SLOTS)
    try:
        with peer.Client(address=combo.get_address()) as client:
            system = System(client)
            system.takes_chunksize = False
            yield system
    finally:
        combo.shutdown()


@contextmanager
def mpi(directory: str) -> Iterator[System]:
    with module("mpi4py.futures").MPIPoolExecutor(max_workers=SLOTS) as executor:
        yield System(executor)


class Contestant(NamedTuple):
    """``group``: of dependencies, in pyproject.toml; ``package``: whose version is told."""

    title: str
    start: Callable[[str], AbstractContextManager[System]]
    group: str
    package: str = ""


CONTESTANTS = {
    "processpool": Contestant("ProcessPoolExecutor", processpool, "bench"),
    "embedded": Contestant("achilles, embedded", embedded, "bench", "achilles"),
    "ipc": Contestant("achilles, broker over ipc", ipc, "bench", "achilles"),
    "tcp": Contestant("achilles, broker over TCP + CURVE", tcp, "bench", "achilles"),
    "loky": Contestant("loky", loky, "bench-loky", "loky"),
    "mpi": Contestant("mpi4py.futures", mpi, "bench-mpi", "mpi4py"),
    "dask": Contestant("dask.distributed", dask, "bench-dask", "distributed"),
    "ray": Contestant("Ray", ray, "bench-ray", "ray"),
    "parsl": Contestant("Parsl HTEX", parsl, "bench-parsl", "parsl"),
    "ipyparallel": Contestant("ipyparallel", ipyparallel, "bench-ipyparallel", "ipyparallel"),
    "scaler": Contestant("opengris-scaler", scaler, "bench-scaler", "opengris-scaler"),
}
OURS = ("embedded", "ipc", "tcp")


def started(name: str, directory: str) -> tuple[ExitStack, System]:
    """That contestant, started; the stack ends it."""
    with ExitStack() as stack:
        system = stack.enter_context(CONTESTANTS[name].start(directory))
        return stack.pop_all(), system
    raise AssertionError("an exit stack does not swallow exceptions")


def version(name: str) -> str:
    """Of the contestant's package in this environment."""
    package = CONTESTANTS[name].package
    return importlib.metadata.version(package) if package else ""
