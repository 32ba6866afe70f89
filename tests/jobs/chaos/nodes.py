"""A Ray cluster of several nodes on this machine, and the processes in it that a campaign kills."""

import subprocess
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import psutil
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

# Ray's own patience with a silent node is 15 s and more, too long to wait for at every kill.
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}


class Nodes:
    """Context manager of a head without CPUs, where drivers and their retrieval actor are, and nodes of one CPU.

    Args:
        num_workers: nodes besides the head; with more than there are replicas a lost one finds another place.
    """

    def __init__(self, num_workers: int) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH},
        )
        for _ in range(num_workers):
            self._cluster.add_node(wait=False, num_cpus=1)
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        """For `--ray-address`."""
        return str(self._cluster.address)

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.shutdown()

    def actors(self, cls: str) -> list[psutil.Process]:
        """Processes of the actors of a class, in the order of their nodes and ages."""
        nodes = [self._cluster.head_node, *self._workers()]
        return [process for node in nodes for process in actors_below(_raylet(node), cls)]

    def kill_raylet(self, pick: float) -> bool:
        """SIGKILL to the raylet of a node with a replica; False if there is none.

        Args:
            pick: which one, in [0, 1).
        """
        busy = [node for node in self._workers() if list(actors_below(_raylet(node), "Replica"))]
        if busy:
            _raylet(busy[int(pick * len(busy))]).kill()
        return bool(busy)

    def mend(self) -> None:
        """Put new nodes in the places of those that lost their raylets."""
        for node in self._cluster.worker_nodes - set(self._workers()):
            self._cluster.remove_node(node, allow_graceful=False)  # what is left of it
            self._cluster.add_node(num_cpus=1)

    def _workers(self) -> list[Any]:
        alive = [node for node in self._cluster.worker_nodes if _process(node).poll() is None]
        return sorted(alive, key=lambda node: _process(node).pid)


def _process(node: Any) -> "subprocess.Popen[bytes]":
    return node.all_processes[PROCESS_TYPE_RAYLET][0].process


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(_process(node).pid)


def actors_below(ancestor: psutil.Process, cls: str) -> Iterator[psutil.Process]:
    """Actors of a class among the descendants of a process, by age."""
    for process in sorted(ancestor.children(recursive=True), key=lambda child: child.pid):
        try:
            title = (process.cmdline() or [""])[0]  # a zombie's is empty
        except psutil.NoSuchProcess:
            continue
        if title.partition(".")[0] == f"ray::{cls}":  # Ray puts a method behind the class while it runs
            yield process
