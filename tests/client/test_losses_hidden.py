"""Losses of hidden states with a head, and of positions, equal those of the whole logits, chunk by chunk."""

import pytest
import torch
from models import some_logits
from schoolhouse import encodings, functional
from schoolhouse.losses import (
    CausalLMLoss,
    DKDLoss,
    HiddenCosineLoss,
    HiddenMSELoss,
    LogitsDistillationLoss,
)
from schoolhouse.sparse import HiddenLogits, decode
from schoolhouse.teachers.encoder import encode
from schoolhouse_wire.encodings import Sampled, TopK
from sparse_forms import ALL, LABELLED, MASK, REDUCTIONS, FakeHead, ids, positioned, remade, value_and_gradient


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", ALL, **ids)
def test_hidden_states_are_the_whole_logits(loss, reduction):
    head = FakeHead(5, 11)
    student, _ = some_logits(3, 7, 11)
    hidden = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = (torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(2)),)
    labels = labels if isinstance(loss, LABELLED) else ()
    loss = remade(loss, reduction)
    want, due = value_and_gradient(loss, student, hidden @ head.weight.T, *labels)
    got, gradient = value_and_gradient(loss, student, HiddenLogits(hidden, head, chunk_rows=4), *labels)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, due, rtol=1e-12, atol=1e-14)
    assert max(head.asked) == 4
    assert sum(head.asked) == 2 * 21  # once forward, once backward


def test_no_gradient_and_no_memory_of_the_teacher():
    head = FakeHead(5, 11)
    head.weight.requires_grad_()
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    student = some_logits(6, 11)[0].requires_grad_()
    LogitsDistillationLoss()(student, HiddenLogits(hidden, head, 2)).backward()
    assert hidden.grad is None
    assert head.weight.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("loss", [*ALL, CausalLMLoss(LogitsDistillationLoss()), CausalLMLoss(DKDLoss())], **ids)
def test_only_a_chunk_of_the_teachers_logits_is_ever_made(loss):
    head = FakeHead(4, 50, torch.float32)
    student = torch.randn(2, 32, 50).requires_grad_()
    labels = torch.randint(0, 50, (2, 32))
    needs = isinstance(loss, (*LABELLED, CausalLMLoss))
    value = loss(student, HiddenLogits(torch.randn(2, 32, 4), head, 8), *((labels,) if needs else ()))
    value.backward()
    assert max(head.asked) <= 8
    assert len(head.asked) >= 16


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", ALL, **ids)
def test_positions_are_the_loss_of_their_rows(loss, reduction):
    student, teacher = some_logits(2, 4, 6)
    loss = remade(loss, reduction)
    labels = torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]])
    of_rows, of_all = ((labels[MASK],), (labels,)) if isinstance(loss, LABELLED) else ((), ())
    want, due = value_and_gradient(loss, student[MASK], teacher[MASK], *of_rows)
    got, gradient = value_and_gradient(loss, student, positioned(teacher), *of_all)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[MASK], due, rtol=1e-12, atol=1e-14)
    assert not gradient[~MASK].any()


def test_positions_of_other_forms_and_of_whole_sequences():
    student, teacher = some_logits(2, 4, 6)
    loss = LogitsDistillationLoss(reduction="mean")
    for encoding in (TopK(k=3), Sampled(n=9, seed=1)):
        form = positioned(teacher, encoding)
        torch.testing.assert_close(loss(student, form), loss(student[MASK], form.values))
    rows = torch.tensor([False, True])
    whole = decode(encode(teacher, encodings.at_positions(), rows))
    torch.testing.assert_close(loss(student, whole), loss(student[1:], teacher[1:]))


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean"])
def test_no_positions_is_zero(reduction):
    student, teacher = some_logits(2, 4, 6)
    for encoding in (None, TopK(k=3), Sampled(n=9, seed=1)):
        form = decode(encode(teacher, encodings.at_positions(encoding), torch.zeros_like(MASK)))
        value, gradient = value_and_gradient(LogitsDistillationLoss(reduction=reduction), student, form)
        assert value.item() == 0
        assert not gradient.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("module", [HiddenMSELoss, HiddenCosineLoss])
@pytest.mark.parametrize("masked", [True, False])
def test_hidden_losses_of_positions(module, reduction, masked):
    student, teacher = some_logits(2, 4, 6)
    counted = MASK.clone()
    counted[0, 0] = not masked
    student_hidden = student[..., :5].requires_grad_()
    torch.manual_seed(0)
    loss = module(5, 6, reduction).double()
    want = loss(student_hidden, teacher, mask=counted)
    due = torch.autograd.grad(want.sum(), student_hidden)[0]
    got = loss(student_hidden, positioned(teacher), mask=counted if masked else None)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), student_hidden)[0], due)


def test_hidden_losses_count_only_what_travelled():
    student, teacher = some_logits(2, 4, 6)
    with pytest.raises(ValueError, match="3 of the 8 positions that the loss counts are not among the 5"):
        functional.hidden_mse(student, positioned(teacher), mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"the mask has the shape \(2, 3\)"):
        functional.hidden_mse(student, positioned(teacher), mask=torch.ones(2, 3))


def test_one_row_without_a_batch():
    head, hidden = FakeHead(5, 11), torch.randn(5, dtype=torch.float64)
    student = some_logits(11)[0]
    want = LogitsDistillationLoss()(student, head.logits(hidden))
    torch.testing.assert_close(LogitsDistillationLoss()(student, HiddenLogits(hidden, head)), want)
