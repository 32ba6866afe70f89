"""What a verification pass takes on a GPU by slots and nodes, for models of given shapes with random weights.

    python -m benchmarks.gpu_passes --shapes smollm2-135m llama-8b --output benchmarks/results/gpu_passes.json

Needs torch, transformers, numpy and numba. Each pass over a cache of random numbers is timed eagerly and as a captured
graph, after the two have been compared in fp32; beside them stand the card's measured ceilings, and the bytes of
weights and cache that a pass must read. A head's draft levels are timed the same way.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import machine
from pipeline.growth import DraftOptions
from pipeline.head import DraftHead, HeadConfig
from pipeline.head_drafter import HeadDrafter
from pipeline.pace import FullPace
from pipeline.packing import Run, Runs
from pipeline.pages import PageRun
from pipeline.proposal import Committed, SlotView
from pipeline.target import Target
from pipeline.tree import TokenTree

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2},
    "smollm2-135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama-8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"intermediate_size": 256, "vocab_size": 512, "head_dim": 64},
    "smollm2-135m": {"intermediate_size": 1536, "vocab_size": 49152, "head_dim": 64},
    "llama-8b": {"intermediate_size": 14336, "vocab_size": 128256, "head_dim": 128},
}
_PAGE = 32
_REPEATS = 15
_HEAD_VOCABULARY = 8192


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["smollm2-135m"])
    arguments.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32, 128])
    arguments.add_argument("--nodes", type=int, nargs="+", default=[0, 1, 3, 7, 15, 31])
    arguments.add_argument("--context", type=int, default=512)
    arguments.add_argument("--most-rows", type=int, default=1024)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--profile", type=Path, help="text file for the kernels of a one-slot pass of each shape")
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    device = torch.device(options.device)
    results: dict[str, Any] = {"machine": machine(), "context": options.context}
    results["differences"] = [_differences(device, context) for context in (0, 17, 300)]
    print(results["differences"], file=sys.stderr, flush=True)
    results["ceilings"] = ceilings(device)
    print(results["ceilings"], file=sys.stderr, flush=True)
    results["shapes"] = {
        name: curve(name, device, options.slots, options.nodes, options.context, options.most_rows, options.profile)
        for name in options.shapes
    }
    text = json.dumps(results, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """One of `SHAPES`, the same weights each time on one kind of device."""
    config = LlamaConfig(**SHAPES[name], **SIZES[name], tie_word_embeddings=name != "llama-8b")
    config.dtype = dtype
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def _runs(slots: int, nodes: int, context: int, vocabulary: int, first_page: int = 0) -> list[Run]:
    """One root a slot with a random tree of so many nodes behind `context` cached tokens."""
    draws = np.random.default_rng(first_page)
    pages = -(-(context + nodes + 1) // _PAGE)
    runs = []
    for slot in range(slots):
        parents = [int(draws.integers(-1, i)) if i else -1 for i in range(nodes)]
        tree = TokenTree.of(draws.integers(0, vocabulary, nodes).tolist(), parents, "draft")
        held = PageRun.of(first_page + slot * pages + page for page in range(pages))
        runs.append(Run(draws.integers(0, vocabulary, 1).astype(np.int32), tree, context, held, True))
    return runs


def _target(model: LlamaForCausalLM, slots: int, context: int, nodes: int, *, is_static: bool) -> Target:
    num_pages = slots * -(-(context + nodes + 1) // _PAGE)
    target = Target(model, num_pages, _PAGE, slots, is_static=is_static)
    torch.manual_seed(1)
    for pool in (*target.cache.keys, *target.cache.values):
        pool.normal_()
    return target


def _differences(device: torch.device, context: int) -> dict[str, Any]:
    """The largest difference between logits of both kinds of passes and those of the CPU, in fp32, and their spread."""
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    runs = [*_runs(3, 13, context, 512), *_runs(2, 0, context, 512, 40)]
    chunk = 45
    held = PageRun.of(range(100, 100 + -(-(context + chunk) // _PAGE)))
    runs.append(Run(np.arange(chunk, dtype=np.int32), TokenTree.of([], [], "draft"), context, held, True))
    expected = Target(model, 128, _PAGE, is_static=False)
    torch.manual_seed(1)
    for pool in (*expected.cache.keys, *expected.cache.values):
        pool.normal_()
    caches = [pool.clone() for pool in (*expected.cache.keys, *expected.cache.values)]
    columns = Runs.of(runs, _PAGE)
    want = expected.forward(columns).logits
    found: dict[str, Any] = {"context": context, "spread": round(float(want.std()), 4)}
    model.to(device)  # type: ignore[arg-type]
    for kind in ("eager", "graph"):
        target = Target(model, 128, _PAGE, is_static=kind == "graph")
        for pool, content in zip((*target.cache.keys, *target.cache.values), caches, strict=True):
            pool.copy_(content)
        for _ in range(2):
            found[kind] = float((target.forward(columns).logits.cpu() - want).abs().max())
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of copies and operations a second of matrix products; nothing without CUDA."""
    if device.type != "cuda":
        return {}
    data = torch.randn(1 << 30, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(data)
    copied = 2 * data.numel() * 2 / _seconds(lambda: other.copy_(data), device)
    square = data[: 1 << 26].view(8192, 8192)
    product = 2 * 8192**3 / _seconds(lambda: square @ square, device)
    return {"copy_tb_s": round(copied / 1e12, 2), "bf16_tflop_s": round(product / 1e12, 1)}


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> float:
    """Median seconds, the device's work included."""
    call(), call(), call()
    times = []
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def curve(
    name: str,
    device: torch.device,
    slots: Sequence[int],
    nodes: Sequence[int],
    context: int = 512,
    most_rows: int = 1024,
    profile_to: Path | None = None,
) -> dict[str, Any]:
    """Milliseconds of passes and drafts of one of `SHAPES`, and the rate at which passes read weights and cache."""
    models = {kind: random_model(name, device, torch.bfloat16) for kind in ("eager", "graph")}  # one compiled in parts
    model = models["graph"]
    vocabulary = model.config.vocab_size
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2
    points = []
    for num_slots in slots:
        targets = {
            kind: _target(models[kind], num_slots, context, max(nodes), is_static=kind == "graph")
            for kind in ("eager", "graph")
        }
        read = weights + num_slots * context * targets["graph"].cache.shape.bytes_per_token
        for count in nodes:
            if num_slots * (count + 1) > most_rows:
                continue
            runs = Runs.of(_runs(num_slots, count, context, vocabulary), _PAGE)
            point: dict[str, Any] = {"slots": num_slots, "nodes": count}
            for kind, target in targets.items():
                if kind == "eager" and count not in (0, 7):
                    continue
                seconds = _seconds(lambda target=target, runs=runs: _greedy(target, runs), device)
                point[f"{kind}_ms"] = round(1000 * seconds, 3)
            point["tb_s"] = round(read / point["graph_ms"] / 1e9, 3)
            points.append(point)
            print(name, point, file=sys.stderr, flush=True)
        if profile_to and num_slots == slots[0]:
            runs = Runs.of(_runs(num_slots, 7, context, vocabulary), _PAGE)
            _profile(name, targets["graph"], runs, profile_to)
        del targets
    found = {"weights_gb": round(weights / 1e9, 3), "passes": points}
    found["drafts"] = _drafts(model, device, slots, context)
    print(name, found["drafts"], file=sys.stderr, flush=True)
    return found


def _drafts(model: LlamaForCausalLM, device: torch.device, slots: Sequence[int], context: int) -> list[dict[str, Any]]:
    """Milliseconds of a draft in full with a random head, of five levels."""
    config = model.config
    head_config = HeadConfig.for_target(model, "random", _HEAD_VOCABULARY, 16)
    embedding = model.get_input_embeddings().weight.detach()
    output = model.get_output_embeddings().weight.detach()
    token_ids = torch.arange(min(_HEAD_VOCABULARY, config.vocab_size), device=device)
    rows = []
    for num_slots in slots:
        with torch.device(device):
            head = DraftHead(head_config, embedding, output, token_ids).to(device, embedding.dtype).eval()
        pages = -(-(context + 2) // _PAGE)
        row: dict[str, Any] = {"slots": num_slots}
        for is_static in (False, True):
            drafter = HeadDrafter(head, num_slots * pages, _PAGE, num_slots, DraftOptions(), is_static=is_static)
            views = []
            for slot in range(num_slots):
                tokens = np.random.default_rng(slot).integers(0, config.vocab_size, context + 1).astype(np.int32)
                held = PageRun.of(range(slot * pages, (slot + 1) * pages))
                views.append(SlotView(slot, tokens, 8, pages=held))
                states = torch.randn(context, 3 * config.hidden_size, device=device, dtype=embedding.dtype)
                places = np.arange(context)
                whole = Committed([slot], np.array([0, context]), tokens[:-1], places, slot * pages * _PAGE + places)
                drafter.commit(whole, states)
            seconds = _seconds(lambda drafter=drafter, views=views: drafter.draft(views, FullPace()), device, 7)
            row["graph_ms" if is_static else "eager_ms"] = round(1000 * seconds, 3)
        rows.append(row)
    return rows


def _greedy(target: Target, runs: Runs) -> torch.Tensor:
    """The target's choices, on the CPU as a round wants them."""
    return target.forward(runs).logits.argmax(-1).cpu()


def _profile(name: str, target: Target, runs: Runs, path: Path) -> None:
    activities = [ProfilerActivity.CUDA] if target.device.type == "cuda" else [ProfilerActivity.CPU]
    target.forward(runs)
    with profile(activities=activities) as profiler:
        for _ in range(5):
            _greedy(target, runs)
    averages = profiler.key_averages()
    kernels = sum(entry.count for entry in averages if entry.self_device_time_total > 0) / 5
    busy = sum(entry.self_device_time_total for entry in averages) / 5
    with path.open("a", encoding="utf-8") as file:
        table = averages.table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=100)
        file.write(f"{name}: {kernels:.0f} kernels a pass, {busy:.0f} us of them busy\n{table}\n")


if __name__ == "__main__":
    main()
