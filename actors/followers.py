"""The further processes of a replica whose target is shared, see `pipeline.ranks`: actors in bundles of its place.

They live and die together: whichever process is lost, all end, and the job's driver sees one replica lost.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.replica_config import ReplicaConfig
from pipeline.errors import JobError, RasdError
from pipeline.following import follow
from pipeline.models import load_causal_lm, resolve_model
from pipeline.ranks import End, Ranks, find_store, host_store

_GRACE_SECONDS = 30.0  # from the end of one process to that of another, or to the news of it

log = logging.getLogger(__name__)


class Follower:
    """One of them; a plain class, which its leader makes an actor."""

    def follow(self, config: ReplicaConfig, rank: int, port: int) -> None:
        """Loads its share of the target, and does its part of every pass until the leader leaves.

        Args:
            port: of the leader's store.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        ranks = Ranks(find_store(port), rank, config.num_ranks, config.device)
        resolved = resolve_model(config.model, config.revision)
        model = load_causal_lm(
            resolved,
            getattr(torch, config.dtype),
            config.device,
            trust_remote_code=config.trust_remote_code,
            num_ranks=config.num_ranks,
        )
        follow(model, ranks)  # and no more: who leaves waits for captured passes, and the leader ends this process


class Followers:
    """A replica's own; it runs in the first bundle of a placement group that has one for each process.

    Attributes:
        ranks: this process among them.
    """

    def __init__(self, config: ReplicaConfig) -> None:
        group: Any = get_current_placement_group()
        assert group is not None and group.bundle_count == config.num_ranks
        store, port = host_store()
        self._is_leaving = False
        self._is_lost = threading.Event()  # one of them has ended
        self._reason: RasdError | None = None  # what it said, if that is for the user
        self._actors = []
        for rank in range(1, config.num_ranks):
            bundle = group.bundle_specs[rank]
            lifted: Any = ray.remote(Follower).options(
                num_cpus=bundle.get("CPU", 0.0),
                num_gpus=bundle.get("GPU", 0.0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
            )
            self._actors.append(lifted.remote())
        self._ends = [actor.follow.remote(config, rank, port) for rank, actor in enumerate(self._actors, 1)]
        threading.Thread(target=self._watch, name="followers", daemon=True).start()
        with self.in_step():
            self.ranks = Ranks(store, 0, config.num_ranks, config.device)

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """What the processes do together.

        Raises:
            RasdError: what a follower could not do, or a device has no memory for.
        """
        try:
            yield
        except Exception as error:
            told = self.explain(error)
            if told is error:
                raise
            raise told from error

    def explain(self, error: BaseException) -> BaseException:
        """What a failure of the leader was, for the user; where a follower is lost, this process ends, too."""
        if isinstance(error, RasdError):
            return error
        if isinstance(error, torch.OutOfMemoryError):
            return _no_memory(error)
        if self._is_lost.wait(_GRACE_SECONDS):
            if self._reason is None:
                _end("another process of this replica is lost", error)
            return self._reason or error
        return error

    def leave(self) -> None:
        """Ends them."""
        self._is_leaving = True
        self.ranks.tell(End())
        self._kill()

    def _kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _watch(self) -> None:
        ended, _ = ray.wait(self._ends, num_returns=1)
        if self._is_leaving:
            return
        try:
            ray.get(ended)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            log.error("a process of this replica's target is lost: %s", cause or error)
            if isinstance(cause, torch.OutOfMemoryError):
                cause = _no_memory(cause)
            self._reason = cause if isinstance(cause, RasdError) else None
        self._is_lost.set()
        self._kill()  # whoever computes with them notices
        time.sleep(2 * _GRACE_SECONDS)
        _end("a process of this replica is lost, and this one did not notice", self._reason)


def _no_memory(error: BaseException) -> JobError:
    return JobError(
        f"The device has no memory for a replica of several processes: {error}. Lower --slots or --kv-memory; the same"
        " command then resumes the job."
    )


def _end(what: str, error: BaseException | None) -> NoReturn:
    """Ends this process as one that is lost; the job's driver starts another replica."""
    log.error("%s: %s", what, error)
    os._exit(1)
