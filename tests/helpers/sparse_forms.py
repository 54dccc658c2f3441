"""What the tests of a teacher's sparse forms share."""

import copy

import torch
from schoolhouse import encodings
from schoolhouse.losses import (
    DKDLoss,
    JSDLoss,
    LogitsDistillationLoss,
    MFTLoss,
    ReverseKLLoss,
    SkewedKLLoss,
)
from schoolhouse.sparse import decode
from schoolhouse.teachers.encoder import encode
from schoolhouse_wire.encodings import Sampled, TopK

REDUCTIONS = ["none", "sum", "batchmean", "mean"]
ALL = [
    LogitsDistillationLoss(2.0),
    ReverseKLLoss(2.0),
    JSDLoss(0.3, 2.0),
    JSDLoss(1.0, 2.0),
    SkewedKLLoss(0.2, 2.0),
    SkewedKLLoss(0.2, 2.0, reverse=True),
    MFTLoss(2.0, 0.3),
    DKDLoss(1.0, 2.0, 2.0),
]
LABELLED = (MFTLoss, DKDLoss)
ids = {"ids": lambda loss: type(loss).__name__}


MASK = torch.tensor([[True, True, False, True], [False, True, False, True]])


LABELS = torch.tensor([[0, -100, 2, 3], [-100, -100, 1, 0]])


class FakeHead:
    """A linear head that remembers how many rows it was asked for at once."""

    def __init__(self, width, classes, dtype=torch.float64):
        self.weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(9), dtype=dtype)
        self.asked = []

    @property
    def classes(self):
        return len(self.weight)

    def logits(self, hidden):
        self.asked.append(hidden.shape[:-1].numel())
        return hidden @ self.weight.T


def remade(loss, reduction):
    """The loss with another reduction."""
    other = copy.deepcopy(loss)
    other._reduction = reduction
    return other


def value_and_gradient(loss, student, *rest):
    student = student.detach().clone().requires_grad_()
    value = loss(student, *rest)
    return value, torch.autograd.grad(value.sum(), student)[0]


def top_k(logits, k, temperature=1.0):
    return decode(encode(logits, TopK(k=k, temperature=temperature)))


def draws(logits, n, seed, temperature=1.0):
    return decode(encode(logits, Sampled(n=n, temperature=temperature, seed=seed)))


def forms(teacher, temperature=2.0):
    return [top_k(teacher, 3, temperature), draws(teacher, 5, 0, temperature)]


def positioned(teacher, encoding=None):
    return decode(encode(teacher, encodings.at_positions(encoding), MASK))
