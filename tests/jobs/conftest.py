"""A real S3 server, moto's, in a process of its own, a Ray cluster whose workers know it, and a throughput run."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from jobs.cli import main
from tests.jobs.throughput_run import words, write_questions

BUCKET = "rasd-tests"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of the server, which has an empty bucket; the environment of all processes from here on names it."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("moto_server", path=beside)
    assert program is not None, "moto_server is missing; install the extra dev"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        create_bucket(server, f"{endpoint}/{BUCKET}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_REGION", "us-east-1")
            yield endpoint
    finally:
        server.kill()
        server.wait()


def create_bucket(server: "subprocess.Popen[bytes]", url: str) -> None:
    """Ask until the server is up."""
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=10).close()
            return
        except urllib.error.URLError:
            assert server.poll() is None, "moto_server ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def uri(s3_server: str, request: pytest.FixtureRequest) -> str:
    """A prefix of the bucket that no other test has."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '/').replace(']', '').replace('*', '')}"


@pytest.fixture(scope="session")
def s3_cluster(s3_server: str) -> Iterator[str]:
    """Address of a one-node Ray cluster that was started once the environment named the server, as its nodes' must."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def throughput_output(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of `rasd throughput`, done once for all tests that look at it."""
    folder = tmp_path_factory.mktemp("throughput")
    assert main(words(write_questions(folder / "question.jsonl"), folder / "out", cluster)) == 0
    return folder / "out"
