"""When a replica rests: rounds in which nothing is looked up or drafted, because speculation does not pay.

With many slots a pass takes nearly as long as its rows, and what surrounds it is not earned back. Rounds of both kinds
are compared by their tokens against what plain decoding's passes alone would have made in the same time, at each
number of slots by itself; the lesser kind is tried again, ever more rarely while it stays the lesser. Where a row is
dear from the start, a replica begins at rest: a short batch is over before speculation could have been found wanting.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.budget import StepTimes

_DECAY = 0.98  # of a round in moving averages
_MARGIN = 1.02  # by which rest must be better: what 16 slots emit in a round varies by a sixth
# First rounds at a number of slots, which teach nothing: code is loaded, and drafts are not yet known for their worth.
_WARM_UP_SLOTS = 1024  # rounds x slots
_TRIAL = 16  # rounds of one kind before it is judged
# With many slots a round tells more, a batch is over sooner, and there is most to lose.
_FEW_SLOTS = 16
_SHORT_WARM_UP, _SHORT_TRIAL = 8, 8
# Rounds of rest before a trial of speculation, half of it at most, in which drafters follow new requests again: what
# began before is drafted for from retrieval alone until it ends.
_RUN_UP, _LONGEST_RUN_UP = 64, 256
_SHORTEST, _LONGEST = 128, 2048  # rounds of rest between two trials of speculation
_DEAR = 0.3  # of what a slot's share of a plain pass takes: a row that adds so much is rarely earned back
_FAR = 3  # times as many rows, to tell what one adds
_CERTAIN = 1.1  # speculation worth more needs no comparison: rest is worth 1 at most


@dataclass(slots=True)
class _Worth:
    """Tokens against plain decoding's in the same time, newer rounds counting more."""

    tokens: float = 0.0
    plain: float = 0.0
    num_rounds: int = 0

    def observe(self, tokens: float, plain: float) -> None:
        self.tokens = _DECAY * self.tokens + tokens
        self.plain = _DECAY * self.plain + plain
        self.num_rounds += 1

    @property
    def value(self) -> float:
        return self.tokens / self.plain


class _Level:
    """What is known at about one number of slots, 2**size."""

    def __init__(self, size: int, *, begins_at_rest: bool = False) -> None:
        are_few = 2**size <= _FEW_SLOTS
        self.is_resting = False
        self._speculation, self._rest = _Worth(), _Worth()
        self._unseen = _WARM_UP_SLOTS >> size if are_few else _SHORT_WARM_UP
        self._trial = _TRIAL if are_few else _SHORT_TRIAL
        self._left = self._trial  # rounds of speculation until the next decision: those that teach; of rest: all
        self._length = _SHORTEST  # of the next rest
        self._has_rested = False
        self._is_trying = False  # whether this is the first rest, which ends when enough is known of it
        self._run_up = 0
        if begins_at_rest:
            self._rest_for(_SHORTEST)

    @property
    def follows(self) -> bool:
        return not self.is_resting or self._is_trying or self._left <= self._run_up

    def begin(self) -> None:
        """A round begins. Rounds with much prefill teach nothing, and may be all there are: rest ends all the same."""
        if self.is_resting:
            if self._left == 0:
                self._speculate()
            self._left -= self.is_resting

    def observe(self, tokens: float, plain: float) -> None:
        """A round of the current kind that teaches."""
        if self.is_resting:
            self._rest.observe(tokens, plain)
            if self._is_trying and self._rest.num_rounds == self._trial:
                self._decide()
        elif self._unseen:
            self._unseen -= 1
        else:
            self._speculation.observe(tokens, plain)
            self._left -= 1
            if self._left == 0:
                self._decide()

    def _decide(self) -> None:
        are_known = self._rest.num_rounds > 0 and self._speculation.num_rounds > 0
        if are_known and self._rest.value > _MARGIN * self._speculation.value:
            self._rest_for(self._length)
            self._length = min(2 * self._length, _LONGEST)
        elif not self._has_rested and self._speculation.value < _CERTAIN:
            self._rest_for(_SHORTEST)
            self._is_trying = True
        else:
            self._speculate()
            self._length = _SHORTEST

    def _rest_for(self, num_rounds: int) -> None:
        self.is_resting, self._left = True, num_rounds
        self._has_rested, self._is_trying = True, False
        self._run_up = min(max(num_rounds // 2, _RUN_UP), _LONGEST_RUN_UP)

    def _speculate(self) -> None:
        self.is_resting, self._left = False, self._trial


class Resting:
    """Decides round by round whether to rest.

    Args:
        times: of the target's passes.
    """

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._levels: dict[int, _Level] = {}
        self._level = _Level(0)  # of this round

    @property
    def is_resting(self) -> bool:
        """Whether this round does without speculation."""
        return self._level.is_resting

    @property
    def follows(self) -> bool:
        """Whether drafters should be told of requests that begin in this round: speculation goes on, or soon will."""
        return self._level.follows

    def begin_round(self, num_slots: int) -> bool:
        """Whether a round does without speculation.

        Args:
            num_slots: requests under way, one at least: those in prefill soon decode beside the others.
        """
        size = round(math.log2(num_slots))
        if size not in self._levels:
            few, many = self._times(np.array([num_slots, _FAR * num_slots]))  # far apart: single times are noisy
            is_dear = 2**size > _FEW_SLOTS and many > (1.0 + (_FAR - 1) * _DEAR) * few
            self._levels[size] = _Level(size, begins_at_rest=is_dear)
        self._level = self._levels[size]
        self._level.begin()
        return self._level.is_resting

    def observe(self, tokens: float, plain_tokens: float) -> None:
        """The round emitted tokens; plain decoding's passes would have made `plain_tokens` in its time."""
        self._level.observe(tokens, plain_tokens)
