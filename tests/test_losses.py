"""The loss and the balancer against independent computations."""

import math

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
