"""The Slurm script, run with a real Ray on this machine; `srun` and `scontrol` are stand-ins that run things here."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from memfd import soon

HELPERS = Path(__file__).parents[1] / "helpers"

pytest.importorskip("ray")

SCRIPT = Path(__file__).parents[2] / "deploy/slurm/schoolhouse.sbatch"
# Options of ours are all of the form --name=value, so what follows them is the command.
SRUN = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
while case $1 in -*) true ;; *) false ;; esac; do shift; done
exec "$@"
"""
STUDENT = """
import os, pathlib, schoolhouse as sh, torch
from models import Net
(url,) = pathlib.Path(os.environ["SCHOOLHOUSE_URLS"]).read_text().split()
x = torch.ones(3, 8)
with sh.connect(url) as teacher:
    assert torch.equal(teacher.submit((x,), {}, [""]).result(60)[""], Net(32, seed=1)(x))
print("student: the same", flush=True)
"""


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """Starts the script in an allocation of these nodes; ends what it left, and says what that was."""
    bin_folder = tmp_path / "bin"
    program(bin_folder / "srun", SRUN)
    program(bin_folder / "schoolhouse", f"#!{sys.executable}\nfrom schoolhouse_server.cli.main import main; main()\n")
    (tmp_path / "student.py").write_text(STUDENT)
    (tmp_path / "pool.yaml").write_text(
        "port: 0\nteachers: {net: {build: 'models:Net', kwargs: {width: 32, seed: 1}, replicas: 2, threads: 1}}\n"
    )
    paths = [str(HELPERS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    job = str(os.getpid())
    environment = os.environ | {
        "PATH": os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    started = []

    def start(nodes, *arguments, **variables):
        program(bin_folder / "scontrol", "#!/bin/sh\n" + "".join(f"echo {node}\n" for node in nodes))
        started.append(
            subprocess.Popen(
                ["bash", SCRIPT, *arguments],
                env=environment | variables,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    start.folder = tmp_path / f"schoolhouse-{job}"
    start.scratch = Path(f"/tmp/ray-{job}")
    yield start
    for process in started:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            child.kill()
        process.wait()


def left(scratch):
    """Processes that belong to the job's Ray cluster."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if str(scratch) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_job_serves_its_command_and_cleans_up(slurm, tmp_path):
    job = slurm(["node1", "node2"], "pool.yaml", sys.executable, "student.py")
    shown, _ = job.communicate(timeout=250)
    assert job.returncode == 0, shown
    assert "student: the same" in shown
    assert re.search(r"^grpc://\S+/net$", shown, flags=re.MULTILINE)
    calls = (tmp_path / "calls").read_text()
    assert len(re.findall(r"--nodelist=node1 .* ray start --head ", calls)) == 1
    assert len(re.findall(r"--nodelist=node2 .* ray start --block --address=\S+ --node-ip-address=", calls)) == 1
    assert (slurm.folder / "token").stat().st_mode & 0o077 == 0
    assert soon(lambda: left(slurm.scratch) == []), left(slurm.scratch)
    assert not slurm.scratch.exists()


STOPS = """#!/bin/sh
case "$*" in
    *start*) trap 'echo "$* stopped" >> "$CALLS"; kill $!; exit 0' TERM; sleep 60 & touch "$CALLS.$$"; wait ;;
    *up*)
        while [ "$(ls "$CALLS".* 2>/dev/null | wc -l)" -lt 2 ]; do sleep 0.1; done
        echo "students connect to  grpc://127.0.0.1:7070/net" ;;
    *down*) echo "$*" >> "$CALLS" ;;
esac
"""


def test_a_job_without_a_command_ends_with_its_time(slurm, tmp_path):
    for name in ("ray", "schoolhouse"):
        program(tmp_path / "bin" / name, STOPS)
    job = slurm(["node1", "node2"], "pool.yaml")
    assert job.stdout.readline() == "grpc://127.0.0.1:7070/net\n"
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)  # as --signal=B:TERM@120 has Slurm send it
    job.communicate(timeout=60)
    assert job.returncode == 143
    *_, down, first, second, removed = (tmp_path / "calls").read_text().splitlines()
    assert down.startswith("down --address ")
    assert sorted([first[:13], second[:13]]) == ["start --block", "start --head "]
    assert first.endswith("stopped")
    assert second.endswith("stopped")
    assert removed.endswith(f"rm -rf -- {slurm.scratch}")


# A system that knows itself by a loopback address, and has a network for each of its cards.
HOSTNAME = """#!/bin/sh
case $1 in
    --all-ip-addresses) echo "127.0.1.1 10.0.0.5 10.1.7.5 fd00::5 " ;;
    *) echo 127.0.1.1 ;;
esac
"""


@pytest.mark.parametrize(("network", "address"), [("", "10.0.0.5"), ("10.1.*", "10.1.7.5")])
def test_nodes_know_one_another_by_an_address_of_the_network(slurm, tmp_path, network, address):
    for name, text in (("ray", STOPS), ("schoolhouse", STOPS), ("hostname", HOSTNAME)):
        program(tmp_path / "bin" / name, text)
    job = slurm(["node1", "node2"], "pool.yaml", "true", SCHOOLHOUSE_NETWORK=network)
    shown, _ = job.communicate(timeout=60)
    assert job.returncode == 0, shown
    calls = (tmp_path / "calls").read_text()
    assert len(re.findall(rf"ray start .*--node-ip-address={re.escape(address)} ", calls)) == 2
    assert re.search(rf"ray start --block --address={re.escape(address)}:\d+ ", calls)


def test_a_node_outside_the_network_is_said(slurm, tmp_path):
    program(tmp_path / "bin/hostname", HOSTNAME)
    job = slurm(["node1"], "pool.yaml", SCHOOLHOUSE_NETWORK="192.168.*")
    shown, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "node1 has no address like 192.168.*; set SCHOOLHOUSE_NETWORK" in shown


def test_a_head_that_does_not_start_is_said(slurm, tmp_path):
    program(tmp_path / "bin/ray", "#!/bin/sh\necho the port is taken\nexit 1\n")
    program(tmp_path / "bin/schoolhouse", STOPS)
    job = slurm(["node1"], "pool.yaml")
    shown, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "head.log says why" in shown
    assert (slurm.folder / "head.log").read_text() == "the port is taken\n"


def test_a_pool_file_that_is_not_there_is_refused(slurm):
    job = slurm(["node1"], "nothing.yaml")
    shown, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "usage" in shown
