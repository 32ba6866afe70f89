"""`rasd throughput`: methods, and transformers' `generate`, measured against plain decoding on a Ray cluster.

rasd throughput --model smollm2-135m --prompts questions.jsonl --output speed --quick
ray job submit --working-dir . -- python -m jobs.throughput --model ... --prompts ... --output ...

    OUTPUT/throughput.json    what is measured, which a resumed run must equal
    OUTPUT/measured.jsonl     every sample as it was measured
    OUTPUT/results.parquet    one row a request, method, number of slots and repeat
    OUTPUT/results.json       medians, ratios and intervals; machine, versions, configuration
    OUTPUT/report.html        the same to look at, in one file; *.png where matplotlib is
"""

import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.contest import Contestants, ContestConfig, Question
from actors.peers import ONE_SLOT, PEERS
from jobs import logs
from jobs.backend import AUTO_DTYPE, SHIPPED, ModelBackend, anywhere
from jobs.cluster import Placement, connected, place
from jobs.contest import Contest, measure, samples_of
from jobs.figures import figures_of
from jobs.files import read_json, write_json, writing
from jobs.generation import output_directory
from jobs.html.page import slots_named, write_report
from jobs.lease import Lease
from jobs.measured import Journal, trail_tokens
from jobs.options import Parser, add_options, build_config
from jobs.questions import read_questions
from jobs.signals import StopSignals
from jobs.throughput_config import PRESETS, ThroughputConfig
from jobs.throughput_outcome import print_outcome
from jobs.throughput_plots import write_plots
from pipeline.errors import ConfigError, InputError, JobError, RasdError
from pipeline.head_files import is_head
from pipeline.methods import method_named
from pipeline.models import load_tokenizer, resolve_model
from pipeline.request import SamplingParams

PLAN = "throughput.json"
MACHINES = "machines.json"
SUMMARY = "results.json"
# May differ in a resumed run: what was measured before stays comparable.
_FREE = ("output", "quiet", "log_format", "ray_address", "repeats", "slots", "quick", "full", "traced")
_OF_MACHINE = ("cpu", "gpu", "threads", "device", "dtype", "torch", "transformers", "rasd", "weights")

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Parse, validate and run; returns the exit code, raises RasdError."""
    parser = Parser(
        prog="rasd throughput",
        usage="rasd throughput --model MODEL --prompts PATH [PATH ...] --output DIR [options]",
        description="Measure methods against plain decoding, interleaved over the same prompts, and write a report.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad input or option, 130/143 stopped by a signal.",
    )
    add_options(parser, ThroughputConfig)
    config = build_config(ThroughputConfig, *parser.parse_known_args(arguments))
    logs.use(config.log_format)
    return throughput(config.resolved(), shlex.join(["rasd", "throughput", *arguments]))


class RayReplicas:
    """Contestants as Ray actors; see `jobs.contest.Replicas`."""

    def __init__(self, config: ContestConfig, placement: Placement) -> None:
        self.count = placement.num_replicas
        lifted: Any = ray.remote(Contestants).options(
            num_cpus=placement.num_cpus, num_gpus=placement.num_gpus, max_restarts=0, max_task_retries=0
        )
        self._actors = [lifted.remote(config) for _ in range(self.count)]

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Replicas.ask`.

        Raises:
            RasdError: what a replica raised.
            JobError: a replica is lost or failed otherwise.
        """
        pairs = zip(self._actors, arguments, strict=False)
        futures = [getattr(actor, method).remote(*own) for actor, own in pairs]
        try:
            found: list[Any] = ray.get(futures)
        except RayTaskError as error:
            if isinstance(error.cause, RasdError):
                raise error.cause from error
            raise JobError(f"a replica failed: {error.cause!r}. What is measured stays.") from error
        except RayError as error:
            raise JobError(f"a replica is lost: {error}. What is measured stays; the same command resumes.") from error
        return found


def throughput(config: ThroughputConfig, command: str) -> int:
    """Measures what is not measured yet, and writes the report of it all.

    Args:
        config: resolved.

    Raises:
        RasdError: see `pipeline.errors` for the kinds; what is measured stays.
    """
    began = time.monotonic()
    assert config.per_task != "auto" and config.slots != "auto"
    generation = config.as_generation()
    backend = ModelBackend()
    facts = backend.facts(generation)
    sources = backend.sources(generation, facts)
    methods = methods_of(config, sources)
    questions = read_questions(config.prompts, config.per_task, config.tasks, config.skip)
    output = output_directory(config.output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with Lease(output):
        _bind(output, config, methods, facts.weights, questions)
        journal = Journal(output)
        resumed = len(journal.done)
        signals = StopSignals()
        with _replicas(config, methods, sources, facts.revision, facts.tokenizer) as replicas, signals:
            machines = replicas.ask("start", [()] * replicas.count)
            _bind_machines(output, machines)
            max_context = _max_context(replicas, questions, config, machines[0])
            for slots in config.slots:
                _measure(config, methods, questions, slots, max_context, replicas, journal, signals)
        record = {
            "state": "done" if signals.received is None else "stopped",
            "seconds": round(time.monotonic() - began, 1),
            "resumed_samples": resumed,
            "command": command,
            "machine": machines[0],
            "replicas": len(machines),
            "nodes": sorted({(each["cpu"], each["gpu"] or "no GPU") for each in machines}),
            "methods": list(methods),
            "config": config.model_dump(),
            "max_context": max_context,
            "questions": len(questions),
            "slots": figures_of(journal.rows),
        }
        write_json(output / SUMMARY, record)
        write_report(output, record, journal.rows)
        write_plots(output, record)
    print_outcome(record, output, is_quiet=config.quiet)
    if signals.received is not None:
        log.warning("stopped by %s; the same command goes on", signals.received)
    return signals.exit_code


def methods_of(config: ThroughputConfig, sources: frozenset[str]) -> tuple[str, ...]:
    """The methods to measure, `plain` first; those of a preset that there is nothing for are left out.

    Raises:
        ConfigError: one that was asked for does not exist, or there is nothing for it.
    """
    assert config.methods != "auto"
    is_asked = not any(set(config.methods) == set(preset["methods"]) for preset in PRESETS.values())
    has_model = config.draft not in (None, SHIPPED) and not is_head(str(config.draft))
    found = ["plain"]
    for name in config.methods:
        try:
            _check_method(name, sources, has_model)
        except ConfigError as error:
            if is_asked:
                raise
            log.info("%s is not measured: %s", name, error)
            continue
        if name not in found:
            found.append(name)
    return tuple(found)


def _check_method(name: str, sources: frozenset[str], has_model: bool) -> None:
    if name in PEERS:
        if name == "hf-assisted" and not has_model:
            raise ConfigError("hf-assisted drafts with a whole model, not with a head; name one with --draft.")
        return
    method, colon, budget = name.partition(":")
    if colon and not (budget.isdigit() and int(budget) > 0):
        raise ConfigError(f"--methods has {name!r}; behind the colon stands the most nodes a round, such as draft:12.")
    if method.startswith("hf-"):
        raise ConfigError(f"--methods has {name!r}; peers are {', '.join(PEERS)}.")
    method_named(method, sources)


@contextlib.contextmanager
def _replicas(
    config: ThroughputConfig, methods: Sequence[str], sources: frozenset[str], revision: str | None, tokenizer: str
) -> Iterator[RayReplicas]:
    generation = config.as_generation()
    with connected(config.ray_address) as nodes:
        placement = place(generation, nodes)
        device = placement.device
        contest = ContestConfig(
            model=anywhere(config.model),
            revision=revision,
            dtype=AUTO_DTYPE[device] if config.dtype == "auto" else config.dtype,
            device=device,
            methods=tuple(methods),
            sources=tuple(sources),
            draft=None if config.draft in (None, SHIPPED) else anywhere(str(config.draft)),
            datastore=None if config.datastore is None else str(Path(config.datastore).expanduser().absolute()),
            tokenizer=tokenizer,
            passages=config.passages,
            num_threads=placement.num_threads,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
        yield RayReplicas(contest, placement)


def _max_context(
    replicas: RayReplicas, questions: Sequence[Question], config: ThroughputConfig, machine: Mapping[str, Any]
) -> int:
    """Room for the longest question and its answers; raises InputError if the model has not that much."""
    needs: list[int | str] = replicas.ask("needs", [(questions, config.max_new_tokens)])[0]
    for question, need in zip(questions, needs, strict=True):
        if isinstance(need, str):
            raise InputError(f"question {question.id!r} of {question.task}: {need}")
        if need > machine["max_context"]:
            raise InputError(
                f"question {question.id!r} of {question.task} and its answers need up to {need} tokens; the model's"
                f" context is {machine['max_context']}. Leave it out, or lower --max-new-tokens."
            )
    return max(need for need in needs if isinstance(need, int))


def _measure(
    config: ThroughputConfig,
    methods: Sequence[str],
    questions: Sequence[Question],
    slots: int,
    max_context: int,
    replicas: RayReplicas,
    journal: Journal,
    signals: StopSignals,
) -> None:
    """All repeats at one number of slots."""
    assert config.max_new_tokens != "auto" and config.repeats != "auto"
    contest = Contest(
        methods=[name for name in methods if slots == 1 or name not in ONE_SLOT],
        samples=samples_of(questions, slots, replicas.count),
        slots=slots,
        repeats=config.repeats,
        params=SamplingParams(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
        max_context=max_context,
        followed=followed_of(questions, config.traced) if slots == min(config.slots) else (),
    )
    tokenizer = load_tokenizer(resolve_model(config.model, config.revision), trust_remote_code=config.trust_remote_code)
    done = {(repeat, sample) for at, repeat, sample in journal.done if at == slots}
    total = contest.repeats * len(contest.samples)
    for measured in measure(contest, replicas, done, lambda: signals.received is not None):
        texts = {token: str(tokenizer.decode([token])) for token in trail_tokens(measured)}
        journal.add(measured, replicas.count, texts)
        done.add((measured[0].repeat, measured[0].sample.number))
        if not config.quiet:
            at = slots_named(str(slots))
            log.info("%s: %d of %d samples, repeat %d", at, len(done), total, measured[0].repeat + 1)
        if measured[0].sample is contest.samples[-1]:
            journal.write_table()
    journal.write_table()


def followed_of(questions: Sequence[Question], count: int) -> frozenset[int]:
    """Rows of the questions that are shown token by token: the first of each task, then the second, ..."""
    seen: dict[str, int] = {}
    ranked = []
    for place_, question in enumerate(questions):
        seen[question.task] = seen.get(question.task, 0) + 1
        ranked.append((seen[question.task], place_, question.row))
    return frozenset(row for _, _, row in sorted(ranked)[:count])


def _bind(
    output: Path, config: ThroughputConfig, methods: Sequence[str], weights: str, questions: Sequence[Question]
) -> None:
    """Writes what is measured, or checks that it is the same as before; raises ConfigError."""
    plan = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}
    plan |= {"methods": list(methods), "weights": weights, "questions": [[q.row, q.id, q.task] for q in questions]}
    _write_or_compare(output, PLAN, plan)


def _bind_machines(output: Path, machines: Sequence[Mapping[str, Any]]) -> None:
    """The same for what it is measured on: ratios of other machines, or of samples dealt out otherwise, do not mix."""
    kept = sorted(json.dumps({name: each.get(name) for name in _OF_MACHINE}) for each in machines)
    _write_or_compare(output, MACHINES, {"replicas": len(kept), "machines": kept})


def _write_or_compare(output: Path, file: str, plan: Mapping[str, Any]) -> None:
    recorded = read_json(output / file)
    if recorded is None:
        write_json(output / file, plan)
        return
    for name in sorted(plan.keys() | recorded.keys()):
        if plan.get(name) != recorded.get(name):
            old, new = (json.dumps(each.get(name))[:200] for each in (recorded, plan))
            raise ConfigError(
                f"--output {output} holds measurements with {name}: {old} -> {new}. Give the old options, or another"
                " directory."
            )


if __name__ == "__main__":
    from jobs.cli import main as rasd

    sys.exit(rasd(["throughput", *sys.argv[1:]]))
