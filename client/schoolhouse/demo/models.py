"""The demo's teacher, its tiny student, and scikit-learn's handwritten digits."""

import torch
from torch import nn


class DigitsTeacher(nn.Module):
    """A CNN for 8x8 digits; `neck` is the feature map `[batch, 16, 4, 4]` that the student may imitate."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.neck = nn.Sequential(nn.Conv2d(width, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.3))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, 10]` of images `[batch, 1, 8, 8]`."""
        logits: torch.Tensor = self.fc(self.head(self.neck(self.body(self.stem(x)))))
        return logits


class DigitsStudent(nn.Module):
    """A tiny CNN; `hint` has the shape of the teacher's `neck`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.hint = nn.Conv2d(4, 16, 1)
        self.fc = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, 10]` of images `[batch, 1, 8, 8]`."""
        logits: torch.Tensor = self.fc(self.hint(self.stem(x).relu()).relu().flatten(1))
        return logits


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images `[n, 1, 8, 8]` in [0, 1] and labels `[n]`: 1,197 to train on and 600 to test on.

    The split is always the same.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[600:], labels[600:], images[:600], labels[:600]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of `images` that `model`, called in eval mode and without gradients, names right."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right: float = (model(images).argmax(-1) == labels).float().mean().item()
    model.train(training)
    return right
