"""What a round takes on the host beside the models, and what share of the round that is.

    python -m benchmarks.host --recording R.npz --datastore STORE --slots 1 8 32 128 --output host.json

Whole rounds of the engine with passes of fixed sizes, as on a GPU, but the models stand still: they are said to take
what they take there (`gpu_passes.json`), on a clock that goes on with the host's own time, and to say what a recording
of `rasd simulate` holds. The host waits for them where it does there, and works beside them where it can. Lookups are
made in this process. Launching passes and copies on the device is not in it. Another program on the machine only ever
adds work: of several repeats the one with the least is kept.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pipeline.engine
from actors.searchers import LocalSearcher
from benchmarks import gpu_played
from benchmarks.common import report
from benchmarks.gpu_played import PlayedEngine, played_engine, played_requests
from datastore import Datastore
from datastore.live import LiveStore
from pipeline.budget import StepTimes
from pipeline.graphs import Graphs
from pipeline.phases import Phases
from pipeline.replay import Recording
from pipeline.search import Searcher
from pipeline.static_row import Size

_PASSES = Path(__file__).with_name("results") / "gpu_passes.json"
_SHAPE = "llama-8b"
_LEVEL_FIXED, _LEVEL_ROW = 8e-4, 3e-6  # seconds of a draft level
_FULL = 0.9  # of the slots decode in rounds that count
_REQUESTS_A_SLOT = 3
_TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


class Clock:
    """Goes on with the host, which waits now and then for a device that works beside it.

    Attributes:
        models: seconds of the device's work so far.
    """

    def __init__(self) -> None:
        self.models = 0.0
        self._stood = 0.0  # what standing in for models took, which it leaves out
        self._waited = 0.0
        self._done_at = 0.0  # when all that was launched will be done

    def __call__(self) -> float:
        return self.host() + self._waited

    def host(self) -> float:
        """Seconds of the host's own work."""
        return time.perf_counter() - self._stood

    def launch(self, seconds: float) -> None:
        """The device has so much more to do."""
        self._done_at = max(self(), self._done_at) + seconds
        self.models += seconds

    def wait(self) -> None:
        """Until the device has done all."""
        self._waited += max(self._done_at - self(), 0.0)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """What is done within is the models'."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._stood += time.perf_counter() - begin

    def model(self, function: Callable[..., Any], *, waits: bool) -> Callable[..., Any]:
        """The function as the models' work; the host waits for what was launched before."""

        def call(*arguments: Any, **options: Any) -> Any:
            if waits:
                self.wait()
            with self.standing_in():
                return function(*arguments, **options)

        return call


class _Said(Graphs[Size, Any]):
    """Graphs of which each is computed once."""

    def __init__(self, graphs: Graphs[Size, Any], clock: Clock, seconds: Callable[[Any], float]) -> None:
        super().__init__(graphs._function, torch.device("cpu"))
        self._clock = clock
        self._seconds = seconds
        self._outputs: dict[Size, Any] = {}

    def __call__(self, key: Size) -> Any:
        self._clock.launch(self._seconds(key))
        with self._clock.standing_in():
            if key not in self._outputs:
                self._outputs[key] = super().__call__(key)
        return self._outputs[key]


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--recording", type=Path, required=True, help="file of `rasd simulate`")
    arguments.add_argument("--datastore", help="searched, too")
    arguments.add_argument("--methods", nargs="+", default=["plain", "rasd"])
    arguments.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32, 128])
    arguments.add_argument("--repeats", type=int, default=1, help="in turn; of each point the one with the least work")
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    recording = Recording.load(options.recording)
    store = Datastore.open(options.datastore, dense=False) if options.datastore else None
    searcher = LocalSearcher(store, LiveStore(recording.vocab_size))
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for name in options.methods:
        host_times(recording, name, 2, searcher)  # compiles, or loads what was compiled
    for _ in range(options.repeats):
        for point in product(options.methods, options.slots):
            found = host_times(recording, *point, searcher)
            if point not in best or found["us"].get("all", 0) < best[point]["us"].get("all", 0):
                best[point] = found
    measured = [{"method": name, "slots": slots, **found} for (name, slots), found in best.items()]
    report({"rows": len(recording.prompts), "repeats": options.repeats, "measured": measured}, options.output)


def gpu_times(slots: int) -> StepTimes:
    """The large shape's passes as measured on a GPU with so many slots or fewer."""
    passes = json.loads(_PASSES.read_text("utf-8"))["shapes"][_SHAPE]["passes"]
    times = {
        item["slots"] * (item["nodes"] + 1): item["graph_ms"] / 1e3
        for item in sorted(passes, key=lambda item: int(item["slots"]))
        if item["slots"] <= slots
    }
    rows = tuple(sorted(times))
    return StepTimes(rows, [times[row] for row in rows])


def engine_with_models_still(
    recording: Recording, name: str, slots: int, searcher: Searcher, clock: Clock
) -> PlayedEngine:
    """A played engine whose models take what they are said to."""
    torch.manual_seed(0)
    config = LlamaConfig(**_TINY, num_key_value_heads=2, vocab_size=recording.vocab_size, max_position_embeddings=8192)
    model = LlamaForCausalLM(config).eval()
    times, true_times = gpu_times(slots), gpu_times(slots)
    engine = played_engine(model, recording, name, slots, searcher, is_static=True, times=times, clock=clock)
    target: Any = engine.target

    def too_large(**inputs: Any) -> Any:
        """A pass of more rows than any fixed size."""
        clock.launch(float(true_times(inputs["input_ids"].shape[1])))
        with clock.standing_in():
            return model(**inputs)

    target.model = too_large
    target.cache.move = clock.model(target.cache.move, waits=False)
    target._passes._graphs = _Said(target._passes._graphs, clock, lambda size: float(true_times(size.num_rows)))
    if engine._reader is not None:
        drafter: Any = engine.drafter
        passes = drafter._passes
        passes._graphs = _Said(passes._graphs, clock, lambda size: _LEVEL_FIXED + _LEVEL_ROW * size.num_rows)
        entries = drafter._entries._static
        entries._graphs = _Said(entries._graphs, clock, lambda _: _LEVEL_FIXED / 4)
    engine.works_beside = True
    engine.phases = Phases(clock.host)
    return engine


def host_times(recording: Recording, name: str, slots: int, searcher: Searcher) -> dict[str, Any]:
    """The host's work a round in microseconds by phase, over rounds not at rest with nearly all slots decoding.

    Also such a round's length and what the models are said to take of it; the share of the rest, in which the device
    has nothing to do; and tokens a second of all rounds.
    """
    clock = Clock()
    engine = engine_with_models_still(recording, name, slots, searcher, clock)
    spent: Counter[str] = Counter()
    rounds, models, whole = 0, 0.0, 0.0
    for request in played_requests(recording, max(_REQUESTS_A_SLOT * slots, len(recording.prompts))):
        engine.submit(request)
    start, num_tokens = clock(), 0
    with _standing_in(clock):
        while engine.has_work:
            is_full = len(engine._scheduler.decoding()) >= _FULL * slots
            before, began = Counter(engine.phases.seconds), (clock.host(), clock(), clock.models)
            num_tokens += sum(len(generation.token_ids) for generation in engine.step())
            if is_full and not engine._rests:
                rounds += 1
                spent["all"] += clock.host() - began[0]
                whole += clock() - began[1]
                models += clock.models - began[2]
                for phase, seconds in engine.phases.seconds.items():
                    spent[phase] += seconds - before[phase]
    return {
        "rounds": rounds,
        "us": {phase: round(1e6 * seconds / max(rounds, 1)) for phase, seconds in spent.items()},
        "round_us": round(1e6 * whole / max(rounds, 1)),
        "models_us": round(1e6 * models / max(rounds, 1)),
        "share": round(1.0 - models / max(whole, 1e-9), 3),
        "tokens_per_second": round(num_tokens / (clock() - start), 1),
    }


@contextmanager
def _standing_in(clock: Clock) -> Iterator[None]:
    """What says in the models' stead what was recorded takes no time of the host."""
    places = [(gpu_played, "likeliest", True), (gpu_played, "chosen", False), (pipeline.engine, "choose", True)]
    with ExitStack() as stack:
        for module, name, waits in places:
            stack.enter_context(patch.object(module, name, clock.model(getattr(module, name), waits=waits)))
        yield


if __name__ == "__main__":
    main()
