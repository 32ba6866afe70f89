"""Engines against each other over the same requests, interleaved: tokens a second, and where a round's time goes."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.engine import Engine
from pipeline.request import Generation, Request

_PROFILED_REQUESTS = 2  # a slot
_PASSES = ("verify", "draft")  # phases that launch passes; what the host does there is in `gpu_busy` alone


class Deadline:
    """When to stop starting new measurements.

    Attributes:
        skipped: what was left out for lack of time.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self.skipped: list[str] = []

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there are more than so many seconds left; notes `what` otherwise."""
        is_allowed = time.monotonic() + seconds < self._until
        if not is_allowed:
            self.skipped.append(what)
            say(f"no time left for {what}")
        return is_allowed


def say(what: object) -> None:
    """Progress, on stderr."""
    print(what, file=sys.stderr, flush=True)


def run(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """What becomes of the requests, in their order."""
    return sorted(engine.generate(requests), key=lambda generation: generation.request_id)


def race(
    engines: Mapping[str, Engine],
    requests: Sequence[Request],
    repeats: int,
    others: Mapping[str, Callable[[], int]] | None = None,
    profile_to: Path | None = None,
) -> list[dict[str, Any]]:
    """A row for each engine; the first is what the others are compared to.

    Args:
        others: peers without an engine; each call generates and returns how many tokens.
        profile_to: text file for the kernels of each engine's rounds, added at its end.
    """
    done: dict[str, list[Generation]] = {}
    asked = {name: engine.num_slots for name, engine in engines.items()}

    def through(name: str) -> int:
        engines[name].forget()  # prefill counts
        done[name] = run(engines[name], requests)
        return sum(len(generation.token_ids) for generation in done[name])

    runs: dict[str, Callable[[], int]] = {name: partial(through, name) for name in engines} | dict(others or {})
    for name, call in runs.items():  # compiles, captures and learns
        begin = time.perf_counter()
        call()
        say(f"{name}: warmed up in {time.perf_counter() - begin:.1f} s")
    for engine in engines.values():
        engine.phases.seconds.clear()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, call in runs.items():
            begin = time.perf_counter()
            rates[name].append(call() / (time.perf_counter() - begin))
    first = next(iter(engines))
    rows = []
    for name in runs:
        row: dict[str, Any] = {"method": name, "tokens_per_second": round(statistics.median(rates[name]), 1)}
        ratios = [own / base for own, base in zip(rates[name], rates[first], strict=True)]
        row[f"of_{first}"] = round(statistics.median(ratios), 3)
        if name in engines:
            pairs = zip(done[name], done[first], strict=True)
            row["differing"] = round(sum(own.token_ids != base.token_ids for own, base in pairs) / len(requests), 3)
            row |= _of_rounds(engines[name], done[name]) | _on_device(engines[name], requests, profile_to)
            if engines[name].num_slots < asked[name]:
                row["slots_left"] = engines[name].num_slots  # memory ended: it is not what was asked for
        rows.append(row)
        say(row)
    return rows


def _of_rounds(engine: Engine, done: Sequence[Generation]) -> dict[str, Any]:
    """tau, and shares of a round by phase. Host work that nothing hides is at most what `gpu_busy` leaves: part of what
    is beside the phases with passes, what a round leaves to be noted, is done while a level is computed."""
    rounds = max(sum(generation.rounds for generation in done), 1)
    total = sum(engine.phases.seconds.values())
    phases = {name: round(seconds / total, 3) for name, seconds in engine.phases.seconds.items()}
    return {
        "tau": round(sum(len(generation.token_ids) - 1 for generation in done) / rounds, 3),
        "nodes": round(sum(generation.drafted for generation in done) / rounds, 2),
        "phases": phases,
        "beside_passes": round(sum(share for name, share in phases.items() if name not in _PASSES), 3),
    }


def _on_device(engine: Engine, requests: Sequence[Request], profile_to: Path | None) -> dict[str, Any]:
    """One more short run under the profiler: for how much of it the device computes."""
    if engine.target.device.type != "cuda":
        return {}
    few = requests[: _PROFILED_REQUESTS * engine.num_slots]
    engine.forget()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        run(engine, few)
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    averages = profiler.key_averages()
    if profile_to is not None:
        with profile_to.open("a", encoding="utf-8") as file:
            table = averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90)
            file.write(f"{engine.num_slots} slots\n{table}\n")
    return {"gpu_busy": round(sum(entry.self_device_time_total for entry in averages) / 1e6 / wall, 3)}
