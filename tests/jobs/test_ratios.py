"""Ratios of paired times: their value, and intervals that hold what they promise."""

import numpy as np
import pytest

from jobs.ratios import rate, ratio


def times(values: np.ndarray) -> dict[int, dict[int, float]]:
    """Seconds by sample and repeat of an array [samples, repeats]; nan was not measured."""
    return {s: {r: float(v) for r, v in enumerate(row) if not np.isnan(v)} for s, row in enumerate(values)}


def test_a_ratio_is_that_of_summed_medians() -> None:
    base = times(np.array([[2.0, 2.2, 9.0], [4.0, 4.0, 4.4]]))
    own = times(np.array([[1.0, 1.1, 1.0], [3.0, 2.0, 2.0]]))
    found = ratio(base, own, [0, 1])
    assert found is not None
    assert found.value == pytest.approx((2.2 + 4.0) / (1.0 + 2.0))
    one = ratio(base, own, [1])
    assert one is not None and one.value == pytest.approx(2.0)
    speed = rate({0: 10.0, 1: 20.0}, own, [0, 1])
    assert speed is not None and speed.value == pytest.approx(30.0 / 3.0)


def test_noise_that_hits_both_alike_does_not_widen_the_interval() -> None:
    random = np.random.default_rng(0)
    slow = random.uniform(1.0, 3.0, (1, 5))  # of each repeat: the machine was busy
    prompts = random.uniform(1.0, 4.0, (10, 1))
    base = prompts * slow
    own = base / 1.5
    found = ratio(times(base), times(own), range(10))
    assert found is not None and found.interval is not None
    assert found.interval == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize("shape", [(1, 3), (1, 2), (3, 3), (10, 2), (10, 5)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        speed = np.exp(random.normal(np.log(1.4), 0.1, (shape[0], 1)))  # what the method wins differs by prompt
        base = np.exp(random.normal(0.0, 0.06, shape))
        own = np.exp(random.normal(0.0, 0.06, shape)) / (speed if shape[0] > 1 else 1.4)
        found = ratio(times(base), times(own), range(shape[0]))
        assert found is not None and found.interval is not None
        held += found.interval[0] <= 1.4 <= found.interval[1]
    assert held >= 0.85 * 200


def test_one_measurement_has_no_interval_and_none_has_no_ratio() -> None:
    one = times(np.array([[2.0]]))
    found = ratio(one, one, [0])
    assert found is not None and found.interval is None and found.rounded() == {"value": 1.0, "interval": None}
    assert ratio({}, one, [0]) is None


def test_a_run_that_was_stopped_compares_what_both_have() -> None:
    nan = float("nan")
    base = times(np.array([[2.0, 2.0], [4.0, nan], [6.0, nan]]))
    own = times(np.array([[1.0, 1.0], [2.0, nan], [nan, nan]]))
    found = ratio(base, own, [0, 1, 2])
    assert found is not None and found.value == pytest.approx(2.0)


def test_the_interval_knows_how_far_repeats_differ() -> None:
    own = 1.0 / np.tile([1.2, 1.3, 1.5, 1.7, 1.8], (6, 1))  # the machine treated the method differently each time
    found = ratio(times(np.ones((6, 5))), times(own), range(6))
    assert found is not None and found.interval is not None
    assert found.interval[0] <= 1.3 and found.interval[1] >= 1.7


def test_samples_that_share_a_measurement_do_not_pretend_to_be_many() -> None:
    """A batch of ten questions, each with the same share of both methods' times: three timings, not thirty."""
    shares = np.linspace(0.5, 1.5, 10)[:, None]
    base, own = shares * np.array([1.0, 1.1, 1.05]), shares * np.array([0.8, 0.79, 0.7])
    alone = ratio(times(base), times(own), range(10))
    together = ratio(times(base), times(own), range(10), num_timed=1)
    assert alone is not None and together is not None and alone.interval is not None and together.interval is not None
    assert together.value == alone.value
    assert together.interval[0] < alone.interval[0] and together.interval[1] > alone.interval[1]
    one = ratio(times(base.sum(axis=0, keepdims=True)), times(own.sum(axis=0, keepdims=True)), [0])
    assert one is not None and together.interval == pytest.approx(one.interval)
