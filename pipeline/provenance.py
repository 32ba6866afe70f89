"""Who proposed each token of an output, and how good the guesses were: counts for every request, trails for a few.

An engine without a `Recorder` keeps none of it. Nothing here changes what is drafted or emitted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit

from pipeline.tree import SOURCES, TokenTree, node_depths, path_values

TARGET = "target"  # who an output token comes from that nobody proposed: each round's last, and the first of all
ANY = "any"
MAX_DEPTH = 8  # deeper places count as this
NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class TrailToken:
    """One output token.

    Attributes:
        source: who was surest of it, of `SOURCES`; else `TARGET`.
        others: who else had proposed it.
        score: estimated p(accepted | parent accepted) before it was verified; None of a target's own token.
        value: the estimates' product along its path in the round's tree; None likewise.
        depth: its place in the round's tree, from 1; 0 of a target's own token.
        round: in which it was emitted, from 1; 0 is the pass that ended the prompt.
    """

    token_id: int
    source: str
    others: tuple[str, ...]
    score: float | None
    value: float | None
    depth: int
    round: int

    def record(self, text: str) -> dict[str, Any]:
        """For JSON and Parquet; `text` is the token's."""
        return {
            "token_id": self.token_id,
            "text": text,
            "source": self.source,
            "others": list(self.others),
            "score": self.score,
            "value": self.value,
            "depth": self.depth,
            "round": self.round,
        }


@dataclass(slots=True)
class Counts:
    """What one request's rounds showed of the nodes that they verified.

    Attributes:
        offered: [len(SOURCES) + 1, MAX_DEPTH] how often a source (last: any) had children of the root or of an accepted
            node verified, by the children's depth.
        right: [len(SOURCES) + 1, MAX_DEPTH] how often one of them was accepted.
        predicted: [3, NUM_BINS] those children by estimated acceptance: how many, how many accepted, sum of estimates.
    """

    offered: np.ndarray = field(default_factory=lambda: np.zeros((len(SOURCES) + 1, MAX_DEPTH), np.int64))
    right: np.ndarray = field(default_factory=lambda: np.zeros((len(SOURCES) + 1, MAX_DEPTH), np.int64))
    predicted: np.ndarray = field(default_factory=lambda: np.zeros((3, NUM_BINS)))

    def __iadd__(self, other: "Counts") -> "Counts":
        self.offered += other.offered
        self.right += other.right
        self.predicted += other.predicted
        return self

    def by_depth(self) -> dict[str, Mapping[str, list[int]]]:
        """`offered` and `right` by source, those that never offered anything left out."""
        names = [*SOURCES, ANY]
        kept = [i for i in range(len(names)) if self.offered[i].any()]
        return {
            "offered": {names[i]: self.offered[i].tolist() for i in kept},
            "right": {names[i]: self.right[i].tolist() for i in kept},
        }


class Recorder:
    """Keeps the counts of all requests of an engine, and the trails of those it was asked to follow."""

    def __init__(self) -> None:
        self._counts: dict[int, Counts] = {}
        self._trails: dict[int, list[TrailToken]] = {}

    def follow(self, request_id: int) -> None:
        """Keep the trail of this request, too."""
        self._trails[request_id] = []

    def emitted(
        self, request_id: int, round_number: int, tree: TokenTree, accepted: np.ndarray, token_ids: np.ndarray
    ) -> None:
        """One pass emitted tokens.

        Args:
            tree: what was verified.
            accepted: [A] its accepted nodes, from the root down.
            token_ids: [n] the new output tokens: those of accepted nodes, then the target's own unless the output
                ended before.
        """
        counts = self._counts.setdefault(request_id, Counts())
        if len(tree):
            columns = (tree.parents, tree.evidence, tree.scores, accepted)
            _count(*columns, counts.offered, counts.right, counts.predicted)
        trail = self._trails.get(request_id)
        if trail is not None:
            trail += _trail(round_number, tree, accepted, token_ids)

    def take(self, request_id: int) -> tuple[Counts, tuple[TrailToken, ...]]:
        """What was kept of a finished request, which is forgotten; its trail is empty unless it was followed."""
        return self._counts.pop(request_id, Counts()), tuple(self._trails.pop(request_id, ()))


def _trail(round_number: int, tree: TokenTree, accepted: np.ndarray, token_ids: np.ndarray) -> list[TrailToken]:
    found: list[TrailToken] = []
    depths, values = node_depths(tree.parents), path_values(tree.parents, tree.scores)
    for place, token_id in enumerate(token_ids.tolist()):
        if place >= len(accepted):
            found.append(TrailToken(token_id, TARGET, (), None, None, 0, round_number))
            continue
        node = int(accepted[place])
        source = SOURCES[tree.sources[node]]
        proposers = (SOURCES[i] for i in np.flatnonzero(tree.evidence[node] > 0))
        others = tuple(name for name in proposers if name != source)
        score, value = round(float(tree.scores[node]), 4), round(float(values[node]), 4)
        found.append(TrailToken(token_id, source, others, score, value, int(depths[node]), round_number))
    return found


@njit(cache=True, nogil=True)
def _count(
    parents: np.ndarray,
    evidence: np.ndarray,
    scores: np.ndarray,
    accepted: np.ndarray,
    offered: np.ndarray,
    right: np.ndarray,
    predicted: np.ndarray,
) -> None:
    """Adds one round to `Counts`."""
    num_sources = evidence.shape[1]
    num_bins = predicted.shape[1]
    node = -1
    for place in range(len(accepted) + 1):
        following = accepted[place] if place < len(accepted) else -1
        depth = min(place, offered.shape[1] - 1)
        has_offer = np.zeros(num_sources + 1, np.bool_)
        for child in range(node + 1, len(parents)):
            if parents[child] == node:
                has_offer[num_sources] = True
                for source in range(num_sources):
                    if evidence[child, source] > 0:
                        has_offer[source] = True
                at = min(int(scores[child] * num_bins), num_bins - 1)
                predicted[0, at] += 1
                predicted[1, at] += child == following
                predicted[2, at] += scores[child]
        for source in range(num_sources + 1):
            offered[source, depth] += has_offer[source]
        if following < 0:
            break
        for source in range(num_sources):
            right[source, depth] += evidence[following, source] > 0
        right[num_sources, depth] += 1
        node = following
