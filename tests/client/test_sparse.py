"""The forms that a loss gets: what they stand for, and what they say where a tensor is needed."""

import copy

import pytest
import torch
from models import some_logits
from schoolhouse import functional
from schoolhouse.losses import (
    LogitsDistillationLoss,
)
from schoolhouse.sparse import HiddenLogits, PositionedFeatures, SparseForm, TopKLogits, with_head
from schoolhouse_wire.values.tree import map_tensors
from sparse_forms import (
    FakeHead,
    forms,
)
from torch import nn
from torch.nn import functional as F


def all_forms():
    teacher = some_logits(2, 3, 7)[1]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    hidden = HiddenLogits(torch.zeros(2, 3, 4, dtype=torch.float64), FakeHead(4, 7))
    return [*forms(teacher), hidden, PositionedFeatures(mask, teacher[mask])]


def test_other_shapes_and_students_are_refused():
    student, teacher = some_logits(2, 7)
    for form in (*forms(teacher), HiddenLogits(torch.zeros(2, 3), FakeHead(3, 7))):
        with pytest.raises(ValueError, match=r"\(2, 6\), the teacher's \(2, 7\)"):
            LogitsDistillationLoss(2.0)(student[:, :6], form)
        with pytest.raises(TypeError, match="student's logits came as builtins.str"):
            LogitsDistillationLoss(2.0)("logits", form)


@pytest.mark.parametrize("form", all_forms(), ids=lambda form: type(form).__name__)
def test_torch_functions_say_what_a_form_is(form):
    assert isinstance(form, SparseForm)
    assert form.shape == (2, 3, 7)
    assert form.device == torch.device("cpu")
    tensor = torch.zeros(2, 3, 7)
    name = type(form).__name__
    for use in (
        lambda: torch.softmax(form, -1),
        lambda: tensor - form,
        lambda: form - tensor,
        lambda: nn.MSELoss()(tensor, form),
        lambda: F.kl_div(tensor, form),
    ):
        with pytest.raises(TypeError, match=rf"{name}, which is not a tensor: .*take it"):
            use()
    with pytest.raises(AttributeError, match=f"no 'float'.*{name}"):
        form.float()
    assert getattr(form, "logits", form) is form
    copied = copy.deepcopy(form)
    assert copied.shape == form.shape


def test_other_losses_refuse_forms_with_the_choices():
    form = all_forms()[0]
    with pytest.raises(TypeError, match=r"TopKLogits, which is not a tensor"):
        functional.hidden_mse(torch.zeros(2, 3, 7), form)
    with pytest.raises(TypeError, match=r"PositionedFeatures, which is not a tensor"):
        functional.rkd_distance(torch.zeros(2, 3), all_forms()[3])


@pytest.mark.parametrize("form", all_forms(), ids=lambda form: type(form).__name__)
def test_forms_move_as_records(form):
    seen = []
    moved = map_tensors(form, lambda tensor: seen.append(tensor) or tensor.clone())
    assert type(moved) is type(form)
    assert moved.shape == form.shape
    assert seen
    if isinstance(form, HiddenLogits):
        assert moved.head is form.head


def test_dense_logits_of_hidden_states():
    form = HiddenLogits(torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), FakeHead(4, 7))
    assert torch.equal(form.dense(), form.hidden.detach() @ form.head.weight.T)
    assert not form.dense().requires_grad
    mask = torch.tensor([True, False])
    states = PositionedFeatures(mask, form.hidden.detach()[mask])
    made = with_head(states, form.head, 2)
    torch.testing.assert_close(made.values.dense(), form.dense()[mask])
    assert made.values.chunk_rows == 2


def test_rows_are_picked_as_if_flattened():
    for form in all_forms()[:3]:
        picked = form.rows(torch.tensor([4, 0]))
        assert picked.shape == (2, 7)
        if isinstance(form, TopKLogits):
            assert torch.equal(picked.values, form.values.flatten(0, 1)[[4, 0]])
            assert torch.equal(picked.tail, form.tail.flatten()[[4, 0]])
