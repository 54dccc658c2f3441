"""A teacher with an emulated device: it sleeps as long as a forward would take, and returns prepared features."""

import contextlib
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import processes
import torch
from schoolhouse_server import serve
from torch import nn


class EmulatedTeacher(nn.Module):
    """Sleeps for `forward_s` without using the CPU, and returns `features_bytes` of float32, split over the rows."""

    def __init__(self, forward_s: float, features_bytes: int, rows: int) -> None:
        super().__init__()
        self.forward_s = forward_s
        self.head = nn.Identity()
        self.features = torch.randn(rows, features_bytes // 4 // rows)

    def forward(self, _x: torch.Tensor) -> torch.Tensor:
        """The same features for any batch, in new memory, as if copied from a device to the host."""
        time.sleep(self.forward_s)
        features: torch.Tensor = self.head(self.features)
        return features


class RowsTeacher(nn.Module):
    """Sleeps for `forward_s`, and `s_per_row` for each row of its input; returns as many rows of `width` float32."""

    def __init__(self, forward_s: float, s_per_row: float, width: int) -> None:
        super().__init__()
        self.forward_s, self.s_per_row, self.width = forward_s, s_per_row, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sleep, and return features; uses the CPU only to allocate these."""
        time.sleep(self.forward_s + self.s_per_row * x.shape[0])
        return torch.zeros(x.shape[0], self.width)


def _serve(ready: Connection, make: Callable[..., nn.Module], settings: tuple[Any, ...], serving: Any) -> None:
    with serve(make(*settings), **serving) as server:
        ready.send(server.url)
        with contextlib.suppress(EOFError):  # until the parent closes the connection, or is gone
            ready.recv()


def start(make: Callable[..., nn.Module], *settings: Any, **serving: Any) -> tuple[str, Connection]:
    """Run `serve(make(*settings), **serving)` in its own process; returns its URL, and what keeps it alive."""
    connection, _ = processes.start(_serve, make, settings, serving)
    url: Any = connection.recv()
    return url, connection


def start_replica(forward_s: float, features_bytes: int, rows: int) -> tuple[str, Connection]:
    """Serve an `EmulatedTeacher` in its own process; returns what `start` does."""
    return start(EmulatedTeacher, forward_s, features_bytes, rows)
