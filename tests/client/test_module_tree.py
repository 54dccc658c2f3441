"""The meta-model as a module: its tree, state dicts, copies and export; with either teacher."""

import copy
import inspect
import io
import pickle

import pytest
import schoolhouse as sh
import torch
from models import Net, Projected, converted
from schoolhouse import errors
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums")


@pytest.fixture
def teacher(teach):
    return teach(Net(32, seed=1))


def test_trainable_losses_and_the_tree(teach, x):
    pairs = {("body", "body"): Projected(), ("fc", "fc"): nn.MSELoss()}
    balancer = sh.StaticLossBalancer([0.5, 0.5])
    teacher = teach(Net(32, seed=1))
    student = Net()
    model = converted(student, teacher, pairs, balancer)
    assert list(model.loss_modules) == [pairs["body", "body"]]
    assert model.loss_balancer is balancer
    assert {id(p) for p in pairs["body", "body"].parameters()} <= {id(p) for p in model.parameters()}
    extra = ["_loss_modules", "_loss_balancer"] + (["_teacher_model"] if isinstance(teacher, sh.LocalTeacher) else [])
    assert [n for n, _ in model.named_children()] == ["body", "act", "fc", *extra]
    assert model.original_cls is Net
    assert isinstance(model, sh.DistillationModel)
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = pairs["body", "body"].map.weight.clone()
    model(x)
    model.compute_kd_loss().backward()
    optimizer.step()
    assert not torch.equal(before, pairs["body", "body"].map.weight)
    with model.hide_loss_modules(), model.hide_teacher_model():
        assert sum(1 for _ in model.parameters()) == 4
    with model.hide_loss_modules(enable=False):
        assert sum(1 for _ in model.loss_modules.parameters()) == 2
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    exported = sh.export(model)
    assert exported is student
    assert type(exported) is Net
    assert set(vars(exported)) == set(vars(Net()))
    assert exported.body._forward_hooks == {}
    assert list(exported.state_dict()) == list(Net().state_dict())


def test_a_local_teacher_stays_frozen_and_in_eval_mode(x):
    module = nn.Sequential(nn.Linear(8, 5), nn.Dropout(0.5), nn.BatchNorm1d(5))
    model = converted(Net(), module, nn.MSELoss())
    state = copy.deepcopy(module.state_dict())
    model.train()
    model.requires_grad_(True)
    assert not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    assert all(p.requires_grad for p in model.body.parameters())
    module.train()  # by whatever way
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(x)
    model.compute_kd_loss().backward()
    optimizer.step()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("minimal", [True, False])
def test_state_dicts(teach, minimal):
    def fresh(seed):
        pairs = {("body", "body"): Projected()}
        teacher = teach(Net(32, seed=1))
        return converted(Net(16, seed), teacher, pairs, expose_minimal_state_dict=minimal), teacher

    (model, teacher), (other, _) = fresh(2), fresh(3)
    state = model.state_dict()
    student, losses = list(Net().state_dict()), ["_loss_modules.0.map.weight", "_loss_modules.0.map.bias"]
    full = not minimal and isinstance(teacher, sh.LocalTeacher)
    assert sorted(state) == sorted(student + losses + [f"_teacher_model.{n}" for n in student if full])
    other.load_state_dict(state)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    kept = {name: value.clone() for name, value in other.loss_modules.state_dict().items()}
    other.load_state_dict(Net(16, seed=9).state_dict())  # a checkpoint of the student alone
    assert torch.equal(other.body.weight, Net(16, seed=9).body.weight)
    assert all(torch.equal(value, kept[name]) for name, value in other.loss_modules.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.bias"):
        other.load_state_dict({name: value for name, value in state.items() if name != "fc.bias"})
    with pytest.raises(RuntimeError, match=r"Missing key.*map\.bias"):
        other.load_state_dict({name: value for name, value in state.items() if not name.endswith("map.bias")})
    outer, again = (nn.ModuleDict({"inner": m}) for m in (model, other))
    again.load_state_dict(outer.state_dict())
    assert torch.equal(other.fc.weight, model.fc.weight)
    again.load_state_dict({f"inner.{name}": value for name, value in Net(16, seed=9).state_dict().items()})
    with pytest.raises(RuntimeError, match=r"Missing key.*inner\.fc\.bias"):
        again.load_state_dict({n: v for n, v in outer.state_dict().items() if n != "inner.fc.bias"})


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(teacher, x, how):
    pairs = {("body", "body"): Projected(), ("", ""): nn.MSELoss()}
    model = converted(Net(), teacher, pairs, sh.StaticLossBalancer([0.5, 0.5]))
    model(x)  # what is under way is not copied
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        data = pickle.dumps(model)
        twin = pickle.loads(data)
        if isinstance(teacher, sh.RemoteTeacher):
            assert teacher.url.encode() in data
            assert len(data) < 20_000
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(model)
    first = model.compute_kd_loss()
    with pytest.raises(errors.UsageError):
        twin.compute_kd_loss()
    twin(x)
    assert torch.equal(twin.compute_kd_loss(), first)
    with torch.no_grad():
        twin.fc.weight.zero_()
        twin.loss_modules[0].map.weight.zero_()
    twin(x)
    assert not torch.equal(twin.compute_kd_loss(), first)  # its hooks and losses are its own
    model(x)
    assert torch.equal(model.compute_kd_loss(), first)
    if isinstance(twin.teacher_model, sh.RemoteTeacher):
        twin.teacher_model.close()
    assert type(sh.export(twin)) is Net
    assert twin.body._forward_hooks == {}


def test_export_takes_wrappers_off_and_says_so(teacher):
    model = converted(Net(), teacher)
    with pytest.warns(UserWarning, match="OptimizedModule"):
        assert type(sh.export(torch.compile(model))) is Net
    with pytest.warns(UserWarning, match="nothing to export"):
        assert sh.export(model) is model
    assert type(converted(Net(), teacher).export()) is Net
