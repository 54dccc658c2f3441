"""Small models that tests share."""

import torch
from torch import nn


class Net(nn.Module):
    """Two linear layers around an in-place ReLU."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.body = nn.Linear(8, width)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, 5)
        torch.set_rng_state(generator_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.act(self.body(x)))
