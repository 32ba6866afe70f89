"""Medians and ratios of paired times, with 95% intervals that do not promise more than was measured."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
_FEW_SAMPLES = 5
# Student's t, 97.5%, by degrees of freedom from 1.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Times = Mapping[Hashable, Mapping[int, float]]  # seconds by sample and repeat


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95% interval, which is None where one measurement cannot tell."""

    value: float
    interval: tuple[float, float] | None

    def rounded(self, digits: int = 3) -> dict[str, object]:
        """For JSON."""
        bounds = None if self.interval is None else [round(bound, digits) for bound in self.interval]
        return {"value": round(self.value, digits), "interval": bounds}


def ratio(base: Times, own: Times, samples: Sequence[Hashable], num_timed: int | None = None) -> Estimate | None:
    """How many times as fast as `base` a method is over samples: summed medians of repeats; None if nothing is paired.

    The interval is a bootstrap over the samples, and over the repeats of all of them together, which shared the
    machine's state. Of few samples it would be too narrow: there it is at least Student's over the repeats' own ratios.

    Args:
        num_timed: how many measurements a repeat has, if samples share them; then two repeats are too few for Student.
    """
    chosen = [sample for sample in samples if _common(base, own, sample)]
    if not chosen:
        return None
    repeats = sorted(set.intersection(*(_common(base, own, sample) for sample in chosen)))
    if not repeats:  # a run that was stopped: each sample's first
        repeats = [min(min(_common(base, own, sample)) for sample in chosen)]
        chosen = [sample for sample in chosen if repeats[0] in _common(base, own, sample)]
    times = np.array([[[each[sample][r] for r in repeats] for sample in chosen] for each in (base, own)])
    medians = np.median(times, axis=2).sum(axis=1)  # times: [2, samples, repeats]
    needed = 2 if num_timed is None else 3
    is_narrow = min(len(chosen), num_timed or len(chosen)) < _FEW_SAMPLES and len(repeats) >= needed
    return Estimate(float(medians[0] / medians[1]), _interval(times, is_narrow=is_narrow))


def rate(
    count: Mapping[Hashable, float], own: Times, samples: Sequence[Hashable], num_timed: int | None = None
) -> Estimate | None:
    """Things a second over samples, `count` of each sample; see `ratio`."""
    base = {sample: dict.fromkeys(own[sample], count[sample]) for sample in samples if sample in own}
    return ratio(base, own, samples, num_timed)


def _common(base: Times, own: Times, sample: Hashable) -> set[int]:
    return set(base.get(sample, ())) & set(own.get(sample, ()))


def _interval(times: np.ndarray, *, is_narrow: bool) -> tuple[float, float] | None:
    """Args: times: [2, samples, repeats]; is_narrow: whether it must not be narrower than Student's."""
    _, num_samples, num_repeats = times.shape
    if num_samples == 1 and num_repeats == 1:
        return None
    random_state = np.random.default_rng(0)
    rows = random_state.integers(0, num_samples, (_RESAMPLES, num_samples))
    columns = random_state.integers(0, num_repeats, (_RESAMPLES, num_repeats))
    drawn = times[:, rows[:, :, None], columns[:, None, :]]  # [2, resamples, samples, repeats]
    base, own = np.median(drawn, axis=3).sum(axis=2)
    low, high = (float(bound) for bound in np.percentile(base / own, [2.5, 97.5]))
    if is_narrow:
        student = _student(times)
        low, high = min(low, student[0]), max(high, student[1])
    return low, high


def _student(times: np.ndarray) -> tuple[float, float]:
    """Interval of the ratio of the samples' sums from its repeats alone; times: [2, samples, repeats]."""
    base, own = times.sum(axis=1)
    logs = np.log(base / own)  # [repeats]
    quantile = _STUDENT[min(len(logs) - 1, len(_STUDENT)) - 1]
    half = quantile * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    middle = math.log(float(np.median(times, axis=2).sum(axis=1)[0] / np.median(times, axis=2).sum(axis=1)[1]))
    return math.exp(middle - half), math.exp(middle + half)
