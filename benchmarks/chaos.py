"""Every row exactly once, whatever dies: jobs on a cluster whose processes are killed at random and at every step.

    python -m benchmarks.chaos --kills 50 --seed 1 --output benchmarks/results/chaos.json

`rasd generate` is the real program, with a tiny model in fp32, two replicas on a Ray cluster of a head and three nodes
on this machine, and a retrieval service over a datastore and live outputs. SIGKILL ends the driver, a replica, the
retrieval actor or a node's raylet; driver and replicas before each of their durable steps, too. Beside the kills the
disk is filled, temporary files become garbage, committed files are damaged between runs, and the same job is started a
second time. After reruns all rows must equal those of an undisturbed run, statistics excepted. See `tests/jobs/chaos`.
"""

import argparse
import ctypes
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import report

_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_NUM_NODES = 3
_DISK_MEGABYTES = 64
_END_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, attack, print and write; 0 if everything was as it should be, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50, help="kills to do, of all kinds together")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed when")
    parser.add_argument("--shards", type=int, default=24, help="of each job, of 4 prompts with 2 samples")
    parser.add_argument("--minutes", type=float, default=40.0, help="nothing is killed any more after so long")
    parser.add_argument("--output", type=Path, help="JSON file for the results; printed in any case")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    # What loses its parent, as the workers of a killed raylet do, becomes a child of this process and is found again.
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rasd-chaos-") as directory:
        results = attack(Path(directory), options)
    results["processes_left"] = end_all()
    results["seconds"] = round(time.monotonic() - begin)
    print_table(results)
    report(results, options.output)
    is_good = not results["differences"] and not results["problems"] and not results["processes_left"]
    return 0 if is_good and results["num_kills"] >= options.kills else 1


def attack(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A whole campaign; what it found."""
    # Ray reads the environment that this sets when it is imported, as the next ones do.
    import tests.conftest  # noqa: F401
    from tests.jobs.chaos.campaign import Campaign
    from tests.jobs.chaos.debris import Disk
    from tests.jobs.chaos.nodes import Nodes
    from tests.jobs.chaos.steps import Steps
    from tests.jobs.chaos.work import make_work

    until = time.monotonic() + 60 * options.minutes
    work = make_work(directory, options.shards)
    os.environ.update(Steps.environment(directory))
    with Disk(directory / "outputs", _DISK_MEGABYTES) as disk, Nodes(_NUM_NODES) as nodes:
        outcome = Campaign(directory, work, nodes, disk, options.kills, options.seed, until).run()
    return {
        "seed": options.seed,
        "num_kills": outcome.num_kills,
        "struck": dict(sorted(outcome.struck.items())),
        "steps": dict(sorted(outcome.steps.items())),
        "corrupted_files": outcome.corrupted_files,
        "damaged_files": outcome.damaged,
        "is_disk_real": disk.is_real,
        "jobs": outcome.jobs,
        "runs": outcome.runs,
        "rows": outcome.rows,
        **outcome.differences,
        "differences": sum(outcome.differences.values()),
        "problems": outcome.problems,
    }


def end_all() -> int:
    """Kill whatever is left of the campaign's processes after a while; how many there were."""
    deadline = time.monotonic() + _END_SECONDS
    while (left := _alive()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        process.kill()
    return len(left)


def _alive() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def print_table(results: dict[str, Any]) -> None:
    """For people."""
    lines = [
        (kind if kind in ("disk full", "duplicate") else f"kill: {kind}", n) for kind, n in results["struck"].items()
    ]
    names = ("num_kills", "jobs", "runs", "rows", "missing", "doubled", "different", "processes_left", "seconds")
    lines += [(name.replace("_", " "), results[name]) for name in names]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    for problem in results["problems"]:
        print("problem:", problem)


if __name__ == "__main__":
    sys.exit(main())
