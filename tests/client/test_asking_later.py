"""Without training the teacher is asked once its features are needed, as it would have been at the forward."""

import warnings
import weakref

import pytest
import torch
from models import Counts, Net, converted
from schoolhouse import errors
from torch import nn
from torch.nn import functional as F


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_without_training_nobody_is_asked_before_the_loss(x, mode):
    teacher = Counts(Net(32, seed=1))
    model = converted(Net(), teacher, nn.MSELoss()).train(mode == "no_grad")
    with torch.set_grad_enabled(mode == "eval"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            out = model(x)
    assert teacher.asked == 0
    before = x.clone()
    x.numpy()[:] = 0  # unseen by version counters
    assert torch.equal(model.compute_kd_loss(), F.mse_loss(out, Net(32, seed=1)(before)))
    assert teacher.asked == 1
    with pytest.raises(errors.UsageError):
        model.compute_kd_loss()
    model.train()
    model(x)
    assert teacher.asked == 2
    assert model.compute_kd_loss() > 0


def test_a_training_step_that_a_forward_without_gradients_ends(x):
    model = converted(Net(), Counts(Net(32, seed=1)), nn.MSELoss()).train()
    model(x)
    with torch.no_grad(), pytest.warns(UserWarning, match="again without compute_kd_loss"):
        model(x * 2)
    assert not model.compute_kd_loss().requires_grad


def test_eval_kd_asks_at_once(x):
    teacher = Counts(Net(32, seed=1))
    model = converted(Net(), teacher, nn.MSELoss(), eval_kd=True).eval()
    out = model(x)
    assert teacher.asked == 1
    assert torch.equal(model.compute_kd_loss(), F.mse_loss(out, Net(32, seed=1)(x)))


def test_a_teacher_that_is_asked_later_computes_as_it_would_have_then(x):
    """Under autocast of the forward, and not of the loss."""
    now = converted(Net(), Net(32, seed=1), nn.MSELoss(), eval_kd=True).eval()
    later = converted(Net(), Net(32, seed=1), nn.MSELoss()).eval()
    losses = []
    for inside in (True, False):
        for model in (now, later):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                model(x)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
                losses.append(model.compute_kd_loss().item())
    assert losses[0] == losses[1] != losses[2] == losses[3]


class Boxed(Net):
    """Takes its input in an object that nobody can copy."""

    def forward(self, box):
        return super().forward(box.x)


class Box:
    def __init__(self, x):
        self.x = x


def test_what_cannot_be_kept_is_asked_at_once(x):
    teacher = Counts(Boxed(32, seed=1))
    model = converted(Boxed(), teacher, nn.MSELoss()).eval()
    box = Box(x)
    out = model(box)
    box.x = x * 2
    assert torch.equal(model.compute_kd_loss(), F.mse_loss(out, Net(32, seed=1)(x)))


def test_only_the_last_batch_is_kept_for_later(x):
    kept = []

    class Keeps(Counts):
        def submit(self, args, kwargs, taps, **more):
            kept.append(weakref.ref(args[0]))
            return super().submit(args, kwargs, taps, **more)

    model = converted(Net(), Keeps(Net(32, seed=1)), nn.MSELoss()).eval()
    model(x)
    held = model._schoolhouse.step
    inner = weakref.ref(held.later.args[0][0])
    del held
    model(x * 2)
    assert inner() is None
    model.compute_kd_loss()
    assert [ref() for ref in kept] == [None]
