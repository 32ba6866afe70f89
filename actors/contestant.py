"""Who can be measured: an engine with one of our methods, over the weights of a model that others have, too.

Peers from other libraries are in `actors.peers`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel

from actors.searchers import LocalPassages, LocalSearcher
from datastore import Datastore, LiveStore
from pipeline.engine import Engine
from pipeline.errors import JobError
from pipeline.methods import Method
from pipeline.provenance import Counts, Recorder, TrailToken
from pipeline.request import Generation, Request
from pipeline.search import Searcher

Follow = Callable[[Generation], Request | None]  # the request that a finished one makes possible


class Contestant(Protocol):
    """Who generates in a contest."""

    def run(self, requests: Sequence[Request], follow: Follow, questions: Mapping[int, str]) -> list[Generation]:
        """Generates for all requests and for those that follow their outputs.

        Args:
            questions: by request, what passages should be near to.
        """

    def report(self, generation: Generation) -> tuple[Counts, tuple[TrailToken, ...]]:
        """See `Recorder.take`."""

    def follow(self, request_id: int) -> None:
        """See `Recorder.follow`."""

    def clock(self) -> tuple[int, dict[str, float]]:
        """Rounds so far, and seconds by phase."""


class EngineContestant:
    """One of our methods.

    Args:
        live: the method's store of outputs, which find their way into it at once; None without that source.
        passages: None without that source.
    """

    def __init__(self, engine: Engine, live: LiveStore | None, passages: LocalPassages | None) -> None:
        self.engine = engine
        self._num_slots = engine.num_slots
        self._live = live
        self._passages = passages
        self._recorder = engine.recorder = Recorder()
        self._rounds = 0

    def run(self, requests: Sequence[Request], follow: Follow, questions: Mapping[int, str]) -> list[Generation]:
        """See `Contestant.run`.

        Raises:
            JobError: memory was too short for as many slots as the figures would be for.
        """
        if self._passages is not None:
            vocabulary = self.engine.target.config.vocab_size
            found = self._passages.passages([questions[request.request_id] for request in requests])
            pairs = zip(requests, found, strict=True)
            requests = [
                Request(r.request_id, r.prompt_ids, r.params, r.seed, tuple(p[p < vocabulary] for p in passages))
                for r, passages in pairs
            ]
        done = run(self.engine, requests, self._live, follow, self._count)
        if self.engine.num_slots < self._num_slots:
            raise JobError(
                f"memory was too short for {self._num_slots} slots: {self.engine.num_slots} were left. Lower --slots,"
                " or measure fewer methods together; what is measured stays."
            )
        return done

    def report(self, generation: Generation) -> tuple[Counts, tuple[TrailToken, ...]]:
        """See `Recorder.take`."""
        return self._recorder.take(generation.request_id)

    def follow(self, request_id: int) -> None:
        """See `Recorder.follow`."""
        self._recorder.follow(request_id)

    def clock(self) -> tuple[int, dict[str, float]]:
        """See `Contestant.clock`."""
        return self._rounds, dict(self.engine.phases.seconds)

    def _count(self) -> None:
        self._rounds += 1


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own over the same weights: an engine changes how its model attends and what it tells."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def local_search(
    method: Method, store: Datastore | None, vocab_size: int
) -> tuple[tuple[Searcher, ...], LiveStore | None]:
    """What searches a method's sources in this process, and its live store, empty, if it has that source."""
    live = LiveStore(vocab_size) if "live" in method.sources else None
    if not {"corpus", "live"} & set(method.sources):
        return (), None
    return (LocalSearcher(store if "corpus" in method.sources else None, live),), live


def run(
    engine: Engine,
    requests: Iterable[Request],
    live: LiveStore | None,
    follow: Follow = lambda generation: None,
    on_round: Callable[[], None] = lambda: None,
) -> list[Generation]:
    """Generates for all requests, in the order in which they end; a finished output can be found at once."""
    done: list[Generation] = []
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        finished = engine.step()
        on_round()
        done += finished
        if live is not None and finished:
            live.append([np.asarray(generation.token_ids, np.int32) for generation in finished])
        for generation in finished:
            if (following := follow(generation)) is not None:
                engine.submit(following)
    return done
