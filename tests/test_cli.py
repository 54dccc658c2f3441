"""The command line, as an operator types it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import schoolhouse as sh
import torch
from models import Net

pytest.importorskip("ray")
PATHS = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
SCHOOLHOUSE = [sys.executable, "-c", "from schoolhouse_server.cli import main; main()"]


@pytest.fixture
def run(tmp_path):
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONPATH": PATHS}
    environment |= {"COLUMNS": "120"}

    def call(*args):
        return subprocess.run(
            [*SCHOOLHOUSE, *args], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=170
        )

    return call


def test_help_teaches(run):
    shown = run("--help").stdout
    assert "pool.yaml" in shown
    assert all(command in shown for command in ("up", "status", "down"))


@pytest.mark.timeout(360)  # eight commands, of which each takes seconds to begin
def test_up_status_down(run, tmp_path):
    (tmp_path / "pool.yaml").write_text(
        "port: 0\nteachers: {net: {build: 'models:Net', kwargs: {width: 32, seed: 1}, threads: 1}}\n"
    )
    up = run("up", "pool.yaml")
    try:
        assert up.returncode == 0, up.stderr
        url = re.search(r"grpc://\S+/net", up.stdout).group()
        x = torch.randn(3, 8)
        with sh.connect(url) as teacher:
            assert torch.equal(teacher.submit((x,), {}, [""]).result()[""], Net(32, seed=1)(x))
            shown = run("status")
            assert teacher.describe().revision in shown.stdout
            assert "serving" in shown.stdout
            assert "serving at 127.0.0.1:" in run("logs", "net").stdout
            assert "it has: net" in run("scale", "nets", "2").stderr
            rolled = run("roll", "pool.yaml", "--linger-s", "0")
            assert rolled.returncode == 0, rolled.stderr
            assert f"net serves revision {teacher.describe().revision}" in rolled.stdout
        assert "already" in run("up", "pool.yaml").stderr
    finally:
        assert run("down").returncode == 0
    after = run("status")
    assert after.returncode == 1
    assert "no local pool" in after.stderr


def test_a_wrong_pool_file_is_one_sentence(run, tmp_path):
    (tmp_path / "pool.yaml").write_text("teachers: {a: {}}")
    up = run("up", "pool.yaml")
    assert up.returncode == 1
    assert "either 'build" in up.stderr
    assert "Traceback" not in up.stderr
