"""A follower as a process of its own, for `tests.pipeline.test_ranks`: python -m ... DIRECTORY RANK SIZE PORT."""

import sys

import torch

from pipeline.following import follow
from pipeline.models import load_causal_lm, resolve_model
from pipeline.ranks import Ranks, find_store


def main(directory: str, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(find_store(port), rank, size, "cpu")
    follow(load_causal_lm(resolve_model(directory), torch.float32, "cpu", num_ranks=size), ranks)
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
