"""The heads of a teacher in this process: they are those of its weights as they are now."""

import copy
import pickle

import pytest
import schoolhouse as sh
import torch
from schoolhouse import encodings
from schoolhouse.errors import FeatureMismatchError, UnsupportedValueError
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(6, 9, bias=False)

    def forward(self, x):
        return self.lm_head(x)


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def logits(teacher, x):
    """The model's logits, of hidden states and the head."""
    future = teacher.submit((x,), {}, [""], encodings={"": encodings.hidden("lm_head")})
    return future.result()[""].dense()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.lm_head.weight, "data", torch.randn(9, 6)),
        lambda model: model.load_state_dict(Plain().state_dict(), assign=True),
        lambda model: model.load_state_dict(Plain().state_dict()),
        lambda model: setattr(model, "lm_head", nn.Linear(6, 9)),
        lambda model: model.bfloat16(),
    ],
    ids=["data", "assign", "copy", "module", "dtype"],
)
def test_a_local_teachers_head_follows_its_weights(x, change):
    model = Plain()
    teacher = sh.LocalTeacher(model)
    logits(teacher, x)
    change(model)
    x = x.to(model.lm_head.weight.dtype)
    assert torch.equal(logits(teacher, x), model(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
def test_a_copy_of_a_teacher_has_heads_of_its_own(x, again):
    teacher = sh.LocalTeacher(Plain())
    logits(teacher, x)
    twin = again(teacher)
    twin.module.lm_head.weight.add_(1)
    given = [logits(each, x) for each in (teacher, twin)]
    assert torch.equal(given[0], teacher.module(x))
    assert torch.equal(given[1], twin.module(x))


def test_logits_of_weights_that_changed_in_between_are_refused(x):
    model = Plain()
    teacher = sh.LocalTeacher(model)
    future = teacher.submit((x,), {}, [""], encodings={"": encodings.hidden("lm_head")})
    model.lm_head.weight.mul_(2)
    with pytest.raises(FeatureMismatchError, match="written into after its hidden states"):
        future.result()[""].dense()
    assert torch.equal(logits(teacher, x), model(x))


def test_a_head_is_held_against_the_logits_again(x):
    model = Plain()
    teacher = sh.LocalTeacher(model)
    for _ in range(3):
        logits(teacher, x)
    model.lm_head.register_forward_hook(lambda _module, _args, output: output + 1)
    with pytest.raises(UnsupportedValueError, match="does not compute this teacher's logits"):
        logits(teacher, x)


def test_under_autocast_a_head_needs_a_teacher_of_its_dtype(x):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UnsupportedValueError, match="Under autocast, load the teacher in the dtype"):
            logits(sh.LocalTeacher(Plain()), x)
        model = Plain().bfloat16()
        assert torch.equal(logits(sh.LocalTeacher(model), x), model(x))
