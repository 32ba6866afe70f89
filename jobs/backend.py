"""What stands behind a job: the real model and replicas here, fakes in tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jobs.cluster import Placement
from jobs.config import GenerateConfig
from jobs.plan import MemoryEstimate, ModelFacts
from jobs.storage import job_name

if TYPE_CHECKING:
    from actors.replica_config import ReplicaConfig

SHIPPED = "head"  # what `--draft` calls the head that comes with the project
AUTO_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
AUTO_SLOTS = {"cpu": 16, "cuda": 256}  # at most
# Of KV memory for each of them: more slots than long rows have room for would push each other out.
_SLOT_TOKENS = {"cpu": 0, "cuda": 1024}


@dataclass(frozen=True, slots=True)
class Retrieving:
    """How a job drafts: its method, and what it has for it (`PROVIDED_BY` in `pipeline.methods`)."""

    method: str
    sources: frozenset[str]


@dataclass(frozen=True, slots=True)
class Launch:
    """One actor to start.

    Attributes:
        services: what `Backend.services` started.
        resolved: the plan's fingerprint; dtype and max_context are `auto` in it until the first replica has decided.
        concurrency: calls the actor must take at once.
        group: placement group that has room for it; None takes any room.
    """

    config: GenerateConfig
    placement: Placement
    retrieving: Retrieving
    services: "Services | None"
    resolved: Mapping[str, Any]
    replica: int
    concurrency: int
    group: Any = None

    def actor(self, cls: type, *arguments: Any) -> Any:
        """Lift a plain replica class to an actor with this launch's resources."""
        lifted: Any = ray.remote(cls).options(
            num_cpus=self.placement.num_cpus,
            num_gpus=self.placement.num_gpus,
            max_concurrency=self.concurrency,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="DEFAULT" if self.group is None else PlacementGroupSchedulingStrategy(self.group, 0),
        )
        return lifted.remote(*arguments)


class Services(Protocol):
    """Actors that a job's replicas share."""

    @property
    def config(self) -> Any:
        """What a replica must know of them: `actors.searchers.RetrievalConfig` behind the real backend."""

    def notes(self) -> list[str]:
        """What a user should know of how they did, a line each."""


class Backend(Protocol):
    """The job's view of models."""

    def facts(self, config: GenerateConfig) -> ModelFacts:
        """Identity of the target; raises ModelError."""

    def memory(self, config: GenerateConfig) -> MemoryEstimate:
        """What a replica would need; raises ModelError."""

    def sources(self, config: GenerateConfig, facts: ModelFacts) -> frozenset[str]:
        """Which sources of `PROVIDED_BY` the job has; raises DatastoreError or ModelError."""

    def services(self, config: GenerateConfig, facts: ModelFacts, retrieving: Retrieving) -> "Services | None":
        """Starts what the replicas share; None if they share nothing."""

    def launch(self, launch: Launch) -> Any:
        """An actor with the methods of `actors.replica.Replica`."""


class ModelBackend:
    """Replicas of a real model. Its imports take seconds and wait until they are needed: fakes need none of them."""

    def facts(self, config: GenerateConfig) -> ModelFacts:
        """See `Backend.facts`."""
        from jobs.facts import model_facts

        return model_facts(config)

    def memory(self, config: GenerateConfig) -> MemoryEstimate:
        """See `Backend.memory`."""
        from jobs.facts import estimate_memory

        return estimate_memory(config)

    def sources(self, config: GenerateConfig, facts: ModelFacts) -> frozenset[str]:
        """See `Backend.sources`."""
        from jobs.facts import has_draft
        from jobs.retrieval import provided_sources

        sources = provided_sources(config, facts)
        if has_draft(config, facts):
            sources |= {"draft"}
        return sources

    def services(self, config: GenerateConfig, facts: ModelFacts, retrieving: Retrieving) -> "Services | None":
        """See `Backend.services`."""
        from jobs.facts import vocab_size
        from jobs.retrieval import RetrievalServices, sources_of

        used = sources_of(retrieving.method, retrieving.sources - {"draft"})
        return RetrievalServices(config, facts, used, vocab_size(config)) if used else None

    def launch(self, launch: Launch) -> Any:
        """See `Backend.launch`."""
        from actors.replica import Replica

        config = launch.config
        device = launch.placement.device
        dtype = launch.resolved["dtype"]
        replica_config = make_replica_config(
            config,
            launch.retrieving,
            # Of a hub model the very commit that was planned with, even if its branch has moved since.
            revision=launch.resolved["revision"],
            device=device,
            dtype=AUTO_DTYPE[device] if dtype == "auto" else dtype,
            max_context=_or_none(launch.resolved["max_context"]),
            retrieval=None if launch.services is None else launch.services.config,
            replica=launch.replica,
            num_threads=launch.placement.num_threads,
            num_gpus=launch.placement.num_gpus,
        )
        return launch.actor(Replica, replica_config)


def most_slots(config: GenerateConfig, device: str) -> int:
    """Slots of a replica; on a GPU memory may leave fewer where they are chosen for the user."""
    return AUTO_SLOTS[device] if config.slots == "auto" else config.slots


def make_replica_config(
    config: GenerateConfig,
    retrieving: Retrieving,
    *,
    revision: str | None,
    device: str,
    dtype: str,
    max_context: int | None,
    retrieval: Any,
    replica: int,
    num_threads: int | None,
    num_gpus: float,
) -> "ReplicaConfig":
    """What a replica is told: the user's options, with all that they leave open decided.

    Args:
        retrieval: `actors.searchers.RetrievalConfig`, or None.
        num_gpus: of each of the replica's processes, less than 1 if it shares one.
    """
    from actors.replica_config import ReplicaConfig

    return ReplicaConfig(
        model=anywhere(config.model),
        revision=revision,
        dtype=dtype,
        device=device,
        slots=most_slots(config, device),
        gpu_share=min(num_gpus, 1.0) if num_gpus > 0 else 1.0,
        slot_tokens=_SLOT_TOKENS[device] if config.slots == "auto" else 0,
        method=retrieving.method,
        sources=tuple(retrieving.sources),
        draft=None if config.draft in (None, SHIPPED) else anywhere(config.draft),
        retrieval=retrieval,
        budget=_or_none(config.budget),
        sampling=config.sampling(),
        seed=config.seed,
        num_samples=config.num_samples,
        kv_memory=_or_none(config.kv_memory),
        max_context=max_context,
        prefill_chunk=config.prefill_chunk,
        trust_remote_code=config.trust_remote_code,
        replica=replica,
        job=job_name(config.output),
        num_threads=num_threads,
        quantization=config.quantization,
        num_ranks=config.tensor_parallel,
        is_split=num_gpus > 1,
        is_traced=config.trace is not None,
    )


def anywhere(model: str) -> str:
    """A model's name so that it means the same in another process's working directory."""
    from pipeline.embedded import EMBEDDED

    path = Path(model).expanduser()
    return model if model in EMBEDDED or not path.exists() else str(path.absolute())


def _or_none(value: Any) -> int | None:
    return None if value == "auto" else int(value)
