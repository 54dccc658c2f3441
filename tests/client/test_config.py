"""What convert() takes and what it refuses; with the teacher in this process and behind gRPC."""

import functools

import pytest
import schoolhouse as sh
import torch
from models import Net, config, converted
from schoolhouse import errors
from schoolhouse_server import serve
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums")


@pytest.fixture
def teacher(teach):
    return teach(Net(32, seed=1))


@pytest.mark.parametrize("given", ["class", "callable", "one", "two", "three", "module", "local"])
def test_forms_of_a_teacher_in_this_process(given, x):
    forms = {
        "class": Net,
        "callable": lambda: Net(16, 0),
        "one": (Net,),
        "two": (Net, (16,)),
        "three": (Net, [16], {"seed": 0}),
        "module": Net(16, 0),
        "local": sh.LocalTeacher(Net(16, 0)),
    }
    model = converted(Net(8, seed=3), forms[given], nn.MSELoss())
    out = model(x)
    assert torch.equal(model.compute_kd_loss(), F.mse_loss(out, Net(16, 0)(x)))
    assert isinstance(model.teacher_model, Net)


def test_forms_of_a_teacher_elsewhere(x):
    expected = Net(16, 0)(x)
    with serve(Net(16, 0)) as server:
        for form in (server.url, sh.connect(server.url), functools.partial(sh.connect, server.url)):
            model = converted(Net(8), form, nn.MSELoss())
            out = model(x)
            assert torch.equal(model.compute_kd_loss(), F.mse_loss(out, expected))
            assert isinstance(model.teacher_model, sh.RemoteTeacher)
            teacher = model.teacher_model
            sh.export(model)
            if form is not teacher:  # convert connected, so export closes
                with pytest.raises(errors.UsageError, match="closed"):
                    teacher.submit((x,), {}, [""])
            teacher.close()


@pytest.mark.parametrize("form", ["list of pairs", "dict", "object", "pair in a tuple"])
def test_forms_of_mode(form, teacher, x):
    fields = config(teacher)
    modes = {
        "list of pairs": [("kd_loss", fields)],
        "dict": {"kd_loss": fields},
        "object": [("kd_loss", sh.KDLossConfig(**fields))],
        "pair in a tuple": (("kd_loss", fields),),
    }
    model = sh.convert(Net(), mode=modes[form])
    model(x)
    assert model.compute_kd_loss() > 0
    assert type(sh.convert(model, "export_student")) is Net


def test_a_student_as_a_class(teacher):
    assert isinstance(sh.convert((Net, (4,)), mode={"kd_loss": config(teacher)}), Net)


def test_criterion_with_classes_and_shared_layers(teacher, x):
    pairs = {("fc", "fc"): nn.MSELoss, ("fc", ""): nn.L1Loss(), ("", "fc"): sh.LogitsDistillationLoss}
    model = converted(Net(), teacher, pairs, sh.StaticLossBalancer([0.2, 0.3, 0.5]))
    model(x)
    losses = model.compute_kd_loss(skip_balancer=True)
    out, target = Net()(x), Net(32, seed=1)(x)
    assert list(losses) == ["MSELoss_0", "L1Loss_1", "LogitsDistillationLoss_2"]
    assert torch.equal(losses["MSELoss_0"], F.mse_loss(out, target))
    assert torch.equal(losses["L1Loss_1"], F.l1_loss(out, target))


WRONG = [
    ({"criterion": None}, "criterion is missing"),
    ({"criterion": {}}, "criterion has no layer pairs"),
    ({"criterion": {"fc": nn.MSELoss()}}, "student_layer, teacher_layer"),
    ({"criterion": F.mse_loss}, "criterion.*choices"),
    ({"criterion": nn.Linear}, "Linear\\(\\) failed, give an instance"),
    ({"criterion": {("fc", "fc"): nn.MSELoss(), ("", ""): nn.MSELoss()}}, "several.*loss_balancer"),
    ({"loss_balancer": nn.Linear(2, 2)}, "loss_balancer is a Linear; choices"),
    ({"teacher_model": None}, "teacher_model is missing; choices"),
    ({"teacher_model": 3}, "teacher_model is 3; choices"),
    ({"teacher_model": (Net, (), {}, 1)}, "teacher_model is a tuple of 4"),
    ({"teacher_model": lambda: 3}, "teacher_model made a int; choices"),
    ({"expose_minimal_state_dict": "no"}, "expose_minimal_state_dict is 'no'; choices"),
    ({"criteria": 1}, "unknown fields.*criteria.*choices: teacher_model"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_config_errors_name_the_field(change, message):
    student = Net()
    with pytest.raises(errors.ConfigError, match=message):
        sh.convert(student, mode=[("kd_loss", {**config(Net()), **change})])
    assert type(student) is Net
    assert student._forward_hooks == {}


class Weighted(sh.DistillationLossBalancer):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, loss):
        return sum(loss.values())


@pytest.mark.parametrize("mode", ["kd_loss", ["kd_loss"], [], "kd", [("kd_loss", 3)], [("a", {}), ("b", {})], 3, [3]])
def test_wrong_modes(mode):
    with pytest.raises(errors.ConfigError, match=r"mode|choices|missing"):
        sh.convert(Net(), mode=mode)


def test_what_cannot_be_converted():
    with pytest.raises(errors.ConfigError, match="has parameters"):
        converted(Net(), Net(), balancer=Weighted())
    student = Net()
    with pytest.raises(errors.ConfigError, match="deepcopy"):
        converted(student, student)
    tied = Net()
    tied.fc = student.fc
    with pytest.raises(errors.ConfigError, match=r"fc\.weight"):
        converted(student, tied)
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(errors.ConfigError, match="DataParallel.*inside first"):
        converted(nn.DataParallel(Net()), Net())
    with pytest.raises(errors.ConfigError, match="OptimizedModule"):
        converted(torch.compile(Net()), Net())
    with pytest.raises(errors.ConfigError, match="ScriptModule"):
        converted(torch.jit.trace(Net(), torch.ones(1, 8)), Net())
    with pytest.raises(errors.ConfigError, match="model made a int"):
        converted(lambda: 5, Net())
    owner = Net()
    owner._teacher_model = nn.Linear(2, 2)
    with pytest.raises(errors.ConfigError, match="_teacher_model.*rename"):
        converted(owner, Net())
    with pytest.raises(errors.ConfigError, match="converted already"):
        converted(converted(student, Net()), Net())
    with pytest.raises(errors.UnknownTapError, match="the student.*'fc'"):
        converted(Net(), Net(), {("fcc", "fc"): nn.MSELoss()})
    with pytest.raises(errors.UnknownTapError, match="teacher.*'fc'"):
        converted(Net(), Net(), {("fc", "fcc"): nn.MSELoss()})


def test_a_student_loss_needs_a_balancer(teacher, x):
    model = converted(Net(), teacher)
    model(x)
    with pytest.raises(errors.ConfigError, match="student_loss needs a loss_balancer"):
        model.compute_kd_loss(student_loss=torch.ones(()))
    assert model.compute_kd_loss() > 0  # the step is still there


def test_a_frozen_student_is_told(teacher):
    with pytest.warns(UserWarning, match=r"nothing will be trained.*requires_grad_\(\)"):
        converted(Net().requires_grad_(False), teacher)
