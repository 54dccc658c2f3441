"""The benchmarks print the keys that others read. What they measure is not looked at here: machines differ."""

import importlib.util
import json
from pathlib import Path

import programs
import pytest

pytestmark = pytest.mark.timeout(300)  # a minute where nothing else runs
FOLDER = Path(__file__).parents[2] / "benchmarks"


def figures(name, *options):
    done = programs.run(FOLDER / f"{name}.py", "--json", *options, timeout_s=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # and nothing else


def test_overlap():
    found = figures("overlap", "--steps", "2", "--rounds", "1")
    assert all(found[name] > 0 for name in ("pure", "local", "remote", "remote_prefetch"))
    assert "emulated" in found["device"]


@pytest.mark.parametrize("model", [["--untrained"], pytest.param([], marks=pytest.mark.chaos)])
def test_bytes_per_token(model):
    names = ("hidden_fp32", "sampled64")
    found = figures("bytes_per_token", "--rows", "1", "--length", "16", "--encodings", *names, *model)
    assert found["plain_bytes_per_token"] == pytest.approx(4 * 49152, rel=0.01)
    exact = found["encodings"]["hidden_fp32"]
    assert exact["bytes_per_token"] < 2.1 * 576 * 4
    assert exact["kl_error"] < 1e-4
    for name in names:
        assert set(found["encodings"][name]) == {"bytes_per_token", "kl_error", "grad_error", "peak_client_mb"}


def test_clients():
    found = figures("clients", "--clients", "1", "4", "--connections", "2", "--seconds", "0.2", "--rounds", "1")
    assert [*found] == ["clients", "ratios", "connections"]
    assert [*found["clients"]] == ["1", "4"]
    for row in found["clients"].values():
        assert [*row] == ["schoolhouse", "schoolhouse_shm", "grpc_aio", "grpc_sync"]
    keys = {"calls_per_s", "server_us", "client_us", "server_threads", "client_threads", "server_rss_mb", "least_share"}
    for row in [*found["clients"].values(), *found["connections"].values()]:
        assert all(set(one) == keys and one["calls_per_s"] > 0 for one in row.values())
    assert [*found["connections"]["2"]] == ["stream", "shared_memory"]
    assert [*found["ratios"]] == ["server_us_of_aio_1", "server_us_of_aio_4"]


def test_beside():
    found = figures("beside", "--layers", "20", "--rates", "20", "--seconds", "1", "--rounds", "1")
    assert found["bare_forwards_per_s"] > 0
    assert set(found["rates"]["20"]) == {"calls_per_s", "forwards_of_bare"}
    assert all(figure > 0 for figure in found["rates"]["20"].values())


@pytest.mark.ray
def test_wire():
    peers = ["schoolhouse", "grpc_aio", "arrow_flight", "ray_actor"]
    found = figures("wire", "--rounds", "1", "--sizes", "1KiB", "1MiB", "--peers", *peers)
    assert {*found} == {*peers}
    for peer, row in found.items():
        if peer == "arrow_flight" and importlib.util.find_spec("pyarrow") is None:
            assert "pip install" in row["missing"]
        else:
            assert {*row} == {"1KiB", "1MiB", "calls_per_s"}
            assert all(figure > 0 for figure in row.values())


def test_early_stop():
    assert 0 < figures("early_stop", "--rounds", "1")["cpu_time_ratio"] < 10


@pytest.mark.ray
def test_scaling():
    found = figures("scaling", "--rounds", "1", "--seconds", "0.3", "--clients", "1", "2", "--replicas", "2")
    assert list(found["clients"]) == ["1", "2"]
    assert list(found["replicas"]) == ["2"]
    assert all(rate > 0 for rate in [*found["clients"].values(), *found["replicas"].values()])


@pytest.mark.ray
@pytest.mark.parametrize(
    ("option", "systems"),
    [
        ("--alone", ["schoolhouse"]),
        pytest.param("--peer-waits-ms", ["schoolhouse", "ray_serve"], marks=pytest.mark.chaos),
    ],
)
def test_sharing(option, systems):
    found = figures("sharing", "--seconds", "0.5", "--jobs", "1", "2", "--small-jobs", "2", option)
    assert {"small_batches", "small_batches_unmerged_rows_per_s"} <= set(found["schoolhouse"])
    assert [*found] == [*systems, "device"]
    for system in systems:
        keys = {"total_vs_single", "jain", "light_p99_ms", "forward_ms", "1", "2"}
        assert keys <= set(found[system])
        assert found[system]["jain"] == 0 or 0.5 <= found[system]["jain"] <= 1  # 0: the machine stood still meanwhile
    assert any(found[system]["total_vs_single"] > 0 for system in systems)
    assert "emulated" in found["device"]


@pytest.mark.ray
def test_pool():
    found = figures("pool", "--replicas", "1", "--students", "1", "--seconds", "1")
    assert found["up_s"] > 0
    assert found["recover_s"] > 0
    assert found["failed_steps"] == 0
    assert found["steps"] > 0


@pytest.mark.ray
@pytest.mark.chaos
def test_soak():
    found = figures("soak", "--seconds", "1")
    assert found["requests"] > 0
    assert found["faults"] > 0
    assert found["recovery_p50_s"] <= found["recovery_p99_s"]
    assert isinstance(found["rss_growth_mb"], float)
    assert [found[name] for name in ("steps_lost", "wrong_pairings", "leaked_fds")] == [0, 0, 0]
