"""Functions over tensors at fixed places, captured once for each size as a CUDA graph and replayed.

A pass of a small model is a thousand kernels of microseconds, which take longer to launch than to run; a captured graph
is launched whole. Without CUDA the same functions run uncaptured.
"""

import bisect
import logging
import os
import shutil
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)
Outputs = TypeVar("Outputs")

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_WARM_UPS = 2  # calls before a capture: kernels compile and libraries allocate

log = logging.getLogger(__name__)


def pays(device: torch.device) -> bool:
    """Whether passes of fixed sizes are faster than those that fit exactly: where they can be captured."""
    return device.type == "cuda"


def has_compiler() -> bool:
    """Whether there is a C compiler, which Triton builds its launchers with."""
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def size_of(count: int) -> int:
    """The least of `SIZES` that holds so many, which are no more than the last."""
    return SIZES[bisect.bisect_left(SIZES, count)]


class Graphs(Generic[Key, Outputs]):
    """Replays of one function.

    Attributes:
        num_captures: of all functions in this process; what took a capture tells nothing about the passes to come.

    Args:
        function: launches work for a key and returns the tensors it will write; reads and writes fixed places alone and
            never waits for the device.
    """

    num_captures: ClassVar[int] = 0

    def __init__(self, function: Callable[[Key], Outputs], device: torch.device) -> None:
        self._function = function
        self._is_cuda = device.type == "cuda"
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._broken: set[Key] = set()

    def __call__(self, key: Key) -> Outputs | None:
        """What the function returns; valid until the next call. None if it cannot be captured."""
        if not self._is_cuda:
            return self._function(key)
        if key not in self._graphs and key not in self._broken:
            self._capture(key)
        if key in self._broken:
            return None
        graph, outputs = self._graphs[key]
        graph.replay()
        return outputs

    def _capture(self, key: Key) -> None:
        Graphs.num_captures += 1
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._function(key)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = (
            next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        )  # one for all: none outlives a call
        try:
            with torch.cuda.graph(graph, pool=pool):
                outputs = self._function(key)
        except torch.OutOfMemoryError:
            raise  # for whoever can do with less
        except RuntimeError as error:
            log.warning("passes cannot be captured as CUDA graphs and will be slower: %s", error)
            self._broken.add(key)
            return
        self._graphs[key] = graph, outputs


class Staged:
    """A tensor at a fixed place on the device, and where its next content is made.

    Attributes:
        device: the tensor.
        host: its next content.
    """

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.device = torch.zeros(size, dtype=dtype, device=device)
        self._staging = torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")
        self.host: np.ndarray = self._staging.numpy()

    def send(self, count: int | None = None) -> None:
        """Copies the first `count` entries, all if None. The caller waits for the device before it changes them."""
        self.device[:count].copy_(self._staging[:count], non_blocking=True)


class Fence:
    """Between what the host changes and what was launched to read it; no more than a pair of calls without CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the device has read what was launched before the last `set`."""
        if self._event is not None:
            self._event.synchronize()

    def set(self) -> None:
        """What reads has been launched."""
        if self._event is not None:
            self._event.record()
