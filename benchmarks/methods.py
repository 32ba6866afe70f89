"""What methods are worth against plain decoding: tokens a second, paired per prompt, methods interleaved, one machine.

    python -m benchmarks.methods --prompts PROMPTS/*.jsonl --datastore STORE --slots 1 \\
        --methods plain context:8 corpus:8 draft:12 switch:16 rasd-fixed:16 rasd --output methods.json

`rasd throughput` without a cluster, for prompts of random tokens, too: the measurement is `jobs.contest`, the
statistics are `jobs.ratios`. A method may keep some of its sources only (`rasd-fixed@draft+context`) and be followed by
its fixed budget, which `rasd simulate` finds on other prompts; without one it tunes itself. At one slot a sample is one
prompt; at more, one batch of a task's prompts.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.contest import Contestants, ContestConfig, Question
from benchmarks.common import parser, report
from jobs.contest import Contest, LocalReplica, Measured, Sample, measure
from jobs.questions import read_questions
from jobs.ratios import Times, ratio
from pipeline.request import Generation, SamplingParams

_LONG = ("docqa", "summary", "rag")  # judged together, too
_RANDOM = "random"
_MAX_CONTEXT = 2048


@dataclass(slots=True)
class Contender:
    """A method under test, over all repeats: seconds by sample and by phase, and its newest generations."""

    seconds: dict[int, dict[int, float]] = field(default_factory=dict)
    done: dict[int, list[Generation]] = field(default_factory=dict)
    phases: Counter[str] = field(default_factory=Counter)

    def take(self, measured: Measured) -> None:
        """One more sample."""
        number = measured.sample.number
        self.seconds.setdefault(number, {})[measured.repeat] = measured.timed.seconds
        self.done[number] = [answer.generation for answer in measured.timed.answers]
        self.phases.update(measured.timed.phases)


def main() -> None:
    """Command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--methods", nargs="+", default=["plain", "context", "draft", "switch", "rasd"])
    arguments.add_argument("--datastore", help="searched by the methods that have the source `corpus`")
    arguments.add_argument("--live", choices=("on", "off"), default="on")
    arguments.add_argument("--draft", help="draft head or model; the head shipped for the model if not given")
    arguments.add_argument("--per-task", type=int, default=1)
    arguments.add_argument("--skip", type=int, default=0, help="prompts of each task passed over first")
    arguments.add_argument("--tasks", nargs="*", default=())
    arguments.add_argument(
        "--random-words", type=int, default=0, help="prompts of random tokens, as a task of their own"
    )
    arguments.add_argument("--max-new-tokens", type=int, default=64)
    arguments.add_argument("--temperature", type=float, default=0.0)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--slots", type=int, default=1)
    arguments.add_argument("--dtype", default="bfloat16")
    options = arguments.parse_args()
    contestants = Contestants(_config(options))
    contestants.start()
    questions = [*read_questions(options.prompts, options.per_task, options.tasks, options.skip)]
    questions += _random_words(options.random_words)
    groups = [[question] for question in questions]
    if options.slots > 1:
        groups = [[q for q in questions if q.task == task] for task in sorted({q.task for q in questions})]
    contest = Contest(
        methods=options.methods,
        samples=[Sample(number, group[0].task, tuple(group)) for number, group in enumerate(groups)],
        slots=options.slots,
        repeats=options.repeats,
        params=SamplingParams(max_new_tokens=options.max_new_tokens, temperature=options.temperature),
        max_context=_MAX_CONTEXT,
    )
    contenders = {name: Contender() for name in options.methods}
    for measured in measure(contest, LocalReplica(contestants)):
        for each in measured:
            contenders[each.method].take(each)
        if measured[0].sample is contest.samples[-1]:
            print(f"repeat {measured[0].repeat + 1} of {options.repeats}", file=sys.stderr)
    names = ("slots", "dtype", "temperature", "max_new_tokens", "per_task", "skip", "repeats", "live")
    facts = {name: getattr(options, name) for name in names}
    facts["has_datastore"] = options.datastore is not None
    report({**facts, "methods": _results(contenders, contest.samples)}, options.output)


def _config(options: Any) -> ContestConfig:
    sources = ("draft", *(["corpus"] if options.datastore else []), *(["live"] if options.live == "on" else []))
    return ContestConfig(
        model=options.model,
        revision=None,
        dtype=options.dtype,
        device="cpu",
        methods=tuple(options.methods),
        sources=sources,
        draft=options.draft,
        datastore=options.datastore,
        num_threads=options.threads,
    )


def _random_words(count: int) -> list[Question]:
    """Prompts in which nothing repeats and after which nothing is likely."""
    draws = np.random.default_rng(0).integers(1000, 48000, (count, 120))
    return [Question(i, f"random-{i}", _RANDOM, ids=tuple(row.tolist())) for i, row in enumerate(draws)]


def _results(contenders: Mapping[str, Contender], samples: Sequence[Sample]) -> dict[str, Any]:
    tasks = [sample.task for sample in samples]
    sets = {task: [i for i, own in enumerate(tasks) if own == task] for task in sorted(set(tasks))}
    everything = [i for i, task in enumerate(tasks) if task != _RANDOM]
    sets = {"all": everything, "long": [i for i in everything if tasks[i] in _LONG], **sets}
    plain = contenders.get("plain")
    return {name: _figures(contender, plain, sets) for name, contender in contenders.items()}


def _figures(contender: Contender, plain: Contender | None, sets: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    total = sum(contender.phases.values())
    return {
        "sets": {name: _of_set(contender, plain, chosen) for name, chosen in sets.items() if chosen},
        "phases": {name: round(seconds / total, 4) for name, seconds in contender.phases.items()},
    }


def _of_set(contender: Contender, plain: Contender | None, chosen: Sequence[int]) -> dict[str, Any]:
    done = [generation for i in chosen for generation in contender.done[i]]
    own: Times = contender.seconds
    rounds = max(sum(generation.rounds for generation in done), 1)
    seconds = sum(float(np.median(list(own[i].values()))) for i in chosen)
    figures: dict[str, Any] = {
        "tokens_per_second": round(sum(len(g.token_ids) for g in done) / seconds, 2),
        "tau": round(sum(len(g.token_ids) - 1 for g in done) / rounds, 3),
        "nodes": round(sum(g.drafted for g in done) / rounds, 2),
    }
    if plain is not None and (paired := ratio(plain.seconds, own, chosen)) is not None:
        figures["ratio"] = round(paired.value, 3)
        figures["interval"] = None if paired.interval is None else [round(bound, 3) for bound in paired.interval]
    return figures


if __name__ == "__main__":
    main()
