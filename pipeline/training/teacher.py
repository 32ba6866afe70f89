"""A target that says what a head should learn of sequences."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pipeline.errors import ModelError
from pipeline.features import FeatureTap
from pipeline.head import DraftHead
from pipeline.training.data import Example, padded, span
from pipeline.training.lessons import NUM_TOP, Lesson, LessonCache
from pipeline.training.unrolled import Batch

_ROWS, _ROWS_ON_CPU = 2048, 256  # whose scores of the whole vocabulary are held in fp32 at once


class Teacher:
    """Makes batches.

    Args:
        model: the target.
        head: whose depths and vocabulary count.
        length: most tokens of a sequence.
        cache: of what the target said before.

    Raises:
        ModelError: the head's vocabulary is too small.
    """

    def __init__(self, model: PreTrainedModel, head: DraftHead, length: int, cache: LessonCache | None = None) -> None:
        if len(head.token_ids) < NUM_TOP:
            raise ModelError(f"The head proposes {len(head.token_ids)} tokens; training takes at least {NUM_TOP}.")
        self._model = model
        self._length = length
        self._cache = cache
        self._tap = FeatureTap(model, head.config.depths)
        self._token_ids = head.token_ids
        self._draft_id = torch.full((head.config.vocab_size,), -1, dtype=torch.int32, device=head.token_ids.device)
        self._draft_id[head.token_ids] = torch.arange(len(head.token_ids), device=head.token_ids.device).int()

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Sequences with what the target says of them; one forward pass for those that are not in the cache."""
        if self._cache is None:
            return self._asked(examples)
        lessons = [self._cache.get(example) for example in examples]
        missing = [number for number, lesson in enumerate(lessons) if lesson is None]
        if missing:
            for number, lesson in zip(missing, self._lessons([examples[n] for n in missing]), strict=True):
                lessons[number] = lesson
                self._cache.put(examples[number], lesson)
        return self._joined(examples, [lesson for lesson in lessons if lesson is not None])

    def _asked(self, examples: Sequence[Example]) -> Batch:
        """Without leaving the device."""
        token_ids, places = (tensor.to(self._model.device) for tensor in padded(examples, self._length))
        states, ids, probabilities, best = self._says(token_ids, places)
        lengths = torch.tensor([span(example, self._length)[0] for example in examples])
        width = token_ids.shape[1]
        padding = (width - lengths).to(self._model.device)
        place = torch.arange(width, device=self._model.device) - padding[:, None]  # shorter sequences to the end
        token_ids = token_ids.gather(1, place % width)
        states = states.gather(1, (place % width)[..., None].expand_as(states))
        states = torch.where((place >= 0)[..., None], states, 0.0)
        places = torch.stack([places[:, 0], places[:, 1] + padding[places[:, 0]]], dim=1)
        return Batch(token_ids, padding, states, places, ids.long(), probabilities.float(), best.long())

    @torch.no_grad()
    def _says(self, token_ids: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """States of all tokens, padding's too; then likeliest draft tokens, probabilities and choice at the places."""
        first = int(places[:, 1].min())  # the output matrix is wide: prompts that all share are left out
        logits = self._model(input_ids=token_ids, use_cache=False, logits_to_keep=token_ids.shape[1] - first).logits
        states = self._tap.take()
        ids, probabilities, best = [], [], []
        at_once = _ROWS_ON_CPU if token_ids.device.type == "cpu" else _ROWS
        for begin in range(0, len(places), at_once):
            row, place = places[begin : begin + at_once].unbind(1)
            scores = logits[row, place - first].float()
            top = scores[:, self._token_ids].topk(NUM_TOP, dim=-1)
            ids.append(top.indices.int())
            probabilities.append((top.values - scores.logsumexp(-1, keepdim=True)).exp().half())
            best.append(self._draft_id[scores.argmax(-1)])
        return states, torch.cat(ids), torch.cat(probabilities), torch.cat(best)

    def _lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        token_ids, places = (tensor.to(self._model.device) for tensor in padded(examples, self._length))
        states, *said = self._says(token_ids, places)
        spans = [span(example, self._length) for example in examples]
        counts = [kept - begin for kept, begin in spans]
        taught = (torch.split(part, counts) for part in said)
        kept_states = [states[row, :kept] for row, (kept, _) in enumerate(spans)]
        return [Lesson(*(part.cpu() for part in parts)) for parts in zip(kept_states, *taught, strict=True)]

    def _joined(self, examples: Sequence[Example], lessons: Sequence[Lesson]) -> Batch:
        device = self._model.device
        lengths = torch.tensor([len(lesson.states) for lesson in lessons])
        width = int(lengths.max())
        padding = width - lengths
        token_ids, places = padded(examples, self._length)
        token_ids = torch.stack([row.roll(int(shift)) for row, shift in zip(token_ids, padding, strict=True)])
        places[:, 1] += padding[places[:, 0]]
        states = torch.zeros(len(lessons), width, lessons[0].states.shape[1], dtype=lessons[0].states.dtype)
        for row, lesson in enumerate(lessons):
            states[row, width - len(lesson.states) :] = lesson.states
        ids, probabilities, best = (
            torch.cat([getattr(lesson, name) for lesson in lessons]).to(device)
            for name in ("ids", "probabilities", "best")
        )
        return Batch(
            token_ids.to(device),
            padding.to(device),
            states.to(device),
            places.to(device),
            ids.long(),
            probabilities.float(),
            best.long(),
        )
