"""Losses where one side pads its vocabulary: held against formulas of the shared classes, in float64 and numpy."""

import math

import numpy as np
import pytest
import schoolhouse as sh
import torch
from models import some_logits
from schoolhouse import functional
from schoolhouse.sparse import HiddenLogits
from sparse_forms import FakeHead, draws, positioned, top_k, value_and_gradient

SHARED, TEMPERATURE = 7, 2.0
LABELS = torch.tensor([[0, 5, 2, 3], [6, -100, 1, 0]])
PADS = [(SHARED, 10), (10, SHARED)]  # classes of the student and of the teacher


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def skewed(p, q):
    return kl(p, 0.2 * p + 0.8 * q)


def jensen(p, q):
    m = 0.3 * p + 0.7 * q
    return 0.3 * kl(p, m) + 0.7 * kl(q, m)


MAKERS = {
    "kl": (sh.LogitsDistillationLoss, kl),
    "reverse": (sh.ReverseKLLoss, lambda p, q: kl(q, p)),
    "jsd": (lambda *args, **kwargs: sh.JSDLoss(0.3, *args, **kwargs), jensen),
    "skewed": (lambda *args, **kwargs: sh.SkewedKLLoss(0.2, *args, **kwargs), skewed),
}
LABELLED = {"mft": sh.MFTLoss, "dkd": lambda t, *args, **kwargs: sh.DKDLoss(1.0, 2.0, t, *args, **kwargs)}
ALL = {**{name: make for name, (make, _) in MAKERS.items()}, **LABELLED}


def made(name, reduction="none"):
    return ALL[name](TEMPERATURE, reduction=reduction, vocabulary="shared")


def shares(row):
    """The distribution over the shared classes of a row of logits, by numpy."""
    scaled = np.asarray(row, dtype=np.float64)[:SHARED] / TEMPERATURE
    odds = np.exp(scaled - scaled.max())
    return odds / odds.sum()


def pair(classes_s, classes_t):
    student, _ = some_logits(2, 4, classes_s, seed=1)
    _, teacher = some_logits(2, 4, classes_t, seed=2)
    return student, teacher


def labels_of(name):
    return (LABELS.clamp(min=0),) if name in LABELLED else ()


@pytest.mark.parametrize(("classes_s", "classes_t"), PADS)
@pytest.mark.parametrize("name", MAKERS)
def test_whole_logits_are_normalised_over_the_shared_classes(name, classes_s, classes_t):
    student, teacher = pair(classes_s, classes_t)
    got, gradient = value_and_gradient(made(name), student, teacher)
    formula = MAKERS[name][1]
    want = [[formula(shares(t), shares(s)) * TEMPERATURE**2 for s, t in zip(*rows, strict=True)]
            for rows in zip(student, teacher, strict=True)]  # fmt: skip
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert gradient.shape == student.shape
    assert not gradient[..., SHARED:].any()  # padding gets none
    per_class = name == "kl"  # whose "mean" is ModelOpt's
    for reduction, divisor in (("sum", 1), ("batchmean", 2), ("mean", 8 * SHARED if per_class else 8)):
        assert made(name, reduction)(student, teacher).item() == pytest.approx(np.sum(want) / divisor)


@pytest.mark.parametrize(("classes_s", "classes_t"), PADS)
@pytest.mark.parametrize("name", ALL)
def test_a_form_of_all_the_logits_gives_what_they_give(name, classes_s, classes_t):
    student, teacher = pair(classes_s, classes_t)
    head = FakeHead(5, classes_t)
    hidden = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = labels_of(name)
    for reduction in ("none", "mean", "batchmean", "sum"):
        loss = made(name, reduction)
        cut = ALL[name](TEMPERATURE, reduction=reduction)  # of logits that were cut by hand
        dense = hidden @ head.weight.T
        want = value_and_gradient(cut, student[..., :SHARED], dense[..., :SHARED], *labels)
        got = value_and_gradient(loss, student, HiddenLogits(hidden, head, 3), *labels)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1][..., :SHARED], want[1])
        assert not got[1][..., SHARED:].any()
    if name not in LABELLED:
        form = positioned(teacher)
        got = made(name)(student, form)
        torch.testing.assert_close(got, made(name)(student, teacher)[form.mask])


@pytest.mark.parametrize("name", ["kl", "skewed", "jsd"])
@pytest.mark.parametrize("k", [1, 4, 9, 10])
def test_top_k_of_a_padded_teacher_leaves_its_padding_out(name, k):
    student, teacher = pair(SHARED, 10)
    form = top_k(teacher, k, TEMPERATURE)
    assert bool((form.indices >= SHARED).any())
    got, gradient = value_and_gradient(made(name), student, form)
    want = torch.zeros_like(got)
    for i in range(2):
        for j in range(4):
            odds = np.exp(teacher[i, j].numpy() / TEMPERATURE)
            kept = [c for c in form.indices[i, j].tolist() if c < SHARED]
            left_out = [c for c in range(10) if c not in form.indices[i, j].tolist()]
            tail = sum(odds[c] for c in left_out) if min(left_out, default=SHARED) < SHARED else 0.0
            p = np.array([odds[c] for c in kept] + [tail])
            q = shares(student[i, j])
            q = np.array([q[c] for c in kept] + [1 - sum(q[c] for c in kept)])
            if tail == 0:
                p, q = p[:-1], q[:-1]
            want[i, j] = MAKERS[name][1](p / p.sum(), q) * TEMPERATURE**2
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert bool(gradient.isfinite().all())
    loss, few, of_few = made(name), student[:1, :2].clone().requires_grad_(), top_k(teacher[:1, :2], k, TEMPERATURE)
    assert torch.autograd.gradcheck(lambda s: loss(s, of_few), few, fast_mode=True)


@pytest.mark.parametrize("name", ["kl", "skewed", "jsd"])
def test_top_k_of_a_teacher_whose_tail_has_no_padding_is_that_of_the_shared_logits(name):
    student, teacher = pair(SHARED, 10)
    teacher[..., SHARED:] += 20  # all three are among the k
    got = value_and_gradient(made(name), student, top_k(teacher, 6, TEMPERATURE))
    want = value_and_gradient(made(name), student, top_k(teacher[..., :SHARED].contiguous(), 3, TEMPERATURE))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["kl", "skewed", "jsd"])
def test_of_a_padded_student_the_tail_is_that_of_the_shared_classes(name):
    student, teacher = pair(10, SHARED)
    got, gradient = value_and_gradient(made(name), student, top_k(teacher, 3, TEMPERATURE))
    want = value_and_gradient(made(name), student[..., :SHARED], top_k(teacher, 3, TEMPERATURE))
    torch.testing.assert_close((got, gradient[..., :SHARED]), want)
    assert not gradient[..., SHARED:].any()


@pytest.mark.parametrize("name", ["kl", "skewed"])
@pytest.mark.parametrize(("classes_s", "classes_t"), PADS)
def test_draws_that_fell_on_padding_do_not_count(name, classes_s, classes_t):
    student, teacher = pair(classes_s, classes_t)
    form = draws(teacher, 20, 3, TEMPERATURE)
    got, gradient = value_and_gradient(made(name), student, form)
    want = torch.zeros_like(got)
    for i in range(2):
        for j in range(4):
            odds = np.exp(teacher[i, j].numpy() / TEMPERATURE)
            log_p, q = np.log(odds / odds.sum()), shares(student[i, j])
            drawn = list(zip(form.indices[i, j].tolist(), form.counts[i, j].tolist(), strict=True))
            drawn = [(c, count) for c, count in drawn if c < SHARED]
            m = sum(count for _, count in drawn)
            for c, count in drawn:
                p = math.exp(log_p[c]) / (m / 20)
                other = q[c] if name == "kl" else 0.2 * p + 0.8 * q[c]
                want[i, j] += count / m * math.log(p / other) * TEMPERATURE**2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not gradient[..., SHARED:].any()


@pytest.mark.parametrize("name", ["kl", "skewed"])
def test_many_draws_tend_to_the_loss_of_the_shared_classes(name):
    student, teacher = pair(SHARED, 10)
    got = value_and_gradient(made(name, "sum"), student, draws(teacher, 65535, 0, TEMPERATURE))
    want = value_and_gradient(made(name, "sum"), student, teacher)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_a_row_whose_draws_are_all_padding_counts_nothing():
    student, teacher = pair(SHARED, 10)
    teacher[0, 0, SHARED:] += 80
    value, gradient = value_and_gradient(made("kl"), student, draws(teacher, 20, 0, TEMPERATURE))
    assert value[0, 0] == 0
    assert not gradient[0, 0].any()
    assert bool(value.isfinite().all())


@pytest.mark.parametrize(("classes_s", "classes_t"), PADS)
@pytest.mark.parametrize("name", ALL)
def test_causal_losses_compare_the_shared_classes(name, classes_s, classes_t):
    student, teacher = pair(classes_s, classes_t)
    want = value_and_gradient(
        sh.CausalLMLoss(ALL[name](TEMPERATURE)), student[..., :SHARED], teacher[..., :SHARED], LABELS
    )
    got, gradient = value_and_gradient(sh.CausalLMLoss(made(name)), student, teacher, LABELS)
    torch.testing.assert_close((got, gradient[..., :SHARED]), want)
    assert not gradient[..., SHARED:].any()
    head = FakeHead(classes_t, classes_t)  # logits are its width's, so that hidden states can be any
    hidden = HiddenLogits(teacher @ torch.linalg.inv(head.weight.T), head, 3)
    torch.testing.assert_close(sh.CausalLMLoss(made(name))(student, hidden, LABELS), want[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", [lambda t: top_k(t, 4, TEMPERATURE), lambda t: draws(t, 20, 0, TEMPERATURE)])
def test_causal_losses_of_a_padded_teachers_sparse_forms(make):
    student, teacher = pair(SHARED, 10)
    form = make(teacher)
    counted = LABELS[:, 1:] != -100
    want = made("kl")(student, form)[:, :-1][counted].mean()
    torch.testing.assert_close(sh.CausalLMLoss(made("kl"))(student, form, LABELS), want)


def test_equal_classes_are_computed_as_ever():
    student, teacher = some_logits(2, 4, 9)
    for name, make in ALL.items():
        rest = labels_of(name)
        plain, shared = make(TEMPERATURE), make(TEMPERATURE, vocabulary="shared")
        assert torch.equal(plain(student, teacher, *rest), shared(student, teacher, *rest))


def test_the_error_names_the_way():
    student, teacher = torch.zeros(2, 49_152), torch.zeros(2, 49_280)
    says = "give the loss vocabulary='shared': it compares the first 49152 classes"
    for loss in (sh.LogitsDistillationLoss(), sh.ReverseKLLoss(), sh.CausalLMLoss(sh.JSDLoss())):
        with pytest.raises(ValueError, match=says):
            loss(student, teacher)
        with pytest.raises(ValueError, match=says):
            loss(student, top_k(teacher, 3))
    with pytest.raises(ValueError, match=r"\(3, 49280\); they must be equal$"):
        sh.LogitsDistillationLoss(vocabulary="shared")(student, torch.zeros(3, 49_280))
    for wrong in (lambda: sh.DKDLoss(vocabulary="first"), lambda: functional.jsd(student, student, vocabulary="first")):
        with pytest.raises(ValueError, match="vocabulary is 'first'; choices: 'equal', 'shared'"):
            wrong()


def test_losses_of_ones_own_may_have_it_too():
    class Squares(sh.LogitsLoss):
        def __init__(self):
            super().__init__(1.0, "none", "shared")

        def per_example(self, logits_s, logits_t, labels=None):
            return (logits_s - logits_t).square().mean(-1)

    student, teacher = pair(SHARED, 10)
    want = (student - teacher[..., :SHARED]).square().mean(-1)[:, :-1].mean()
    torch.testing.assert_close(sh.CausalLMLoss(Squares())(student, teacher).double(), want)
