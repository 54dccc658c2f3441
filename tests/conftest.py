"""Fixtures that tests share: one local Ray cluster a session, started when first asked for."""

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)


@pytest.fixture(scope="session")
def cluster():
    """The address of the session's local Ray cluster; its workers can import the tests' models."""
    from schoolhouse_server.pool import ray_cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    with ray_cluster(num_cpus=4) as address:
        yield address
