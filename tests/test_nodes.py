"""A pool on a cluster whose nodes go away: a raylet that is killed, and one whose network link is down."""

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

SCRIPT = str(Path(__file__).parent / "two_nodes.py")


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "done"


def test_a_raylet_is_killed():
    run([sys.executable, SCRIPT, "kill"])
