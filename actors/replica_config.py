"""What a replica must know to start; small and picklable."""

from dataclasses import dataclass

from actors.searchers import RetrievalConfig
from pipeline.models import Quantization
from pipeline.request import SamplingParams


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """All a replica must know; the model, `dtype`, `quantization`, `sampling` and `seed` fix the text.

    Attributes:
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32`, `bfloat16` or `float16`.
        slots, slot_tokens, gpu_share: see `pipeline.assemble.EngineOptions`.
        budget: most tree nodes a slot and round; None tunes itself.
        kv_memory: bytes for keys and values; None takes a share of what is free.
        sources: of `PROVIDED_BY` in `pipeline.methods`: what this job has.
        draft: model, or directory of a head, for the source `draft`; None is the head shipped for the target.
        retrieval: where the others are; None if the method needs none of them.
        job: absolute path, or URI, of the job's output; names the job in metrics.
        num_threads: CPU threads of torch and numba; None leaves their default.
        quantization: `none` or `int8`, see `pipeline.models.load_causal_lm`.
        num_ranks: processes that share the target.
        is_split: spread the target's layers over all GPUs that the process sees.
        is_traced: keep the times of the newest rounds' phases, which `stop` returns.
    """

    model: str
    revision: str | None
    dtype: str
    device: str
    slots: int
    slot_tokens: int
    gpu_share: float
    method: str
    budget: int | None
    sampling: SamplingParams
    seed: int
    num_samples: int
    kv_memory: int | None
    max_context: int | None
    prefill_chunk: int
    trust_remote_code: bool
    sources: tuple[str, ...]
    draft: str | None
    retrieval: RetrievalConfig | None
    replica: int
    job: str
    num_threads: int | None
    quantization: Quantization
    num_ranks: int
    is_split: bool
    is_traced: bool
