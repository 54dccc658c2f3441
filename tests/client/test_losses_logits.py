"""Losses between logits against plain Python, their properties, and logits at the edge of what numbers can hold."""

import math

import pytest
import torch
from models import some_logits
from schoolhouse import functional

INF = math.inf
SETTINGS = [0.0, 0.1, 0.5, 0.9]
# The label-free losses as functions of (logits_s, logits_t, **settings).
DIVERGENCES = {
    "forward": functional.logits_distillation,
    "reverse": functional.reverse_kl,
    "jsd": functional.jsd,
    "jsd at 0": lambda s, t, **k: functional.jsd(s, t, beta=0.0, **k),
    "jsd at 1": lambda s, t, **k: functional.jsd(s, t, beta=1.0, **k),
    "skewed": functional.skewed_kl,
    "skewed, reverse": lambda s, t, **k: functional.skewed_kl(s, t, reverse=True, **k),
}
MODELOPTS = ("forward",)
LABELED = {"mft": functional.mft, "dkd": functional.dkd}


def softmax(logits, temperature=1.0):
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mixture(p, q, weight):
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def jsd(s, t, beta):
    if beta in (0, 1):
        return kl(s, t) if beta else kl(t, s)
    m = mixture(t, s, beta)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def dkd(s, t, label, alpha, beta):
    rest = [c for c in range(len(s)) if c != label]
    masses = [[p[label], sum(p[c] for c in rest)] for p in (s, t)]
    others = [[p[c] / sum(p[c] for c in rest) for c in rest] for p in (s, t)]
    return alpha * kl(masses[1], masses[0]) + beta * kl(others[1], others[0])


def corrected(t, label, threshold):
    """The share x of (1 - x) * t + x * onehot(label) that gives the lead, or the label's mass, which the paper asks."""
    top = max(range(len(t)), key=t.__getitem__)
    if top != label:  # ((1 - x) * t[label] + x) - (1 - x) * t[top] = threshold
        x = (threshold - t[label] + t[top]) / (1 - t[label] + t[top])
    else:  # (1 - x) * t[label] + x = min(1, t[label] + threshold)
        x = (min(1.0, t[label] + threshold) - t[label]) / (1 - t[label])
    return [(1 - x) * p + x * (c == label) for c, p in enumerate(t)]


def expected(formula, student, teacher, temperature, *labels):
    rows = zip(student.flatten(0, -2).tolist(), teacher.flatten(0, -2).tolist(), *labels, strict=True)
    return [temperature**2 * formula(softmax(s, temperature), softmax(t, temperature), *y) for s, t, *y in rows]


def as_list(loss):
    return loss.flatten().tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_are_their_formulas(temperature):
    student, teacher = some_logits(2, 3, 5)
    known = {"temperature": temperature, "reduction": "none"}

    def check(loss, formula):
        assert loss.shape == (2, 3)
        assert as_list(loss) == pytest.approx(expected(formula, student, teacher, temperature), rel=1e-9)

    check(functional.logits_distillation(student, teacher, **known), lambda s, t: kl(t, s))
    check(functional.reverse_kl(student, teacher, **known), kl)
    for weight in [*SETTINGS, 1.0]:
        check(functional.jsd(student, teacher, beta=weight, **known), lambda s, t: jsd(s, t, weight))  # noqa: B023
    for weight in SETTINGS:
        forward = functional.skewed_kl(student, teacher, alpha=weight, **known)
        check(forward, lambda s, t: kl(t, mixture(t, s, weight)))  # noqa: B023
        reverse = functional.skewed_kl(student, teacher, alpha=weight, reverse=True, **known)
        check(reverse, lambda s, t: kl(s, mixture(s, t, weight)))  # noqa: B023


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.0, 1.0), (2.0, 0.0)])
def test_dkd_is_its_formula(temperature, alpha, beta):
    student, teacher = some_logits(2, 3, 5)
    labels = torch.tensor([[0, 4, 2], [1, 1, 3]])
    settings = {"alpha": alpha, "beta": beta, "temperature": temperature, "reduction": "none"}
    loss = functional.dkd(student, teacher, labels, **settings)
    want = expected(lambda s, t, y: dkd(s, t, y, alpha, beta), student, teacher, temperature, labels.flatten().tolist())
    assert loss.shape == (2, 3)
    assert as_list(loss) == pytest.approx(want, rel=1e-9)


def test_dkd_with_the_teachers_own_weight_is_the_kl():
    # KL(t || s) = TCKD + (1 - p_t(label)) * NCKD: the paper's equation 7, an identity that holds row by row.
    student, teacher = some_logits(4, 6)
    labels = torch.tensor([0, 5, 2, 2])
    rest = 1 - teacher.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    parts = [
        functional.dkd(student, teacher, labels, alpha=a, beta=1 - a, temperature=1.0, reduction="none") for a in (1, 0)
    ]
    whole = functional.logits_distillation(student, teacher, reduction="none")
    torch.testing.assert_close(parts[0] + rest * parts[1], whole)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7, 1.0])
def test_mft_is_its_formula(temperature, threshold):
    student, teacher = some_logits(2, 4, 5)
    labels = teacher.flatten(0, 1).argmax(-1)
    labels[1::2] = (labels[1::2] + 1) % 5  # wrong teachers and right ones
    settings = {"temperature": temperature, "threshold": threshold}
    loss = functional.mft(student, teacher, labels, **settings, reduction="none")
    want = expected(lambda s, t, y: kl(corrected(t, y, threshold), s), student, teacher, temperature, labels.tolist())
    assert loss.shape == (8, 5)
    assert loss.sum(-1).tolist() == pytest.approx(want, rel=1e-5, abs=1e-5)
    for reduction, divisor in [("sum", 1), ("batchmean", 8), ("mean", 40)]:
        reduced = functional.mft(student, teacher, labels, **settings, reduction=reduction)
        assert reduced.item() == pytest.approx(sum(want) / divisor, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mft_of_threshold_one_is_the_labels_alone(dtype):
    # Rounding may push the share of the label above 1; the loss must not become the logarithm of a negative number.
    student, teacher = some_logits(200, 7, dtype=dtype)
    labels = torch.arange(200) % 7
    loss = functional.mft(student, teacher, labels, threshold=1.0, reduction="none").sum(-1)
    want = -student.double().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(loss.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_mean_is_over_the_examples_and_over_all_elements_only_where_it_is_modelopts(name):
    student, teacher = some_logits(2, 3, 5)
    each = DIVERGENCES[name](student, teacher, reduction="none")
    assert each.shape == (2, 3)
    for reduction, divisor in [("sum", 1), ("batchmean", 2), ("mean", 30 if name in MODELOPTS else 6)]:
        reduced = DIVERGENCES[name](student, teacher, reduction=reduction)
        assert reduced.item() == pytest.approx(sum(as_list(each)) / divisor)
    with pytest.raises(ValueError, match="reduction is 'avg'; choices: 'mean', 'batchmean', 'sum', 'none'"):
        DIVERGENCES[name](student, teacher, reduction="avg")


def test_reductions_of_dkd():
    student, teacher = some_logits(2, 3, 5)
    labels = torch.ones(2, 3, dtype=torch.int64)
    each = as_list(functional.dkd(student, teacher, labels, reduction="none"))
    for reduction, divisor in [("sum", 1), ("batchmean", 2), ("mean", 6)]:
        assert functional.dkd(student, teacher, labels, reduction=reduction).item() == pytest.approx(
            sum(each) / divisor
        )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_for_equals_and_else_above(name):
    student, teacher = some_logits(50, 6)
    assert as_list(DIVERGENCES[name](student, student + 3.0, reduction="none")) == pytest.approx([0] * 50, abs=1e-12)
    assert min(as_list(DIVERGENCES[name](student, teacher, reduction="none"))) > 0.0


def test_jsd_is_symmetric_and_bounded():
    student, teacher = some_logits(50, 6, scale=20.0)
    one, other = (functional.jsd(*pair, reduction="none") for pair in [(student, teacher), (teacher, student)])
    torch.testing.assert_close(one, other)
    assert max(as_list(one)) <= math.log(2)
    disjoint = functional.jsd(torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]]), reduction="none")
    assert disjoint.item() == pytest.approx(math.log(2))


def test_the_limits_of_jsd_and_of_the_skew():
    student, teacher = some_logits(8, 6)
    forward = functional.logits_distillation(student, teacher, reduction="none")
    reverse = functional.reverse_kl(student, teacher, reduction="none")
    torch.testing.assert_close(functional.jsd(student, teacher, beta=0.0, reduction="none"), forward)
    torch.testing.assert_close(functional.jsd(student, teacher, beta=1.0, reduction="none"), reverse)
    # Between, the divergence over its weight tends to the same.
    near_0 = functional.jsd(student, teacher, beta=1e-6, reduction="none") / 1e-6
    near_1 = functional.jsd(student, teacher, beta=1 - 1e-6, reduction="none") / 1e-6
    torch.testing.assert_close(near_0, forward, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near_1, reverse, rtol=1e-3, atol=1e-4)
    for backwards, plain in [(False, forward), (True, reverse)]:
        skewed = [
            functional.skewed_kl(student, teacher, alpha=a, reverse=backwards, reduction="none") for a in (0, 1e-9, 0.5)
        ]
        torch.testing.assert_close(skewed[0], plain)
        torch.testing.assert_close(skewed[1], plain, rtol=1e-5, atol=1e-6)
        assert bool((skewed[2] < plain).all())


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_gradients(name, reduction):
    student, teacher = some_logits(3, 4)
    student.requires_grad_()
    loss = DIVERGENCES[name]
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, temperature=2.0, reduction=reduction), (student,))


@pytest.mark.parametrize("name", LABELED)
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_gradients_with_labels(name, reduction):
    student, teacher = some_logits(3, 4)
    student.requires_grad_()
    labels = torch.tensor([0, 3, int(teacher[2].argmax())])
    loss = LABELED[name]
    assert torch.autograd.gradcheck(
        lambda s: loss(s, teacher, labels, temperature=2.0, reduction=reduction), (student,)
    )


def all_losses(student, teacher, labels, **settings):
    """Per-example losses `[n]` of all functions, by name."""
    for name, loss in DIVERGENCES.items():
        yield name, loss(student, teacher, reduction="none", **settings)
    yield "dkd", functional.dkd(student, teacher, labels, reduction="none", **{"temperature": 1.0, **settings})
    yield "mft", functional.mft(student, teacher, labels, reduction="none", **settings).sum(-1)


def test_the_teacher_gets_no_gradient():
    student, teacher = (x.requires_grad_() for x in some_logits(3, 4))
    for name, loss in all_losses(student, teacher, torch.tensor([0, 1, 2])):
        (of_student, of_teacher) = torch.autograd.grad(loss.sum(), (student, teacher), allow_unused=True)
        assert of_teacher is None, name
        assert bool((of_student != 0).any()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 50.0])
def test_extreme_logits_and_dtypes(dtype, temperature):
    # In float16 the ports compute in the dtype of the logits, where 1e4 / 0.1 is too large a number.
    size = 1e3 if dtype == torch.float16 and temperature < 1 else 1e4
    teacher = torch.tensor([[size, -size, 0.0], [-size, -size, size], [0.0, 0.0, 0.0]], dtype=dtype)
    student = torch.tensor(
        [[size, -size, 0.0], [-size, -size, size - 8], [0.5, 0.0, -0.5]], dtype=dtype
    ).requires_grad_()
    for name, loss in all_losses(student, teacher, torch.tensor([0, 2, 1]), temperature=temperature):
        assert loss.dtype == dtype, name
        assert bool(loss.isfinite().all()), (name, loss)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.dtype == dtype
        assert bool(gradient.isfinite().all()), (name, gradient)


def test_confident_and_opposed_distributions():
    teacher = torch.tensor([[1e4, -1e4]])
    student = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    label = torch.tensor([0])
    losses = {name: loss.item() for name, loss in all_losses(student, teacher, label)}
    want = {
        "forward": 2e4,
        "reverse": 2e4,
        "jsd": math.log(2),
        "jsd at 0": 2e4,
        "jsd at 1": 2e4,
        "skewed": -math.log(0.1),
        "skewed, reverse": -math.log(0.1),
        "dkd": 2e4,  # one class beside the label: NCKD is 0
        "mft": 2e4,
    }
    assert losses == pytest.approx(want, rel=1e-5)
    for name, loss in all_losses(student, teacher, label):
        assert bool(torch.autograd.grad(loss.sum(), student)[0].isfinite().all()), name


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(temperature):
    student, teacher = some_logits(6, 5, dtype=torch.float32)
    student.requires_grad_()
    labels = torch.arange(6) % 5
    wide = student.detach().double().requires_grad_()
    exact = all_losses(wide, teacher.double(), labels, temperature=temperature)
    for (name, loss), (_, want) in zip(
        all_losses(student, teacher, labels, temperature=temperature), exact, strict=True
    ):
        # A value is a small difference times temperature squared, and so is what rounding left; a gradient is not.
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6 * max(1.0, temperature**2), msg=name)
        got, due = torch.autograd.grad(loss.sum(), student)[0], torch.autograd.grad(want.sum(), wide)[0]
        torch.testing.assert_close(got.double(), due, rtol=1e-3, atol=1e-6 * max(1.0, temperature), msg=name)


def test_classes_masked_in_both_count_nothing():
    student, teacher = (x.float() for x in some_logits(4, 6))
    labels = torch.tensor([0, 1, 4, 5])
    kept = [0, 1, 4, 5]
    among_kept = torch.tensor([0, 1, 2, 3])
    masked = [x.index_fill(1, torch.tensor([2, 3]), -INF) for x in (student, teacher)]
    few, many = student[:, kept].clone().requires_grad_(), masked[0].clone().requires_grad_()
    pairs = zip(all_losses(many, masked[1], labels), all_losses(few, teacher[:, kept], among_kept), strict=True)
    for (name, loss), (_, want) in pairs:
        torch.testing.assert_close(loss, want, msg=name)
        got, due = torch.autograd.grad(loss.sum(), many)[0], torch.autograd.grad(want.sum(), few)[0]
        torch.testing.assert_close(got[:, kept], due, msg=name)
        assert as_list(got[:, [2, 3]]) == [0.0] * 8, name


def test_classes_masked_in_one_alone():
    one = torch.tensor([[1.0, 2.0, -INF]])
    both = torch.tensor([[1.0, 2.0, 3.0]])
    for name in ["jsd", "skewed", "skewed, reverse"]:  # a mixture has every class that one of them has
        for student, teacher in [(one.clone().requires_grad_(), both), (both.clone().requires_grad_(), one)]:
            loss = DIVERGENCES[name](student, teacher)
            assert bool(loss.isfinite()), name
            assert bool(torch.autograd.grad(loss, student)[0].isfinite().all()), name
    for name, student, teacher in [("forward", both, one), ("jsd at 0", both, one), ("reverse", one, both)]:
        student = student.clone().requires_grad_()
        loss = DIVERGENCES[name](student, teacher, reduction="sum")
        p, q = (softmax(x.flatten().tolist()) for x in ((one, both)))
        assert loss.item() == pytest.approx(kl(p, q), rel=1e-5)
        assert bool(torch.autograd.grad(loss, student)[0].isfinite().all())
        assert DIVERGENCES[name](teacher, student, reduction="sum").item() == INF


def test_dkd_where_only_the_label_is_left():
    logits = torch.tensor([[-INF, 2.0, -INF]])
    student = (logits + 1).requires_grad_()
    loss = functional.dkd(student, logits, torch.tensor([1]))
    assert loss.item() == 0.0
    assert as_list(torch.autograd.grad(loss, student)[0]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", [*DIVERGENCES.values()])
def test_refused_logits(loss):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(1, 3\).*must be equal"):
        loss(torch.zeros(2, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("loss", [*LABELED.values()])
def test_refused_labels(loss):
    logits = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(1, 3\).*must be equal"):
        loss(logits, logits[:1], torch.zeros(4, dtype=torch.int64))
    for shape in [(3,), (4, 1), (1,)]:
        with pytest.raises(
            ValueError, match=rf"labels have the shape \({shape[0]}.*one index for each example.*\(4,\)"
        ):
            loss(logits, logits, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(TypeError, match="labels came as list"):
        loss(logits, logits, [0, 0, 0, 0])


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_mft_takes_labels_flat_or_of_the_logits_shape(reduction):
    generator = torch.Generator().manual_seed(3)
    logits_s, logits_t = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    labels = torch.randint(0, 4, (2, 3), generator=generator)
    flat = functional.mft(logits_s.reshape(6, 4), logits_t.reshape(6, 4), labels.reshape(6), reduction=reduction)
    assert torch.equal(functional.mft(logits_s, logits_t, labels, reduction=reduction), flat)
    assert torch.equal(functional.mft(logits_s, logits_t, labels.reshape(6), reduction=reduction), flat)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(6,\)"):
        functional.mft(logits_s, logits_t, labels.reshape(3, 2), reduction=reduction)


def test_dkd_needs_two_classes():
    with pytest.raises(ValueError, match="2 classes or more"):
        functional.dkd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
