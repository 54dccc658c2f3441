"""Small models, losses and configs that tests share."""

import schoolhouse as sh
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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


class Blocks(nn.Module):
    """Two blocks under activation checkpointing, if asked for."""

    def __init__(self, seed, mode=None):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.mode = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8), mode
        self.runs = 0
        self.two.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.runs += 1

    def forward(self, x):
        for block in (self.one, self.two):
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return x


class Projected(nn.Module):
    """A loss with parameters."""

    def __init__(self, width_s=16, width_t=32):
        super().__init__()
        self.map = nn.Linear(width_s, width_t)

    def forward(self, out_s, out_t):
        return F.mse_loss(self.map(out_s), out_t)


class Extra(Net):
    """Has extra state."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class Counts(sh.LocalTeacher):
    """A teacher in this process that counts what it is asked."""

    asked = 0

    def submit(self, *args, **kwargs):
        self.asked += 1
        return super().submit(*args, **kwargs)


def same(a, b):
    """Whether two models have equal states."""
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def bits(model):
    """The parameters and buffers, to the bit."""
    return {name: p.detach().numpy().tobytes() for name, p in [*model.named_parameters(), *model.named_buffers()]}


def config(teacher, criterion=None, balancer=None, **more):
    criterion = sh.LogitsDistillationLoss() if criterion is None else criterion
    return {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer, **more}


def converted(student, *args, **kwargs):
    return sh.convert(student, mode=[("kd_loss", config(*args, **kwargs))])


def some_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    """Logits of a student and of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(2)]
