"""Balancers that change over a run: against plain arithmetic, and across a checkpoint."""

import copy
import math
import pickle

import pytest
import schoolhouse as sh
import torch
from models import Net
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums")


def losses(*values, student=None):
    named = {f"A_{i}": torch.tensor(float(value)) for i, value in enumerate(values)}
    return named if student is None else {sh.STUDENT_LOSS_KEY: torch.tensor(float(student)), **named}


def test_schedules():
    linear, cosine = sh.LinearSchedule(0.2, 0.8, 4), sh.CosineSchedule(1.0, 0.0, 4)
    assert [linear(i) for i in (0, 2, 4, 9)] == pytest.approx([0.2, 0.5, 0.8, 0.8])
    assert [cosine(i) for i in (0, 1, 2, 4, 9)] == pytest.approx([1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0, 0])
    assert linear(4) == 0.8
    assert sh.LinearSchedule(0.2, 0.8, 0)(0) == 0.8


def test_a_schedule_advances_once_a_training_step():
    balancer = sh.ScheduledLossBalancer(sh.LinearSchedule(0.0, 1.0, 4), accumulation_steps=2)
    given = losses(10, student=2)
    seen = []
    for _ in range(10):
        seen.append(balancer(given).item())
        with torch.no_grad():
            balancer(given)  # a validation in between
        balancer.eval()
        balancer(given)
        balancer.train()
    assert seen == pytest.approx([2, 2, 4, 4, 6, 6, 8, 8, 10, 10])
    assert balancer.step == 5


def test_a_schedule_of_several_weights_is_checked_when_used():
    balancer = sh.ScheduledLossBalancer(lambda step: [0.25, 0.25 + step])
    assert balancer(losses(4, 8, student=2)).item() == 1 + 2 + 1
    with pytest.raises(ValueError, match="step 1 sums to 1.5"):
        balancer(losses(4, 8))
    with pytest.raises(ValueError, match="accumulation_steps"):
        sh.ScheduledLossBalancer(lambda step: 0.5, accumulation_steps=0)


def test_loss_scales():
    balancer = sh.LossScaleBalancer([0.25, 0.25], decay=0.5)
    average = [0.0, 0.0, 0.0]
    for t, values in enumerate([(2.0, 100.0, -0.01), (4.0, 50.0, 0.03), (1.0, 70.0, 0.02)], 1):
        average = [0.5 * a + 0.5 * abs(v) for a, v in zip(average, values, strict=True)]
        m = [a / (1 - 0.5**t) for a in average]
        expected = 0.5 * values[0] + sum(0.25 * v * m[0] / n for v, n in zip(values[1:], m[1:], strict=True))
        assert balancer(losses(*values[1:], student=values[0])).item() == pytest.approx(expected, rel=1e-5)


def test_without_a_student_loss_the_first_is_the_anchor():
    balancer = sh.LossScaleBalancer([0.5, 0.5])
    assert balancer(losses(4, 1000)).item() == pytest.approx(0.5 * 4 + 0.5 * 4, rel=1e-5)


def test_odd_magnitudes_do_not_poison():
    balancer = sh.LossScaleBalancer([0.5, 0.5], decay=0.0)
    assert balancer(losses(2, 0)).item() == 1  # no magnitude yet: the factor is 1
    assert math.isnan(balancer(losses(2, math.nan)).item())
    assert balancer(losses(2, math.inf)).item() == math.inf
    assert balancer(losses(2, 8)).item() == pytest.approx(2)
    assert balancer(losses(math.nan, 0)).isnan()
    assert balancer(losses(2, 8)).item() == pytest.approx(2)
    assert sh.LossScaleBalancer([0.5, 0.5], max_factor=10)(losses(1, 1e-6)).item() == pytest.approx(0.5 + 0.5e-5)


def test_evaluation_leaves_the_scales():
    balancer = sh.LossScaleBalancer([0.5, 0.5])
    balancer(losses(2, 8))
    state = copy.deepcopy(balancer.state_dict())
    balancer.eval()
    assert balancer(losses(2, 80)).item() == pytest.approx(1 + 10)
    balancer.train()
    with torch.no_grad():
        balancer(losses(2, 80))
    assert all(torch.equal(value, state[name]) for name, value in balancer.state_dict().items())


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"max_factor": 0.5}, {"kd_loss_weight": [2.0]}])
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        sh.LossScaleBalancer(**settings)


def test_gradient_scales():
    body, head = nn.Linear(4, 3), nn.Linear(3, 2)
    x = torch.randn(5, 4)

    def terms():
        hidden = body(x)
        return head(hidden).pow(2).mean(), 1000 * hidden.pow(2).mean()

    norms = []
    for term in terms():
        found = torch.autograd.grad(term, list(body.parameters()), retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in found]).norm().item())
    balancer = sh.GradientScaleBalancer(body.parameters, 0.25)
    student, kd = terms()
    total = balancer({sh.STUDENT_LOSS_KEY: student, "A_0": kd})
    assert total.item() == pytest.approx(0.75 * student.item() + 0.25 * kd.item() * norms[0] / norms[1], rel=1e-4)
    total.backward()
    assert body.weight.grad is not None
    assert list(balancer.parameters()) == []
    with pytest.raises(ValueError, match="loss 1.*no gradient"):
        balancer({sh.STUDENT_LOSS_KEY: terms()[0], "A_0": head(x[:, :3]).sum()})


def balancers():
    return {
        "schedule": lambda student: sh.ScheduledLossBalancer(sh.CosineSchedule(0.9, 0.1, 8)),
        "loss": lambda student: sh.LossScaleBalancer(0.5, decay=0.8),
        "gradient": lambda student: sh.GradientScaleBalancer(student.body.parameters, 0.5, decay=0.8),
    }


@pytest.mark.parametrize("which", balancers())
def test_a_run_goes_on_where_its_checkpoint_was_taken(teach, which, tmp_path):
    teacher = teach(Net(32, seed=1))

    def fresh():
        student = Net(16, seed=2)
        fields = {"teacher_model": teacher, "criterion": nn.MSELoss(), "loss_balancer": balancers()[which](student)}
        model = sh.convert(student, {"kd_loss": fields})
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def run(model, optimizer, steps):
        found = []
        for i in steps:
            generator = torch.Generator().manual_seed(i)
            x, y = torch.randn(8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)
            loss = model.compute_kd_loss(student_loss=F.cross_entropy(model(x), y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    whole = run(*fresh(), range(10))
    first, again, other = fresh(), fresh(), fresh()
    run(*first, range(5))
    again[0].load_state_dict(first[0].state_dict())
    assert run(*again, range(5, 10)) == whole[5:]
    run(*other, range(1))  # its own state must give way
    sh.save(first[0], tmp_path / "student.safetensors", include_losses=True)
    sh.restore(other[0], tmp_path / "student.safetensors")
    assert run(*other, range(5, 10)) == whole[5:]
    for twin in (copy.deepcopy(first[0]), pickle.loads(pickle.dumps(first[0]))):
        assert run(twin, torch.optim.SGD(twin.parameters(), lr=0.1), range(5, 10)) == whole[5:]
        if isinstance(twin.teacher_model, sh.RemoteTeacher):
            twin.teacher_model.close()


def test_a_checkpoint_without_the_balancer_leaves_it():
    balancer = sh.LossScaleBalancer(1.0)
    fields = {"teacher_model": Net(), "criterion": nn.MSELoss(), "loss_balancer": balancer}
    model = sh.convert(Net(), {"kd_loss": fields})
    balancer(losses(3))
    before = balancer.average.clone()
    model.load_state_dict(Net(seed=3).state_dict())
    assert torch.equal(balancer.average, before)
