"""Replicas get the places that were planned, keep them, and give everything back however the job ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from jobs.backend import Launch, Retrieving
from jobs.cluster import place
from jobs.config import GenerateConfig
from jobs.generation import generate
from jobs.places import Places
from pipeline.errors import ModelError
from tests.fake_rasd import parse
from tests.fakes import FakeBackend, Faults

ROOT = Path(__file__).parents[2]


class Probe:
    """An actor that says where it is."""

    def place(self) -> dict[str, Any]:
        context = ray.get_runtime_context()
        return {
            "node": context.get_node_id(),
            "pid": os.getpid(),
            "resources": context.get_assigned_resources(),
            "gpus": context.get_accelerator_ids()["GPU"],
            "group": context.get_placement_group_id(),
        }


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[str]:
    """Two nodes with 4 CPUs and 2 GPUs each, as far as Ray knows."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=4, num_gpus=2)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def nodes(gpu_cluster: str) -> Iterator[list[dict[str, float]]]:
    ray.init(address=gpu_cluster, log_to_driver=False, logging_level="ERROR")
    yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    ray.shutdown()


def launch(config: GenerateConfig, places: Places, replica: int) -> Any:
    order = Launch(
        config, places.placement, Retrieving("plain", frozenset()), None, {}, replica, 1, places.group(replica)
    )
    return order.actor(Probe)


@pytest.mark.parametrize(
    ("options", "num_replicas", "gpus_each"),
    [
        ({}, 4, 1.0),
        ({"gpus_per_replica": 2.0}, 2, 2.0),
        ({"gpus_per_replica": 0.5, "num_replicas": 3}, 3, 0.5),
        ({"device": "cpu", "num_replicas": 2}, 2, 0.0),
        ({"tensor_parallel": 2}, 2, 1.0),
        ({"tensor_parallel": 2, "gpus_per_replica": 2.0, "num_replicas": 1}, 1, 1.0),
        ({"tensor_parallel": 3, "device": "cpu", "num_replicas": 1}, 1, 0.0),
    ],
)
def test_each_replica_has_a_group_with_what_it_reserves(
    nodes: list[dict[str, float]], options: dict[str, Any], num_replicas: int, gpus_each: float
) -> None:
    config = GenerateConfig(model="m", prompts=("p",), output="o", **options)
    with Places(place(config, nodes)) as places:
        assert places.placement.num_replicas == num_replicas
        actors = [launch(config, places, replica) for replica in range(num_replicas)]
        found = ray.get([actor.place.remote() for actor in actors], timeout=100)
        groups = {info["group"]: placement_group_table(places.group(i)) for i, info in enumerate(found)}
        assert len(groups) == num_replicas
        for group in groups.values():
            assert (group["strategy"], group["state"]) == ("STRICT_PACK", "CREATED")
            assert len(group["bundles"]) == config.tensor_parallel
            assert all(bundle.get("GPU", 0.0) == gpus_each for bundle in group["bundles"].values())
        for info in found:
            assert info["resources"].get("GPU", 0.0) == gpus_each
            assert info["resources"]["CPU"] == places.placement.num_cpus
            assert len(info["gpus"]) == (max(1, int(gpus_each)) if gpus_each else 0)
        used: dict[tuple[str, str], float] = {}
        for info in found:
            for gpu in info["gpus"]:
                used[info["node"], gpu] = used.get((info["node"], gpu), 0.0) + min(1.0, gpus_each)
        assert all(share <= 1.0 for share in used.values())
        for actor in actors:
            ray.kill(actor)
    wait_until_all_is_back()


@pytest.mark.chaos
def test_a_place_is_kept_while_its_actor_is_dead(nodes: list[dict[str, float]]) -> None:
    config = GenerateConfig(model="m", prompts=("p",), output="o", gpus_per_replica=2.0)
    with Places(place(config, nodes)) as places:
        before = ray.get(launch(config, places, 0).place.remote(), timeout=100)
        os.kill(before["pid"], signal.SIGKILL)
        # All that is left goes to somebody else; the dead actor's place does not.
        others = [ray.remote(Probe).options(num_gpus=2).remote() for _ in range(2)]  # type: ignore[attr-defined]
        ready, waiting = ray.wait([other.place.remote() for other in others], num_returns=1, timeout=100)
        assert ray.get(ready[0])["node"] != before["node"]
        after = ray.get(launch(config, places, 0).place.remote(), timeout=100)
        assert (after["node"], after["group"]) == (before["node"], before["group"])
        assert after["pid"] != before["pid"]
        assert ray.wait(waiting, timeout=0)[1] == waiting
        for other in others:
            ray.kill(other)
    wait_until_all_is_back()


def wait_until_all_is_back() -> None:
    """Every resource is free again, and no group is left."""
    deadline = time.monotonic() + 60
    while True:
        kinds = {kind for kind in ray.cluster_resources() if kind in {"CPU", "GPU"}}
        lacking = {kind for kind in kinds if ray.available_resources().get(kind) != ray.cluster_resources()[kind]}
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if kinds and not lacking and not groups:
            return
        assert time.monotonic() < deadline, (lacking, groups)
        time.sleep(0.1)


@pytest.fixture
def words(tmp_path: Path, cluster: str) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(40)))
    options = ["--model", "m", "--prompts", str(prompts), "--output", str(tmp_path / "out"), "--num-replicas", "2"]
    return [*options, "--quiet", "--ray-address", cluster]


def check_resources(cluster: str) -> None:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        wait_until_all_is_back()
    finally:
        ray.shutdown()


@contextlib.contextmanager
def checking_groups_at_the_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every group of the driver is gone when it leaves the cluster: from then on Ray itself removes what is left."""
    states: list[list[str]] = []
    shutdown = ray.shutdown

    def checked() -> None:
        deadline = time.monotonic() + 20
        states.append([""])
        while set(states[-1]) - {"REMOVED"} and time.monotonic() < deadline:
            states.append([group["state"] for group in placement_group_table().values()])
            time.sleep(0.05)
        shutdown()

    with monkeypatch.context() as patch:
        patch.setattr(ray, "shutdown", checked)
        yield
    assert states and set(states[-1]) <= {"REMOVED"}


def test_a_job_that_ends_gives_all_resources_back(
    words: list[str], cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checking_groups_at_the_end(monkeypatch):
        assert generate(parse(words), FakeBackend()) == 0
    check_resources(cluster)


def test_a_job_that_fails_gives_all_resources_back(
    words: list[str], cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checking_groups_at_the_end(monkeypatch), pytest.raises(ModelError, match="no weights"):
        generate(parse(words), FakeBackend(Faults(start_error="no weights")))
    check_resources(cluster)


@pytest.mark.chaos
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_job_that_is_stopped_gives_all_resources_back(
    tmp_path: Path, words: list[str], cluster: str, number: signal.Signals, code: int
) -> None:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        # Half a minute's work, of which the first shard takes a second.
        (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(2000)))
        command = [sys.executable, "-m", "tests.fake_rasd", "0.2", *words, "--rows-per-shard", "4"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while not list((tmp_path / "out").glob("_commits/*.json")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            states = [group["state"] for group in placement_group_table().values()]
            assert states.count("CREATED") == 2
            process.send_signal(number)
        assert process.returncode == code
        wait_until_all_is_back()
    finally:
        ray.shutdown()
