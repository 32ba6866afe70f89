"""How many replicas one driver keeps busy: the driver itself under virtual time, and beside it 16 real Ray actors.

    python -m benchmarks.scaling --plot benchmarks/results/scaling.png --output benchmarks/results/scaling.json

Reading, commit log, leases and part files are real; only the replicas' time is virtual. Charged to its clock are the
driver's own seconds, its waits for the disk included, and what Ray's calls take here. Shards take 30 to 120 s, skewed.
Utilisation is what replicas worked until the last shard was handed out, of what they could have from the first one's
start; `whole` goes on to the last commit, so that the replicas that wait for the slowest shard are in it.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.rows import InputRow, ReplicaInfo, ShardStats
from benchmarks.common import report
from benchmarks.driver_rows import write_prompts
from benchmarks.ray_costs import ray_costs
from benchmarks.timed_replica import SkewedSeconds, TimedReplica
from benchmarks.virtual_time import Costs, VirtualActor, VirtualTime
from jobs.cluster import connected
from jobs.commit import Commit, CommitLog
from jobs.config import GenerateConfig
from jobs.driver import Driver, DriverConfig
from jobs.inputs import open_inputs
from jobs.lease import Lease
from jobs.plan import make_plan
from jobs.runtime import RAY, Runtime
from jobs.shards import open_shards
from tests.fakes import FakeBackend, FakeReplica, Faults

_SEED = 7
_IN_FLIGHT = 2
_CONCURRENCY = _IN_FLIGHT + 2  # progress and stop are answered beside the shards
_NUM_REAL = 16
_REAL_SCALE = 1 / 30
_MOST_SHARDS = 3584
_ENTRIES = 12

Shards = Iterator[tuple[int, tuple[InputRow, ...]]]


@dataclass
class Course:
    """A watcher that notes when what happened."""

    runtime: Runtime
    ready: list[float] = field(default_factory=list)
    handed_out: list[float] = field(default_factory=list)
    committed_at: list[float] = field(default_factory=list)

    def started(self, info: ReplicaInfo) -> None:
        """See `jobs.driver.Watcher`."""
        self.ready.append(self.runtime.now())

    def progressed(self, stats: ShardStats) -> None:
        """See `jobs.driver.Watcher`."""

    def committed(self, commit: Commit) -> None:
        """See `jobs.driver.Watcher`."""
        self.committed_at.append(self.runtime.now())

    def should_stop(self) -> bool:
        """See `jobs.driver.Watcher`."""
        return False

    def noting(self, shards: Shards) -> Shards:
        """The shards as they come, each noted when it is taken."""
        for item in shards:
            self.handed_out.append(self.runtime.now())
            yield item


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 64, 512], help="numbers of replicas")
    parser.add_argument("--profiled", type=int, default=512, help="size at which it is profiled and saturated")
    parser.add_argument(
        "--faster", type=int, nargs="*", default=[16, 32], help="shorter shards, to find what it manages"
    )
    parser.add_argument("--shards-per-replica", type=int, default=10, help=f"at most; {_MOST_SHARDS} in all")
    parser.add_argument("--rows-per-shard", type=int, default=64)
    parser.add_argument("--no-real", action="store_true", help="leave the real actors out")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    rows = options.rows_per_shard
    results: dict[str, Any] = {"seed": _SEED, "rows_per_shard": rows, "in_flight": _IN_FLIGHT}
    with connected("local"):
        costs = ray_costs(rows)
        results["ray_costs"] = asdict(costs)
        if not options.no_real:
            shards, seconds = options.shards_per_replica * _NUM_REAL, SkewedSeconds(_SEED, _REAL_SCALE)
            results["real_actors"] = run_real(_NUM_REAL, shards, rows, seconds)
            results["same_in_virtual_time"] = run_virtual(_NUM_REAL, shards, rows, seconds, costs)
            results["real_to_virtual"] = {
                key: results["real_actors"][key] / results["same_in_virtual_time"][key]
                for key in ("utilisation", "seconds_until_last_handed_out", "makespan", "whole_utilisation")
            }
    results["sizes"] = [
        run_virtual(size, _num_shards(size, options), rows, SkewedSeconds(_SEED), costs) for size in options.sizes
    ]
    size = options.profiled
    results["saturation"] = [
        {"faster": faster, **run_virtual(size, 4 * size, rows, SkewedSeconds(_SEED, 1 / faster), costs)}
        for faster in options.faster
    ]
    profile = run_virtual(size, _num_shards(size, options) // 3, rows, SkewedSeconds(_SEED), costs, is_profiled=True)
    results["profile"] = {"replicas": size, "share_of_driver_by_function": profile["profile"]}
    report(results, options.output)
    if options.plot is not None:
        plot(results["sizes"], options.plot)


def _num_shards(size: int, options: argparse.Namespace) -> int:
    return max(3 * size, min(options.shards_per_replica * size, _MOST_SHARDS))


def run_virtual(
    size: int, num_shards: int, rows: int, seconds: SkewedSeconds, costs: Costs, *, is_profiled: bool = False
) -> dict[str, Any]:
    """The driver with `size` replicas under virtual time; figures of `measure`, and what it took of the driver."""
    clock = VirtualTime(time.perf_counter, costs)
    cpu = time.thread_time()

    def launch(replica: int, config: GenerateConfig) -> VirtualActor:
        plain = FakeReplica(config, replica, "float32", Faults())
        return VirtualActor(clock, plain, lambda task: seconds(task.shard))

    profile = cProfile.Profile(clock.driver_seconds) if is_profiled else None
    figures = measure(clock, launch, size, num_shards, rows, profile)
    figures |= {
        "driver_seconds": clock.busy,
        "of_these_ray": clock.calls,
        "driver_share": clock.busy / figures["makespan"],
        "events": clock.events,
        "events_per_driver_second": clock.events / clock.busy,
        "driver_ms_a_shard": 1000 * clock.busy / num_shards,
        "shards_per_second": num_shards / figures["makespan"],
        "process_cpu_seconds": time.thread_time() - cpu,
    }
    if profile is not None:
        figures["profile"] = _shares(profile)
    return figures


def run_real(size: int, num_shards: int, rows: int, seconds: SkewedSeconds) -> dict[str, Any]:
    """The same with real actors that sleep, in real time; their processes are there before, as virtual ones are."""
    lifted: Any = ray.remote(TimedReplica).options(num_cpus=0, max_concurrency=_CONCURRENCY)
    config = GenerateConfig(model="fake", prompts=("unused",), output="unused")
    actors = [lifted.remote(config, replica, "float32", seconds) for replica in range(size)]
    ray.get([actor.progress.remote() for actor in actors])
    return measure(RAY, lambda replica, _: actors[replica], size, num_shards, rows)


def measure(
    runtime: Runtime,
    launch: Callable[[int, GenerateConfig], Any],
    size: int,
    num_shards: int,
    rows: int,
    profile: cProfile.Profile | None = None,
) -> dict[str, Any]:
    """Runs the driver over inputs of its own; all of it is what `rasd generate` does but for the model."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as directory:
        prompts, output = Path(directory) / "prompts.jsonl", Path(directory) / "out"
        write_prompts(prompts, num_shards * rows)
        output.mkdir()
        config = GenerateConfig(model="fake", prompts=(str(prompts),), output=str(output), rows_per_shard=rows)
        inputs = open_inputs(config.prompts)
        plan = make_plan(config, inputs, FakeBackend().facts(config), None)
        course = Course(runtime)
        with Lease(output) as lease:
            log = CommitLog(output, lease)
            driver = Driver(
                shards=course.noting(open_shards(inputs, plan, log.open())),
                commits=log,
                launch=lambda replica: launch(replica, config),
                watcher=course,
                config=DriverConfig(size, _IN_FLIGHT, run=1, schema=plan.schema.serialize().to_pybytes()),
                runtime=runtime,
            )
            driver.run() if profile is None else profile.runcall(driver.run)
    if len(course.committed_at) != plan.num_shards:
        raise RuntimeError(f"{len(course.committed_at)} of {plan.num_shards} shards were committed.")
    begin, last, end = min(course.ready), course.handed_out[-1], course.committed_at[-1]
    spans = [(span["begin"], span["end"]) for span in driver.events]
    worked = sum(max(0.0, min(to, last) - at) for at, to in spans)
    return {
        "replicas": size,
        "shards": num_shards,
        "mean_shard_seconds": sum(to - at for at, to in spans) / len(spans),
        "seconds_until_last_handed_out": last - begin,
        "utilisation": worked / (size * (last - begin)),
        "makespan": end - begin,
        "whole_utilisation": sum(to - at for at, to in spans) / (size * (end - begin)),
    }


def _shares(profile: cProfile.Profile) -> dict[str, float]:
    """Share of the driver's seconds in each function of ours and below it, the largest first."""
    entries: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in entries.values())
    shares = {
        f"{Path(file).parent.name}/{Path(file).name}:{function}": round(below / total, 4)
        for (file, _, function), (_, _, _, below, _) in entries.items()
        if Path(file).parent.name in ("jobs", "actors", "benchmarks", "readers", "pipeline")
    }
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return dict([item for item in ranked if not item[0].endswith(":run")][:_ENTRIES])


def plot(sizes: Sequence[dict[str, Any]], path: Path) -> None:
    """Utilisation of the replicas, and of the driver, by the number of replicas."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    replicas = [size["replicas"] for size in sizes]
    for key, label in (
        ("utilisation", "replicas, until the last shard is handed out"),
        ("whole_utilisation", "replicas, until the last commit"),
        ("driver_share", "driver"),
    ):
        axes.plot(replicas, [size[key] for size in sizes], marker="o", label=label)
    axes.axhline(0.95, color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="replicas", ylabel="share of time at work", xscale="log", ylim=(0, 1.02))
    axes.set_xticks(replicas, [str(size) for size in replicas])
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
