"""Several processes that hold one target together: each has its share of every layer's heads and columns.

transformers shards the weights and sums what the processes compute (tensor parallel; Shoeybi et al., arXiv 1909.08053).
One process, the leader, has the engine; the others, its followers, do to their share of the weights and of the KV pool
what it tells them, pass by pass. They are on one node.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed

from pipeline.errors import ModelError
from pipeline.packing import Runs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOST = "127.0.0.1"
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
_PATIENCE = timedelta(minutes=10)  # for processes to meet, and for one that computes
_IDLE = timedelta(days=365)  # a follower hears nothing while there is no work, and at once if the leader dies

_untyped: Any = distributed  # its types lack TCPStore


@dataclass(frozen=True, slots=True)
class Gather:
    """Gather the embedding and the output matrix, see `whole_matrices`."""


@dataclass(frozen=True, slots=True)
class Room:
    """Find the KV cache's shape, and its room within this share of the device, see `pipeline.assemble.kv_room`."""

    gpu_share: float


@dataclass(frozen=True, slots=True)
class Build:
    """Make a target with these arguments."""

    num_pages: int
    page_size: int
    num_slots: int
    is_static: bool | None


@dataclass(frozen=True, slots=True)
class Pass:
    """Run a pass."""

    runs: Runs


@dataclass(frozen=True, slots=True)
class Move:
    """Copy tokens within the cache: pool token indices, [n] int64 each."""

    source: np.ndarray
    target: np.ndarray


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more will come."""


Order = Gather | Room | Build | Pass | Move | End


def host_store() -> tuple[Any, int]:
    """Where the processes of a target meet, and its port; kept by the leader until all have."""
    store = _untyped.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
    return store, int(store.port)


def find_store(port: int) -> Any:
    """The same for a follower."""
    return _untyped.TCPStore(_HOST, port, is_master=False, timeout=_PATIENCE)


class Ranks:
    """This process among those of its target. There is one in a process at a time.

    Attributes:
        rank: 0 is the leader.
        size: how many processes there are.

    Args:
        store: where they meet; waits for all of them.
        device: `cpu` or `cuda`.

    Raises:
        RuntimeError: not all came.
    """

    def __init__(self, store: Any, rank: int, size: int, device: str) -> None:
        self.rank, self.size = rank, size
        distributed.init_process_group(_BACKENDS[device], store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        self._orders = distributed.new_group(backend="gloo", timeout=_IDLE)

    def tell(self, order: Order) -> None:
        """The leader's next step, of which the followers do their part while it does its own; others tell nothing."""
        if self.rank == 0:
            distributed.broadcast_object_list([order], src=0, group=self._orders)

    def hear(self) -> Order:
        """Waits for the leader's next step.

        Raises:
            RuntimeError: the leader is gone.
        """
        told: list[Any] = [None]
        distributed.broadcast_object_list(told, src=0, group=self._orders)
        order: Order = told[0]
        return order

    def least(self, value: int) -> int:
        """The least of all processes' values."""
        number = torch.tensor([value])
        distributed.all_reduce(number, distributed.ReduceOp.MIN, group=self._orders)
        return int(number[0])

    def leave(self) -> None:
        """Ends what connects the processes, after the leader's `End`. It waits for captured passes to be forgotten."""
        distributed.destroy_process_group()


def sharing_device() -> str:
    """The type of device on which transformers shares models: the one that this PyTorch was built for."""
    accelerator: Any = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else str(accelerator.type)


def check_shares(config: Any, size: int) -> None:
    """Whether a model's heads can be shared by so many processes.

    Args:
        config: of the text model.

    Raises:
        ModelError: they cannot; names how many can.
    """
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if kv_heads % size or heads % size:
        fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
        raise ModelError(
            f"The target's {heads} heads with {kv_heads} keys and values cannot be shared by {size} processes alike;"
            f" --tensor-parallel may be one of {fitting}."
        )


def whole_matrices(model: "PreTrainedModel") -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and output matrix of a model, [V, H] each; of one that is shared all processes must ask."""
    untyped: Any = model
    return _whole(untyped.get_input_embeddings().weight), _whole(untyped.get_output_embeddings().weight)


def _whole(weight: torch.Tensor) -> torch.Tensor:
    gather = getattr(weight, "full_tensor", None)  # of a DTensor
    whole: torch.Tensor = weight if gather is None else gather()
    return whole.detach()
