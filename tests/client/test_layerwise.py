"""The mode layerwise_kd: layers of the student get the teacher's inputs; with either teacher."""

import copy

import pytest
import schoolhouse as sh
import torch
from models import Blocks, config
from schoolhouse import errors
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums")


class Tiny(nn.Module):
    def __init__(self, seed, bias=True):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.block, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 8, bias=bias), nn.Linear(8, 50)

    def forward(self, x):
        return self.lm_head(self.block(torch.tanh(self.embed(x))))


def layerwise(student, teacher, pairs=None):
    pairs = pairs or {("block", "block"): nn.MSELoss()}
    return sh.convert(student, mode=[("layerwise_kd", config(teacher, pairs))])


def test_layerwise_gives_the_layer_the_teachers_inputs(teach, x):
    module, student = Tiny(1), Tiny(2, bias=False)
    model = layerwise(student, teach(module))
    assert isinstance(model, sh.LayerwiseDistillationModel)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["block.weight"]
    inputs = torch.tanh(module.embed(x))
    out = model(x)
    assert torch.equal(out, F.linear(inputs, student.block.weight))  # no head
    loss = model.compute_kd_loss()
    assert torch.equal(loss, F.mse_loss(F.linear(inputs, student.block.weight), module.block(inputs)))
    loss.backward()
    residual = F.linear(inputs, student.block.weight.detach()) - module.block(inputs)
    torch.testing.assert_close(student.block.weight.grad, 2 * residual.T @ inputs / residual.numel())
    assert list(model.state_dict()) == list(Tiny(2, bias=False).state_dict())
    exported = sh.export(model)
    assert exported(x).shape == (6, 50)
    assert exported.block._forward_pre_hooks == {}


def test_module_replacement_recovers_the_teacher(teach, x):
    module = Tiny(1)
    student = copy.deepcopy(module)
    student.block = nn.Linear(8, 8)
    model = layerwise(student, teach(module))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    batch = torch.randn(64, 8)
    for _ in range(300):
        model(batch)
        loss = model.compute_kd_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(sh.export(model)(x), module(x), atol=0.02, rtol=0.02)


def test_layerwise_with_the_student_alone_uses_its_own_inputs(teach, x):
    student = Tiny(2)
    own = student.block(torch.tanh(student.embed(x)))
    model = layerwise(student, teach(Tiny(1)))
    with model.only_student_forward():
        assert torch.equal(model(x), own)


class ByKeyword(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.block = nn.Linear(8, 8), Attend()

    def forward(self, x):
        return self.block(hidden=self.embed(x), scale=2.0, cache=object())


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden, scale, cache):
        return self.fc(hidden) * scale


def test_layerwise_inputs_by_keyword(teach, x):
    module, student = ByKeyword(1), ByKeyword(2)
    model = layerwise(student, teach(module))
    assert torch.equal(model(x), student.block.fc(module.embed(x)) * 2)
    assert model.compute_kd_loss() > 0


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.MSELoss(), "layerwise_kd"),
        ({("", ""): nn.MSELoss()}, "named layers"),
        ({("block", "block"): nn.MSELoss(), ("block", "embed"): nn.MSELoss()}, "several pairs"),
    ],
)
def test_layerwise_needs_named_pairs(criterion, message):
    fields = config(Tiny(1), criterion, sh.StaticLossBalancer([0.5, 0.5]))
    with pytest.raises(errors.ConfigError, match=message):
        sh.convert(Tiny(2), mode=[("layerwise_kd", fields)])


def test_checkpointing_in_a_backward_of_ones_own_is_refused(teach, x):
    model = layerwise(Blocks(1, "plain"), teach(Blocks(2)), {("two", "two"): nn.MSELoss()})
    out = model(x.requires_grad_())
    with pytest.raises(errors.FeatureMismatchError, match="compute_kd_loss"):
        out.sum().backward()
