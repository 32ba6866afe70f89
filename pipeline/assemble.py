"""From a loaded model to a running engine: KV memory, context length, method, and the step times measured at start."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.acceptance import AcceptanceTable
from pipeline.budget import StepTimes
from pipeline.economy import Economy
from pipeline.engine import Engine, EngineConfig
from pipeline.errors import ConfigError
from pipeline.growth import DraftOptions
from pipeline.head import DraftHead
from pipeline.head_drafter import HeadDrafter
from pipeline.kv_cache import KVShape
from pipeline.methods import Method, build
from pipeline.model_drafter import ModelDrafter
from pipeline.packing import Run, Runs
from pipeline.pages import PageRun
from pipeline.proposal import Drafter
from pipeline.ranks import Ranks, Room
from pipeline.search import Searcher
from pipeline.target import Target, kv_shape, max_context_of
from pipeline.tree import TokenTree

PAGE_SIZE = 32
_CPU_SHARE = 0.25  # of available memory
_GPU_SHARE = 0.85
TIMED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ALWAYS_TIMED = 64  # more rows only where there are half as many slots
_TIMED_SECONDS = 0.3
_MIN_CONTEXT = 16
_DRAFT_PAGES = 3  # a slot's tree in the draft model's cache, beyond its known tokens


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may set; none of it changes the text.

    Attributes:
        num_slots: requests decoded at a time.
        gpu_share: share of each GPU that this process may take.
        slot_tokens: KV memory that there must be for each, in tokens; otherwise there are fewer slots.
        budget: most tree nodes a slot and round, 0 for none; None chooses by measured step times.
        kv_memory: bytes for keys and values; None takes what `num_slots` longest sequences need, within a share of
            what is free.
        max_context: longest prompt plus output in tokens; None takes the model's.
        prefill_chunk: most prefill tokens a round.
        drafting: shape of a draft model's trees.
        is_static: run passes of fixed sizes, see `pipeline.static_pass`; None where that is faster, on a GPU.
    """

    num_slots: int = 16
    budget: int | None = None
    kv_memory: int | None = None
    max_context: int | None = None
    prefill_chunk: int = 512
    drafting: DraftOptions = field(default_factory=DraftOptions)
    is_static: bool | None = None
    slot_tokens: int = 0
    gpu_share: float = 1.0


def build_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    options: EngineOptions,
    searchers: Sequence[Searcher] = (),
    draft: PreTrainedModel | DraftHead | None = None,
    ranks: Ranks | None = None,
) -> Engine:
    """An engine for a loaded model.

    Args:
        searchers: of the method's sources that search text outside the request.
        draft: a model with the same tokenizer, or a head of this target, for the source `draft`; its KV cache shares
            the memory.
        ranks: the processes that share the model, of which this is the leader; None if it is whole.

    Raises:
        ConfigError: the context asked for is longer than the model's or than KV memory holds.
        ModelError: the model's architecture is not supported.
    """
    max_context = _max_context(model, options.max_context)
    shape, room = kv_room(model, options.gpu_share, ranks)
    num_ranks = 1 if ranks is None else ranks.size
    token_bytes = shape.bytes_per_token + _draft_bytes(draft)
    page_bytes = token_bytes * PAGE_SIZE
    wanted = options.num_slots * (-(-max_context // PAGE_SIZE) + 1) * page_bytes
    memory = options.kv_memory // num_ranks if options.kv_memory is not None else min(wanted, room)
    num_pages = min(memory, wanted) // page_bytes
    if num_pages * PAGE_SIZE < max_context + 1:
        max_context = (num_pages - 1) * PAGE_SIZE
        if options.max_context is not None or max_context < _MIN_CONTEXT:
            raise ConfigError(
                f"--kv-memory gives {memory * num_ranks:,} bytes, room for {max(max_context, 0)} tokens of context; "
                f"{(options.max_context or _MIN_CONTEXT) + PAGE_SIZE} tokens need "
                f"{num_ranks * token_bytes * ((options.max_context or _MIN_CONTEXT) + 2 * PAGE_SIZE):,} bytes. "
                "Raise --kv-memory or lower --max-context."
            )
    if options.slot_tokens:
        most = max(num_pages * PAGE_SIZE // min(options.slot_tokens, max_context), 1)
        options = replace(options, num_slots=min(options.num_slots, most))
    target = Target(model, num_pages, PAGE_SIZE, options.num_slots, is_static=options.is_static, ranks=ranks)
    acceptance = AcceptanceTable()
    speculates = bool(method.sources)
    drafter = _drafter(draft, target, num_pages, options)  # first: what it reads of a pass takes time, too
    times = measure_step_times(target, options.num_slots) if speculates and options.budget is None else None
    config = EngineConfig(
        num_slots=options.num_slots,
        budget=options.budget if speculates else 0,
        prefill_chunk=options.prefill_chunk,
        max_context=max_context,
    )
    economy = Economy(times, options.drafting.depth) if times is not None else None
    proposers = build(method, acceptance, target.config.vocab_size, searchers, drafter, economy)
    return Engine(target, tokenizer, eos_token_ids(model, tokenizer), proposers, acceptance, config, times)


def _drafter(
    draft: PreTrainedModel | DraftHead | None, target: Target, num_pages: int, options: EngineOptions
) -> Drafter | None:
    match draft:
        case None:
            return None
        case DraftHead():
            target.read_states(draft.config.depths)
            shape, is_static = options.drafting, options.is_static
            return HeadDrafter(draft, num_pages, PAGE_SIZE, options.num_slots, shape, is_static=is_static)
    num_pages += _DRAFT_PAGES * options.num_slots
    own = Target(draft, num_pages, PAGE_SIZE, options.num_slots, is_static=options.is_static)
    return ModelDrafter(own, options.drafting)


def _draft_bytes(draft: PreTrainedModel | DraftHead | None) -> int:
    """Of one token in the draft's cache."""
    match draft:
        case None:
            return 0
        case DraftHead():
            return 2 * draft.config.num_kv_heads * draft.config.head_dim * draft.fuse.weight.dtype.itemsize
    return kv_shape(draft).bytes_per_token


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """Token ids that end a sequence, as `generate` takes them: generation config, else config, else tokenizer."""
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids: Any = getattr(source, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def measure_step_times(target: Target, num_slots: int) -> StepTimes:
    """Seconds of a verification pass by its number of rows, from passes over an empty cache; some seconds on a CPU.

    Rows are spread over the slots: the same rows of more sequences take longer.
    """
    seconds = []
    num_pages = target.num_pages
    timed = [rows for rows in TIMED_ROWS if rows <= max(ALWAYS_TIMED, 2 * num_slots)]
    num_slots = min(num_slots, num_pages)
    timed = [rows for rows in timed if sum(map(_pages_of, _spread(rows, num_slots))) <= num_pages]
    for rows in timed:
        runs, first = [], 0
        for own in _spread(rows, num_slots):
            pages = PageRun.of(range(first, first + _pages_of(own)))
            first += _pages_of(own)
            tree = TokenTree.of(range(1, own), [-1] * (own - 1), "draft")  # every row with logits, as in verification
            runs.append(Run(np.zeros(1, np.int32), tree, 0, pages, True))
        try:
            seconds.append(_fastest(target, Runs.of(runs, PAGE_SIZE)))
        except torch.OutOfMemoryError:
            if target.is_shared or not seconds:  # a pass that others do, too, cannot be given up
                raise
            break  # the engine does with fewer rows, too
    return StepTimes(timed[: len(seconds)], seconds)


def _fastest(target: Target, runs: Runs) -> float:
    """Of four passes, or of two that are so long that others beside them hardly change them."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 4 and sum(seconds) < _TIMED_SECONDS):
        seconds.append(_timed(target, runs))
    return min(seconds)


def _timed(target: Target, runs: Runs) -> float:
    begin = time.perf_counter()
    target.forward(runs).logits.argmax(dim=-1).cpu()
    return time.perf_counter() - begin


def _spread(rows: int, num_slots: int) -> list[int]:
    """Rows of each of at most `num_slots` sequences."""
    count = min(rows, num_slots)
    return [rows // count + (i < rows % count) for i in range(count)]


def _pages_of(rows: int) -> int:
    return -(-rows // PAGE_SIZE)


def _max_context(model: PreTrainedModel, asked: int | None) -> int:
    longest = max_context_of(model)
    if asked is not None and asked > longest:
        raise ConfigError(f"--max-context is {asked}; the model's context is {longest}. Ask for at most that.")
    return asked or longest


def kv_room(model: PreTrainedModel, gpu_share: float, ranks: Ranks | None = None) -> tuple[KVShape, int]:
    """Shape of the KV cache, and how many bytes there are for it: in each process, where several share the model."""
    if ranks is not None:
        ranks.tell(Room(gpu_share))
    shape = kv_shape(model)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left is room, too
    room = _free_memory(model.device, shape, gpu_share)
    if ranks is None:
        return shape, room
    return shape, ranks.least(room if model.device.type == "cuda" else room // ranks.size)


def _free_memory(device: torch.device, shape: KVShape, gpu_share: float) -> int:
    """Bytes for the keys and values of all layers, of which each device takes its layers' part."""
    if device.type == "cuda":
        devices = shape.devices or (device,) * shape.num_layers
        room = (_free_on(each, gpu_share) * len(devices) / devices.count(each) for each in set(devices))
        return int(min(room) * _GPU_SHARE)
    return int(psutil.virtual_memory().available * _CPU_SHARE)


def _free_on(device: torch.device, gpu_share: float) -> float:
    """Of a GPU's share that is this process's, what is neither taken by it nor by others."""
    free, total = torch.cuda.mem_get_info(device)
    return max(min(free, total * gpu_share - torch.cuda.memory_reserved(device)), 0.0)
