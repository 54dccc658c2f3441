"""`benchmarks/overhead.py` prints its keys. What it measures is not looked at here: machines differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("modelopt.torch.distill", reason="make parity installs it into an environment of its own")
pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]
SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "overhead.py"


def test_overhead():
    command = [sys.executable, SCRIPT, "--json", "--turns", "2", "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["small", "mid"]
    for figures in found.values():
        assert set(figures) == {"schoolhouse", "modelopt", "ratio", "cpu_ratio"}
        assert all(figure > 0 for figure in figures.values())
