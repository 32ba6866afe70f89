"""What a target has to say of each sequence, kept on disk so that later epochs need no forward pass of it.

States take 6 H bytes a token in 16 bits, so a cache has a bound; sequences beyond it are computed every time. Workers
on one machine share it through the page cache; each machine has its own.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.training.data import Example, span

NUM_TOP = 64  # likeliest draft tokens whose probabilities are kept; the rest of the mass is not learned


@dataclass(frozen=True, slots=True)
class Lesson:
    """One sequence of L kept tokens, of which the last n + 1 hold the places that are learned.

    Attributes:
        states: [L, 3 H] hidden states of the target.
        ids: [n, NUM_TOP] int32 likeliest draft tokens; probabilities: [n, NUM_TOP] float16, the target's.
        best: [n] int32 draft token that is the target's choice; -1 if that is no draft token.
    """

    states: torch.Tensor
    ids: torch.Tensor
    probabilities: torch.Tensor
    best: torch.Tensor


class LessonCache:
    """Lessons by example.

    Args:
        directory: for its files, on a disk of this machine.
        examples: those that may be asked for, told apart by identity.
        length: most tokens of a sequence.
        width: 3 H.
        dtype: of states; 16 bits.
        limit: most bytes on disk; the first examples that fit are kept.
        is_new: whether to make the files anew; another worker has done so otherwise.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(
        self,
        directory: Path,
        examples: Sequence[Example],
        length: int,
        width: int,
        dtype: torch.dtype,
        limit: int,
        is_new: bool = True,
    ) -> None:
        spans = [span(example, length) for example in examples]
        tokens = np.cumsum([0, *(kept for kept, _ in spans)])
        places = np.cumsum([0, *(kept - first for kept, first in spans)])
        size = tokens * width * dtype.itemsize + places * (NUM_TOP * 6 + 4)
        num_kept = int(np.searchsorted(size, limit, side="right")) - 1
        self._dtype = dtype
        self._begins = {
            id(example): (i, int(tokens[i]), int(places[i])) for i, example in enumerate(examples[:num_kept])
        }
        self._spans = spans
        num_tokens, num_places = int(tokens[num_kept]), int(places[num_kept])
        directory.mkdir(parents=True, exist_ok=True)

        def array(name: str, kind: type[np.generic], *shape: int) -> np.ndarray:
            if num_kept == 0:
                return np.empty((0, *shape[1:]), kind)
            path = directory / name
            if is_new:
                path.unlink(missing_ok=True)
                with path.open("wb") as file:  # a page that finds no room later would kill the process
                    os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * np.dtype(kind).itemsize)
            return np.memmap(path, kind, "r+", shape=shape)

        self._arrays = {
            "states": array("states", np.uint16, num_tokens, width),
            "ids": array("ids", np.int32, num_places, NUM_TOP),
            "probabilities": array("probabilities", np.float16, num_places, NUM_TOP),
            "best": array("best", np.int32, num_places),
            "done": array("done", np.bool_, num_kept),
        }

    def get(self, example: Example) -> Lesson | None:
        """The lesson of an example, if it is here."""
        place = self._begins.get(id(example))
        if place is None or not self._arrays["done"][place[0]]:
            return None
        states, ids, probabilities, best = (torch.from_numpy(np.array(part)) for part in self._parts(*place))
        return Lesson(states.view(self._dtype), ids, probabilities, best)

    def put(self, example: Example, lesson: Lesson) -> None:
        """Keeps a lesson if there is room for it."""
        place = self._begins.get(id(example))
        if place is None:
            return
        states = lesson.states.view(torch.uint16)
        for kept, value in zip(
            self._parts(*place), (states, lesson.ids, lesson.probabilities, lesson.best), strict=True
        ):
            kept[:] = value.numpy()
        self._arrays["done"][place[0]] = True

    def _parts(self, number: int, token: int, place: int) -> tuple[np.ndarray, ...]:
        kept, first = self._spans[number]
        arrays = (self._arrays[name][place : place + kept - first] for name in ("ids", "probabilities", "best"))
        return (self._arrays["states"][token : token + kept], *arrays)
