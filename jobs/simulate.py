"""`rasd simulate`: plays recorded generations through drafting, retrieval and selection, without the target.

rasd simulate --model smollm2-135m --answers OUTPUT --recording OUTPUT.npz --methods draft rasd --budgets auto 16

The first run records: the target answers the prompts once more, and the draft says at every place what it would have
proposed. Every later run with that file takes seconds. Times are those of the machine that recorded.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from actors.contestant import local_search, run
from actors.searchers import LocalPassages, Misses
from datastore import Datastore
from jobs.backend import SHIPPED
from jobs.commit import committed_parts
from jobs.facts import has_draft, model_facts
from jobs.files import writing
from jobs.options import Parser, add_options, build_config
from jobs.plan import ModelFacts
from jobs.readers.stream import reading
from jobs.simulate_config import SimulateConfig
from jobs.storage import open_storage, read_plan
from jobs.training_data import check_answers, prompt_ids
from pipeline.assemble import EngineOptions
from pipeline.digests import files_sha256
from pipeline.drafts import load_draft
from pipeline.errors import ConfigError, InputError
from pipeline.head_files import CONFIG, WEIGHTS, is_head, shipped_head
from pipeline.methods import Method, method_named
from pipeline.models import load_causal_lm, load_tokenizer, resolve_model
from pipeline.record import record
from pipeline.replay import Recording, ReplayEngine, with_tuples
from pipeline.request import Generation, SamplingParams

_RECORDED_SLOTS = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """An answer to play: its prompt, what passages are searched for, its seed, and its task or the empty name."""

    prompt_ids: tuple[int, ...]
    question: str
    seed: int
    task: str


def main(arguments: Sequence[str]) -> int:
    """Parse, validate and run; returns the exit code, raises RasdError."""
    parser = Parser(
        prog="rasd simulate",
        usage="rasd simulate --model MODEL --answers DIR --recording FILE [options]",
        description="Play recorded generations through methods and budgets without the target, to tune in seconds.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad input or option.",
    )
    add_options(parser, SimulateConfig)
    return simulate(build_config(SimulateConfig, *parser.parse_known_args(arguments)))


def simulate(config: SimulateConfig) -> int:
    """Records if need be, plays every method with every budget, and prints what came of it.

    Raises:
        RasdError: see `pipeline.errors` for the kinds.
    """
    provided = {"draft"} | ({"live"} if config.live == "on" else set())
    if config.datastore is not None:
        provided |= {"corpus"} | ({"passages"} if config.passages else set())
    methods = [method_named(name, provided) for name in config.methods]  # a mistake is told before hours of recording
    facts = model_facts(config)
    rows, sampling = rows_of(config, facts)
    wanted = {source for method in methods for source in method.sources}
    store = None
    if config.datastore is not None and wanted & {"corpus", "passages"}:
        store = Datastore.open(config.datastore, tokenizer=facts.tokenizer, dense="passages" in wanted)
    recording = _recording(config, facts, rows, sampling)
    passages: Sequence[tuple[np.ndarray, ...]] = [()] * len(rows)
    if store is not None and "passages" in wanted:
        passages = passages_for(rows, store, config.passages, recording.vocab_size)
    results = [
        play(recording, rows, method, None if budget == "auto" else budget, config.slots, store, passages)
        for method in methods
        for budget in (config.budgets if method.sources else ("auto",))
    ]
    plain = next((result["tokens_per_second"] for result in results if result["method"] == "plain"), None)
    for result in results:
        result["ratio_to_plain"] = None if plain is None else round(result["tokens_per_second"] / plain, 3)
    if not config.quiet:
        _print(results)
    print(json.dumps({"rows": len(rows), "slots": config.slots, "results": results}), flush=True)
    return 0


def passages_for(rows: Sequence[Row], store: Datastore, count: int, vocab_size: int) -> list[tuple[np.ndarray, ...]]:
    """The datastore's passages nearest to each row's question, as tokens that the model knows."""
    found = LocalPassages(store, count, Misses()).passages([row.question for row in rows])
    return [tuple(text[text < vocab_size] for text in texts) for texts in found]


def play(
    recording: Recording,
    rows: Sequence[Row],
    method: Method,
    budget: int | None,
    slots: int,
    store: Datastore | None,
    passages: Sequence[tuple[np.ndarray, ...]],
) -> dict[str, Any]:
    """One method with one budget: tau, nodes and accepted tokens a round, simulated tokens/s; over all and by task.

    Args:
        budget: None tunes it.
        passages: of each row; used if the method has that source.
    """
    searchers, live = local_search(method, store, recording.vocab_size)
    engine = ReplayEngine(recording, method, num_slots=slots, budget=budget, searchers=searchers)
    done = run(engine, engine.requests(passages if "passages" in method.sources else ()), live)
    tasks = sorted({row.task for row in rows})
    by_task = {task: [g for g in done if rows[g.request_id].task == task] for task in tasks}
    return {
        "method": method.name,
        "budget": "auto" if budget is None else budget,
        **summary(done),
        "tokens_per_second": round(sum(len(g.token_ids) for g in done) / engine.clock.now, 2),
        "by_task": {task: summary(generations) for task, generations in by_task.items()},
    }


def summary(done: Sequence[Generation]) -> dict[str, Any]:
    """tau, and per round: nodes verified, and tokens accepted by source."""
    rounds = max(sum(generation.rounds for generation in done), 1)
    accepted = sum((Counter(generation.accepted_by_source) for generation in done), Counter())
    return {
        "tau": round(sum(len(generation.token_ids) - 1 for generation in done) / rounds, 3),
        "nodes": round(sum(generation.drafted for generation in done) / rounds, 2),
        "accepted": {source: round(count / rounds, 3) for source, count in sorted(accepted.items())},
    }


def rows_of(config: SimulateConfig, facts: ModelFacts) -> tuple[list[Row], SamplingParams]:
    """The rows to play, and how they were sampled."""
    output = open_storage(config.answers)
    check_answers(config.answers, facts.weights)
    resolved = resolve_model(config.model, config.revision)
    tokenizer = load_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
    rows: list[Row] = []
    for part in committed_parts(output, config.answers):
        with reading(str(part)), part.open() as file:
            found = pq.read_table(file).to_pylist()
        for row in found:
            if row["status"] == "ok" and len(row["token_ids"]) > 1:
                rows.append(_row(row, tokenizer))
    if not rows:
        raise InputError(f"--answers {config.answers} has no good row of two or more tokens; there is nothing to play.")
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(config.num_rows, len(rows))).round().astype(int))
    plan = read_plan(output)
    assert plan is not None  # checked above
    return [rows[i] for i in chosen], _sampling(plan["fingerprint"])


def _row(row: Mapping[str, Any], tokenizer: Any) -> Row:
    messages = row.get("messages")
    question = row["prompt"] if messages is None else str(messages[-1]["content"])
    return Row(prompt_ids(row, tokenizer), question, row["seed"], str(row.get("task") or ""))


def _sampling(fingerprint: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters that a plan's fingerprint holds."""
    return SamplingParams(**with_tuples({field.name: fingerprint[field.name] for field in fields(SamplingParams)}))


def _recording(config: SimulateConfig, facts: ModelFacts, rows: Sequence[Row], sampling: SamplingParams) -> Recording:
    """What the file holds, or what is recorded into it."""
    path = Path(config.recording).expanduser()
    if path.suffix != ".npz" or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--recording is {config.recording!r}; it must be a name that ends in .npz, in a directory that exists and"
            " can be written to."
        )
    if not has_draft(config, facts):
        raise ConfigError(f"no draft head comes with rasd for --model {config.model}; give --draft to record with.")
    source = {"model": facts.weights, "draft": _draft_hash(config, facts), "dtype": config.dtype}
    if path.exists():
        recording = Recording.load(path)
        old = (dict(recording.source), list(recording.prompts), list(recording.seeds), recording.params)
        if old != (source, [row.prompt_ids for row in rows], [row.seed for row in rows], sampling):
            raise ConfigError(
                f"--recording {path} holds {len(recording.prompts)} rows of {old[0]}; wanted are {len(rows)} rows of"
                f" {source}, with the same prompts, seeds and sampling. Name another file, or remove it."
            )
        return recording
    log.info("recording %d rows into %s", len(rows), path)
    with writing(path):
        _record(config, source, rows, sampling).save(path)
    return Recording.load(path)


def _record(
    config: SimulateConfig, source: Mapping[str, Any], rows: Sequence[Row], sampling: SamplingParams
) -> Recording:
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    trusted = config.trust_remote_code
    resolved = resolve_model(config.model, config.revision)
    tokenizer = load_tokenizer(resolved, trust_remote_code=trusted)
    model = load_causal_lm(resolved, getattr(torch, config.dtype), device, trust_remote_code=trusted)
    name = None if config.draft == SHIPPED else config.draft
    draft = load_draft(name, model, resolved, trust_remote_code=trusted)
    options = EngineOptions(num_slots=_RECORDED_SLOTS)
    prompts, seeds = [row.prompt_ids for row in rows], [row.seed for row in rows]
    return record(model, tokenizer, draft, prompts, sampling, seeds, options, source)


def _draft_hash(config: SimulateConfig, facts: ModelFacts) -> str:
    head = shipped_head(facts.weights) if config.draft in (None, SHIPPED) else None
    if head is None and config.draft is not None and is_head(config.draft):
        head = Path(config.draft).expanduser()
    if head is not None:
        return files_sha256([head / CONFIG, head / WEIGHTS])
    assert config.draft is not None  # `has_draft` said so
    return resolve_model(config.draft).hash


def _print(results: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'method':<12} {'budget':>6} {'tau':>6} {'nodes':>6} {'tokens/s':>9} {'x plain':>8}  accepted a round")
    for r in results:
        ratio = "" if r["ratio_to_plain"] is None else f"{r['ratio_to_plain']:.2f}"
        parts = ", ".join(f"{source} {share:.2f}" for source, share in r["accepted"].items())
        figures = f"{r['tau']:>6.2f} {r['nodes']:>6.1f} {r['tokens_per_second']:>9.1f} {ratio:>8}"
        print(f"{r['method']:<12} {r['budget']:>6} {figures}  {parts}")


if __name__ == "__main__":
    from jobs.cli import main as rasd

    sys.exit(rasd(["simulate", *sys.argv[1:]]))
