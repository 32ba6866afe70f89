"""The engine: continuous batching of requests through rounds of draft, retrieve, fuse, verify, commit.

One loop for every method. Plain decoding is the null drafter without retrievers. Knows nothing of files, rows or
clusters.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pipeline.acceptance import AcceptanceTable
from pipeline.budget import StepTimes, select
from pipeline.emission import Books, Emission, emit
from pipeline.errors import JobError
from pipeline.forest import Forest
from pipeline.graphs import Graphs
from pipeline.keeping import followed, kept_of
from pipeline.methods import Proposers
from pipeline.pages import PagePool
from pipeline.phases import Phases
from pipeline.proposal import FeatureDrafter
from pipeline.provenance import Recorder
from pipeline.request import Generation, Request, check_prompt
from pipeline.retrieval import Retrieval
from pipeline.rules import Lesson
from pipeline.sampling import Choices, choose
from pipeline.scheduler import MIN_CHUNK, Scheduler, Work
from pipeline.slots import Slot
from pipeline.stopping import Decoder, StopCheck
from pipeline.target import Forward, Target
from pipeline.verify import Outcome, walk_forest

_SMOOTHING = 0.1  # of a round in moving averages
_MOST_PREFILL = 0.5  # of a round's rows, for it to teach what rounds take: with many slots few have none

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine works; none of it changes the text.

    Attributes:
        num_slots: requests decoded at a time.
        budget: most tree nodes a slot and round; None chooses by measured step times.
        prefill_chunk: most prefill tokens a round.
        max_context: longest prompt plus output, in tokens.
    """

    num_slots: int
    budget: int | None
    prefill_chunk: int
    max_context: int


class Engine:
    """Generates for any number of requests; `step` runs one round.

    Attributes:
        target, drafter: its models.
        phases: where the time of its rounds went.
        works_beside: whether the models compute beside this process, as on a GPU.
        recorder: see `pipeline.emission.Books`.

    Args:
        target: the model over its KV pool.
        decoder: the target's tokenizer, for text and stop strings.
        eos_ids: token ids that end a sequence.
        proposers: drafter and retrievers of the method.
        acceptance: what retrieval scores are read from and learned into.
        times: step times for `budget=None`.
        clock: tells seconds.
    """

    def __init__(
        self,
        target: Target,
        decoder: Decoder,
        eos_ids: Iterable[int],
        proposers: Proposers,
        acceptance: AcceptanceTable,
        config: EngineConfig,
        times: StepTimes | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.target = target
        self._decoder = decoder
        self._eos_ids = np.array(sorted(set(eos_ids)), np.int64)
        self.drafter = proposers.drafter
        self._reader = proposers.drafter if isinstance(proposers.drafter, FeatureDrafter) else None
        self._retrievers = proposers.retrievers
        self.works_beside = target.device.type != "cpu"
        self._rule = proposers.rule
        self._acceptance = acceptance
        self._config = config
        self._times = times
        pool = PagePool(target.num_pages, target.cache.page_size)
        self._proposed = Forest.empty(0)  # this round's candidates
        self._numbers: list[int] = []  # the slot of each of these trees
        self._rests = False  # whether this round does without speculation
        self._lesson: Callable[[], None] | None = None  # of the last round, not learned yet
        self._pass_seconds: float | None = None  # of this round's pass, if that says anything of those to come
        self._observation: Callable[[], None] | None = None  # what the last round took and brought, not noticed yet
        self._overhead = 0.0  # seconds of a round's commit, lately
        self._clock = clock
        self.phases = Phases(clock)
        self._scheduler = Scheduler(
            config.num_slots, pool, config.prefill_chunk, proposers.retrievers, proposers.drafter
        )
        self._books = Books(self._scheduler, proposers.retrievers)

    @property
    def recorder(self) -> Recorder | None:
        return self._books.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._books.recorder = recorder

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_slots(self) -> int:
        """Requests decoded at a time, as it is now."""
        return self._scheduler.num_slots

    @property
    def max_context(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self._config.max_context

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RowError: the prompt is empty, holds ids outside the vocabulary, or leaves no room for an output token.
        """
        check_prompt(request.prompt_ids, self._config.max_context, self.target.config.vocab_size)
        max_new_tokens = min(request.params.max_new_tokens, self._config.max_context - len(request.prompt_ids))
        stop = StopCheck(request.params, max_new_tokens, self._eos_ids.tolist(), self._decoder)
        self._scheduler.submit(Slot.of(request, stop))

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Runs requests to their ends; yields each as it finishes."""
        for request in requests:
            self.submit(request)
        while self.has_work:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """One round over all slots; returns the requests it finished.

        A round that the device has no memory for is given up, and half as many slots go on.

        Raises:
            JobError: not even one slot fits.
            torch.OutOfMemoryError: as it is, of a target of several processes, which cannot give a round up.
        """
        try:
            return self._round()
        except torch.OutOfMemoryError as error:
            if self.target.is_shared:
                raise
            reason = str(error)  # the error itself holds what the round had allocated
        return self._retreat(reason)

    def forget(self) -> None:
        """Forgets the prompts that it has in its cache; nothing may be under way."""
        self._scheduler.forget()

    def _round(self) -> list[Generation]:
        begin, num_captures = self._clock(), Graphs.num_captures
        if self._observation is not None:
            with self.phases("commit"):
                self._observation()  # before this round is of a kind of its own
            self._observation = None
        if not self.works_beside:
            self._settle()
        decoding = self._scheduler.decoding()
        self._rests = self._rule.rests(self._scheduler.num_under_way)
        self._numbers = [slot.number for slot in decoding]
        self._proposed = self._propose(decoding)
        with self.phases("select"):
            work = self._scheduler.plan(self._numbers, self._select(self._clock() - begin))
        with self.phases("verify"):
            forward, choices = self._verify(work)
        with self.phases("commit"):
            emission, finished = self._commit(work, forward, choices)
        seconds = self._clock() - begin if Graphs.num_captures == num_captures else None
        self._observation = partial(self._observe, emission, self._pass_seconds, seconds)
        return finished

    def _settle_late(self) -> None:
        """As `_settle`, where it has not been done before."""
        if self.works_beside:
            self._settle()

    def _settle(self) -> None:
        """Notes what the last round left to be noted, and lets requests in."""
        with self.phases("commit"):
            self._books.settle()
            self._scheduler.admit()

    def _retreat(self, reason: str) -> list[Generation]:
        """Makes every slot start anew from the tokens it has, in half as many slots; returns those that had ended."""
        self._books.settle()
        ended = [slot for slot in self._scheduler.active if slot.finish_reason is not None]
        for slot in ended:
            self._scheduler.finish(slot)
        if not self._scheduler.halve():
            raise JobError(
                f"The device has no memory for a round of one slot and a prefill chunk of {MIN_CHUNK} tokens: {reason}."
                " Lower --kv-memory, which leaves more for computing, or see what else uses the device; the same"
                " command then resumes the job."
            )
        log.warning("no memory for a round (%s); %d slots go on", reason, self._scheduler.num_slots)
        if self.target.device.type == "cuda":
            torch.cuda.empty_cache()
        return [slot.generation() for slot in ended]

    def _propose(self, decoding: Sequence[Slot]) -> Forest:
        """What the method's rule makes of a draft and of what was retrieved, one tree a slot.

        Retrievers in other processes work while the draft model does; beside a device so does this process, with its
        own searches and what the last round left to be noted.
        """
        if self._rests:
            self._settle_late()
            return Forest.empty(len(decoding))
        views = [slot.view() for slot in decoding]
        with self.phases("retrieve"):
            beside = self.works_beside
            retrieval = Retrieval(self._retrievers, views, self._settle_late, waits=self._rule.waits, is_beside=beside)
        with self.phases("draft"):
            draft = self.drafter.draft(views, self._rule.pace(views, retrieval))
        with self.phases("retrieve"):
            retrieved = retrieval.finish()
        with self.phases("fuse"):
            return self._rule.join(views, draft, retrieved)

    def _select(self, spent: float) -> Forest:
        """The nodes that this round verifies, of what was proposed in `spent` seconds."""
        rows = self._scheduler.prefill_rows()
        return select(self._proposed, self._config.budget, self._times, rows, spent + self._overhead)

    def _observe(self, emission: Emission, pass_seconds: float | None, seconds: float | None) -> None:
        """Learns what a round's pass took, and what the round took and brought, prefill left out."""
        work = emission.work
        num_rows, num_prefill = work.num_rows, work.num_prefill
        if self._times is None or num_prefill > _MOST_PREFILL * num_rows:
            return
        if pass_seconds is not None:
            self._times.observe(num_rows, pass_seconds)
        num_slots = int(np.count_nonzero(work.runs.num_known == 1))
        if seconds is not None and num_slots:
            whole, own = self._times(np.array([num_rows, num_rows - num_prefill]))
            num_tokens, seconds = sum(emission.num_new), seconds * float(own / whole)
            self._rule.observe_round(num_slots, num_rows - num_prefill, num_tokens, seconds)

    def _verify(self, work: Work) -> tuple[Forward, Choices]:
        """One target forward pass over all runs and the target's choice after every node; times itself.

        What the last round taught is learned meanwhile.
        """
        copies = self._scheduler.take_copies()
        if len(copies[0]):
            self.target.move(*copies)
        if self._reader is not None and len(copies[0]):
            self._reader.copy(*(torch.from_numpy(index).to(self.target.device) for index in copies))
        if self._lesson is not None and not self.works_beside:
            self._lesson()
        begin, num_captures = self._clock(), Graphs.num_captures
        forward = self.target.forward(work.runs)
        if self._lesson is not None:
            self._lesson()
        choices = self._choose(work, forward)
        self._pass_seconds = self._clock() - begin if Graphs.num_captures == num_captures else None
        return forward, choices

    def _choose(self, work: Work, forward: Forward) -> Choices:
        rows = [None] * forward.logits.shape[0]
        for slot, tree, begin in zip(work.slots, work.trees, forward.begin.tolist(), strict=True):
            if begin >= 0:
                choice_rows = slot.choice_rows(tree)
                rows[begin : begin + len(choice_rows)] = choice_rows  # type: ignore[assignment]
        return choose(forward.logits, rows)  # type: ignore[arg-type]

    def _emit(self, work: Work, forward: Forward, choices: Choices) -> Emission:
        """Appends the round's tokens to all slots. What they teach waits."""
        walks = walk_forest(work.trees, choices.token_ids, forward.begin)
        emission = emit(work, walks, choices, forward.begin, self._eos_ids)
        if not self._rests:
            # A slot that gave way and computes its tokens again was no part of what was proposed.
            places = {slot.number: i for i, slot in enumerate(work.slots) if emission.is_round[i]}
            outcome = walks.outcome.taken([places.get(number, -1) for number in self._numbers])
            self._lesson = partial(self._learn, self._proposed, outcome, self._rule.lesson())
        return emission

    def _learn(self, proposed: Forest, outcome: Outcome, lesson: Lesson) -> None:
        """A round's proposals and what became of them. It can wait until the device has a next pass to compute."""
        self._acceptance.observe(proposed, outcome)
        lesson(proposed, outcome)
        self._lesson = None

    def _commit(self, work: Work, forward: Forward, choices: Choices) -> tuple[Emission, list[Generation]]:
        """Emits tokens, keeps the accepted nodes' keys and values, and lets finished requests go."""
        began, num_captures = self._clock(), Graphs.num_captures
        emission, slots = self._emit(work, forward, choices), work.slots
        self._books.enter(emission)
        if self._reader is not None and self._rests and not self._rule.follows:
            for slot in slots:
                if slot.is_followed:
                    slot.is_followed = False
                    self._reader.release(slot.number)
        if self._reader is not None or len(emission.kept):
            self._keep(emission, forward)
        counts = work.runs.num_known + np.diff(emission.kept_begins)
        for slot, count in zip(slots, counts.tolist(), strict=True):
            slot.cached += count
        self._books.settle(only_ended=True)
        ended = [slot for slot in slots if slot.finish_reason is not None]
        for slot in ended:
            self._scheduler.finish(slot)
        if Graphs.num_captures == num_captures:
            self._overhead += _SMOOTHING * (self._clock() - began - self._overhead)
        return emission, [slot.generation() for slot in ended]

    def _keep(self, emission: Emission, forward: Forward) -> None:
        """Moves accepted nodes' keys and values to where they belong; tells the drafter the states of what is kept."""
        slots, page_size = emission.work.slots, self.target.cache.page_size
        kept = kept_of(emission.work.runs, emission.kept, emission.kept_begins, page_size)
        if len(kept.sources):
            self.target.move(kept.sources, kept.targets)
        if self._reader is not None and forward.states is not None and any(slot.is_followed for slot in slots):
            committed, rows = followed(slots, kept, forward.state_begin)
            self._reader.commit(committed, forward.states[torch.from_numpy(rows).to(self.target.device)])
