"""Where the replicas of a job are: a placement group for each, which keeps its place while actors come and go in it.

A group is of the kind STRICT_PACK: all that a replica reserves, a bundle for each of its processes, is on one node. It
belongs to the driver, so that Ray removes it when the driver is gone, however that happened.
"""

import logging
from types import TracebackType
from typing import Any

from ray.exceptions import RayError
from ray.util import placement_group, remove_placement_group

from jobs.cluster import Placement

log = logging.getLogger(__name__)


class Places:
    """Context manager that makes the groups when they are asked for, and gives all resources back at its end."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        bundle = {"CPU": placement.num_cpus}
        if placement.num_gpus > 0:
            bundle["GPU"] = placement.num_gpus
        self._bundles = [dict(bundle) for _ in range(placement.num_ranks)]
        self._groups: dict[int, Any] = {}

    def group(self, replica: int) -> Any:
        """The replica's placement group, the same one each time; it may still wait for room."""
        if replica not in self._groups:
            self._groups[replica] = placement_group(self._bundles, strategy="STRICT_PACK")
        return self._groups[replica]

    def release(self, replica: int) -> None:
        """Gives up the place of a replica that is not started again; others may be waiting for the room."""
        if (group := self._groups.pop(replica, None)) is not None:
            _remove(replica, group)

    def __enter__(self) -> "Places":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replica in list(self._groups):
            self.release(replica)


def _remove(replica: int, group: Any) -> None:
    try:
        remove_placement_group(group)
    except RayError as problem:  # Ray removes it when the driver leaves; that must not hide another error
        log.warning("the place of replica %d was not given back at once: %s", replica, problem)
