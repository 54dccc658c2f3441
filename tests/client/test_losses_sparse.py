"""Losses of top-k logits and of draws: held against dense formulas in float64, written out here."""

import math

import pytest
import torch
from models import some_logits
from schoolhouse.losses import (
    DKDLoss,
    JSDLoss,
    LogitsDistillationLoss,
    MFTLoss,
    ReverseKLLoss,
    SkewedKLLoss,
)
from schoolhouse.sparse import HiddenLogits
from sparse_forms import (
    LABELLED,
    FakeHead,
    draws,
    forms,
    remade,
    top_k,
    value_and_gradient,
)


def collapsed(logits, indices, temperature):
    """Probabilities `[..., k + 1]` of the classes of `indices`, and of all others together; `[..., k]` if all are."""
    p = (logits / temperature).softmax(-1)
    if indices.shape[-1] == p.shape[-1]:
        return p.gather(-1, indices)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, indices, True)
    return torch.cat([p.gather(-1, indices), (p * ~kept).sum(-1, keepdim=True)], dim=-1)


def kl(p, q):
    return (torch.where(p > 0, p * (p / q).log(), 0.0)).sum(-1)


def skewed(p, q):
    return kl(p, 0.2 * p + 0.8 * q)


def jensen(p, q):
    m = 0.3 * p + 0.7 * q
    return 0.3 * kl(p, m) + 0.7 * kl(q, m)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 10, 11])
@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (LogitsDistillationLoss, kl),
        (lambda t, r: SkewedKLLoss(0.2, t, r), skewed),
        (lambda t, r: JSDLoss(0.3, t, r), jensen),
        (lambda t, r: JSDLoss(0.0, t, r), kl),
    ],
    ids=["kl", "skewed", "jsd", "jsd0"],
)
def test_top_k_is_the_divergence_over_k_and_one_class(make, formula, k, temperature):
    student, teacher = some_logits(2, 3, 11)
    form = top_k(teacher, k, temperature)
    reference = student.clone().requires_grad_()
    want = formula(collapsed(teacher, form.indices, temperature), collapsed(reference, form.indices, temperature))
    want = want * temperature**2
    due = torch.autograd.grad(want.sum(), reference)[0]
    got, gradient = value_and_gradient(make(temperature, "none"), student, form)
    torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, due, rtol=1e-10, atol=1e-12)
    for reduction, divisor in (("sum", 1), ("batchmean", 2), ("mean", 66 if make is LogitsDistillationLoss else 6)):
        assert make(temperature, reduction)(student, form).item() == pytest.approx(want.sum().item() / divisor)


def test_top_k_of_all_classes_is_the_whole_divergence():
    student, teacher = some_logits(4, 11)
    for loss in (LogitsDistillationLoss(2.0), SkewedKLLoss(0.2, 2.0), JSDLoss(0.3, 2.0)):
        torch.testing.assert_close(loss(student, top_k(teacher, 11, 2.0)), loss(student, teacher))


def test_top_k_bounds_the_whole_divergence_from_below_and_more_tightly_with_k():
    student, teacher = some_logits(50, 40, scale=3.0)
    whole = LogitsDistillationLoss(reduction="none")(student, teacher)
    last = torch.zeros_like(whole)
    for k in (1, 2, 5, 20, 39):
        bound = LogitsDistillationLoss(reduction="none")(student, top_k(teacher, k))
        assert bool((bound >= last - 1e-12).all())
        assert bool((bound <= whole + 1e-12).all())
        last = bound
    assert bool((last > 0).all())


def test_a_students_tail_is_not_lost_beside_its_head():
    student, teacher = torch.tensor([[40.0, 1.0, 0.0]]), torch.tensor([[5.0, 4.0, 3.0]])
    got, gradient = value_and_gradient(LogitsDistillationLoss(reduction="none"), student, top_k(teacher, 1))
    reference = student.double().requires_grad_()
    q = reference.softmax(-1)
    p = teacher.double().softmax(-1)
    want = (p[:, 0] * (p[:, 0] / q[:, 0]).log()) + p[:, 1:].sum(-1) * (p[:, 1:].sum(-1) / q[:, 1:].sum(-1)).log()
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=0)
    due = torch.autograd.grad(want.sum(), reference)[0]
    torch.testing.assert_close(gradient.double(), due, rtol=1e-5, atol=1e-12)


def test_classes_that_neither_has_leave_no_nan():
    student, teacher = (logits.masked_fill(torch.arange(6) > 2, -math.inf) for logits in some_logits(2, 6))
    for loss in (LogitsDistillationLoss(), SkewedKLLoss(), JSDLoss()):
        for k in (3, 5):
            value, gradient = value_and_gradient(remade(loss, "sum"), student, top_k(teacher, k))
            torch.testing.assert_close(value, remade(loss, "sum")(student, teacher))
            assert not gradient.isnan().any()
    value, gradient = value_and_gradient(LogitsDistillationLoss(), student, draws(teacher, 9, 0))
    assert bool(value.isfinite())
    assert not gradient.isnan().any()


@pytest.mark.parametrize(
    ("make", "ratio"),
    [
        (LogitsDistillationLoss, lambda p, q: (p / q).log()),
        (lambda t, r: SkewedKLLoss(0.2, t, r), lambda p, q: (p / (0.2 * p + 0.8 * q)).log()),
        (lambda t, r: SkewedKLLoss(0.0, t, r), lambda p, q: (p / q).log()),
    ],
    ids=["kl", "skewed", "skewed0"],
)
def test_a_loss_of_draws_is_their_mean(make, ratio):
    student, teacher = some_logits(2, 3, 7)
    form = draws(teacher, 20, 3, temperature=2.0)
    reference = student.clone().requires_grad_()
    p, q = (teacher / 2).softmax(-1), (reference / 2).softmax(-1)
    counts = torch.zeros_like(p).scatter_add(-1, form.indices, form.counts.double())
    want = 4 * (counts / 20 * ratio(p, q)).sum(-1)
    due = torch.autograd.grad(want.sum(), reference)[0]
    got, gradient = value_and_gradient(make(2.0, "none"), student, form)
    torch.testing.assert_close(got, want.detach())
    torch.testing.assert_close(gradient, due)


def test_draws_are_unbiased_in_value_and_gradient():
    student, teacher = some_logits(2, 6)
    want, due = value_and_gradient(LogitsDistillationLoss(reduction="none"), student, teacher)
    values, gradients = zip(
        *(
            value_and_gradient(LogitsDistillationLoss(reduction="none"), student, draws(teacher, 8, seed))
            for seed in range(1500)
        ),
        strict=True,
    )
    for found, exact in ((torch.stack(values), want), (torch.stack(gradients), due)):
        error = (found.mean(0) - exact).abs()
        stderr = found.std(0) / math.sqrt(len(found))
        assert bool((error <= 5 * stderr).all())
        assert bool((stderr <= 0.05).all())


def test_bf16_students_get_losses_computed_in_float32():
    student, teacher = some_logits(4, 9, dtype=torch.float32)
    half = student.bfloat16()
    for form in (top_k(teacher, 3), draws(teacher, 5, 0)):
        got = LogitsDistillationLoss()(half, form)
        assert got.dtype == torch.bfloat16
        assert got.item() == LogitsDistillationLoss()(half.float(), form).bfloat16().item()


@pytest.mark.parametrize(
    ("loss", "kinds"),
    [
        (ReverseKLLoss(2.0), (0, 1)),
        (SkewedKLLoss(0.2, 2.0, reverse=True), (0, 1)),
        (JSDLoss(1.0, 2.0), (0, 1)),
        (JSDLoss(0.3, 2.0), (1,)),
        (MFTLoss(2.0), (0, 1)),
        (DKDLoss(1.0, 2.0, 2.0), (0, 1)),
    ],
    ids=str,
)
def test_losses_that_read_what_did_not_travel_are_refused(loss, kinds):
    student, teacher = some_logits(2, 7)
    labels = (torch.tensor([1, 2]),) if isinstance(loss, LABELLED) else ()
    for kind in kinds:
        form = forms(teacher)[kind]
        with pytest.raises(
            TypeError, match=rf"can't be computed from {type(form).__name__}: .*Choices: .*hidden, int8"
        ):
            loss(student, form, *labels)


def test_another_temperature_is_refused_with_what_to_ask_for():
    student, teacher = some_logits(2, 7)
    for form, asked in zip(forms(teacher, 3.0), ("topk(3, ", "sampled(5, "), strict=True):
        with pytest.raises(ValueError, match="came at 3.0.*re-tempered") as caught:
            LogitsDistillationLoss(2.0)(student, form)
        assert asked + "temperature=2.0)" in str(caught.value)


def test_gradients_of_sparse_forms():
    student, teacher = some_logits(2, 5)
    student.requires_grad_()
    for form in (top_k(teacher, 2), draws(teacher, 4, 0)):
        for loss in (LogitsDistillationLoss(), SkewedKLLoss(0.3)):
            assert torch.autograd.gradcheck(lambda s, loss=loss, form=form: loss(s, form), (student,))
    hidden = HiddenLogits(torch.randn(2, 3, dtype=torch.float64), FakeHead(3, 5), 1)
    assert torch.autograd.gradcheck(lambda s: JSDLoss()(s, hidden), (student,))
