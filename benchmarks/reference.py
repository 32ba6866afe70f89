"""What transformers' `generate` says, and whether our output may differ from it.

Two correct fp32 programs add the same numbers in different orders, so a choice between two logits closer than rounding
may fall either way. A difference counts unless it starts at such a place; then it is listed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline.noise import position_key
from pipeline.request import SamplingParams
from pipeline.sampling import ChoiceRow, perturbed_scores

MARGIN = 3e-4  # fp32 rounding moves logits by about 5e-5


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where two outputs part.

    Attributes:
        place: index of the first output token that differs.
        margin: difference of the two best scores there, by the reference model.
    """

    place: int
    margin: float

    @property
    def counts(self) -> bool:
        """Whether rounding cannot explain it."""
        return self.margin >= MARGIN


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt_ids: Sequence[int], max_new_tokens: int, **options: object) -> list[int]:
    """transformers' greedy output tokens for one prompt; `options` go to `generate`."""
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


@torch.inference_mode()
def first_mismatch(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    params: SamplingParams | None = None,
    seed: int = 0,
) -> Mismatch | None:
    """Where `got` leaves `expected`, and the margin of the choice there; None if they are equal.

    Args:
        model: an untouched model with transformers' own attention.
        params, seed: how the tokens were chosen; greedy if not given.
    """
    if list(expected) == list(got):
        return None
    place = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
    )
    known = [*prompt_ids, *expected[:place]]
    logits = model(input_ids=torch.tensor([known], device=model.device)).logits[:, -1]
    params = params or SamplingParams()
    seen = torch.tensor(known).numpy() if params.repetition_penalty != 1.0 else None
    scores = perturbed_scores(logits, [ChoiceRow(params, position_key(seed, len(known)), seen)])
    best = scores[0].topk(2).values
    return Mismatch(place, float(best[0] - best[1]))
