"""What each part of `rasd` is worth: tuned budgets played over a recording, one part missing at a time.

    python -m benchmarks.ablation --answers ANSWERS --recording R.npz --num-rows 140 --datastore STORE [--passages 4]

Answers and recording are those of `rasd simulate`. Times are those of the machine that recorded, without prefill and
bookkeeping, so retrieval in series, which costs neither, is not among the parts; see tests/pipeline/test_parallel.py.
"""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import report
from datastore import Datastore
from jobs.facts import model_facts
from jobs.simulate import passages_for, play, rows_of
from jobs.simulate_config import SimulateConfig
from pipeline.forest import Forest
from pipeline.methods import METHODS, Method, method_named
from pipeline.pace import FullPace, Pace
from pipeline.proposal import Draft, SlotView
from pipeline.replay import Recording
from pipeline.retrieval import Retrieval
from pipeline.rules import Calibrated, Rule


class Uncalibrated(Calibrated):
    """Every node keeps the highest estimate of its sources."""

    def _scored(self, trees: Forest) -> Forest:
        return trees


class Unskipped(Calibrated):
    """Drafts in full, every round."""

    def pace(self, views: Sequence[SlotView], retrieval: Retrieval) -> Pace:
        super().pace(views, retrieval)
        self._pace = None
        return FullPace()

    def join(self, views: Sequence[SlotView], draft: Draft, retrieved: Forest) -> Forest:
        return self._scored(Rule.join(self, views, draft, retrieved))


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--answers", required=True)
    arguments.add_argument("--recording", type=Path, required=True)
    arguments.add_argument("--num-rows", type=int, default=64)
    arguments.add_argument("--datastore")
    arguments.add_argument("--passages", type=int, default=0, help="of each prompt; needs a datastore with passages")
    arguments.add_argument("--slots", type=int, nargs="+", default=[1, 16])
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    config = SimulateConfig(
        model=options.model, answers=options.answers, recording=str(options.recording), num_rows=options.num_rows
    )
    rows, _ = rows_of(config, model_facts(config))
    recording = Recording.load(options.recording)
    store = Datastore.open(options.datastore, dense=options.passages > 0) if options.datastore else None
    passages = [()] * len(rows)
    if store is not None and options.passages:
        passages = passages_for(rows, store, options.passages, recording.vocab_size)
    provided = {"draft", "live"} | ({"corpus"} if store else set()) | ({"passages"} if options.passages else set())
    results: dict[str, Any] = {}
    for slots in options.slots:
        played = {
            name: play(recording, rows, method, None, slots, store, passages)
            for name, method in variants(provided).items()
        }
        full = played["rasd"]["tokens_per_second"]
        results[f"{slots} slots"] = {
            name: {
                "tau": result["tau"],
                "nodes": result["nodes"],
                "tokens_per_second": result["tokens_per_second"],
                "of_rasd": round(result["tokens_per_second"] / full, 3),
            }
            for name, result in played.items()
        }
    report({"rows": len(rows), **results}, options.output)


def variants(provided: Collection[str]) -> dict[str, Method]:
    """`rasd` with all there is, without each of its parts, and plain decoding."""
    full = method_named("rasd", provided)
    without = {
        f"without {source}": replace(full, sources=tuple(s for s in full.sources if s != source))
        for source in full.sources
    }
    parts = {"without calibration": Uncalibrated, "without skipping": Unskipped}
    return {
        "plain": METHODS["plain"],
        "rasd": full,
        **{name: replace(full, rule=rule) for name, rule in parts.items()},
        **without,
    }


if __name__ == "__main__":
    main()
