"""From a model to an engine: how many slots there are, and what is timed where memory is short."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.assemble import EngineOptions, build_engine, measure_step_times
from pipeline.methods import METHODS
from pipeline.packing import Runs
from pipeline.target import Forward, Target, kv_shape
from tests.models import tiny_model
from tests.pipeline.test_engine_architectures import NoText


@pytest.mark.parametrize(("room", "slots"), [(64, 2), (900, 1), (2048, 4), (1 << 20, 9)])
def test_there_are_as_many_slots_as_kv_memory_has_room_for(room: int, slots: int) -> None:
    model: Any = tiny_model("llama")
    memory = room * kv_shape(model).bytes_per_token
    options = EngineOptions(num_slots=9, slot_tokens=500, kv_memory=memory)
    engine = build_engine(model, NoText(), METHODS["plain"], options)  # type: ignore[arg-type]
    assert engine.num_slots == slots


class Starved(Target):
    most_rows = 1 << 30

    def forward(self, runs: Runs) -> Forward:
        if runs.lengths.sum() > self.most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(runs)


def test_rows_that_memory_does_not_hold_are_not_timed() -> None:
    target = Starved(tiny_model("llama"), 64, 32)
    target.most_rows = 8
    times = measure_step_times(target, 4)
    assert np.all(np.diff(times(np.array([1, 8, 64, 256]))) >= 0), "the slope of what was timed goes on"
    target.most_rows = 0
    with pytest.raises(torch.OutOfMemoryError):
        measure_step_times(target, 4)
