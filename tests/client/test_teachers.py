"""What a teacher promises wherever it lives: features as modules made them, and the student's batch left alone."""

import socket
import time
from collections import UserDict
from dataclasses import dataclass

import pytest
import schoolhouse as sh
import torch
from models import Net
from schoolhouse import errors
from schoolhouse.taps import check_modules
from schoolhouse.teachers.fingerprint import revision_of
from schoolhouse_server import serve
from torch import nn


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.Identity()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x.mul_(2)
        return self.fc(self.act(x).add_(1))


def test_a_teacher_that_writes_into_its_input(teach):
    module, x = ChangesItsInput(), torch.arange(8.0).reshape(2, 4)
    for _ in range(3):
        given = x.clone()
        got = teach(module).submit((given,), {}, ["act", ("", "input"), ""]).result()
        assert torch.equal(given, x)  # the student's batch is its own
        assert torch.equal(got["", "input"][0], x * 2 + 1)  # as a plain hook sees it in the end
        assert torch.equal(got["act"], x * 2 + 1)
        assert torch.equal(got[""], module.fc(x * 2 + 1))


@dataclass
class Pair:
    a: torch.Tensor
    b: torch.Tensor


def test_a_structured_tap_that_is_written_into_keeps_its_type():
    @dataclass
    class Here:
        a: torch.Tensor

    class Inner(nn.Module):
        def forward(self, x):
            return Here(x + 1)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = Inner(), nn.Identity()

        def forward(self, x):
            found = self.inner(x)
            return self.last(found.a.mul_(3))

    got = sh.LocalTeacher(Outer()).submit((torch.ones(2),), {}, ["inner", ""]).result()
    assert type(got["inner"]) is Here
    assert got["inner"].a.tolist() == [6, 6]
    assert got[""].tolist() == [6, 6]


def test_the_revision_is_of_values_not_of_layout():
    plain, turned = nn.Linear(300, 400), nn.Linear(300, 400)
    turned.load_state_dict(plain.state_dict())
    turned.weight = nn.Parameter(plain.weight.detach().t().contiguous().t())
    assert not turned.weight.is_contiguous()
    assert len({revision_of(plain), *(revision_of(turned) for _ in range(20))}) == 1
    with torch.no_grad():
        turned.weight[3, 4] += 1
    assert revision_of(turned) != revision_of(plain)


def test_served_weights_that_change_are_another_revision():
    module = Net()
    with serve(module) as server, sh.connect(server.url) as teacher:
        teacher.submit((torch.ones(1, 8),), {}, [""]).result()
        with torch.no_grad():
            module.fc.weight.add_(1)
        with pytest.raises(errors.RevisionChangedError, match="serve it again"):
            teacher.submit((torch.ones(1, 8),), {}, [""]).result()


def test_the_limit_on_requests_is_not_one_on_replies():
    with serve(Net(width=4096), max_request_bytes=1000) as server, sh.connect(server.url) as teacher:
        assert teacher.submit((torch.ones(2, 8),), {}, ["body"]).result()["body"].shape == (2, 4096)


class Inferring(nn.Module):
    @torch.inference_mode()
    def forward(self, x):
        return x.repeat(40_000)


def test_a_module_that_runs_in_inference_mode(teach):
    with torch.inference_mode():
        x = torch.ones(2)
    assert teach(Inferring()).submit((x,), {}, [""]).result()[""].sum() == 80_000


def test_a_taken_port_is_a_typed_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(errors.TeacherUnavailableError, match="taken"):
            serve(Net(), port=taken.getsockname()[1])


def test_a_module_that_did_not_run_is_named(teach):
    module = Net()
    module.spare = nn.Linear(2, 2)
    with pytest.raises(errors.UnknownTapError, match="spare"):
        teach(module).submit((torch.ones(1, 8),), {}, ["spare"]).result()


class Batch(UserDict):
    """As transformers' BatchEncoding: a mapping with attributes."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


def test_a_mapping_of_another_type_reaches_a_local_teacher_as_it_is():
    class ByName(nn.Module):
        def forward(self, batch):
            return batch.x + batch["x"]

    given = Batch({"x": torch.ones(2)})
    teacher = sh.LocalTeacher(ByName())
    for _ in range(2):
        assert teacher.submit((given,), {}, [""]).result()[""].tolist() == [2, 2]
    assert given["x"].tolist() == [1, 1]


@pytest.mark.parametrize("how", ["wrapped", "in place", "inner"])
def test_a_compiled_teacher_is_tapped_by_the_names_of_the_plain_one(teach, x, how):
    plain, module = Net(seed=1), Net(seed=1)
    if how == "wrapped":
        module = torch.compile(module, backend="eager")
    elif how == "in place":
        module.compile(backend="eager")
    else:
        module.body.compile(backend="eager")
    teacher = teach(module)
    assert teacher.describe().revision == revision_of(plain)
    assert teacher.describe().class_name == "models.Net"
    for _ in range(2):
        for taps in (["body", "fc"], [""], ["act"]):
            got = teacher.submit((x,), {}, taps).result()
            want = sh.LocalTeacher(plain).submit((x,), {}, taps).result()
            assert all(torch.equal(got[tap], want[tap]) for tap in taps)


def test_memory_formats_travel_both_ways(teach):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2)]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    teacher = teach(module)
    for seed in range(5):
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        x = x.to(memory_format=torch.channels_last)
        got = teacher.submit((x,), {}, ["3", "6"]).result()
        with torch.no_grad():
            assert torch.equal(got["6"], module(x))  # kernels round by the layout of their inputs
            inner = module[:4](x)
        assert got["3"].stride() == inner.stride() != inner.contiguous().stride()
        assert torch.equal(got["3"], inner)


def test_a_batch_is_left_alone_in_every_layout(teach):
    module = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(192, 5))
    teacher, x = teach(module), torch.randn(2, 3, 8, 8)
    for given in (x.to(memory_format=torch.channels_last), x, x[:, :, ::2].repeat(1, 1, 2, 1)):
        before = given.clone()
        got = teacher.submit((given,), {}, [""]).result()[""]
        assert torch.equal(got, module(given.clone()))
        assert torch.equal(given, before)


def test_a_teacher_that_is_compiled_after_it_was_given(x):
    module = Net(seed=1)
    teacher = sh.LocalTeacher(module)
    module.compile(backend="eager")
    with torch.no_grad():
        module(x)
    got = teacher.submit((x,), {}, ["body"]).result()["body"]
    assert torch.equal(got, sh.LocalTeacher(Net(seed=1)).submit((x,), {}, ["body"]).result()["body"])


@pytest.mark.parametrize("cut", [lambda x: x[:, :3], lambda x: x[:, 1:, 4:20, 4:20], lambda x: x[::2, :3]])
def test_parts_of_images_keep_their_order_of_dimensions(teach, cut):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 32, 7, stride=2, padding=3), nn.ReLU(), nn.Conv2d(32, 64, 3)).eval()
    x = cut(torch.randn(8, 4, 64, 64).to(memory_format=torch.channels_last))
    got = teach(module).submit((x,), {}, [""]).result()[""]
    with torch.no_grad():
        want = module(x)
    assert got.stride() == want.stride()
    assert torch.equal(got, want)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_reach_a_local_teacher(layout):
    class Pads(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x).to_padded_tensor(0.0)

    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    x = torch.nested.nested_tensor(rows, layout=layout)
    module = Pads(1)
    teacher = sh.LocalTeacher(module)
    for _ in range(2):
        assert torch.equal(teacher.submit((x,), {}, [""]).result()[""], module(x))
    model = sh.convert(Pads(0), mode=[("kd_loss", {"teacher_model": Pads(1), "criterion": nn.MSELoss()})])
    want = (model(x), model.compute_kd_loss())[1]
    with model.only_teacher_forward():
        model(x)
    with model.only_student_forward():
        model(x)
    assert torch.equal(model.compute_kd_loss(), want)


def test_a_wrong_tap_of_a_model_of_very_many_modules_is_told_at_once():
    layers = [
        f"layers.{i}.experts.{j}.{part}" for i in range(32) for j in range(256) for part in ("up", "gate", "down")
    ]
    known = dict.fromkeys(["", "head", *layers])
    began = time.thread_time()  # of this thread alone: the machine may be busy with others
    with pytest.raises(errors.UnknownTapError) as caught:
        check_modules(["layers.3.experts.11.upp"], known, "it")
    assert caught.value.choices[0] == "layers.3.experts.11.up"
    with pytest.raises(errors.UnknownTapError) as caught:
        check_modules(["layers.99.experts.11.upp"], known, "it")
    assert caught.value.choices[0] == "layers.0.experts.0.up"
    assert time.thread_time() - began < 2
