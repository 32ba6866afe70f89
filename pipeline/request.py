"""What goes into the engine and what comes out: value types, no behaviour beyond validation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipeline.errors import ConfigError, RowError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; names and order of the filters as in transformers' `GenerationConfig`.

    Attributes:
        max_new_tokens: most tokens a sample may have, end-of-sequence token included.
        temperature: 0 means greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: > 1 discourages tokens of the prompt and of the output so far (CTRL, arXiv 1909.05858).
        stop: strings that end the output; the text is cut before them.
        stop_token_ids: token ids that end the output, besides the model's end-of-sequence tokens.
        ignore_eos: go on after end-of-sequence tokens.
        logprobs: return the log-probability of each chosen token under the target's own, unfiltered distribution.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (self.temperature >= 0.0, "temperature", self.temperature, "0 (greedy) or more"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (off) or more"),
            (0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1 (off)"),
            (0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 (off) and 1"),
            (self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0; 1 is off"),
            (all(self.stop), "stop", self.stop, "non-empty strings"),
        )
        for ok, name, value, wanted in checks:
            if not ok:
                raise ConfigError(f"{name} is {value!r}; it must be {wanted}.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, one sample.

    Attributes:
        request_id: unique among the requests in the engine; comes back in the output.
        prompt_ids: the prompt's token ids, template and special tokens included; not empty.
        seed: 64-bit seed of this sample's noise; see `row_seed` in `pipeline.noise`.
        passages: text that the output may repeat, [n] int32 each; it never changes the output.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    passages: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished request.

    Attributes:
        token_ids: the output tokens, the one that ended it included.
        text: decoded without special tokens, cut before a stop string.
        finish_reason: `stop` (end of sequence, stop token or stop string) or `length`.
        rounds: verification rounds, prefill not counted; tau = (len(token_ids) - 1) / rounds.
        drafted: tree nodes verified.
        accepted: drafted tokens kept in the output.
        accepted_by_source: `accepted` split by who proposed the token.
        rounds_without_draft: rounds whose tree was empty.
        logprobs: one per output token when asked for, else empty.
        num_requeues: times the request lost its slot to make room in KV memory.
    """

    request_id: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    rounds: int
    drafted: int
    accepted: int
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    rounds_without_draft: int = 0
    logprobs: tuple[float, ...] = ()
    num_requeues: int = 0


def check_prompt(prompt_ids: Sequence[int], max_context: int, vocab_size: int) -> None:
    """Refuses a prompt that cannot be generated for.

    Args:
        max_context: longest prompt plus output, in tokens; vocab_size: of the target.

    Raises:
        RowError: it is empty, holds ids outside the vocabulary, or leaves no room for an output token.
    """
    if not prompt_ids:
        raise RowError("empty_prompt", "The prompt has no tokens; give it some text.")
    if len(prompt_ids) >= max_context:
        raise RowError(
            "prompt_too_long",
            f"The prompt has {len(prompt_ids)} tokens; the context holds {max_context} with at least one output token."
            " Shorten the prompt, or raise --max-context or --kv-memory if the model allows.",
        )
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        outside = next(token for token in prompt_ids if not 0 <= token < vocab_size)
        raise RowError(
            "invalid_token",
            f"The prompt holds token id {outside}, outside the model's vocabulary of {vocab_size}; the tokenizer does"
            " not belong to the model.",
        )
