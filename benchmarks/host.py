"""What a round takes on the host beside the models: retrieval, drafting's bookkeeping, fusion, selection, commit.

    python -m benchmarks.host --recording R.npz --slots 1 8 32 128 --output host.json

Replays a recording of `rasd simulate` in real time. The models stand still and are said to take what they take on a GPU
(`gpu_passes.json`), so as much is drafted and verified as there would be. Lookups are made in this process; packing and
launching passes is not in it.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.contestant import local_search
from benchmarks.common import report
from datastore import Datastore
from pipeline import replay
from pipeline.methods import method_named
from pipeline.phases import Phases
from pipeline.replay import Costs, Recording, ReplayEngine

_PASSES = Path(__file__).with_name("results") / "gpu_passes.json"
_SHAPE = "llama-8b"
_LEVEL_FIXED, _LEVEL_ROW = 8e-4, 3e-6  # seconds of a draft level
_FULL = 0.9  # of the slots decode in rounds that count


class _Timed:
    """Calls a function and keeps the time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._function(*arguments)
        finally:
            self.seconds += time.perf_counter() - begin


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--recording", type=Path, required=True, help="file of `rasd simulate`")
    arguments.add_argument("--datastore", help="searched, too")
    arguments.add_argument("--methods", nargs="+", default=["plain", "rasd"])
    arguments.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32, 128])
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    recording = Recording.load(options.recording)
    store = Datastore.open(options.datastore, dense=False) if options.datastore else None
    measured = []
    for name in options.methods:
        host_times(recording, name, min(options.slots), store)  # compiles, or loads what was compiled
        for slots in options.slots:
            measured.append({"method": name, "slots": slots, **host_times(recording, name, slots, store)})
    report({"rows": len(recording.prompts), "measured": measured}, options.output)


def gpu_costs(slots: int) -> Costs:
    """The large shape's passes as measured on a GPU with so many slots or fewer."""
    passes = json.loads(_PASSES.read_text("utf-8"))["shapes"][_SHAPE]["passes"]
    times = {
        item["slots"] * (item["nodes"] + 1): item["graph_ms"] / 1e3
        for item in sorted(passes, key=lambda item: int(item["slots"]))
        if item["slots"] <= slots
    }
    rows = tuple(sorted(times))
    return Costs(rows, tuple(times[row] for row in rows), _LEVEL_FIXED, _LEVEL_ROW)


def host_times(recording: Recording, name: str, slots: int, store: Datastore | None) -> dict[str, Any]:
    """Microseconds a round by phase, over rounds that are not at rest and have nearly all slots decoding."""
    method = method_named(name, {"draft", "live"} | ({"corpus"} if store is not None else set()))
    searchers, _live = local_search(method, store, recording.vocab_size)
    recording = replace(recording, costs=gpu_costs(slots))
    engine = ReplayEngine(recording, method, num_slots=slots, searchers=searchers)
    engine.phases = Phases(time.perf_counter)
    stand_in = _Timed(replay.candidates)  # what a draft model would say
    original, replay.candidates = replay.candidates, stand_in
    spent: Counter[str] = Counter()
    rounds = 0
    try:
        for request in engine.requests():
            engine.submit(request)
        while engine.has_work:
            is_full = len(engine._scheduler.decoding()) >= _FULL * slots
            before, stood = Counter(engine.phases.seconds), stand_in.seconds
            begin = time.perf_counter()
            engine.step()
            if is_full and not engine._rests:
                rounds += 1
                spent["all"] += time.perf_counter() - begin - (stand_in.seconds - stood)
                spent["draft"] -= stand_in.seconds - stood
                for phase, seconds in engine.phases.seconds.items():
                    spent[phase] += seconds - before[phase]
    finally:
        replay.candidates = original
    spent["all"] -= spent.pop("verify", 0.0)  # the target's stand-in
    return {"rounds": rounds, "us": {phase: round(1e6 * seconds / max(rounds, 1)) for phase, seconds in spent.items()}}


if __name__ == "__main__":
    main()
