"""The loss and the balancer against independent computations."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import schoolhouse as sh
import torch


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_loss_is_the_softened_kl(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    each = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        norm_s = math.log(sum(math.exp(v / temperature) for v in s))
        norm_t = math.log(sum(math.exp(v / temperature) for v in t))
        logs = [(a / temperature - norm_s, b / temperature - norm_t) for a, b in zip(s, t, strict=True)]
        each.append(temperature**2 * sum(math.exp(b) * (b - a) for a, b in logs))

    def loss(reduction):
        return sh.LogitsDistillationLoss(temperature, reduction)(student, teacher)

    assert loss("none").tolist() == pytest.approx(each, rel=1e-5)
    assert loss("sum").item() == pytest.approx(sum(each), rel=1e-5)
    assert loss("batchmean").item() == pytest.approx(sum(each) / 5, rel=1e-5)
    assert loss("mean").item() == pytest.approx(sum(each) / 35, rel=1e-5)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": -1.0}, {"reduction": "avg"}])
def test_wrong_settings_are_refused_at_once(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        sh.LogitsDistillationLoss(**settings)


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match="shape"):
        sh.LogitsDistillationLoss()(torch.zeros(2, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_static_balancer(dtype):
    balancer = sh.StaticLossBalancer([0.25, 0.5])
    losses = {"A_0": torch.tensor(2.0, dtype=dtype), "B_1": torch.tensor(3.0, dtype=dtype)}
    assert balancer(losses).item() == 2.0
    assert balancer(losses).dtype == dtype
    assert balancer({"student_loss": torch.tensor(4.0, dtype=dtype), **losses}).item() == 3.0
    balancer.set_student_loss_reduction_fn(torch.sum)
    assert balancer({"student_loss": torch.tensor([4.0, 4.0], dtype=dtype), **losses}).item() == 4.0
    with pytest.raises(ValueError, match="kd_loss_weight"):
        balancer({"A_0": torch.tensor(1.0)})


@pytest.mark.parametrize("weight", [-0.1, 1.1, [0.6, 0.6]])
def test_weights_beyond_one_are_refused(weight):
    with pytest.raises(ValueError, match="kd_loss_weight"):
        sh.StaticLossBalancer(weight)


@pytest.mark.parametrize("weights", [[0.2, 0.4, 0.3, 0.1], [0.33, 0.56, 0.11], [0.05] * 20, [0.5, 0.5 + 9e-10]])
def test_weights_that_make_one_but_for_rounding(weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer = sh.StaticLossBalancer(weights)
        sh.StaticLossBalancer([0.5, 0.5 - 9e-10])
        sh.LossScaleBalancer([0.5, 0.5 - 9e-10])
    losses = {f"A_{i}": torch.tensor(float(i + 1), dtype=torch.float64) for i in range(len(weights))}
    expected = math.fsum(weight * (i + 1) for i, weight in enumerate(weights))
    assert balancer(losses).item() == pytest.approx(expected, rel=1e-12)
    student = torch.tensor(1e20, dtype=torch.float64, requires_grad=True)
    balancer({"student_loss": student, **losses}).backward()
    assert student.grad.item() == 0  # not below
    scheduled = sh.ScheduledLossBalancer(lambda step: weights)
    assert scheduled(losses).item() == pytest.approx(expected, rel=1e-12)


def test_a_sum_off_by_more_than_rounding():
    with pytest.raises(ValueError, match="kd_loss_weight sums to 1.00000001"):
        sh.StaticLossBalancer([0.5, 0.50000001])
    balancer = sh.StaticLossBalancer([0.5, 0.49999999])
    with pytest.warns(UserWarning, match="sums to less than 1.*pass student_loss"):
        balancer({"A_0": torch.tensor(1.0), "B_1": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("weight", "share"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(1), 1),
        (True, 1),
        (Fraction(1, 4), 0.25),
        ([np.float32(0.25)], 0.25),
        ((Fraction(1, 4),), 0.25),
        (np.array([0.25], dtype=np.float16), 0.25),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_real_number_is_a_weight(weight, share, dtype):
    losses = {"student_loss": torch.tensor(8.0, dtype=dtype), "A_0": torch.tensor(32.0, dtype=dtype)}
    for balancer in (sh.StaticLossBalancer(weight), sh.ScheduledLossBalancer(lambda step: weight)):
        total = balancer(losses)
        assert total.item() == 32 * share + 8 * (1 - share)
        assert total.dtype == dtype


def test_numpy_weights_are_summed_in_their_own_precision():
    numbers = np.full(5, 0.2, dtype=np.float32)  # as float64 their sum is 1.0000000149
    losses = {f"A_{i}": torch.tensor(float(i)) for i in range(5)}
    assert sh.StaticLossBalancer(list(numbers))(losses).item() == pytest.approx(0.2 * (1 + 2 + 3 + 4), rel=1e-6)


@pytest.mark.parametrize(
    "weight", ["0.5", "", b"", None, ["a"], [None], math.nan, math.inf, [0.5, math.nan], [math.inf, -math.inf], 0.5j]
)
@pytest.mark.parametrize("kind", [sh.StaticLossBalancer, sh.LossScaleBalancer])
def test_what_is_no_weight_is_refused(weight, kind):
    with pytest.raises(ValueError, match="kd_loss_weight is .*choices: a finite number, or a list") as caught:
        kind(weight)
    assert repr(weight) in str(caught.value)


@pytest.mark.parametrize("weight", [torch.tensor(0.5), torch.tensor([0.5, 0.5]), [[0.5], [0.5]]])
def test_nested_weights_and_tensors_are_refused(weight):
    with pytest.raises(ValueError, match="kd_loss_weight is .*choices: a finite number, or a list"):
        sh.StaticLossBalancer(weight)
