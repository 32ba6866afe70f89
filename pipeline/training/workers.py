"""Several workers training one head: who they are, and sums over all of them. One worker without torch.distributed."""

import os

import torch
from torch import distributed


def rank() -> int:
    """Of this worker, from 0."""
    return distributed.get_rank() if _is_several() else 0


def local_rank() -> int:
    """Of this worker among those on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if _is_several() else 1


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all workers, which all get; the tensor is changed."""
    if _is_several():
        distributed.all_reduce(values)
    return values


def _is_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
