"""Where segments are made: tasks divide a cluster, lost ones are tried again, and failed ones are not."""

from pathlib import Path

import pytest
import ray

from jobs.segments.pool import Order, RayPool, Room, find_room
from pipeline.errors import ConfigError, DatastoreError, JobError
from tests.jobs.dying import die, fail


@pytest.mark.parametrize(
    ("nodes", "threads", "wants_gpus", "room"),
    [
        ([{"CPU": 2.0}], "auto", False, Room(1, 2, 0)),
        ([{"CPU": 32.0}], "auto", False, Room(4, 8, 0)),
        ([{"CPU": 32.0}, {"CPU": 4.0}, {"GPU": 1.0}], "auto", False, Room(9, 4, 0)),
        ([{"CPU": 32.0, "GPU": 2.0}], 4, True, Room(2, 4, 1)),
        ([{"CPU": 32.0, "GPU": 2.0}], 4, False, Room(8, 4, 0)),
        ([{"CPU": 8.0}], 4, True, Room(2, 4, 0)),
    ],
)
def test_tasks_divide_the_cluster(
    nodes: list[dict[str, float]], threads: int | str, wants_gpus: bool, room: Room
) -> None:
    assert find_room(nodes, threads, wants_gpus=wants_gpus) == room


def test_a_cluster_without_the_threads_asked_for_is_an_error() -> None:
    with pytest.raises(ConfigError, match="--num-threads is 9; it must be at most 8"):
        find_room([{"CPU": 8.0}, {"CPU": 4.0}], 9, wants_gpus=False)
    with pytest.raises(ConfigError, match="no CPUs"):
        find_room([{"GPU": 8.0}], "auto", wants_gpus=False)


@pytest.mark.chaos
def test_lost_tasks_are_tried_again_and_failed_ones_are_not(cluster: str, tmp_path: Path) -> None:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        for deaths in (2, 3):
            (tmp_path / str(deaths)).mkdir()
            pool = RayPool(Room(1, 1, 0))
            pool.submit(Order("s", die, (str(tmp_path / str(deaths)), deaths), "/w/s"))
            if deaths == 2:
                assert drained(pool) == ["s"]
            else:
                with pytest.raises(JobError, match="the segment s could not be made: 3 workers were lost with it"):
                    drained(pool)
        pool.submit(Order("t", fail, (), "/w/t"))
        with pytest.raises(DatastoreError, match=r"^no space for /w/t$"):
            drained(pool)
    finally:
        ray.shutdown()


def drained(pool: RayPool) -> list[str]:
    names: list[str] = []
    while pool.pending:
        names += [order.name for order, _ in pool.done()]
    return names
