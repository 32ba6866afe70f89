"""Times of questions that were generated together: divided by rounds, adding up to what was measured."""

from typing import Any

import pytest

from jobs.figures import figures_of, times_of
from jobs.html.trails import trails_of


def row(row_index: int, rounds: int, seconds: float, repeat: int = 0, **more: Any) -> dict[str, Any]:
    """A row of results.parquet with what figures need."""
    shared = {"method": "plain", "slots": 4, "sample": 0, "sample_task": "mixed", "task": "a", "turn": 0, "drafted": 0}
    shared |= {"accepted": 0, "accepted_by_source": {}, "phases": {}, "run_rounds": 9, "offered": {}, "right": {}}
    shared |= {"predicted": [0.0] * 10, "predicted_right": [0.0] * 10, "predicted_sum": [0.0] * 10}
    own = {"row": row_index, "rounds": rounds, "num_output_tokens": rounds + 1, "seconds": seconds, "repeat": repeat}
    return {**shared, "token_ids": list(range(rounds + 1)), **own, **more}


def test_time_together_is_divided_by_rounds_and_turns_are_one() -> None:
    rows = [row(1, 10, 4.0), row(2, 20, 4.0), row(2, 10, 4.0, turn=1), row(3, 7, 2.5, sample=1)]
    assert times_of(rows) == {(0, 1): {0: 1.0}, (0, 2): {0: 3.0}, (1, 3): {0: 2.5}}


def test_a_batch_has_the_ratio_of_its_seconds_and_an_interval_over_its_questions() -> None:
    seconds = {"plain": [8.0, 8.4, 8.2], "rasd": [4.0, 4.2, 4.1]}
    rounds = {"plain": [20] * 8, "rasd": [4, 6, 8, 10, 10, 12, 14, 16]}
    rows = [
        row(i, rounds[method][i], seconds[method][repeat], repeat, method=method, num_output_tokens=21)
        for method in seconds
        for repeat in range(3)
        for i in range(8)
    ]
    found = figures_of(rows)["4"]
    assert found["plain"]["sets"]["all"]["ratio"] is None
    figures = found["rasd"]["sets"]["all"]
    assert figures["ratio"]["value"] == pytest.approx(2.0)
    low, high = figures["ratio"]["interval"]
    assert 1.4 < low < 1.9 and 2.2 < high < 2.9, "as wide as the questions differ"
    assert figures["tokens_per_second"]["value"] == pytest.approx(8 * 21 / 4.1, abs=0.01)
    assert figures["tau"] == pytest.approx(8 * 20 / 80)
    assert found["rasd"]["sets"]["a"]["ratio"] is None, "no task was alone in the batch"
    assert found["rasd"]["mixed"] is True


def test_outputs_of_one_title_can_all_be_shown() -> None:
    """Ids may repeat, and a row may have several samples."""
    token = {"text": "a", "source": "target", "others": [], "score": None, "value": None, "depth": 0, "round": 0}
    rows = [{"task": "qa", "id": "7", "method": method, "trail": [token]} for method in ("plain", "rasd", "rasd")]
    titles = [(trail["title"], trail["method"]) for trail in trails_of(rows)]
    assert titles == [("qa · 7", "plain"), ("qa · 7", "rasd"), ("qa · 7 (2)", "rasd")]
