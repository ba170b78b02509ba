"""All that a job asks of Ray: a cluster to run on, settings, and what its exceptions mean."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import socket
import sys
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import ray
import ray.data
import ray.exceptions
from ray._private.ray_logging import stdout_deduplicator
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning
from typing_extensions import override

from quantbatch import dataset_threads
from quantbatch.draining import ours_again, signals_wait
from quantbatch.errors import ClusterError, JobError, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantbatch.spec import Cluster, JobSpec

T = TypeVar("T")

_ONE_CHUNK = {"batch_size": 1, "batch_format": "pyarrow"}
COMMITS_AT_ONCE = 8
"""A commit on S3 is three round trips of some 30 ms: 8 threads make about 80 commits/s of it."""
_SETTINGS: dict[str, Any] = {
    # Every row becomes a block of its own and goes on at once: a chunk never waits for another.
    "target_max_block_size": 1,
    # A chunk that is lost with its process is dropped, and comes again in the next round.
    "max_errored_blocks": -1,
    # Ray fails a job without output for 30 minutes; a chunk of long answers may take longer.
    "execution_no_progress_timeout_s": -1,
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    "enable_auto_log_stats": False,
}
ROWS_IN_FLIGHT = 1024
"""Rows that a replica should have: four times the largest batch, so that it never runs dry while
a chunk travels."""
MOST_CHUNKS_IN_FLIGHT = 16
_CARD, _CARD_LABEL = "accelerator_type:", "ray.io/accelerator-type"
READER_CPUS = 0.5
LIGHT_TASK_CPUS = 1.0
"""CPU cores that readers need beside replicas on CPUs; at least one reader must have room."""

DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RaySystemError,
)
"""What Ray raises when a process, a node or what they held is gone."""
_NO_ROOM = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)
"""What it raises where a chunk finds no room on its way from one process to the next."""
_DROPS = logging.getLogger("ray.data._internal.execution.streaming_executor_state")
_TRACES = logging.getLogger("ray.data.exceptions")
"""Logs whatever is raised while a dataset is read, also what a signal raises, and raises it on."""


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[str]:
    """Join or start a Ray cluster for the time of a run; yield what replicas work on.

    A cluster that was there before, such as the caller's own, is left running.

    Raises:
        ClusterError: No cluster answers, or it lacks what the job needs.
    """
    with joined(cluster):
        device = _device(cluster)
        with _settings():
            yield device


@contextlib.contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """Join or start a Ray cluster, unless this process is in one already.

    Raises:
        ClusterError: No cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    try:
        _init(cluster)
        with _quiet_raylet():
            yield
    finally:
        try:
            if ray.is_initialized():
                dataset_threads.end()
        finally:
            ray.shutdown()


def _init(cluster: Cluster) -> None:
    # Ray's C++ side logs errors of its own upkeep to the terminal; what concerns a job comes as
    # exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if not address:
        # Counted generously: replicas on CPUs must not starve the tasks that feed them.
        cores = max(os.cpu_count() or 1, math.ceil(_replica_cpus(cluster) + LIGHT_TASK_CPUS))
        options |= {"num_cpus": cores, "include_dashboard": False}
    try:
        if address:
            _knock(address)
        # What Ray starts on this machine would keep signals out for as long as it lives.
        waits = signals_wait() if address else contextlib.nullcontext()
        with waits, _quiet_start(), ours_again():
            ray.init(address or "local", **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address or 'this machine'}: {error}",
            "check cluster.address, or leave it out to start Ray on this machine",
        ) from error


def _knock(address: str) -> None:
    """Fail at once where nothing listens: ray.init itself tries for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Keep what Ray's C++ side says about its own log level off the terminal."""
    sys.stderr.flush()
    terminal = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nothing)


@contextlib.contextmanager
def _quiet_raylet() -> Iterator[None]:
    """Keep off stdout what Ray says of each process that dies: 900 characters, `log_to_driver` or
    not (2.60). What matters of it comes as an exception.
    """
    before, stdout_deduplicator.skip_re = stdout_deduplicator.skip_re, re.compile("")
    try:
        yield
    finally:
        stdout_deduplicator.skip_re = before


def _replica_cpus(cluster: Cluster) -> float:
    count = cluster.replicas if isinstance(cluster.replicas, int) else cluster.replicas.min
    return count * cluster.cpus_per_replica


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Set Ray Data up for chunks that are one row each (see `records`); undone afterwards."""
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in _SETTINGS}
    log = logging.getLogger("ray.data")
    level = log.level
    try:
        for name, value in _SETTINGS.items():
            setattr(context, name, value)
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Retries of actors have no other way in: ray < 2.64 in pyproject.toml is for this.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            # A round whose chunks all died has nothing to commit.
            warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
            yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


def _has_cards(cluster: Cluster) -> bool:
    there: float = ray.cluster_resources().get("GPU", 0)
    return 0 < cluster.gpus_per_replica <= there


def _device(cluster: Cluster) -> str:
    """Choose what replicas work on, and see that the cluster has it."""
    resources = ray.cluster_resources()
    if cluster.gpus_per_replica > 0:
        if _has_cards(cluster):
            return "cuda"
        if not cluster.cpu_fallback:
            raise ClusterError(
                f"each replica needs {cluster.gpus_per_replica:g} GPU, and the cluster has "
                f"{resources.get('GPU', 0):g}",
                "add a GPU node, or run on CPUs with --set cluster.cpu_fallback=true",
            )
    needed = _replica_cpus(cluster) + LIGHT_TASK_CPUS
    if resources.get("CPU", 0) < needed:
        raise ClusterError(
            f"the replicas and the tasks beside them need {needed:g} CPUs, and the cluster has "
            f"{resources.get('CPU', 0):g}",
            "lower cluster.replicas or cluster.cpus_per_replica",
        )
    return "cpu"


def card_names(cluster: Cluster) -> tuple[str, ...]:
    """Return the names of the cards that replicas may get, such as `A10G`, of the cluster that was
    joined; none if they run on CPUs.

    Ray finds them out on each node, or is told them (resources and labels); those of nodes whose
    card it does not name are missing.
    """
    if not _has_cards(cluster):
        return ()
    found: set[str] = set()
    for node in ray.nodes():
        resources: dict[str, float] = node.get("Resources", {})
        if not node.get("Alive") or not resources.get("GPU"):
            continue
        labels: dict[str, str] = node.get("Labels") or {}
        found |= {name[len(_CARD) :] for name in resources if name.startswith(_CARD)}
        found |= {labels[_CARD_LABEL]} if _CARD_LABEL in labels else set()
    return tuple(sorted(found))


def most_replicas(cluster: Cluster) -> int:
    """Return how many replicas there may be at once."""
    return cluster.replicas if isinstance(cluster.replicas, int) else cluster.replicas.max


def reader_options(spec: JobSpec, device: str) -> dict[str, Any]:
    """Return the arguments of `map_batches` for the pool of readers.

    They are actors because each loads a tokenizer, which takes seconds; tasks would do so in every
    process that they come to. One for each replica is plenty: it renders 20,000 short rows/s.
    """
    most = most_replicas(spec.cluster)
    taken = 0.0 if device == "cuda" else most * spec.cluster.cpus_per_replica
    spare = ray.cluster_resources().get("CPU", 1.0) - taken
    size = max(1, min(most, int(spare)))
    return {
        **_ONE_CHUNK,
        **_restarts(),
        "num_cpus": READER_CPUS,
        "compute": ActorPoolStrategy(size=size),
    }


def committer_options() -> dict[str, Any]:
    """Return the arguments of `map_batches` for the process that commits, in several threads."""
    pool = ActorPoolStrategy(
        size=1, max_concurrent_calls_per_actor=COMMITS_AT_ONCE, enable_true_multi_threading=True
    )
    # It asks for no CPU: what makes work count must never wait behind what makes work.
    return {**_ONE_CHUNK, **_restarts(), "num_cpus": 0, "compute": pool}


def _restarts() -> dict[str, Any]:
    """Return how often a process is started again: always, until the gate says otherwise; and a
    chunk tried that it died under: never, since the next round does it.
    """
    return {"max_restarts": -1, "max_task_retries": 0}


def chunks_in_flight(cluster: Cluster, *, chunks: int, rows: int) -> int:
    """Return how many chunks a replica works on at once.

    Args:
        cluster: What the spec says.
        chunks: How many there are to do.
        rows: Rows of all of them.
    """
    if cluster.chunks_in_flight != "auto":
        return cluster.chunks_in_flight
    replicas = most_replicas(cluster)
    holding_enough = math.ceil(ROWS_IN_FLIGHT * chunks / max(rows, 1))
    half_a_share = math.ceil(chunks / replicas) // 2
    return max(2, min(holding_enough, half_a_share, MOST_CHUNKS_IN_FLIGHT))


def replica_options(spec: JobSpec, device: str, in_flight: int) -> dict[str, Any]:
    """Return the arguments of `map_batches` for the pool of replicas."""
    replicas = spec.cluster.replicas
    size = (
        {"size": replicas}
        if isinstance(replicas, int)
        else {
            "min_size": replicas.min,
            "max_size": replicas.max,
        }
    )
    return {
        **_ONE_CHUNK,
        **replica_needs(spec, device),
        "compute": ActorPoolStrategy(
            **size,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
        ),
        **_restarts(),
    }


def replica_needs(spec: JobSpec, device: str) -> dict[str, Any]:
    """Return what a replica takes of a node."""
    if device == "cuda":
        # A replica on a card leaves the cores to the tasks that feed it.
        return {"num_gpus": spec.cluster.gpus_per_replica, "num_cpus": 0}
    return {"num_cpus": spec.cluster.cpus_per_replica}


def run_once(spec: JobSpec, device: str, function: Callable[[], T]) -> T:
    """Call a function in a process where a replica of the job would run, on its card if it has one.

    Raises:
        JobError: The function raised it.
    """
    needs = replica_needs(spec, device)
    try:
        found: T = ray.get(ray.remote(**needs, max_retries=0)(_call).remote(function))
        return found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, JobError):
            raise error.cause from error
        raise


def _call(function: Callable[[], T]) -> T:
    return function()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn the ways in which work on Ray can break down into an error that says so."""
    try:
        yield
    except _NO_ROOM as error:
        raise Stopped(
            f"Ray's object store has no room: {first_line(error)}",
            "make room where Ray spills to, or lower cluster.chunks_in_flight; the same command "
            "continues",
        ) from error
    except DEATHS as error:
        raise Stopped(
            f"a process of the job died: {first_line(error)}",
            "often the machine's memory; the same command continues",
        ) from error


class Dropped(logging.Filter):
    """Notes why chunks got lost in a round; Ray only logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.cause = ""
        """The latest, in a line."""
        self._fault: BaseException | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Take from Ray's log what is noted here."""
        _DROPS.addFilter(self)
        _TRACES.disabled = True
        try:
            yield
        finally:
            _TRACES.disabled = False
            _DROPS.removeFilter(self)

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self.note(error)
        return error is None

    def note(self, error: BaseException) -> None:
        """Note an error that came otherwise."""
        if isinstance(error, (*DEATHS, *_NO_ROOM)):
            self.cause = first_line(error)
        else:
            self._fault = error

    def raise_fault(self) -> None:
        """Raise what is no death: our stages raise nothing, so it is a fault of ours."""
        if self._fault:
            raise self._fault


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception of Ray's says."""
    return str(error).strip().split("\n", 1)[0]
