"""What all tests share: the embedded model, a quiet local Ray, no network but the package registry."""

import atexit
import os
import shutil
import tempfile
import uuid
from pathlib import Path

# Read when these packages are imported, so set before any of them is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # not every ten seconds, for which tests would wait
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run in Triton's interpreter
if "PYTEST_XDIST_WORKER" in os.environ:
    # A lane beside others has one core: threads that wait for one another at barriers would lose most of the time. And
    # it has a Ray of its own, not that of the process that started it.
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("RAY_TMPDIR", "RAY_AUTH_MODE"):
        os.environ.pop(name, None)
if "RAY_TMPDIR" not in os.environ:
    # Ray puts sockets there, whose paths may have 107 bytes: pytest's own directories are too deep.
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="rasd-")
    atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)
    if "PYTEST_XDIST_WORKER" in os.environ:  # what there is one of on a node is one of each lane's
        os.environ["TMPDIR"] = tempfile.tempdir = os.environ["RAY_TMPDIR"]
if "RAY_AUTH_MODE" not in os.environ:
    # Otherwise Ray makes a token of its own in the user's home.
    token = Path(os.environ["RAY_TMPDIR"]) / "auth_token"
    token.write_text(uuid.uuid4().hex)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from xdist.scheduler import LoadFileScheduling

from pipeline import graphs
from pipeline.models import load_causal_lm, load_tokenizer, resolve_model


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--static-passes` has all engines of this process run what they run on a GPU, uncaptured."""
    parser.addoption("--static-passes", action="store_true", help="passes of fixed sizes, as on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    """See `pytest_addoption`."""
    if config.getoption("--static-passes"):
        graphs.pays = lambda device: True


class Lanes(LoadFileScheduling):  # type: ignore[misc]
    """Tests of a file run in one lane, and those of two files that look at the same throughput run."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return file.replace("test_report_page", "test_throughput")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Lanes:
    """Of `pytest -n`."""
    return Lanes(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Address of a one-node Ray cluster with 4 CPUs, which tests join as a job joins the cluster it runs on."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model in fp32 on the CPU, with transformers' own attention, and its tokenizer.

    One instance for the whole session: a test that changes it (`Target` sets the attention function) changes it back.
    """
    resolved = resolve_model("smollm2-135m")
    return load_causal_lm(resolved, torch.float32, "cpu"), load_tokenizer(resolved)
