"""What a job exports is read back from Ray's own metrics endpoint, and is what its report says."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.metrics import JOB_METRICS, REPLICA_METRICS, JobMetrics, ReplicaMetrics
from actors.rows import ShardStats

ROOT = Path(__file__).parents[2]
SPECS = {series: spec for spec in (*REPLICA_METRICS, *JOB_METRICS) for series in spec.series}
_SAMPLE = re.compile(r"(ray_rasd_\w+)\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Sample = tuple[str, Mapping[str, str], float]


@pytest.fixture(scope="module")
def endpoint(cluster: str) -> str:
    """Address of the node's metrics agent."""
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    (node,) = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    ray.shutdown()
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def samples_of(endpoint: str, output: Path) -> list[Sample]:
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        text = answer.read().decode()
    found = [(name, dict(_LABEL.findall(labels)), float(value)) for name, labels, value in _SAMPLE.findall(text)]
    return [sample for sample in found if sample[1].get("rasd_job") == str(output)]


def total(samples: list[Sample], name: str, **labels: str) -> float:
    return sum(value for found, its, value in samples if found == name and labels.items() <= its.items())


class Scrapes:
    """A job's series as Prometheus has them: the last sample of each, also of what has ended since."""

    def __init__(self, endpoint: str, output: Path) -> None:
        self._endpoint, self._output = endpoint, output
        self._last: dict[tuple[str, frozenset[tuple[str, str]]], Sample] = {}

    def take(self) -> list[Sample]:
        """Scrape once."""
        for sample in samples_of(self._endpoint, self._output):
            self._last[sample[0], frozenset(sample[1].items())] = sample
        return list(self._last.values())

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Scrape all the time: a gauge is there for two seconds after its process has ended."""
        has_ended = threading.Event()

        def repeat() -> None:
            while not has_ended.wait(0.5):
                with suppress(OSError):  # a scrape that timed out
                    self.take()

        with ThreadPoolExecutor(1) as pool:
            scraping = pool.submit(repeat)
            try:
                yield
            finally:
                has_ended.set()
        scraping.result()

    def wait_for(self, is_there: Callable[[list[Sample]], bool]) -> list[Sample]:
        """The samples once that holds; agents get them every second."""
        deadline = time.monotonic() + 60
        while not is_there(samples := self.take()):
            assert time.monotonic() < deadline, samples
            time.sleep(0.2)
        return samples


def test_a_jobs_metrics_are_its_reports_figures(tmp_path: Path, cluster: str, endpoint: str) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [json.dumps({"prompt": f"Write about {subject}. It is"}) for subject in ("tea", "snow", "bread", "chess")]
    prompts.write_text("\n".join([*rows, "{broken", '{"prompt": ""}', "{broken"]) + "\n")
    words = ["--model", "smollm2-135m", "--prompts", str(prompts), "--output", str(output), "--max-context", "256"]
    words += ["--max-new-tokens", "24", "--rows-per-shard", "2", "--slots", "2", "--budget", "8", "--num-replicas", "1"]
    words += ["--method", "rasd", "--retrieval", "shared", "--quiet", "--ray-address", cluster]
    command = [sys.executable, "-m", "jobs.cli", "generate", *words, "--log-format", "json"]
    scrapes = Scrapes(endpoint, output)
    with scrapes.repeated():
        done = subprocess.run(command, cwd=ROOT, check=True, timeout=250, capture_output=True, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["accepted"] > 0

    samples = scrapes.wait_for(lambda found: have_all_told(found, report["rows"]))
    totals = {name: total(samples, f"ray_rasd_{name}_total") for name in ("rows", "rounds", "drafted", "accepted")}
    assert totals == {name: report[name] for name in totals}
    assert total(samples, "ray_rasd_output_tokens_total") == report["tokens"]
    assert total(samples, "ray_rasd_rounds_without_draft_total") == report["rounds_without_draft"]
    assert total(samples, "ray_rasd_retrieval_misses_total") == report["retrieval_misses"]
    for source, accepted in report["accepted_by_source"].items():
        assert total(samples, "ray_rasd_accepted_total", source=source) == accepted
    assert report["error_types"] == {"malformed_json": 2, "empty_prompt": 1}
    for kind, count in report["error_types"].items():
        assert total(samples, "ray_rasd_error_rows_total", error_type=kind) == count
    (tau,) = (value for name, _, value in samples if name == "ray_rasd_tau")
    assert tau == pytest.approx(report["tau"], abs=1e-4)
    assert total(samples, "ray_rasd_retrieval_seconds_count", call="lookup", place="service") > 0
    assert total(samples, "ray_rasd_shards_committed_total") == total(samples, "ray_rasd_shards") == 4
    assert total(samples, "ray_rasd_rows_committed_total") == report["rows"]
    for name, labels, _ in samples:
        spec = SPECS[name]
        assert set(spec.tags) <= labels.keys(), name
        assert labels["method"] == report["method"]
        assert "replica" not in spec.tags or labels["replica"] == "0"
    check_log(done.stderr)


def have_all_told(samples: list[Sample], rows: int) -> bool:
    """Replica, driver and retrieval service each export when they come to it."""
    told = (total(samples, "ray_rasd_rows_total"), total(samples, "ray_rasd_rows_committed_total"))
    return min(told) >= rows and total(samples, "ray_rasd_retrieval_seconds_count", call="lookup", place="service") > 0


def check_log(stderr: str) -> None:
    """Every line is an object, and the job's course is in them."""
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert [line["replica"] for line in lines if "loaded in" in line["message"]] == [0]
    committed = [line for line in lines if "file" in line]
    assert sorted(line["shard"] for line in committed) == [0, 1, 2, 3]
    assert {line["rows"] for line in committed} == {1, 2}


def test_errors_are_json_too(tmp_path: Path) -> None:
    words = ["--model", "nowhere/at-all/x", "--prompts", "none.jsonl", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "jobs.generate", *words, "--log-format", "json"]
    done = subprocess.run(command, cwd=ROOT, timeout=100, capture_output=True, text=True)
    assert done.returncode == 2
    entry = json.loads(done.stderr.splitlines()[-1])
    assert (entry["level"], entry["error"], entry["exit_code"]) == ("error", "InputError", 2)
    assert "none.jsonl does not exist" in entry["message"]


@pytest.mark.chaos
def test_a_replica_in_place_of_a_killed_one_is_counted(tmp_path: Path, cluster: str, endpoint: str) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(800)))
    words = ["0.1", "--model", "m", "--prompts", str(prompts), "--output", str(output), "--ray-address", cluster]
    command = [
        sys.executable,
        "-m",
        "tests.fake_rasd",
        *words,
        "--num-replicas",
        "1",
        "--quiet",
        "--rows-per-shard",
        "4",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(output.glob("_commits/*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        attempt = json.loads((output / "plan.json").read_text())["attempts"][-1]
        os.kill(attempt["replicas"][0]["pid"], signal.SIGKILL)
        scrapes = Scrapes(endpoint, output)
        with scrapes.repeated():
            process.wait(120)
    assert process.returncode == 0
    samples = scrapes.wait_for(lambda found: total(found, "ray_rasd_rows_committed_total") >= 800)
    assert total(samples, "ray_rasd_replica_restarts_total", replica="0") == 1
    assert total(samples, "ray_rasd_shards_committed_total") == total(samples, "ray_rasd_shards") == 200


@pytest.mark.chaos
def test_a_replica_that_dies_before_it_is_ready_is_counted(tmp_path: Path, cluster: str, endpoint: str) -> None:
    """It is when replicas never come to be ready that somebody looks at this figure."""
    prompts, marks, output = tmp_path / "prompts.txt", tmp_path / "marks", tmp_path / "out"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(16)))
    marks.mkdir()
    words = ["--model", "m", "--prompts", str(prompts), "--output", str(output), "--ray-address", cluster, "--quiet"]
    # A process of its own, as a job's driver is: Ray adds what earlier jobs of a process have counted.
    code = (
        "import sys; from jobs.generation import generate; from tests.fake_rasd import parse;"
        " from tests.fakes import FakeBackend, Faults;"
        f" backend = FakeBackend(Faults(marks={str(marks)!r}, start_deaths=2));"
        f" sys.exit(generate(parse({[*words, '--num-replicas', '1']!r}), backend))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, timeout=120, check=True)
    restarts = "ray_rasd_replica_restarts_total"
    samples = Scrapes(endpoint, output).wait_for(
        lambda found: total(found, "ray_rasd_rows_committed_total") >= 16 and total(found, restarts) > 1,
    )
    found = [sample for sample in samples if sample[0] == restarts]
    assert total(found, restarts, replica="0") == 2, found


def test_gauges_are_told_as_long_as_their_process_works(cluster: str, endpoint: str, tmp_path: Path) -> None:
    """The agent here forgets what was not set for two seconds; the job and its replica do nothing for longer."""
    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    try:
        job, replica = JobMetrics(3, "rasd", str(tmp_path)), ReplicaMetrics(0, "rasd", str(tmp_path))
        total_stats = ShardStats(rows=1, samples_ok=1, output_tokens=9, rounds=4)
        replica.finished(total_stats, total_stats, None)
        begin = time.monotonic()
        told: dict[str, float] = {}
        while time.monotonic() < begin + 6 or told != {"ray_rasd_shards": 3, "ray_rasd_tau": 2}:
            assert time.monotonic() < begin + 60, told
            job.working()
            replica.working(total_stats)
            time.sleep(0.5)
            samples = samples_of(endpoint, tmp_path)
            told = {name: value for name, _, value in samples if name in ("ray_rasd_shards", "ray_rasd_tau")}
        wait_until_gone(endpoint, tmp_path, {"ray_rasd_shards", "ray_rasd_tau"})
    finally:
        ray.shutdown()


def wait_until_gone(endpoint: str, output: Path, names: set[str]) -> None:
    """Without that they are forgotten."""
    deadline = time.monotonic() + 30
    while names & {name for name, _, _ in samples_of(endpoint, output)}:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.chaos
def test_a_job_is_told_of_while_it_waits(tmp_path: Path, cluster: str, endpoint: str) -> None:
    """Its number of shards, which nothing changes, also seconds after it began."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("prompt\n" * 8)
    words = ["1", "--model", "m", "--prompts", str(prompts), "--output", str(output), "--ray-address", cluster]
    words += ["--num-replicas", "1", "--quiet", "--rows-per-shard", "8"]
    scrapes = Scrapes(endpoint, output)
    with subprocess.Popen([sys.executable, "-m", "tests.fake_rasd", *words], cwd=ROOT) as process:
        scrapes.wait_for(lambda found: total(found, "ray_rasd_shards") == 1)
        seen = []
        while not list(output.glob("_commits/*.json")):
            assert process.poll() is None
            time.sleep(0.2)
            seen.append(total(samples_of(endpoint, output), "ray_rasd_shards"))
    assert process.returncode == 0
    assert len(seen) > 8
    late = seen[len(seen) // 2 :]
    assert sum(late) > len(late) / 2, "a slow machine may miss some"


def expressions() -> list[str]:
    """Every query of the dashboard, those of its variables included."""
    dashboard: dict[str, Any] = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return queries + [variable["query"]["query"] for variable in variables]


def test_the_dashboard_queries_what_the_code_exports_and_all_of_it() -> None:
    queried = {name for text in expressions() for name in re.findall(r"ray_\w+", text)}
    assert queried <= SPECS.keys()
    assert {SPECS[name] for name in queried} == {*REPLICA_METRICS, *JOB_METRICS}


def test_the_dashboard_selects_and_groups_by_labels_that_are_there() -> None:
    checked = 0
    for text in expressions():
        specs = [SPECS[name] for name in re.findall(r"ray_\w+", text)]
        common = set.intersection(*(set(spec.tags) for spec in specs))
        for name, selectors in re.findall(r"(ray_\w+)\{([^}]*)\}", text):
            used = set(re.findall(r"(\w+)=~", selectors))
            assert used and used <= set(SPECS[name].tags), text
            checked += 1
        for group in re.findall(r"by \(([^)]*)\)", text):
            assert set(group.split(", ")) <= common | {"le", "source"}, text
        assert "by (source)" not in text or any("source" in spec.tags for spec in specs)
    assert checked >= len(SPECS) // 2
