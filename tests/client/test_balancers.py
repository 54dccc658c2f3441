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


CASTS = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.bfloat16),  # casts what is no floating point either
}


def scaled(student, gradient):
    """A converted student of one linear layer, with a balancer of scales."""
    settings = {"decay": 0.9, "max_factor": 1e6}
    balancer = sh.LossScaleBalancer(0.5, **settings)
    if gradient:
        balancer = sh.GradientScaleBalancer(student.parameters, 0.5, **settings)
    fields = {"teacher_model": nn.Linear(4, 4), "criterion": nn.MSELoss(), "loss_balancer": balancer}
    return sh.convert(student, {"kd_loss": fields})


def step(model):
    x = torch.linspace(-1, 1, 8, dtype=model.weight.dtype).reshape(2, 4)
    return model.compute_kd_loss(student_loss=model(x).pow(2).mean())


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_leaves_the_scales(cast, gradient):
    torch.manual_seed(0)
    model = scaled(nn.Linear(4, 4), gradient)
    balancer = model.loss_balancer
    step(model)
    balancer.updates += 1000  # which bfloat16 would round
    average, updates = balancer.average.clone(), balancer.updates.clone()
    assert not torch.equal(average, average.bfloat16().float())
    model.load_state_dict(copy.deepcopy(cast(model).state_dict()))
    assert model.weight.dtype != torch.float32
    assert (balancer.average.dtype, balancer.updates.dtype) == (torch.float32, torch.int64)
    assert torch.equal(balancer.average, average)
    assert torch.equal(balancer.updates, updates)
    loss = step(model)
    loss.backward()
    assert loss.dtype == model.weight.dtype
    assert loss.isfinite()
    assert model.weight.grad.isfinite().all()
    assert torch.equal(balancer.updates, updates + 1)


def test_scales_of_a_cast_model_against_arithmetic():
    model = scaled(nn.Linear(4, 4), gradient=False).to(torch.bfloat16)
    average = [0.0, 0.0]
    for t in range(1, 4):
        x = torch.full((2, 4), float(t), dtype=torch.bfloat16)
        student = model(x).pow(2).mean()
        by_name = model.compute_kd_loss(student_loss=student, skip_balancer=True)
        values = [by_name[sh.STUDENT_LOSS_KEY].item(), by_name["MSELoss_0"].item()]
        average = [0.9 * a + 0.1 * abs(v) for a, v in zip(average, values, strict=True)]
        total = model.loss_balancer(by_name)
        assert total.item() == pytest.approx(0.5 * values[0] + 0.5 * values[1] * average[0] / average[1], rel=3 * 2**-8)
    assert model.loss_balancer.average.tolist() == pytest.approx(average, rel=1e-5)


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_of_a_cast_balancer_is_taken(assign):
    balancer = sh.LossScaleBalancer(0.5, decay=0.5)
    state = {"average": torch.tensor([2.0, 8.0], dtype=torch.bfloat16), "updates": torch.tensor([5, 5])}
    balancer.load_state_dict(state, assign=assign)
    assert balancer.average.dtype == torch.float32
    assert balancer(losses(16, student=4)).item() == pytest.approx(0.5 * 4 + 0.5 * 16 * (3 / 12), rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 1e-300, 0.999, 0.99999999, 1 - 2**-53])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_any_decay_is_corrected_for(decay, scale):
    balancer = sh.LossScaleBalancer(0.5, decay=decay)
    average = [0.0, 0.0]
    for student, kd in [(2 * scale, 10 * scale), (6 * scale, 10 * scale), (1 * scale, 40 * scale)]:
        average = [a + (1 - decay) * (v - a) for a, v in zip(average, (student, kd), strict=True)]
        expected = 0.5 * student + 0.5 * kd * average[0] / average[1]
        found = balancer(losses(kd, student=student)).item()
        assert math.isfinite(found)
        if scale * (1 - decay) > 1e-38:  # an average that float32 can hold
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("decay", [0.5, 0.99999999])
def test_the_correction_is_that_of_each_losss_own_updates(decay):
    balancer = sh.LossScaleBalancer(0.5, decay=decay)
    for _ in range(3):
        balancer(losses(0, student=7))  # the student's alone is counted
    expected = 0.5 * 7 + 0.5 * 7  # of equal values each corrected average is that value
    assert balancer(losses(1000, student=7)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 2.0**127 * (2 - 2**-7)), (torch.float64, 3e38)]
)
@pytest.mark.parametrize("max_factor", [1e8, 1e300])
def test_a_factor_is_one_that_the_dtype_has(dtype, largest, max_factor):
    balancer = sh.LossScaleBalancer(0.5, max_factor=max_factor)
    kd = torch.tensor(2.0**-24, dtype=dtype, requires_grad=True)
    student = torch.tensor(2.0**15, dtype=dtype)
    balancer({sh.STUDENT_LOSS_KEY: student, "A_0": kd}).backward()
    expected = min(2.0**15 / 2.0**-24, max_factor, largest)
    assert kd.grad.item() == pytest.approx(0.5 * expected, rel=2**-7)


def test_a_loss_may_be_an_integer_constant():
    given = {**losses(8, student=2), "B_1": torch.tensor(0)}
    assert sh.LossScaleBalancer([0.25, 0.25])(given).item() == pytest.approx(0.5 * 2 + 0.25 * 2, rel=1e-6)


def test_the_largest_factor_of_bfloat16():
    balancer = sh.LossScaleBalancer(0.5, max_factor=1e300)
    kd = torch.tensor(2.0**-120, dtype=torch.bfloat16, requires_grad=True)
    total = balancer({sh.STUDENT_LOSS_KEY: torch.tensor(2.0**20, dtype=torch.bfloat16), "A_0": kd})
    total.backward()
    assert kd.grad.item() == 0.5 * 2.0**127 * (2 - 2**-7)  # 2**140 is beyond it
    assert total.item() == pytest.approx(0.5 * 2**20, rel=2**-7)


def test_a_deep_copy_compares_gradients_at_its_own_parameters():
    torch.manual_seed(0)
    student = Net()
    fields = {"teacher_model": Net(seed=1), "criterion": nn.MSELoss()}
    balancer = sh.GradientScaleBalancer(student.body.parameters, 0.5)
    model = sh.convert(student, {"kd_loss": {**fields, "loss_balancer": balancer}})
    twin = copy.deepcopy(model)
    del model, student, balancer, fields
    x = torch.randn(4, 8)
    student_loss = twin(x).pow(2).mean()
    by_name = twin.compute_kd_loss(student_loss=student_loss, skip_balancer=True)
    at = list(twin.body.parameters())
    norms = []
    for value in by_name.values():
        found = torch.autograd.grad(value, at, retain_graph=True)
        norms.append(math.sqrt(sum(g.double().pow(2).sum().item() for g in found)))
    values = [value.item() for value in by_name.values()]
    assert list(by_name) == [sh.STUDENT_LOSS_KEY, "MSELoss_0"]
    total = twin.loss_balancer(by_name)  # of the original's parameters it would say that no loss reaches them
    assert total.item() == pytest.approx(0.5 * values[0] + 0.5 * values[1] * norms[0] / norms[1], rel=1e-4)
