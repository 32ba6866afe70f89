"""When an output ends: end-of-sequence tokens, stop tokens, stop strings and the length limit, checked token by
token."""

from collections.abc import Collection
from typing import Protocol

import numpy as np

from pipeline.request import FinishReason, SamplingParams

_LOOK_BACK = 8  # tokens decoded before the new one, so that multi-token characters and word-start spaces come out right


class Decoder(Protocol):
    """The part of a transformers tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str | list[str]: ...


class StopCheck:
    """Decides after every output token whether the output is finished.

    Stop strings are looked for in the decoded text, special tokens left out; a stop string may span any number of
    tokens.

    Attributes:
        has_own: whether more can end the output than an end-of-sequence token and its length.
    """

    def __init__(self, params: SamplingParams, max_new_tokens: int, eos_ids: Collection[int], decoder: Decoder) -> None:
        self._params = params
        self.max_new_tokens = max_new_tokens
        self._stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
        self.has_own = bool(params.stop_token_ids or params.stop)
        self._decoder = decoder
        self._longest_stop = max((len(stop.encode()) for stop in params.stop), default=0)  # a token is at least a byte

    def __call__(self, output: np.ndarray, num_new: int = 1) -> tuple[int, FinishReason | None]:
        """How many of the newest tokens belong to the output, and why it ends behind them; None if it does not.

        Args:
            output: [n] int32 token ids, the newest last; those before the newest `num_new` did not end it.
        """
        before = len(output) - num_new
        for count, token in enumerate(output[before:].tolist(), 1):
            if token in self._stop_ids:
                return count, "stop"
            if self._params.stop and self._ends_in_stop_string(output[: before + count]):
                return count, "stop"
            if before + count >= self.max_new_tokens:
                return count, "length"
        return num_new, None

    def text(self, output: np.ndarray) -> str:
        """The output's text, cut before the first stop string."""
        text = self._decode(output)
        cuts = [at for stop in self._params.stop if (at := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    def _ends_in_stop_string(self, output: np.ndarray) -> bool:
        size = self._longest_stop + _LOOK_BACK
        window = output[-size:]
        tail = self._decode(window)
        while len(window) < len(output) and len(tail.encode()) < self._longest_stop:  # special tokens have no text
            size *= 2
            window = output[-size:]
            tail = self._decode(window)
        if not any(stop in tail for stop in self._params.stop):
            return False
        text = tail if len(window) == len(output) else self._decode(output)
        return any(stop in text for stop in self._params.stop)

    def _decode(self, token_ids: np.ndarray) -> str:
        text = self._decoder.decode(token_ids.tolist(), skip_special_tokens=True)
        assert isinstance(text, str)
        return text
