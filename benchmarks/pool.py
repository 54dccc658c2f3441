"""Seconds from `up` to the first feature and from a killed replica to full strength; failed steps during a roll.

The pool has small teachers on a local Ray cluster, whose start is part of `up`; loading large weights comes on top.
During the roll, students ask step after step while all replicas are replaced by those of another revision. A step has
failed if it raises, or if its features are not those of the revision that the student began with.
`python benchmarks/pool.py --json`
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import schoolhouse as sh
import torch
from schoolhouse_server.pool.config import PoolConfig, Resources, TeacherSpec
from schoolhouse_server.pool.driver import Pool, launch, ray_cluster
from schoolhouse_server.pool.replica_handle import actors
from torch import nn

TIMEOUT_S = 300.0


class Teacher(nn.Module):
    """A small teacher, whose seed decides its revision."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
            self.fc.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One linear layer."""
        out: torch.Tensor = self.fc(x)
        return out


class Student(threading.Thread):
    """A student that asks step after step until it is told to end, and counts its steps."""

    def __init__(self, url: str, job: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.url, self.job, self.model = url, job, Teacher(seed)
        self.steps = self.failed = 0
        self.ended, self.began = threading.Event(), threading.Event()

    def run(self) -> None:
        """Ask step after step."""
        with sh.connect(self.url, job=self.job) as teacher, torch.no_grad():
            while not self.ended.wait(0.005):
                x = torch.randn(4, 8)
                try:
                    right = torch.equal(teacher.submit((x,), {}, [""]).result(TIMEOUT_S)[""], self.model(x))
                except sh.errors.SchoolhouseError as err:
                    sys.stderr.write(f"{self.job}: {err}\n")
                    right = False
                self.steps += 1
                self.failed += not right
                self.began.set()


def config(seed: int, replicas: int, folder: Path) -> PoolConfig:
    """A pool of one teacher."""
    spec = TeacherSpec(
        build="pool:Teacher",
        kwargs={"seed": seed},
        replicas=replicas,
        threads=1,
        resources=Resources(num_cpus=0.1),
    )
    return PoolConfig(teachers={"net": spec}, port=0, drain_timeout_s=10.0, folder=folder)


def kill_one(pool: Pool, replicas: int) -> float:
    """Kill a replica; returns the seconds until as many as before serve and the directory lists them."""
    name, actor = next(iter(actors("net").items()))
    pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    began = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    while True:
        ids = [row["id"] for row in pool.status() if row["stage"] == "serving"]
        if len(ids) == replicas and name.split("/")[1] not in ids:
            return time.perf_counter() - began
        assert time.perf_counter() < began + TIMEOUT_S, pool.status()
        time.sleep(0.05)


def roll(pool: Pool, students: int, replicas: int, after_s: float, folder: Path) -> dict[str, Any]:
    """Roll while students train; they go on for `after_s` afterwards, while the old replicas drain."""
    training = [Student(pool.url("net"), f"job-{i}", seed=1) for i in range(students)]
    for student in training:
        student.start()
    for student in training:
        assert student.began.wait(TIMEOUT_S)
    before = sum(student.steps for student in training)
    began = time.perf_counter()
    pool.roll(config(2, replicas, folder), ["net"], TIMEOUT_S)
    rolled_s = time.perf_counter() - began
    time.sleep(after_s)
    for student in training:
        student.ended.set()
        student.join(TIMEOUT_S)
    steps = sum(student.steps for student in training) - before
    return {"failed_steps": sum(s.failed for s in training), "steps": steps, "roll_s": round(rolled_s, 1)}


def main() -> None:
    """Measure, and print a line, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--students", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long students go on after the roll")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr), ray_cluster(num_cpus=2):  # Ray's own messages go elsewhere
        pool = launch(config(1, options.replicas, folder))
        try:
            pool.wait(TIMEOUT_S)
            with sh.connect(pool.url("net")) as teacher:
                teacher.submit((torch.randn(4, 8),), {}, [""]).result(TIMEOUT_S)
            figures: dict[str, Any] = {"up_s": round(time.perf_counter() - began, 1)}
            figures["recover_s"] = round(kill_one(pool, options.replicas), 1)
            figures |= roll(pool, options.students, options.replicas, options.seconds, folder)
        finally:
            pool.down()
    figures["replicas"] = options.replicas
    line = ", ".join(f"{name}: {value}" for name, value in figures.items())
    sys.stdout.write((json.dumps(figures) if options.json else line) + "\n")


if __name__ == "__main__":
    main()
