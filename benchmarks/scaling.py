"""Total rows/s when 1, 2, 4, 8 students share one replica, and when one teacher has 1, 2, 4 replicas.

Devices are emulated, as there may be no accelerators: a teacher's forward sleeps without using the CPU, and so does a
student's step, which takes as long as five forwards, so that five students saturate a replica. Students look ahead;
they and the replicas are separate processes on this machine. `python benchmarks/scaling.py --json`
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import processes
import schoolhouse as sh
import torch
from emulated import start_replica
from schoolhouse_server.pool.config import PoolConfig, Resources, TeacherSpec
from schoolhouse_server.pool.driver import launch, ray_cluster
from torch import nn

ROWS, FEATURES_BYTES = 32, 64 << 10
FORWARD_S = 0.020
STEP_S = 0.100  # a student's step, so that one student uses a fifth of the replica
SETTLE_S = 1.5
DEVICE = f"emulated: a forward of {ROWS} rows sleeps {FORWARD_S * 1e3:.0f} ms, a student's step {STEP_S * 1e3:.0f} ms"


class Student(nn.Module):
    """A student, whose step is emulated too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, FEATURES_BYTES // 4 // ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of a small layer, for the loss."""
        out: torch.Tensor = self.head(x)
        return out


def batches() -> Iterator[torch.Tensor]:
    """Yield random batches, so that no two requests are the same."""
    while True:
        yield torch.randn(ROWS, 8)


def student(commands: Connection, url: str, step_s: float, depth: int) -> None:
    """Train for as many seconds as each command says, and report steps/s, until the parent closes the connection."""
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())
    with sh.connect(url) as teacher, contextlib.suppress(EOFError):
        config = {"teacher_model": teacher, "criterion": {("head", "head"): nn.MSELoss()}}
        model: Any = sh.convert(Student(), mode=[("kd_loss", config)])
        looked_ahead = iter(model.prefetch(batches(), depth=depth))
        commands.send("ready")
        while True:
            seconds = commands.recv()
            train(model, looked_ahead, step_s, SETTLE_S)  # uses up features that were ready before the turn
            commands.send(train(model, looked_ahead, step_s, seconds))


def train(model: Any, looked_ahead: Iterator[torch.Tensor], step_s: float, seconds: float) -> float:
    """Train for `seconds`; returns steps/s.

    A late step delays the next ones.
    """
    steps, began = 0, time.perf_counter()
    due = began
    while due < began + seconds:
        model(next(looked_ahead))
        model.compute_kd_loss()
        steps += 1
        due = max(due + step_s, time.perf_counter())
        time.sleep(max(due - time.perf_counter(), 0.0))
    return steps / (time.perf_counter() - began)


def start_students(count: int, url: str, step_s: float, depth: int) -> list[Connection]:
    """Students in their own processes, once each is ready."""
    made = [processes.start(student, url, step_s, depth)[0] for _ in range(count)]
    for connection in made:
        connection.recv()
    return made


def rows_per_s(students: list[Connection], seconds: float) -> float:
    """What these students get together, in rows/s."""
    for connection in students:
        connection.send(seconds)
    return ROWS * sum(connection.recv() for connection in students)


def measure_clients(counts: list[int], seconds: float, rounds: int) -> dict[str, float]:
    """Median rows/s by the number of students on one replica; they take turns, so that drift affects all alike."""
    url, _keep = start_replica(FORWARD_S, FEATURES_BYTES, ROWS)
    students = start_students(max(counts), url, STEP_S, depth=4)
    rows_per_s(students, 0.5)
    found: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            found[count].append(rows_per_s(students[:count], seconds))
    return {str(count): round(median(rates), 1) for count, rates in found.items()}


def measure_replicas(counts: list[int], seconds: float, rounds: int) -> dict[str, float]:
    """Median rows/s by the number of replicas of a pool on a local Ray cluster, for a student that never waits."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # so that Ray's workers can import the teacher
    kwargs = {"forward_s": FORWARD_S, "features_bytes": FEATURES_BYTES, "rows": ROWS}
    specs = {
        f"of-{count}": TeacherSpec(
            build="emulated:EmulatedTeacher",
            kwargs=kwargs,
            replicas=count,
            threads=1,
            resources=Resources(num_cpus=0.1),
        )
        for count in counts
    }
    with ray_cluster(num_cpus=2):
        pool = launch(PoolConfig(teachers=specs, port=0))
        try:
            pool.wait(300)
            students = {count: start_students(1, pool.url(f"of-{count}"), 0.0, depth=4 * count) for count in counts}
            for one in students.values():
                rows_per_s(one, 0.5)
            found: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(rounds):
                for count, one in students.items():
                    found[count].append(rows_per_s(one, seconds))
        finally:
            pool.down()
    return {str(count): round(median(rates), 1) for count, rates in found.items()}


def main() -> None:
    """Measure both, and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of each")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of students to measure")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4], help="numbers of replicas to measure")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # Ray's own messages
        figures = {
            "clients": measure_clients(options.clients, options.seconds, options.rounds),
            "replicas": measure_replicas(options.replicas, options.seconds, options.rounds),
        }
    if options.json:
        sys.stdout.write(json.dumps({**figures, "device": DEVICE}) + "\n")
        return
    sys.stdout.write(f"rows/s; devices are {DEVICE}\n")
    for name, row in figures.items():
        full = f", {ROWS / FORWARD_S:.0f} when full" if name == "clients" else ""
        sys.stdout.write(f"{name}{full}: " + "  ".join(f"{count}: {rate:.0f}" for count, rate in row.items()) + "\n")


if __name__ == "__main__":
    main()
