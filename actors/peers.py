"""transformers' `generate` as a contestant: the same model, weights, prompts and clock.

hf-generate       greedy or sampled decoding, in static left-padded batches of as many prompts as there are slots
hf-prompt-lookup  its prompt lookup decoding, one prompt at a time
hf-assisted       its assisted decoding with `--draft`, a whole model, one prompt at a time
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.assemble import eos_token_ids
from pipeline.provenance import Counts, TrailToken
from pipeline.request import Generation, Request

PEERS = ("hf-generate", "hf-prompt-lookup", "hf-assisted")
ONE_SLOT = ("hf-prompt-lookup", "hf-assisted")  # transformers has them for single prompts only
_LOOKUP_TOKENS = 10


class Peer:
    """One of `PEERS`; see `actors.contest.Contestant`.

    Args:
        model: untouched, with transformers' own attention.
        draft: of hf-assisted.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: int,
        draft: PreTrainedModel | None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._slots = slots
        self._ends = eos_token_ids(model, tokenizer)
        self._passes = 0
        self._options: dict[str, Any] = {}
        if name == "hf-prompt-lookup":
            self._options = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
        elif name == "hf-assisted":
            assert draft is not None
            self._options = {"assistant_model": draft}

    def run(
        self,
        requests: Sequence[Request],
        follow: Callable[[Generation], Request | None],
        questions: Mapping[int, str],
    ) -> list[Generation]:
        """See `Contestant.run`; requests that follow wait for the last of their batch."""
        done: list[Generation] = []
        waiting = list(requests)
        while waiting:
            batch, waiting = waiting[: self._slots], waiting[self._slots :]
            finished = self._batch(batch)
            done += finished
            waiting += [r for generation in finished if (r := follow(generation)) is not None]
        return done

    def report(self, generation: Generation) -> tuple[Counts, tuple[TrailToken, ...]]:
        """Nothing: it does not tell who proposed what."""
        return Counts(), ()

    def follow(self, request_id: int) -> None:
        """Cannot be followed."""

    def clock(self) -> tuple[int, dict[str, float]]:
        """Its passes; it has no phases."""
        return self._passes, {}

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request]) -> list[Generation]:
        params = requests[0].params
        width = max(len(request.prompt_ids) for request in requests)
        pads = [width - len(request.prompt_ids) for request in requests]
        pad = self._ends[0] if self._ends else 0
        device = self._model.device
        ids = [[pad] * n + list(r.prompt_ids) for n, r in zip(pads, requests, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in pads]
        # What a checkpoint's own generation config asks for beyond that is not what the methods do.
        sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
        if not params.is_greedy:
            torch.manual_seed(requests[0].seed % (1 << 63))
            sampling |= {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        hook = self._model.register_forward_pre_hook(count)
        try:
            output = self._model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=params.max_new_tokens,
                pad_token_id=pad,
                **sampling,
                **self._options,
            )
        finally:
            hook.remove()
        self._passes += passes
        rows = output[:, width:].tolist()
        return [self._generation(request, row, passes - 1) for request, row in zip(requests, rows, strict=True)]

    def _generation(self, request: Request, row: list[int], passes: int) -> Generation:
        end = next((i + 1 for i, token in enumerate(row) if token in self._ends), None)
        token_ids = tuple(row[:end])
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return Generation(
            request_id=request.request_id,
            token_ids=token_ids,
            text=text,
            finish_reason="length" if end is None else "stop",
            num_prompt_tokens=len(request.prompt_ids),
            rounds=min(passes, len(token_ids) - 1),  # a row that ended before its batch took no part in the others
            drafted=0,
            accepted=len(token_ids) - 1 - min(passes, len(token_ids) - 1),
        )
