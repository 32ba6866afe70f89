"""What a follower does with its share of a target, see `pipeline.ranks`: each of the leader's steps in turn."""

from transformers import PreTrainedModel

from pipeline.assemble import kv_room
from pipeline.ranks import Build, End, Gather, Move, Pass, Ranks, Room, whole_matrices
from pipeline.target import Target


def follow(model: PreTrainedModel, ranks: Ranks) -> None:
    """Does its part of every pass until the leader leaves.

    Args:
        model: loaded as the leader's is.

    Raises:
        RuntimeError: the leader, or another follower, is gone.
    """
    target: Target | None = None
    while True:
        match ranks.hear():
            case Gather():
                whole_matrices(model)
            case Room(gpu_share):
                kv_room(model, gpu_share, ranks)
            case Build(num_pages, page_size, num_slots, is_static):
                target = Target(model, num_pages, page_size, num_slots, is_static=is_static, ranks=ranks)
            case Pass(runs):
                assert target is not None
                target.forward(runs)
            case Move(source, places):
                assert target is not None
                target.move(source, places)
            case End():
                return
