"""The engine on Ray: tasks decode shards, workers that hold the network explain and write them."""

import importlib.util
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sightline.checks import missing
from sightline.facts import Spread
from sightline.scale.decoding import TRIES, Decoded, Failed, Job, search_lethal
from sightline.scale.local import Decoder, Died
from sightline.scale.plan import is_address

if TYPE_CHECKING:
    from sightline.report.networks import ExplainedNetwork
    from sightline.scale.shards import Done

Key = TypeVar("Key")
Argument = TypeVar("Argument")
Result = TypeVar("Result")
_READERS = 8  # images of a core that are on their way over a network
_HOPELESS = 30  # deaths in a row per worker, without one that lived between them


class Cluster(NamedTuple):
    """What Ray may use."""

    address: str | None = None
    """Of a cluster that runs. None: Ray is started in this process, for this machine alone, and ended with it; it
    listens on 127.0.0.1 only, unless you imported Ray before. A Ray that you started in this process is used as it is.
    """
    workers: int | None = None
    """Networks that are held. None: one per GPU; without GPUs, one per core but one."""
    gpus: float | None = None
    """GPUs per worker; 0.5 lets two share one. None: 1 if there are GPUs."""
    cores: int | None = None
    """Cores of this machine that Ray may use, at least one more than workers. None: all. Of a cluster, those that it
    has."""
    memory: int | None = None
    """Bytes of shared memory for decoded images on this machine. None: Ray's choice."""


def check_installed() -> None:
    """Report before the work that Ray is missing.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise missing("--engine ray needs the library ray", "scale")


@contextmanager
def started(cluster: Cluster) -> Generator[Any]:
    """Ray, connected; what was started here ends here.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: options that go only with a Ray of our own, or no cluster at the address.
    """
    check_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's name for: listen on 127.0.0.1 only
        os.environ.setdefault("RAY_worker_niceness", "0")  # else workers are the last on a busy machine
    import ray

    if ray.is_initialized():
        yield ray
        return
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is not None:
        if cluster.cores is not None or cluster.memory is not None:
            raise ValueError(
                "expected --cores and --shared-memory without a cluster, which has its own; leave them out"
            )
        try:
            ray.init(address, **quietly)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"no Ray cluster answers at {address}: {error}; start one by ray start --head; "
                "RAY_AUTH_MODE and the token have to be the same there and here"
            ) from error
    else:
        cores = cluster.cores or os.cpu_count() or 1
        ray.init(
            "local",  # not a cluster that happens to run on this machine
            num_cpus=max(cores, (cluster.workers or 1) + 1),
            object_store_memory=cluster.memory,
            include_dashboard=False,
            **quietly,
        )
    try:
        yield ray
    finally:
        ray.shutdown()


def spread_by(cluster: Cluster) -> Spread:
    """`on_cluster` for functions that take one, such as `sightline.evaluate(spread=...)`."""
    check_installed()
    return partial(on_cluster, cluster)


def on_cluster(
    cluster: Cluster, function: Callable[..., Result], pairs: Iterable[tuple[Key, Argument]], *common: Any
) -> "Iterator[tuple[Key, Result | str]]":
    """What a function returns for each argument, or that its process died `TRIES` times, as they finish.

    Args:
        cluster: what Ray may use.
        function: called with an argument, and with `common`.
        pairs: keys and arguments; two per worker are taken ahead.
        common: sent once.

    Raises:
        Exception: what the function raises.
        ValueError: there are not enough cores or GPUs for the workers.
    """
    with started(cluster) as ray:
        workers, cores, gpus = _shares(ray, cluster)
        largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
        each = max(min(cores // workers, largest), 1)
        task = ray.remote(function).options(num_cpus=each, num_gpus=gpus, max_retries=TRIES - 1)
        sent, waiting, coming = [*map(ray.put, common)], iter(pairs), dict[Any, Key]()
        while True:
            coming |= {
                task.remote(argument, *sent): key for key, argument in islice(waiting, 2 * workers - len(coming))
            }
            if not coming:
                return
            (reference, *_), _ = ray.wait([*coming])
            result = _result(ray, reference)
            # its arrays are read-only and keep Ray's memory
            yield coming.pop(reference), result.reason if isinstance(result, _Death) else deepcopy(result)


def _shares(ray: Any, cluster: Cluster) -> tuple[int, int, float]:
    """Number of workers, of cores in all, and of GPUs per worker.

    Raises:
        ValueError: there are not enough GPUs for the workers.
    """
    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 0)), there.get("GPU", 0)
    per_worker = (1 if gpus else 0) if cluster.gpus is None else cluster.gpus
    workers = cluster.workers or (int(gpus / per_worker) if per_worker else max(cores - 1, 1))
    if workers >= cores or workers * per_worker > gpus:
        raise ValueError(
            f"expected fewer workers than cores, and GPUs for each, got {workers} workers with {per_worker:g} GPUs "
            f"on {cores} cores and {gpus:g} GPUs; give fewer --workers or --gpus"
        )
    return workers, cores, float(per_worker)


class _Death(NamedTuple):
    """The end of a process."""

    reason: str


def _result(ray: Any, reference: Any) -> Any:
    """What a task returned, or that its process died; errors of our own are raised."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if not isinstance(error.cause, RayError | Died):
            raise error.cause from None
        return _Death(str(error.cause))
    except RayError as error:
        return _Death(str(error))


class _Worker:
    """Holds the network; explains decoded shards and writes them."""

    def __init__(self, job: Job, network: "ExplainedNetwork") -> None:
        from sightline.runs import best_device

        self.job, self.network = job, network
        network.model.to(best_device())

    def ready(self) -> None:
        """Return once the network is there."""

    def write(self, decoded: Decoded) -> "Done":
        """See `shards.write`."""
        from sightline.scale.shards import write

        return write(self.job, self.network, decoded)

    def survive(self, decoded: Decoded) -> None:
        """Explain some images, to see whether this process dies of it."""
        from sightline.scale.shards import explained_in_batches

        for _ in explained_in_batches(self.job, self.network, decoded.pixels):
            pass


@lru_cache(maxsize=1)
def _decoder(job: Job) -> Decoder:
    """The decoding process of this one, which outlives a task."""
    return Decoder(job, _READERS if any(map(is_address, job.sources)) else 1)


def _decode(job: Job, shard: int, lethal: Sequence[int], part: Sequence[int] | None) -> tuple[None, Decoded]:
    """Nothing, which is fetched to see that it is done, and the images, which are not."""
    return None, _decoder(job).surely(shard, lethal, part)


class _Work(NamedTuple):
    """A whole shard, or with `part` some of its images, to see whether a process dies of them."""

    shard: int
    part: Sequence[int] | None = None


def run(job: Job, network: "ExplainedNetwork", shards: Iterable[int], cluster: Cluster) -> "Iterator[Done | Failed]":
    """Write shards on all workers, in any order; yields as each is done.

    A shard whose process dies is done again; after `TRIES` times, the images that are to blame are looked for by
    halving and left out. If none is, the shard is given up after as many more times.

    Raises:
        OSError: the disk is full, or a source cannot be reached.
        RuntimeError: processes die all the time.
        ValueError: there are not enough cores or GPUs for the workers.
    """
    with started(cluster) as ray:
        yield from _Driver(ray, job, network, cluster).run(shards)


class _Driver:
    """Hands out the work and counts the dead. It holds numbers of shards and references, and no image."""

    def __init__(self, ray: Any, job: Job, network: "ExplainedNetwork", cluster: Cluster) -> None:
        self.ray = ray
        self.job_size = job.size
        workers, cores, per_worker = _shares(ray, cluster)
        self.decoders = cores - workers
        bytes_each = job.per_shard * 3 * job.preprocess.size[0] * job.preprocess.size[1]
        fitting = int(0.7 * ray.cluster_resources().get("object_store_memory", 0) / bytes_each)
        self.most = max(min(self.decoders + 2 * workers, fitting), workers)
        self.decode = ray.remote(_decode).options(num_cpus=1, num_returns=2, max_retries=0)
        worker = ray.remote(_Worker).options(num_cpus=1, num_gpus=per_worker)
        self.job = ray.put(job)
        self.start_worker = partial(worker.remote, self.job, ray.put(network))
        self.again: deque[_Work] = deque()
        self.decoding: dict[Any, tuple[_Work, Any]] = {}
        self.decoded: deque[tuple[_Work, Any]] = deque()
        self.starting: dict[Any, Any] = {}
        self.idle: deque[Any] = deque()
        self.running: dict[Any, tuple[_Work, Any]] = {}
        self.deaths: Counter[int] = Counter()
        self.lethal: dict[int, list[int]] = {}
        self.searches: dict[int, Generator[Sequence[int], bool, list[int]]] = {}
        self.in_a_row, self.hopeless = 0, _HOPELESS * workers
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        worker = self.start_worker()
        self.starting[worker.ready.remote()] = worker

    def run(self, shards: Iterable[int]) -> "Iterator[Done | Failed]":
        """See the function."""
        coming = iter(shards)
        while True:
            while self._held() < self.most and len(self.decoding) < self.decoders:
                work = self.again.popleft() if self.again else next(map(_Work, coming), None)
                if work is None:
                    break
                seen, decoded = self.decode.remote(self.job, work.shard, self.lethal.get(work.shard, ()), work.part)
                self.decoding[seen] = (work, decoded)
            while self.idle and self.decoded:
                (work, decoded), worker = self.decoded.popleft(), self.idle.popleft()
                explain = worker.write if work.part is None else worker.survive
                self.running[explain.remote(decoded)] = (work, worker)
            if not (self._held() or self.again):
                return
            # only what is said of the images comes here, not the images
            finished, _ = self.ray.wait([*self.decoding, *self.running, *self.starting], fetch_local=False)
            for reference in finished:
                yield from self._finish(reference)

    def _held(self) -> int:
        return len(self.decoding) + len(self.decoded) + len(self.running)

    def _finish(self, reference: Any) -> "Iterator[Done | Failed]":
        result = _result(self.ray, reference)
        if worker := self.starting.pop(reference, None):
            if isinstance(result, _Death):
                self._count_death(result)
                self._start()
            else:
                self.idle.append(worker)
            return
        if reference in self.decoding:
            work, decoded = self.decoding.pop(reference)
            if not isinstance(result, _Death):
                self.decoded.append((work, decoded))
                return
        else:
            work, worker = self.running.pop(reference)
            if isinstance(result, _Death):
                self._start()
            else:
                self.idle.append(worker)
        if not isinstance(result, _Death):
            self.in_a_row = 0
        elif work.part is not None:
            self._count_death(result)
        if work.part is not None:
            self._search(work.shard, not isinstance(result, _Death))
        elif isinstance(result, _Death):
            yield from self._after_death(work, result)
        else:
            yield result

    def _count_death(self, death: _Death) -> None:
        self.in_a_row += 1
        if self.in_a_row > self.hopeless:
            raise RuntimeError(f"{self.in_a_row} processes died, one after the other; the last: {death.reason}")

    def _after_death(self, work: _Work, death: _Death) -> Iterator[Failed]:
        self._count_death(death)
        self.deaths[work.shard] += 1
        if self.deaths[work.shard] == TRIES:
            search = self.searches[work.shard] = search_lethal(range(self.job_size(work.shard)))
            self.again.append(_Work(work.shard, next(search)))
        elif self.deaths[work.shard] < 2 * TRIES:
            self.again.append(work)
        else:
            yield Failed(work.shard, death.reason)

    def _search(self, shard: int, survived: bool) -> None:
        try:
            self.again.append(_Work(shard, self.searches[shard].send(survived)))
        except StopIteration as end:
            self.lethal[shard] = end.value
            self.again.append(_Work(shard))
