"""The order of a contest: every method on every sample of every repeat, interleaved, with new engines each repeat."""

from collections import Counter
from typing import Any

import pytest

from actors.contest import Answer, Question, Timed
from jobs.contest import MIXED, Contest, measure, samples_of
from pipeline.provenance import Counts
from pipeline.request import Generation, SamplingParams

METHODS = ("plain", "context", "rasd")


class Replicas:
    """Stands in for contestants: keeps what it is asked, and takes as long as it is told."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.asked: list[tuple[str, list[tuple[Any, ...]]]] = []

    def ask(self, method: str, arguments: Any) -> list[Any]:
        self.asked.append((method, list(arguments)))
        return [self._answer(method, i, each) for i, each in enumerate(arguments)]

    def _answer(self, method: str, replica: int, arguments: tuple[Any, ...]) -> Timed | None:
        if method != "run":
            return None
        answers = [
            Answer(i, 0, Generation(0, (q.row,), "", "length", 1, 1, 0, 0), Counts(), ())
            for i, q in enumerate(arguments[1])
        ]
        return Timed(1.0 + replica, 3, {"verify": 0.5}, tuple(answers))


def questions(tasks: dict[str, int]) -> list[Question]:
    names = [task for task, count in tasks.items() for _ in range(count)]
    return [Question(row, str(row), task, prompt="x") for row, task in enumerate(names)]


def contest(samples: list[Any], **more: Any) -> Contest:
    return Contest(METHODS, samples, 1, 3, SamplingParams(), 128, **more)


def test_every_method_meets_every_sample_once_a_repeat_in_changing_order() -> None:
    replicas = Replicas()
    samples = samples_of(questions({"a": 3, "b": 2}), 1)
    found = list(measure(contest(samples), replicas))
    keys = Counter((m.method, m.repeat, m.sample.number) for each in found for m in each)
    assert keys == Counter({(m, r, s): 1 for m in METHODS for r in range(3) for s in range(5)})
    assert [method for method, _ in replicas.asked[:: 1 + 15]] == ["renew"] * 3, "new engines begin every repeat"
    runs = [arguments[0][0] for method, arguments in replicas.asked if method == "run"]
    orders = {tuple(runs[i : i + 3]) for i in range(0, len(runs), 3)}
    assert len(orders) > 3 and all(sorted(order) == sorted(METHODS) for order in orders)


def test_what_is_measured_already_is_left_out() -> None:
    replicas = Replicas()
    samples = samples_of(questions({"a": 2}), 1)
    done = {(0, 0), (0, 1), (1, 1)}
    found = [(each[0].repeat, each[0].sample.number) for each in measure(contest(samples), replicas, done)]
    assert found == [(1, 0), (2, 0), (2, 1)]
    assert [method for method, _ in replicas.asked].count("renew") == 2


def test_a_stop_ends_it_between_samples() -> None:
    replicas = Replicas()
    samples = samples_of(questions({"a": 2}), 1)
    found: list[Any] = []
    for each in measure(contest(samples), replicas, should_stop=lambda: len(found) == 3):
        found.append(each)
    assert len(found) == 3


def test_only_the_first_repeat_has_trails() -> None:
    replicas = Replicas()
    list(measure(contest(samples_of(questions({"a": 3}), 1), followed={1}), replicas))
    followed = [(each[1][0].row, each[3]) for method, (each,) in replicas.asked if method == "run" and each[3]]
    assert followed == [(1, [0])] * len(METHODS)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_replicas_share_a_sample_and_the_slowest_counts(replicas: int) -> None:
    asked = Replicas(replicas)
    sample = samples_of(questions({"a": 5}), 4)
    [first, *_] = measure(contest(sample), asked)
    timed = first[0].timed
    assert timed.seconds == replicas and timed.rounds == 3 * replicas and timed.phases == {"verify": 0.5 * replicas}
    assert [answer.question for answer in timed.answers] == [0, 1, 2, 3, 4]
    assert [answer.generation.token_ids for answer in timed.answers] == [(i,) for i in range(5)]


def test_slots_are_filled_with_one_task_or_with_several() -> None:
    own = questions({"a": 8, "b": 3, "c": 2})

    def sizes(slots: int, replicas: int = 1) -> list[tuple[str, int]]:
        return [(sample.task, len(sample.questions)) for sample in samples_of(own, slots, replicas)]

    assert sizes(1) == [("a", 1)] * 8 + [("b", 1)] * 3 + [("c", 1)] * 2
    assert sizes(1, 2) == [("a", 2)] * 4 + [("b", 2), ("b", 1), ("c", 2)]
    assert sizes(8) == [("a", 8), (MIXED, 5)]
    assert sizes(4, 2) == [("a", 8), (MIXED, 5)]
    assert [q.task for q in samples_of(own, 8)[1].questions] == ["b", "c", "b", "c", "b"]
    assert [s.task for s in samples_of(questions({"a": 3}), 16)] == ["a"]
