"""Steps/s with a teacher in the process: Schoolhouse beside NVIDIA ModelOpt, with the same nets, losses and batches.

Both train in this process, on one thread, in short alternating turns, so that whatever else the machine does affects
both alike. The ratio is the median over neighbouring turns, once of wall-clock time and once of this process's CPU
time. It needs nvidia-modelopt, so it runs in the environment that `make parity` makes:
`.venv-parity/bin/python benchmarks/overhead.py --json`
"""

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import schoolhouse as sh
import torch
from torch import nn
from torch.nn import functional as F

Run = Callable[[int], None]
ROWS = 16


class ConvNet(nn.Module):
    """`blocks` blocks of convolutions with `channels` channels, and a classifier of 10 classes."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(self._block(channels) for _ in range(blocks)))
        self.fc = nn.Linear(channels, 10)

    @staticmethod
    def _block(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, 10]`."""
        out: torch.Tensor = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        return out


NETS: dict[str, tuple[int, int, int]] = {"small": (8, 2, 8), "mid": (16, 4, 16)}  # channels, blocks, pixels


def stepper(kit: Any, teacher: nn.Module, student: nn.Module, pixels: int) -> Run:
    """Returns a function that runs so many training steps, distilling an inner layer and the logits."""
    config = {
        "teacher_model": copy.deepcopy(teacher),
        "criterion": {("blocks.1", "blocks.1"): nn.MSELoss(), ("fc", "fc"): kit.LogitsDistillationLoss()},
        "loss_balancer": kit.StaticLossBalancer([0.3, 0.3]),
    }
    model: Any = kit.convert(copy.deepcopy(student), mode=[("kd_loss", config)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = torch.randn(ROWS, 3, pixels, pixels), torch.randint(0, 10, (ROWS,))

    def run(steps: int) -> None:
        for _ in range(steps):
            loss = model.compute_kd_loss(student_loss=F.cross_entropy(model(x), y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def took(run: Run, steps: int) -> tuple[float, float]:
    """How many seconds of wall-clock time and of CPU time so many steps take."""
    began, used = time.perf_counter(), time.process_time()
    run(steps)
    return time.perf_counter() - began, time.process_time() - used


def measure(kits: dict[str, Any], net: str, turn_s: float, turns: int) -> dict[str, float]:
    """Steps/s of both, and the ratio of ours to ModelOpt's."""
    channels, blocks, pixels = NETS[net]
    torch.manual_seed(0)
    teacher, student = ConvNet(channels, blocks), ConvNet(channels, blocks)
    runs = {name: stepper(kit, teacher, student, pixels) for name, kit in kits.items()}
    warm = [took(run, 50)[0] for run in runs.values()]
    steps = max(1, int(turn_s * 50 / min(warm)))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(turns):
        for name in [*runs] if turn % 2 else [*reversed(runs)]:
            found[name].append(took(runs[name], steps))
    ours, theirs = found.values()
    clock, cpu = (median(b[i] / a[i] for a, b in zip(ours, theirs, strict=True)) for i in range(2))
    rates = {name: round(steps / median(seconds for seconds, _ in times), 1) for name, times in found.items()}
    return {**rates, "ratio": round(clock, 4), "cpu_ratio": round(cpu, 4)}


def main() -> None:
    """Measure both nets, and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--turns", type=int, default=100, help="turns of each library for each net")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a turn, roughly")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import modelopt.torch.distill as mtd
        except ImportError:
            parser.error("this needs nvidia-modelopt: run it with .venv-parity/bin/python, which `make parity` makes")
        torch.set_num_threads(1)
        kits = {"schoolhouse": sh, "modelopt": mtd}
        figures = {net: measure(kits, net, options.seconds, options.turns) for net in NETS}
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write("steps/s with a teacher in the process\n")
    for net, found in figures.items():
        rates = "  ".join(f"{name} {found[name]:8.1f}" for name in kits)
        sys.stdout.write(f"{net:6} {rates}  ratio {found['ratio']:.3f}, by CPU time {found['cpu_ratio']:.3f}\n")


if __name__ == "__main__":
    main()
