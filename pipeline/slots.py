"""A slot: one request in the engine, its known tokens, its place in the KV cache and its counters."""

from dataclasses import dataclass, field

import numpy as np

from pipeline.noise import position_key
from pipeline.pages import PageRun
from pipeline.proposal import SlotView
from pipeline.request import FinishReason, Generation, Request
from pipeline.sampling import ChoiceRow
from pipeline.stopping import StopCheck
from pipeline.tree import SOURCES, TokenTree, node_depths


@dataclass(slots=True)
class Slot:
    """State of one request from submission to its end; survives losing and regaining its place in the cache.

    Attributes:
        number: the slot it occupies while admitted.
        order: admission order; the youngest gives way when KV memory runs out.
        tokens: [capacity] int32, prompt and output; the first `length` are known.
        cached: tokens whose keys and values are committed in `pages`.
        is_followed: whether the drafter is told of its tokens.
    """

    request: Request
    stop: StopCheck
    tokens: np.ndarray
    length: int
    number: int = -1
    order: int = -1
    cached: int = 0
    is_followed: bool = True
    pages: PageRun = field(default_factory=PageRun)
    logprobs: list[float] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(len(SOURCES), np.int64))  # by source
    rounds_without_draft: int = 0
    num_requeues: int = 0
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, request: Request, stop: StopCheck) -> "Slot":
        """A slot state for a new request."""
        prompt = np.asarray(request.prompt_ids, np.int32)
        tokens = np.empty(len(prompt) + 64, np.int32)
        tokens[: len(prompt)] = prompt
        return cls(request=request, stop=stop, tokens=tokens, length=len(prompt))

    @property
    def known(self) -> np.ndarray:
        """[L] int32 view of all known tokens."""
        return self.tokens[: self.length]

    @property
    def num_output(self) -> int:
        return self.length - len(self.request.prompt_ids)

    @property
    def output(self) -> np.ndarray:
        """[n] int32 view of the output tokens."""
        return self.tokens[len(self.request.prompt_ids) : self.length]

    @property
    def num_pending(self) -> int:
        """Known tokens not yet in the cache: 1 (the root) while decoding, more while prefill goes on."""
        return self.length - self.cached

    @property
    def is_decoding(self) -> bool:
        return self.num_pending == 1

    def extend(self, tokens: np.ndarray, logprobs: np.ndarray | None, *, has_eos: bool = True) -> int:
        """Adds output tokens, [n] integers, up to the first that ends the output; returns how many.

        Args:
            has_eos: whether one of them may be an end-of-sequence token.
        """
        begin, end = self.length, self.length + len(tokens)
        while end > len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[begin:end] = tokens
        num_new, num_prompt = len(tokens), len(self.request.prompt_ids)
        if has_eos or self.stop.has_own or end - num_prompt >= self.stop.max_new_tokens:
            num_new, self.finish_reason = self.stop(self.tokens[num_prompt:end], num_new)
        self.length = begin + num_new
        if logprobs is not None:
            self.logprobs += logprobs[:num_new].tolist()
        return num_new

    def view(self) -> SlotView:
        """What proposers may know of it in this round."""
        max_depth = self.stop.max_new_tokens - self.num_output - 1
        return SlotView(self.number, self.known, max_depth, self.request.params, self.request.seed, self.pages)

    def choice_rows(self, tree: TokenTree) -> list[ChoiceRow]:
        """How the token after the root, and after each node of `tree`, is chosen: [len(tree) + 1]."""
        params = self.request.params
        if params.is_greedy and params.repetition_penalty == 1.0:
            return [ChoiceRow(params)] * (len(tree) + 1)
        depths = [0, *node_depths(tree.parents).tolist()]
        seen: list[np.ndarray | None] = [None] * len(depths)
        if params.repetition_penalty != 1.0:
            paths = [np.unique(self.known)]
            for token, parent in zip(tree.tokens, tree.parents, strict=True):
                paths.append(np.append(paths[parent + 1], token))
            seen = list(paths)
        if params.is_greedy:
            return [ChoiceRow(params, 0, row) for row in seen]
        keys = [position_key(self.request.seed, self.length + depth) for depth in range(max(depths) + 1)]
        return [ChoiceRow(params, keys[depth], row) for depth, row in zip(depths, seen, strict=True)]

    def count_round(self, num_nodes: int, accepted: np.ndarray) -> None:
        """Books one verification round.

        Args:
            num_nodes: of the tree.
            accepted: [len(SOURCES)] by who was surest of them, the accepted nodes that stayed in the output.
        """
        self.rounds += 1
        self.drafted += num_nodes
        self.rounds_without_draft += num_nodes == 0
        self.accepted += accepted

    def generation(self) -> Generation:
        """The finished request."""
        assert self.finish_reason is not None
        output = self.output
        return Generation(
            request_id=self.request.request_id,
            token_ids=tuple(output.tolist()),
            text=self.stop.text(output),
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.request.prompt_ids),
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=int(self.accepted.sum()),
            accepted_by_source={SOURCES[i]: int(self.accepted[i]) for i in np.flatnonzero(self.accepted)},
            rounds_without_draft=self.rounds_without_draft,
            logprobs=tuple(self.logprobs),
            num_requeues=self.num_requeues,
        )
