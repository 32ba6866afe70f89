"""A small Ray cluster that the tests of jobs join, as a job joins the cluster it runs on."""

from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Address of a one-node cluster with 4 CPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()
