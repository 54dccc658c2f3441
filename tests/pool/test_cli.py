"""The command line, as an operator types it."""

import functools
import os
import re
from pathlib import Path

import programs
import pytest
import schoolhouse as sh
import torch
from models import Net
from typer.testing import CliRunner

HELPERS = Path(__file__).parents[1] / "helpers"

pytest.importorskip("ray")
PATHS = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def run(tmp_path):
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONPATH": PATHS}
    environment |= {"COLUMNS": "120"}

    return functools.partial(programs.command, cwd=tmp_path, env=environment)


def test_help_teaches(run):
    shown = run("--help").stdout
    assert "pool.yaml" in shown
    assert all(command in shown for command in ("up", "status", "down"))


@pytest.mark.timeout(360)  # eight commands, each a connection to Ray
def test_up_status_down(run, tmp_path):
    (tmp_path / "pool.yaml").write_text(
        "port: 0\nteachers: {net: {build: 'models:Net', kwargs: {width: 32, seed: 1}, threads: 1}}\n"
    )
    up = run("up", "pool.yaml")
    try:
        assert up.returncode == 0, up.stderr
        url = re.search(r"^students connect to  (grpc://\S+/net)$", up.stdout, flags=re.MULTILINE).group(1)
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
    assert "exactly one of 'build" in up.stderr
    assert "Traceback" not in up.stderr


@pytest.mark.parametrize("command", ["up", "roll"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{transformers: none}", "teachers.a.transformers: there is no checkpoint (config.json) in {folder}/none"),
        ("{build: 'm:f', weights: w.pt}", "teachers.a.weights: there is no file {folder}/w.pt"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_found_before_ray_starts(command, given, said, tmp_path, monkeypatch):
    from schoolhouse_server.cli import main
    from schoolhouse_server.pool import local_cluster

    def reached(*_args, **_kwargs):
        raise AssertionError("it went on")

    for name in ("running", "start"):
        monkeypatch.setattr(local_cluster, name, reached)
    path = tmp_path / "pool.yaml"
    path.write_text(f"teachers: {{a: {given}}}\n")
    done = CliRunner().invoke(main.app, [command, str(path)])
    assert isinstance(done.exception, sh.errors.ConfigError), done.exception
    assert said.format(folder=tmp_path) in str(done.exception)
    monkeypatch.setattr("schoolhouse_server.pool.driver.ray_cluster", reached)
    # With an address the paths are those of the cluster's nodes, for them to look at.
    elsewhere = CliRunner().invoke(main.app, [command, str(path), "--address", "10.0.0.1:6379"])
    assert isinstance(elsewhere.exception, AssertionError), elsewhere.exception


def test_a_roll_looks_at_the_teachers_that_it_rolls_alone(tmp_path, monkeypatch):
    from schoolhouse_server.cli import main

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "pool.yaml"
    path.write_text("teachers: {a: {transformers: none}, b: {build: 'm:f'}}\n")
    done = CliRunner().invoke(main.app, ["roll", str(path), "b"])
    assert "no local pool is running" in str(done.exception)
