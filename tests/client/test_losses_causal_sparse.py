"""The causal-LM loss of a teacher's forms equals that of its whole logits, or is the mean over counted rows."""

import math

import pytest
import torch
from models import some_logits
from schoolhouse import encodings, functional
from schoolhouse.losses import (
    CausalLMLoss,
    LogitsDistillationLoss,
    LogitsLoss,
)
from schoolhouse.sparse import HiddenLogits, PositionedFeatures, decode, with_head
from schoolhouse.teachers.encoder import encode
from schoolhouse_wire.encodings import Sampled, TopK
from sparse_forms import (
    ALL,
    LABELLED,
    LABELS,
    MASK,
    FakeHead,
    ids,
    positioned,
    top_k,
    value_and_gradient,
)
from torch import nn


def test_causal_positions_are_those_with_a_label_next():
    want = [[False, True, True, False], [False, True, True, False]]
    assert functional.causal_positions(LABELS).tolist() == want
    assert functional.causal_positions(LABELS[0], ignore_index=3).tolist() == [True, True, False, False]
    assert functional.causal_positions(LABELS[:, :1]).tolist() == [[False], [False]]


def causal_forms(student_classes, labels):
    """Names, forms that stand for the same logits, and those logits."""
    head = FakeHead(5, student_classes)
    hidden = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher = hidden @ head.weight.T
    mask = torch.ones(2, 4, dtype=torch.bool) if labels is None else functional.causal_positions(labels)
    asked = encodings.at_positions()
    return teacher, [
        HiddenLogits(hidden, head, 2),
        decode(encode(teacher, asked, mask)),
        with_head(decode(encode(hidden, asked, mask)), head, 3),
    ]


@pytest.mark.parametrize("labels", [LABELS, None, torch.full_like(LABELS, -100)], ids=["labels", "none", "ignored"])
@pytest.mark.parametrize("loss", ALL, **ids)
def test_causal_losses_of_forms_are_those_of_the_logits(loss, labels):
    if labels is None and isinstance(loss, LABELLED):
        return
    student = some_logits(2, 4, 6)[0]
    teacher, made = causal_forms(6, labels)
    want, due = value_and_gradient(CausalLMLoss(loss), student, teacher, labels)
    for form in made:
        got, gradient = value_and_gradient(CausalLMLoss(loss), student, form, labels)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, due, rtol=1e-12, atol=1e-14)


def test_causal_losses_of_sparse_forms_are_means_over_counted_rows():
    student, teacher = some_logits(2, 4, 6)
    counted = functional.causal_positions(LABELS)
    for encoding in (TopK(k=3), Sampled(n=9, seed=1)):
        form = decode(encode(teacher, encoding))
        each = LogitsDistillationLoss(reduction="none")(student, form)
        want = each[counted].mean()
        torch.testing.assert_close(CausalLMLoss(LogitsDistillationLoss())(student, form, LABELS), want)
        torch.testing.assert_close(CausalLMLoss(LogitsDistillationLoss())(student, form), each[:, :-1].mean())
    placed = decode(encode(teacher, encodings.at_positions(TopK(k=3)), counted))
    torch.testing.assert_close(
        CausalLMLoss(LogitsDistillationLoss())(student, placed, LABELS),
        LogitsDistillationLoss(reduction="none")(student, top_k(teacher, 3))[counted].mean(),
    )


def test_without_labels_the_positions_that_travelled_count():
    student, teacher = some_logits(2, 4, 6)
    each = LogitsDistillationLoss(reduction="none")(student, teacher)
    got = CausalLMLoss(LogitsDistillationLoss())(student, positioned(teacher))
    want = each[MASK & (torch.arange(4) < 3)].mean()
    torch.testing.assert_close(got, want)


def test_positions_that_count_must_have_travelled():
    student, teacher = some_logits(2, 4, 6)
    with pytest.raises(ValueError, match="2 of the 4 positions that the loss counts are not among the 5 .*causal_pos"):
        CausalLMLoss(LogitsDistillationLoss())(student, positioned(teacher), LABELS)
    by_sequence = PositionedFeatures(torch.tensor([True, False]), teacher[:1])
    with pytest.raises(ValueError, match=r"positions has the shape \(2,\); one value for each token, \(2, 4\)"):
        CausalLMLoss(LogitsDistillationLoss())(student, by_sequence, LABELS)


def test_ignored_positions_of_the_student_may_hold_garbage():
    student, teacher = some_logits(2, 4, 6)
    counted = functional.causal_positions(LABELS)
    dirty = student.masked_fill(~counted[..., None], math.nan)
    for form in (top_k(teacher, 3), decode(encode(teacher, encodings.at_positions(), counted))):
        want, due = value_and_gradient(CausalLMLoss(LogitsDistillationLoss()), student, form, LABELS)
        got, gradient = value_and_gradient(CausalLMLoss(LogitsDistillationLoss()), dirty, form, LABELS)
        assert got.item() == want.item()
        assert torch.equal(gradient, due)


class Scaled(LogitsLoss):
    """A loss of one's own, with a parameter, that knows tensors alone."""

    def __init__(self):
        super().__init__(1.0, "none")
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def per_example(self, logits_s, logits_t, labels=None):
        return self.scale * (logits_s - logits_t).abs().sum(-1)


def test_a_loss_of_ones_own_takes_hidden_states_and_positions_in_a_causal_one():
    student = some_logits(2, 4, 6)[0]
    teacher, made = causal_forms(6, LABELS)
    loss = CausalLMLoss(Scaled())
    want = loss(student, teacher, LABELS)
    (due,) = torch.autograd.grad(want, loss.loss.scale)
    for form in made:
        got = loss(student, form, LABELS)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, loss.loss.scale)[0], due)
    with pytest.raises(TypeError, match="TopKLogits, which is not a tensor"):
        loss(student, top_k(teacher, 3), LABELS)
