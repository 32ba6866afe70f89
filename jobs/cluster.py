"""Joining or starting a Ray cluster, and dividing its cores and GPUs among replicas."""

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

import ray
from ray.exceptions import RayError

from jobs.config import GenerateConfig
from pipeline.errors import ConfigError

# Ray puts sockets under its temporary directory, and a socket's path has at most 107 bytes.
_LONGEST_TEMP_DIR = 40

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
    """What each replica reserves, for each of its processes.

    Attributes:
        num_cpus: cores Ray sets aside, less than 1 where replicas outnumber cores.
        num_threads: threads the process computes with.
        num_ranks: processes of a replica.
    """

    num_replicas: int
    num_cpus: float
    num_gpus: float
    num_threads: int
    num_ranks: int = 1

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """By what is reserved, not by what a process sees: Ray does not hide GPUs from an actor that asked for none."""
        return "cuda" if self.num_gpus > 0 else "cpu"


class _ToLog(io.TextIOBase):
    """Takes what is printed to it as debug messages."""

    def write(self, text: str) -> int:
        if text.strip():
            log.debug("%s", text.rstrip())
        return len(text)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Sequence[Mapping[str, float]]]:
    """Join the cluster at `address` (None: the one this runs on, else a new local one); gives its nodes' resources.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address is {address!r}; this program cannot drive a cluster from outside. Run it inside with `ray"
            " job submit`, or give a node's address."
        )
    # Quiet two notices about defaults of future Ray versions; we rely on neither default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Even with log_to_driver=False Ray prints to stdout when a worker dies; only the job's outcome belongs there.
    with contextlib.redirect_stdout(cast(IO[str], _ToLog())):
        _init(address)
        try:
            yield [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        finally:
            ray.shutdown()


def _init(address: str | None) -> None:
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=_short_temp_dir(),
        )
    except (ConnectionError, ValueError, RayError) as error:
        raise ConfigError(
            f"--ray-address is {address!r}; no Ray cluster answers: {error}. Give the address of one, or `local`."
        ) from error


def place(config: GenerateConfig, nodes: Sequence[Mapping[str, float]]) -> Placement:
    """Divide the cluster among replicas.

    Args:
        nodes: `CPU` and `GPU` of each node.

    Raises:
        ConfigError: the cluster cannot hold one replica.
    """
    gpus = [node.get("GPU", 0.0) for node in nodes]
    cores = [node["CPU"] for node in nodes if node.get("CPU", 0.0) > 0]
    if not cores:
        raise ConfigError("the Ray cluster has no CPUs; add a node with at least one.")
    num_ranks = config.tensor_parallel
    per_rank = _gpus_per_rank(config, max(gpus))
    if config.num_replicas != "auto":
        num_replicas = config.num_replicas
    elif per_rank > 0:
        num_replicas = sum(int(count // (per_rank * num_ranks)) for count in gpus)
    else:
        num_replicas = len(cores)
    on_one_node = math.ceil(num_replicas / len(cores))
    share = min(cores) / (on_one_node * num_ranks)
    threads = max(1, int(share)) if config.num_threads == "auto" else config.num_threads
    wanted = 1.0 if per_rank > 0 else float(threads)
    # Ray counts in units of 1/10000.
    return Placement(num_replicas, math.floor(min(wanted, share) * 1e4) / 1e4, per_rank, threads, num_ranks)


def _gpus_per_rank(config: GenerateConfig, most: float) -> float:
    asked, num_ranks = config.gpus_per_replica, config.tensor_parallel
    if num_ranks > 1 and asked == "auto" and config.device != "cpu" and most > 0:
        asked = float(num_ranks)
    if config.device == "cuda" and (most == 0 or asked == 0):
        raise ConfigError("--device is cuda, but replicas get no GPU; use a cluster with GPUs, or --device cpu.")
    if asked == "auto":
        return 0.0 if config.device == "cpu" or most == 0 else 1.0
    if asked > most:
        if config.gpus_per_replica == "auto":
            raise ConfigError(
                f"--tensor-parallel is {num_ranks}, but the largest node has {most:g} GPUs; it must be at most that."
            )
        raise ConfigError(
            f"--gpus-per-replica is {asked:g}, but the largest node has {most:g}; it must be at most that."
        )
    if asked > 1 and asked != int(asked):
        raise ConfigError(f"--gpus-per-replica is {asked:g}; above 1 it must be a whole number.")
    if num_ranks > 1 and asked not in (0, num_ranks):
        raise ConfigError(
            f"--gpus-per-replica is {asked:g} and --tensor-parallel {num_ranks}; each of these processes takes one GPU,"
            " so leave --gpus-per-replica out."
        )
    return asked / num_ranks


def _short_temp_dir() -> str | None:
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(base) <= _LONGEST_TEMP_DIR or Path(base, "ray", "ray_current_cluster").exists():
        return None
    return f"/tmp/rasd-{os.getuid()}"
