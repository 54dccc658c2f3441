"""The causal-LM form of each loss between logits: shifted, masked, and blind to what padding holds."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from schoolhouse import functional
from schoolhouse.losses import (
    CausalLMLoss,
    DKDLoss,
    HiddenMSELoss,
    JSDLoss,
    LogitsDistillationLoss,
    LogitsLoss,
    MFTLoss,
    ReverseKLLoss,
    SkewedKLLoss,
)
from torch import nn

LOSSES = [
    LogitsDistillationLoss(2.0),
    ReverseKLLoss(2.0, "none"),
    JSDLoss(0.3, 2.0),
    SkewedKLLoss(0.2, 2.0),
    SkewedKLLoss(0.2, 2.0, reverse=True),
    MFTLoss(2.0, 0.3),
    DKDLoss(1.0, 2.0, 2.0),
]
LABEL_FREE = LOSSES[:5]
ids = {"ids": lambda loss: type(loss).__name__}


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    labels = torch.tensor([[0, -100, 2, 3, 1], [-100, -100, 1, 0, -100]])
    return student, teacher, labels


def counted_pairs(labels, ignore_index=-100):
    """Rows of (example, position, next label) that count, written out."""
    rows = [(i, j, row[j + 1]) for i, row in enumerate(labels.tolist()) for j in range(len(row) - 1)]
    return [row for row in rows if row[2] != ignore_index]


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_it_is_the_mean_over_the_counted_tokens_alone(loss):
    student, teacher, labels = batch()
    pairs = counted_pairs(labels)
    assert len(pairs) == 5
    each = [loss.per_example(student[i, j][None], teacher[i, j][None], torch.tensor([y])).item() for i, j, y in pairs]
    assert CausalLMLoss(loss)(student, teacher, labels=labels).item() == pytest.approx(sum(each) / 5)


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_it_is_the_masked_sum_over_the_count(loss):
    student, teacher, labels = batch(torch.float32)
    mask = labels[:, 1:] != -100
    per_token = loss.per_example(student[:, :-1], teacher[:, :-1], labels[:, 1:].clamp(min=0))
    want = (per_token * mask).sum() / mask.sum().clamp(min=1)
    assert torch.equal(CausalLMLoss(loss)(student, teacher, labels), want)


def test_the_kl_of_tokens_in_plain_python():
    student, teacher, labels = batch()

    def log_softmax(row):
        norm = math.log(sum(map(math.exp, row)))
        return [x - norm for x in row]

    total = 0.0
    for i, j, _ in counted_pairs(labels):
        s, t = log_softmax(student[i, j].tolist()), log_softmax(teacher[i, j].tolist())
        total += sum(math.exp(b) * (b - a) for a, b in zip(s, t, strict=True))
    assert CausalLMLoss(LogitsDistillationLoss())(student, teacher, labels).item() == pytest.approx(total / 5)


@pytest.mark.parametrize("loss", LABEL_FREE, **ids)
def test_without_labels_every_position_counts(loss):
    student, teacher, _ = batch()
    want = loss.per_example(student[:, :-1], teacher[:, :-1]).mean()
    torch.testing.assert_close(CausalLMLoss(loss)(student, teacher), want)


@pytest.mark.parametrize("loss", [MFTLoss(), DKDLoss()], **ids)
def test_losses_that_need_labels_say_so(loss):
    student, teacher, _ = batch()
    with pytest.raises(ValueError, match=f"{type(loss).__name__} needs labels"):
        CausalLMLoss(loss)(student, teacher)


@pytest.mark.parametrize("loss", LOSSES, **ids)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_ignored_positions_may_hold_garbage(loss, garbage):
    student, teacher, labels = batch()
    ignored = torch.cat([labels[:, 1:] == -100, torch.ones(2, 1, dtype=torch.bool)], dim=1)  # and the last of all
    clean = student.clone().requires_grad_()
    dirty = student.masked_fill(ignored[..., None], garbage).requires_grad_()
    made = CausalLMLoss(loss)
    want, got = made(clean, teacher, labels), made(dirty, teacher.masked_fill(ignored[..., None], garbage), labels)
    assert got.item() == want.item()
    due, gradient = torch.autograd.grad(want, clean)[0], torch.autograd.grad(got, dirty)[0]
    assert torch.equal(gradient, due)
    assert not gradient[ignored].any()
    assert bool(gradient[~ignored].any(dim=-1).all())


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_no_counted_token_is_zero_not_nan(loss):
    student, teacher, labels = batch()
    student.requires_grad_()
    value = CausalLMLoss(loss)(student, teacher, torch.full_like(labels, -100))
    assert value.item() == 0.0
    assert not torch.autograd.grad(value, student)[0].any()
    one_token = CausalLMLoss(loss)(student[:, :1], teacher[:, :1], labels[:, :1])
    assert one_token.item() == 0.0


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_gradients(loss):
    student, teacher, labels = (x[:, 1:4] for x in batch())
    assert torch.autograd.gradcheck(lambda s: CausalLMLoss(loss)(s, teacher, labels), (student.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher, labels = batch(dtype)
    value = CausalLMLoss(loss)(student, teacher, labels)
    assert value.dtype == torch.float32
    assert value.item() == CausalLMLoss(loss)(student.float(), teacher.float(), labels).item()


def test_outputs_with_logits_are_read():
    student, teacher, labels = batch()
    made = CausalLMLoss(LogitsDistillationLoss())
    want = made(student, teacher, labels)
    assert torch.equal(made(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher), labels), want)
    assert torch.equal(made(SimpleNamespace(logits=student), teacher, labels=labels), want)
    with pytest.raises(TypeError, match="teacher's logits came as builtins.dict"):
        made(student, {"logits": teacher}, labels)
    with pytest.raises(TypeError, match="student's logits came as builtins.NoneType"):
        made(SimpleNamespace(logits=None), teacher, labels)


def test_another_ignore_index():
    student, teacher, labels = batch()
    made = CausalLMLoss(MFTLoss(), ignore_index=0)
    labels = labels.masked_fill(labels == -100, 1)
    pairs = counted_pairs(labels, ignore_index=0)
    assert len(pairs) == 7
    each = [
        MFTLoss().per_example(student[i, j][None], teacher[i, j][None], torch.tensor([y])).item() for i, j, y in pairs
    ]
    assert made(student, teacher, labels).item() == pytest.approx(sum(each) / 7)


def test_a_loss_of_ones_own():
    class AbsoluteLoss(LogitsLoss):
        def per_example(self, logits_s, logits_t, labels=None):
            return (logits_s - logits_t).abs().sum(-1)

    student, teacher, labels = batch()
    want = [sum(abs(student[i, j] - teacher[i, j]).tolist()) for i, j, _ in counted_pairs(labels)]
    made = CausalLMLoss(AbsoluteLoss(1.0, "none"))
    assert made(student, teacher, labels).item() == pytest.approx(sum(want) / 5)
    with pytest.raises(NotImplementedError, match="LogitsLoss must define per_example"):
        CausalLMLoss(LogitsLoss(1.0, "none"))(student, teacher, labels)


@pytest.mark.parametrize("loss", [nn.KLDivLoss(), HiddenMSELoss(4, 4), CausalLMLoss(JSDLoss()), "jsd"])
def test_other_losses_are_refused_with_the_choices(loss):
    with pytest.raises(TypeError, match=f"loss is a {type(loss).__name__}; choices: .*JSDLoss.*DKDLoss.*per_example"):
        CausalLMLoss(loss)


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 1), (1, 5), (10,)])
def test_labels_of_another_shape_are_refused(shape):
    student, teacher, _ = batch()
    with pytest.raises(ValueError, match=r"labels have the shape .*one index for each token, \(2, 5\) is needed"):
        CausalLMLoss(JSDLoss())(student, teacher, torch.zeros(shape, dtype=torch.int64))


def test_other_logits_are_refused():
    student, teacher, labels = batch()
    with pytest.raises(ValueError, match="must be equal"):
        CausalLMLoss(JSDLoss())(student, teacher[:1], labels)
    with pytest.raises(ValueError, match=r"\(4,\); \[..., length, classes\]"):
        CausalLMLoss(JSDLoss())(student[0, 0], teacher[0, 0])


def test_the_mean_of_per_token_losses():
    per_token = torch.tensor([[1.0, 2.0, math.nan], [math.inf, 8.0, 5.0]], requires_grad=True)
    labels = torch.tensor([[-100, 7, 0, -100], [3, -100, 1, -100]])
    mean = functional.causal_lm_mean(per_token, labels)
    assert mean.item() == pytest.approx((1 + 2 + 8) / 3)
    (gradient,) = torch.autograd.grad(mean, per_token)
    assert gradient.flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 3, 0])
    assert functional.causal_lm_mean(torch.tensor([[1.0, 2.0, 6.0]])).item() == 3.0
    with pytest.raises(ValueError, match=r"one position more than the losses, \(2, 4\)"):
        functional.causal_lm_mean(per_token, labels[:, 1:])


def test_it_adds_no_state_and_copies():
    made = CausalLMLoss(JSDLoss())
    assert made.state_dict() == {}
    student, teacher, labels = batch()
    assert torch.equal(copy.deepcopy(made)(student, teacher, labels), made(student, teacher, labels))
