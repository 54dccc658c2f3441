"""Student steps/s without a teacher, with one in the process, and with a remote one, without and with look-ahead.

The teacher's device is emulated, as there may be no accelerator: a forward sleeps for 0.9 of a student step without
using the CPU, and returns prepared features of 1 MiB. The student really trains, on one thread; the replica is another
process on the same machine. `python benchmarks/overlap.py --json`
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import schoolhouse as sh
import torch
from emulated import EmulatedTeacher, start_replica
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, torch.Tensor]
ROWS, WIDTH = 64, 4096  # 1 MiB of float32
SHARE = 0.9  # the time of the teacher's forward, relative to a student step
DEVICE = f"emulated: the teacher sleeps {SHARE} of a student step and returns 1 MiB of prepared features"


def make_student() -> nn.Module:
    """A network with 18 million weights; a step takes about a tenth of a second on one thread."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10))


def stepper(model: nn.Module, batches: Iterator[Batch]) -> Callable[[int], None]:
    """Returns a function that runs so many training steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run(steps: int) -> None:
        for x, y in itertools.islice(batches, steps):
            loss: Any = F.cross_entropy(model(x), y)
            if isinstance(model, sh.DistillationModel):
                loss = model.compute_kd_loss(student_loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def distilling(teacher: Any) -> Any:
    """A student that learns from the teacher's features besides its labels."""
    config = {
        "teacher_model": teacher,
        "criterion": {("3", "head"): nn.MSELoss()},
        "loss_balancer": sh.StaticLossBalancer(0.5),
    }
    return sh.convert(make_student(), mode=[("kd_loss", config)])


def seconds(run: Callable[[int], None], steps: int) -> float:
    """How long so many steps take."""
    began = time.perf_counter()
    run(steps)
    return time.perf_counter() - began


def measure(steps: int, rounds: int) -> dict[str, float]:
    """The median steps/s of each; they take turns, so that drift affects all alike."""
    data = [(torch.randn(ROWS, 256), torch.randint(0, 10, (ROWS,))) for _ in range(16)]
    pure = stepper(make_student(), itertools.cycle(data))
    pure(steps)
    forward_s = SHARE * min(seconds(pure, steps) for _ in range(3)) / steps
    url, _keep = start_replica(forward_s, ROWS * WIDTH * 4, ROWS)
    with sh.connect(url) as teacher:
        local, remote, ahead = (
            distilling(EmulatedTeacher(forward_s, ROWS * WIDTH * 4, ROWS)),
            *map(distilling, (teacher,) * 2),
        )
        looked_ahead = ahead.prefetch(itertools.cycle(data), depth=4)
        runs = {
            "pure": pure,
            "local": stepper(local, itertools.cycle(data)),
            "remote": stepper(remote, itertools.cycle(data)),
            "remote_prefetch": stepper(ahead, iter(looked_ahead)),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(-1, rounds):
            for name, run in runs.items():
                took_s = seconds(run, steps)
                if turn >= 0:  # the turn before that warms up
                    rates[name].append(steps / took_s)
    return {name: round(median(found), 3) for name, found in rates.items()}


def main() -> None:
    """Measure all, and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=15, help="steps of each in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(options.steps, options.rounds)
    if options.json:
        sys.stdout.write(json.dumps({**figures, "device": DEVICE}) + "\n")
        return
    sys.stdout.write(f"student steps/s; the teacher's device is {DEVICE}\n")
    for name, rate in figures.items():
        sys.stdout.write(f"{name:16} {rate:8.2f}  {rate / figures['pure']:.3f} of pure\n")


if __name__ == "__main__":
    main()
