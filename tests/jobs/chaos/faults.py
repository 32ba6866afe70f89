"""What is to go wrong in a campaign, and in which run of a driver."""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

# All but the last two are kills.
SHARES = {"raylet": 0.12, "retrieval": 0.14, "replica": 0.14, "replica step": 0.2, "driver": 0.14}
KILLS = (*SHARES, "driver step")
_LEADS = ("driver", "driver step", "disk full", "duplicate")
_LOSSES = ("replica", "replica step", "raylet")
_WHOLE_COVER = 50  # kills, from which on the driver ends before each of its steps at least once


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: of `KILLS`, or `disk full` or `duplicate` (the same command while a driver is at work).
        after: commits of the run before it strikes; delay: seconds from then on.
        pick: which of the processes, in [0, 1).
        step: for a kill at a step, or a disk that is found full there; occurrence: how many times it is done before.
    """

    kind: str
    after: int
    delay: float
    pick: float
    step: str = ""
    occurrence: int = 1


def make_faults(
    num_kills: int, of_driver: Mapping[str, int], of_replicas: Mapping[str, int], pick: random.Random
) -> list[Fault]:
    """At least `num_kills` kills and some other faults, in random order.

    Args:
        of_driver, of_replicas: how often each step is done in an undisturbed run.
    """
    counts = {kind: max(1, round(share * num_kills)) for kind, share in SHARES.items()}
    rest = max(1, num_kills - sum(counts.values()))
    counts["driver step"] = max(rest, len(of_driver)) if num_kills >= _WHOLE_COVER else rest
    counts |= {"disk full": max(1, num_kills // 16), "duplicate": max(1, num_kills // 16)}
    steps = {"driver step": _cycle(of_driver, pick), "replica step": _cycle(of_replicas, pick)}
    faults = []
    for kind, count in counts.items():
        for _ in range(count):
            after = 0 if kind == "duplicate" else pick.randint(2, 5) if kind in _LEADS else pick.randint(1, 2)
            step, times = "", 1
            if kind in steps:
                step = steps[kind][0]
                steps[kind].rotate(-1)
                most = (of_driver if kind == "driver step" else of_replicas)[step]
                times = pick.randint(1, min(most, 4))
            faults.append(Fault(kind, after, pick.uniform(0.0, 0.3), pick.random(), step, times))
    pick.shuffle(faults)
    return faults


class Schedule:
    """Hands faults out to the runs of drivers; false when there are none.

    A run has at most one fault that ends it, one at a step, and two that cost a replica: after three such losses with
    the same shard the driver would look for a deadly row in it, and be misled.
    """

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults

    def __bool__(self) -> bool:
        return bool(self._faults)

    def next_run(self) -> list[Fault]:
        """The faults of one run; those that do not come to strike must be put back."""
        chosen: list[Fault] = []
        for fault in list(self._faults):
            if self._has_room(chosen, fault):
                chosen.append(fault)
                self._faults.remove(fault)
        return chosen

    def put_back(self, faults: list[Fault]) -> None:
        """These did not strike."""
        self._faults += faults

    def _has_room(self, chosen: list[Fault], fault: Fault) -> bool:
        if fault.step and any(other.step for other in chosen):
            return False
        for kinds, most in ((_LEADS, 1), (_LOSSES, self._losses_a_run()), (("retrieval",), 1)):
            if fault.kind in kinds and sum(other.kind in kinds for other in chosen) >= most:
                return False
        return True

    def _losses_a_run(self) -> int:
        """So that they last as long as the faults that end a run, of which each has one of its own."""
        leads = sum(fault.kind in _LEADS for fault in self._faults)
        losses = sum(fault.kind in _LOSSES for fault in self._faults)
        return 2 if losses > leads else 1


def _cycle(steps: Mapping[str, int], pick: random.Random) -> deque[str]:
    names = sorted(steps)
    pick.shuffle(names)
    return deque(names)
