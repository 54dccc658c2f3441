"""Teachers that take their time."""

import time
from pathlib import Path

import torch
from torch import nn


class Slow(nn.Module):
    """Sleeps, without using the CPU, and returns what it got."""

    def __init__(self, forward_s):
        super().__init__()
        self.forward_s = forward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.forward_s)
        return x


class HangingOnce(nn.Module):
    """Does not return while there is a file, which it removes first."""

    def __init__(self, flag):
        super().__init__()
        self.flag = Path(flag)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.flag.exists():
            self.flag.unlink()
            time.sleep(600)
        return x
