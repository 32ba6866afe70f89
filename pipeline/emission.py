"""What a pass brought to the slots of a round: tokens at once, and what is to be noted of them when there is time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from pipeline.proposal import Retriever
from pipeline.provenance import Recorder
from pipeline.sampling import Choices
from pipeline.scheduler import Scheduler, Work
from pipeline.tree import SOURCES
from pipeline.verify import Walks


@dataclass(frozen=True, slots=True)
class Emission:
    """What S slots brought.

    Attributes:
        num_new: [S] tokens that stayed in the outputs.
        is_round: [S] whether output had begun before.
        has_ended: [S] whether the output has.
        kept: [A] int32 accepted nodes of all trees that go on in the cache: all those of outputs that do.
        kept_begins: [S + 1] int64 where each slot's begin.
    """

    work: Work
    walks: Walks
    num_new: Sequence[int]
    is_round: Sequence[bool]
    has_ended: Sequence[bool]
    kept: np.ndarray
    kept_begins: np.ndarray


def emit(work: Work, walks: Walks, choices: Choices, rows: np.ndarray, eos_ids: np.ndarray) -> Emission:
    """Appends to every output the accepted tokens and the bonus, until one ends it.

    Args:
        choices: of all logits rows.
        rows: [S] int64 that of each root, -1 for none.
        eos_ids: [E] int64 end-of-sequence tokens.
    """
    tokens, begins = walks.outcome.choices, walks.outcome.begins
    slots, ends = work.slots, begins[1:].tolist()
    is_round = [slot.num_output > 0 for slot in slots]
    num_new = [0] * len(slots)
    begin = 0
    for i, (slot, end, has_eos) in enumerate(zip(slots, ends, _hold(tokens, begins, eos_ids).tolist(), strict=True)):
        if end > begin:
            logprobs = None
            if choices.logprobs is not None:
                nodes = walks.nodes[walks.begins[i] : walks.begins[i + 1]]
                logprobs = choices.logprobs[rows[i] + np.array([0, *(nodes + 1)])]
            num_new[i] = slot.extend(tokens[begin:end], logprobs, has_eos=has_eos)
        begin = end
    has_ended = [slot.finish_reason is not None for slot in slots]
    kept, kept_begins = walks.nodes, walks.begins
    if any(has_ended):
        counts = np.diff(walks.begins)
        kept = kept[np.repeat(np.logical_not(has_ended), counts)]
        kept_begins = np.concatenate([[0], np.cumsum(np.where(has_ended, 0, counts))])
    return Emission(work, walks, num_new, is_round, has_ended, kept, kept_begins)


class Books:
    """Notes what an emission brought when it is asked to: the device can have work again before that.

    Attributes:
        recorder: told of every token; None, as at first, if nobody wants to know.
    """

    def __init__(self, scheduler: Scheduler, retrievers: Sequence[Retriever]) -> None:
        self.recorder: Recorder | None = None
        self._scheduler = scheduler
        self._retrievers = retrievers
        self._emission: Emission | None = None
        self._places: list[int] = []  # of its slots that are not noted yet

    def enter(self, emission: Emission) -> None:
        """Notes an emission when it is settled. But for `cached`, its slots stay as they are until then."""
        assert not self._places
        self._emission, self._places = emission, list(range(len(emission.work)))

    def settle(self, *, only_ended: bool = False) -> None:
        """Notes what is not noted yet, maybe only of outputs that have ended."""
        emission, places = self._emission, self._places
        if emission is not None and places:
            has_ended = emission.has_ended
            self._places = [place for place in places if only_ended and not has_ended[place]]
            self._note(emission, [place for place in places if has_ended[place]] if only_ended else places)

    def _note(self, emission: Emission, places: Sequence[int]) -> None:
        """Counts, text for retrievers, and pages that others may share, of these slots."""
        if not places:
            return
        work, walks, pool = emission.work, emission.walks, self._scheduler.pool
        num_new, is_prefill = emission.num_new, (work.runs.num_known > 1).tolist()
        accepted = _accepted(walks.sources, walks.begins, np.array(num_new), len(SOURCES))
        num_nodes = work.runs.num_nodes.tolist()
        for i in places:
            slot = work.slots[i]
            if num_new[i]:
                tokens = slot.known[slot.length - num_new[i] :]
                if emission.is_round[i]:
                    slot.count_round(num_nodes[i], accepted[i])
                if self.recorder is not None:
                    nodes = walks.nodes[walks.begins[i] : walks.begins[i + 1]]
                    self.recorder.emitted(slot.request.request_id, slot.rounds, work.trees[i], nodes, tokens)
                for retriever in self._retrievers:
                    retriever.extend(slot.number, tokens)
            if is_prefill[i] or emission.has_ended[i] or not pool.is_filling(slot.pages, slot.cached):
                pool.publish(slot.pages, slot.known[: slot.cached])


@njit(cache=True, nogil=True)
def _hold(tokens: np.ndarray, begins: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[S] bool which parts of `tokens` hold one of those wanted."""
    found = np.zeros(len(begins) - 1, np.bool_)
    for part in range(len(found)):
        for i in range(begins[part], begins[part + 1]):
            for one in wanted:
                found[part] |= tokens[i] == one
    return found


@njit(cache=True, nogil=True)
def _accepted(sources: np.ndarray, begins: np.ndarray, most: np.ndarray, num_sources: int) -> np.ndarray:
    """[S, sources] by source the nodes of each part, of the first `most` of it, [S]."""
    counts = np.zeros((len(most), num_sources), np.int64)
    for part in range(len(most)):
        for i in range(begins[part], min(begins[part + 1], begins[part] + most[part])):
            counts[part, sources[i]] += 1
    return counts
