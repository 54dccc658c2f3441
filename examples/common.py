"""What the examples share: handwritten digits, a trained teacher, and serving it or keeping it in this process."""

import argparse
import contextlib
from collections.abc import Iterator

import torch
from schoolhouse_server import serve
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Digits(nn.Module):
    """A network for images `[batch, 1, 8, 8]`, with layers to pair and replace."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.neck = nn.Linear(width * 16, 2 * width)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, 10]`."""
        x = F.max_pool2d(self.body(self.stem(x).relu()).relu(), 2)
        return self.fc(self.neck(x.flatten(1)).relu())


def start(description: str | None) -> str:
    """Read the command line, seed the random numbers, and return where the teacher runs: "local" or "remote"."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--teacher", choices=["local", "remote"], default="remote", help="in this process, or served")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    return options.teacher


@contextlib.contextmanager
def standing(teacher: nn.Module, where: str) -> Iterator[nn.Module | str]:
    """Yield the `teacher_model` for a config: the module itself, or the URL at which it is served meanwhile."""
    if where == "local":
        yield teacher
    else:
        with serve(teacher, allow_head=True) as server:
            yield server.url


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images `[n, 1, 8, 8]` in [0, 1] and labels `[n]`: 1,197 to train on, 600 to test on; always the same split."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    return images[600:], labels[600:], images[:600], labels[:600]


def batches(count: int, size: int, epochs: int) -> Iterator[torch.Tensor]:
    """Yield the row numbers `[size]` of each batch, shuffled in each epoch."""
    for _ in range(epochs):
        yield from torch.randperm(count).split(size)


def trained_teacher(images: torch.Tensor, labels: torch.Tensor, epochs: int = 8) -> nn.Module:
    """A teacher that was trained on these images."""
    teacher = Digits(width=24)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for rows in batches(len(labels), 32, epochs):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images[rows]), labels[rows]).backward()
        optimizer.step()
    return teacher.eval()


@torch.no_grad()
def predicted(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The classes `[n]` that a plain model predicts for `images`."""
    return model.eval()(images).argmax(-1)


def share(found: torch.Tensor, expected: torch.Tensor) -> str:
    """The share of equal classes, as text."""
    return f"{(found == expected).float().mean():.3f}"
