"""What the tests of shared memory share."""

import contextlib
import gc
import os
import time

import torch
from torch import nn

MIB = 1 << 20


def memfds(pid="self"):
    """How many descriptors and mappings of segments a process has."""
    fds = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            fds += "memfd:schoolhouse" in os.readlink(f"/proc/{pid}/fd/{fd}")
    with open(f"/proc/{pid}/maps") as maps:
        return fds, sum("memfd:schoolhouse" in line for line in maps)


def soon(check, timeout_s=60.0, collect=True):
    """Whether it becomes true."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if check():
            return True
        if collect:
            gc.collect()
        time.sleep(0.05)
    return bool(check())  # the machine may have stood still


@contextlib.contextmanager
def no_collector():
    """Only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Double(nn.Module):
    """Returns what it is given, and the first tensor twice over."""

    def forward(self, x, *more):
        return [x + x, x, more]


class Sized(nn.Module):
    """As many float32 as asked for, all of them the number asked for."""

    def forward(self, count, value):
        return torch.full((int(count),), float(value))


def ask(teacher, count, value):
    return teacher.submit((torch.tensor(count), torch.tensor(float(value))), {}, [""])
