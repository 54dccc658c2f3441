"""A teacher that takes its time."""

import time

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
