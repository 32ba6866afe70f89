"""The scale of estimated acceptance: fits the weights that ship, and shows how well they and what is learned hold.

    python -m benchmarks.calibration fit --recordings R.npz ... --write
    python -m benchmarks.calibration measure --recordings R.npz ... --plot benchmarks/results/calibration.png \\
        --output benchmarks/results/calibration.json

Recordings are made by `rasd simulate`; those measured must not be those fitted on. Predictions are what the running
engine made before it saw the outcome; they count from round `--after` on, for verified nodes whose parent was accepted.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.contestant import local_search, run
from benchmarks.common import report
from datastore import Datastore
from pipeline.calibration import NUM_WEIGHTS, _accumulate, first_weights, shipped_weights
from pipeline.methods import method_named
from pipeline.replay import Recording, ReplayEngine
from pipeline.request import SamplingParams
from pipeline.tree import SOURCES, TokenTree

_WEIGHTS = Path("pipeline/calibration.json")
_BINS = 15
_BATCH = 64
_STEP = 0.05
_PULL = 1e-4


@dataclass(frozen=True, slots=True)
class Round:
    """What was proposed, what of it was verified, and the target's choices along it."""

    proposed: TokenTree
    verified: TokenTree
    choices: np.ndarray
    is_sampled: bool


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("what", choices=("fit", "measure"))
    arguments.add_argument("--recordings", type=Path, nargs="+", required=True, help="files of `rasd simulate`")
    arguments.add_argument("--datastore", help="searched, too")
    arguments.add_argument("--budget", type=int, default=16)
    arguments.add_argument("--epochs", type=int, default=30)
    arguments.add_argument("--after", type=int, default=2000, help="rounds before predictions count")
    arguments.add_argument("--write", action="store_true", help=f"write {_WEIGHTS}")
    arguments.add_argument("--plot", type=Path)
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    played = [play(Recording.load(path), options) for path in options.recordings]
    rounds = [item for part in played for item in part]
    if options.what == "fit":
        weights = fit(rounds, options.epochs)
        before, after = (loss_of(rounds, w)[0] for w in (first_weights(), weights))
        report({"rounds": len(rounds), "loss_first": before, "loss_fitted": after}, options.output)
        if options.write:
            _WEIGHTS.write_text(json.dumps({"weights": [round(float(w), 4) for w in weights]}) + "\n")
        return
    late = [item for part in played for item in part[options.after :]]
    if not late:
        arguments.error(
            f"the recordings have {max(map(len, played))} rounds at most; lower --after or record more rows"
        )
    figures, bins = measure(late)
    first, shipped = (loss_of(late, weights)[0] for weights in (first_weights(), shipped_weights()))
    report({"rounds": len(late), "loss_first": first, "loss_shipped": shipped, "sources": figures}, options.output)
    if options.plot is not None:
        plot(bins, options.plot)


def play(recording: Recording, options: Any) -> list[Round]:
    """The rounds of RASD over a recording, with all sources there are."""
    store = Datastore.open(options.datastore, dense=False) if options.datastore else None
    method = method_named("rasd", {"draft", "live"} | ({"corpus"} if store is not None else set()))
    searchers, live = local_search(method, store, recording.vocab_size)
    rounds: list[Round] = []

    def keep(proposed: TokenTree, verified: TokenTree, choices: np.ndarray, params: SamplingParams) -> None:
        rounds.append(Round(proposed, verified, choices, not params.is_greedy))

    engine = ReplayEngine(recording, method, budget=options.budget, searchers=searchers, on_round=keep)
    run(engine, engine.requests(), live)
    return rounds


def loss_of(rounds: Sequence[Round], weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean log-loss of the groups along the target's path, a round, and its gradient, [NUM_WEIGHTS]."""
    gradient, loss = np.zeros(NUM_WEIGHTS, np.float32), 0.0
    for item in rounds:
        tree = item.proposed
        if len(tree):
            columns = (tree.tokens, tree.parents, tree.evidence, item.choices.astype(np.int32), item.is_sampled)
            loss += _accumulate(*columns, weights, gradient)
    return loss / max(len(rounds), 1), gradient / max(len(rounds), 1)


def fit(rounds: Sequence[Round], epochs: int) -> np.ndarray:
    """Weights by AdaGrad over shuffled batches, drawn towards `first_weights`."""
    first = first_weights()
    weights, squares, random = first.copy(), np.full(NUM_WEIGHTS, 1e-3, np.float32), np.random.default_rng(0)
    for _ in range(epochs):
        order = random.permutation(len(rounds))
        for begin in range(0, len(order), _BATCH):
            _, gradient = loss_of([rounds[i] for i in order[begin : begin + _BATCH]], weights)
            gradient += _PULL * (weights - first)
            squares += gradient**2
            weights -= (_STEP * gradient / np.sqrt(squares)).astype(np.float32)
    return weights


def measure(rounds: Sequence[Round]) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    """Per source and over all: expected calibration error, log-loss against the base rate's; and the bins."""
    predicted, outcome, evidence = _nodes(rounds)
    figures, bins = {}, {}
    for name, chosen in [("all", np.ones(len(predicted), np.bool_))] + [
        (name, evidence[:, i] > 0) for i, name in enumerate(SOURCES)
    ]:
        p, y = predicted[chosen], outcome[chosen]
        if not len(p):
            continue
        parts = np.array_split(np.argsort(p, kind="stable"), _BINS)
        bins[name] = [(float(p[part].mean()), float(y[part].mean())) for part in parts if len(part)]
        error = sum(abs(p[part].mean() - y[part].mean()) * len(part) for part in parts if len(part)) / len(p)
        loss, base = _log_loss(p, y), _log_loss(np.full(len(y), y.mean()), y)
        figures[name] = {
            "nodes": len(p),
            "accepted": round(float(y.mean()), 4),
            "calibration_error": round(float(error), 4),
            "log_loss": round(loss, 4),
            "base_log_loss": round(base, 4),
            "below_base": round(1 - loss / base, 4),
        }
    return figures, bins


def _nodes(rounds: Sequence[Round]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, outcome and evidence of each verified node whose parent was accepted."""
    predicted, outcome, evidence = [], [], []
    for item in rounds:
        tree, node = item.verified, -1
        for choice in item.choices:
            children = np.flatnonzero(tree.parents == node)
            right = [child for child in children if tree.tokens[child] == choice]
            predicted.append(tree.scores[children])
            outcome.append(tree.tokens[children] == choice)
            evidence.append(tree.evidence[children])
            if not right:
                break
            node = right[0]
    return np.concatenate(predicted), np.concatenate(outcome).astype(float), np.concatenate(evidence)


def _log_loss(p: np.ndarray, y: np.ndarray) -> float:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())


def plot(bins: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Predicted against observed acceptance by source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for marker, (name, points) in zip("osD^vP", bins.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1, label=name)
    axes.set(xlabel="predicted acceptance", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
