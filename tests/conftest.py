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
    import ray
    from schoolhouse_server.pool import init_ray

    os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    yield init_ray(num_cpus=4)
    ray.shutdown()
