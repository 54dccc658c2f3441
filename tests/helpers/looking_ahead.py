"""What the tests of look-ahead share."""

import collections

import schoolhouse as sh
import torch
from models import Net, converted
from schoolhouse.errors import TeacherBusyError
from torch.nn import functional as F

Pair = collections.namedtuple("Pair", "y x")


def batches(count=6, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 8, generator=generator), torch.randint(0, 5, (rows,), generator=generator))
        for _ in range(count)
    ]


def distilled(teach, criterion=None, module=None, student=None):
    return converted(student or Net(seed=1), teach(module or Net(32)), criterion)


def train(model, loop):
    """Step through a loop whose batches are what the forward takes; they are not kept."""
    for x in loop:
        model(x)
        model.compute_kd_loss()
        del x


def expected_loss(student, teacher, x):
    """KL of the plain modules, in float64."""
    with torch.no_grad():
        log_s = F.log_softmax(student(x).double(), -1)
        t = F.softmax(teacher(x).double(), -1)
    return (t * (t.log() - log_s)).mean().item()


class Asked:
    """A teacher in this process that writes down what it was asked for, and answers when told to."""

    def __init__(self, module=None, hold=False):
        self.inner = sh.LocalTeacher(module or Net(32))
        self.asked, self.futures, self.hold, self.busy_from = [], [], hold, None

    def describe(self):
        return self.inner.describe()

    def submit(self, args, kwargs, taps):
        if self.busy_from is not None and len(self.asked) >= self.busy_from:
            raise TeacherBusyError("full")
        self.asked.append(args[0].clone())
        future = self.inner.submit(args, kwargs, taps)
        if self.hold:
            made, future = future.result(), type(future)()
            future.made = made
        self.futures.append(future)
        return future

    def close(self):
        pass
