"""The cluster examples are what Ray and this project's own options take."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.config import GenerateConfig
from jobs.datastore_config import BuildConfig
from jobs.options import Parser, add_options, build_config
from jobs.throughput_config import ThroughputConfig
from jobs.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "generate": GenerateConfig,
    "build_datastore": BuildConfig,
    "train_draft": TrainConfig,
    "throughput": ThroughputConfig,
}


def commands() -> Iterator[tuple[str, str]]:
    """Every job command of the examples and of the documents, as (module, arguments)."""
    job = yaml.safe_load((ROOT / "examples" / "cluster" / "kuberay-job.yaml").read_text())
    texts = [job["spec"]["entrypoint"]]
    for document in (ROOT / "docs" / "cluster.md", ROOT / "README.md"):
        joined = document.read_text("utf-8").replace("\\\n", " ")
        texts += [line for line in joined.splitlines() if line.strip().startswith("ray job submit")]
    for text in texts:
        _, _, rest = text.partition("python -m jobs.")
        module, _, arguments = rest.partition(" ")
        yield module, arguments


def test_there_are_commands_for_all_jobs() -> None:
    assert {module for module, _ in commands()} == set(CONFIGS)


@pytest.mark.parametrize(("module", "arguments"), [pytest.param(*c, id=f"{i}") for i, c in enumerate(commands())])
def test_a_documented_command_has_the_options_of_its_job(module: str, arguments: str) -> None:
    parser = Parser(prog=module)
    add_options(parser, CONFIGS[module])
    config = build_config(CONFIGS[module], *parser.parse_known_args(shlex.split(arguments)))
    assert config.output.startswith("/data/"), "a submitted job's working directory is removed"


def test_the_vm_cluster_is_one_that_ray_takes() -> None:
    config = yaml.safe_load((ROOT / "examples" / "cluster" / "vm-cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["max_workers"] == 2
    with pytest.raises(ValidationError):
        validate_config({**prepared, "head_start": []})


def test_every_pod_of_the_kubernetes_job_sees_the_data() -> None:
    spec = yaml.safe_load((ROOT / "examples" / "cluster" / "kuberay-job.yaml").read_text())["spec"]["rayClusterSpec"]
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in pods:
        (container,) = pod["template"]["spec"]["containers"]
        assert "/data" in {mount["mountPath"] for mount in container["volumeMounts"]}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["template"]["spec"]["volumes"]}
