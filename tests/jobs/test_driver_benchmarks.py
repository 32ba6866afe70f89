"""The benchmarks of the driver at a small size: what they report is there, and follows from what happened."""

import json
from pathlib import Path

import pytest
import ray

from benchmarks import scaling
from benchmarks.driver_rows import measured, write_prompts
from benchmarks.ray_costs import ray_costs
from benchmarks.timed_replica import SkewedSeconds
from benchmarks.virtual_time import Costs
from jobs.config import GenerateConfig


def test_the_driver_keeps_replicas_of_a_minute_a_shard_busy() -> None:
    figures = scaling.run_virtual(4, 24, 8, SkewedSeconds(1), Costs(submit=0.001))
    assert figures["shards"] == 24
    assert 0.95 < figures["utilisation"] <= 1
    assert figures["whole_utilisation"] < figures["utilisation"], "at the end some wait for the slowest"
    assert 0 < figures["of_these_ray"] < figures["driver_seconds"] < figures["makespan"]
    ideal = 24 * figures["mean_shard_seconds"] / 4
    assert figures["makespan"] * figures["whole_utilisation"] == pytest.approx(ideal)


def test_shards_shorter_than_the_driver_needs_leave_replicas_idle() -> None:
    """The driver's seconds are on the clock: here a call takes it as long as two replicas need for their shards."""
    figures = scaling.run_virtual(8, 64, 8, SkewedSeconds(1, scale=0.01), Costs(submit=0.1))
    assert figures["utilisation"] < 0.7
    assert figures["driver_share"] > 0.9


def test_the_profile_names_the_drivers_functions_and_none_of_the_replicas() -> None:
    shares = scaling.run_virtual(2, 8, 64, SkewedSeconds(1), Costs(), is_profiled=True)["profile"]
    assert "jobs/shards.py:open_shards" in shares
    assert not any("parts.py" in name or "fakes.py" in name for name in shares)


def test_a_plot_is_made(tmp_path: Path) -> None:
    sizes = [{"replicas": n, "utilisation": 1.0, "whole_utilisation": 0.9, "driver_share": 0.01 * n} for n in (1, 8)]
    scaling.plot(sizes, tmp_path / "plots" / "scaling.png")
    assert (tmp_path / "plots" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_rays_calls_are_measured(cluster: str) -> None:
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        costs = ray_costs(num_rows=8)
    finally:
        ray.shutdown()
    assert costs.get > 0
    assert costs.submit > 0
    assert costs.wait + 100 * costs.wait_future > 0


def test_a_run_tells_what_it_took(tmp_path: Path, cluster: str) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 96)
    line = (tmp_path / "prompts.jsonl").read_text().splitlines()[5]
    assert set(json.loads(line)) == {"id", "prompt", "topic", "score"}
    notes = tmp_path / "notes"
    notes.mkdir()
    config = GenerateConfig(
        model="fake",
        prompts=(str(tmp_path / "prompts.jsonl"),),
        output=str(tmp_path / "out"),
        num_replicas=2,
        quiet=True,
        ray_address=cluster,
    )
    figures = measured(config, 0.0, notes, began=0.0)
    assert len(list((tmp_path / "out" / "_commits").iterdir())) == 12
    assert figures["driver_cpu_seconds"] > 0
    assert 0 < figures["peak_mb_until_10%"] <= figures["peak_mb_until_100%"]
    stamps = [figures[f"seconds_until_{name}"] for name in ("inputs_found", "planned_and_ray_started", "first_shard")]
    assert stamps == sorted(stamps)
    assert stamps[-1] < figures["seconds"]
