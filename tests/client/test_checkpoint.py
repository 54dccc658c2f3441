"""Checkpoints: the student alone, safe to read, and safe from crashes."""

import functools
import io
import warnings
from fractions import Fraction

import programs
import pytest
import safetensors.torch
import schoolhouse as sh
import torch
from models import Extra, Net, bits, same
from schoolhouse import errors
from torch import nn
from torch.nn import functional as F


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(16, 32)

    def forward(self, out_s, out_t):
        return F.mse_loss(self.map(out_s), out_t)


def converted(student, teacher, **more):
    pairs = {("body", "body"): Projected()}
    fields = {"teacher_model": teacher, "criterion": pairs, "loss_balancer": sh.StaticLossBalancer(1.0), **more}
    return sh.convert(student, {"kd_loss": fields})


def with_buffer(value, seed=3):
    student = Net(seed=seed)
    student.register_buffer("own", value)
    return student


@pytest.fixture
def path(tmp_path):
    return tmp_path / "student.safetensors"


def test_the_student_alone(teach, path):
    teacher = teach(Net(32, seed=1))
    model = converted(Net(seed=2), teacher, expose_minimal_state_dict=False)
    sh.save(model, path)
    assert sorted(safetensors.torch.load_file(path)) == sorted(Net().state_dict())
    student = Net(seed=3)
    with pytest.warns(UserWarning, match=r"restored only the student.*convert\(student.*'body', 'body'\): Projected"):
        assert sh.restore(student, path) is student
    assert type(student) is Net
    assert same(student, Net(seed=2))
    again = converted(Net(seed=3), teacher)
    kept = again.loss_modules[0].map.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sh.restore(again, path)
    assert torch.equal(again.fc.weight, Net(seed=2).fc.weight)
    assert torch.equal(again.loss_modules[0].map.weight, kept)


def test_with_the_losses(teach, path):
    teacher = teach(Net(32, seed=1))
    model = converted(Net(seed=2), teacher)
    sh.save(model, path, include_losses=True)
    assert not any("teacher" in name for name in safetensors.torch.load_file(path))
    again = converted(Net(seed=3), teacher)
    sh.restore(again, path)
    assert torch.equal(again.loss_modules[0].map.weight, model.loss_modules[0].map.weight)
    with pytest.warns(UserWarning, match="then restore again"):
        assert same(sh.restore(Net(seed=3), path), Net(seed=2))


def test_an_exported_student_says_nothing(path):
    sh.save(sh.export(converted(Net(seed=2), Net(32))), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(sh.restore(Net(seed=3), path), Net(seed=2))


def test_wrapped_models(path):
    sh.save(torch.compile(converted(Net(seed=2), Net(32))), path)
    with pytest.warns(UserWarning, match="only the student"):
        assert same(sh.restore(Net(seed=3), path), Net(seed=2))


class Tied(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("turned", torch.randn(4, 6).t())
        self.register_buffer("part", torch.randn(10)[3:7])
        self.register_buffer("empty", torch.zeros(0, 3))
        self.small = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))


def test_tied_strided_and_empty_tensors(path):
    student = Tied(1)
    sh.save(student, path)
    assert path.stat().st_size < 50 * 8 * 4 * 1.5  # once
    assert safetensors.torch.load_file(path)["turned"].shape == (6, 4)
    restored = sh.restore(Tied(2), path)
    assert same(restored, student)
    assert restored.head.weight is restored.embed.weight


def test_extra_state(path):
    sh.save(Extra({"steps": 3, "names": ["a", torch.ones(2)]}), path)
    restored = sh.restore(Extra(None), path)
    assert restored.extra["steps"] == 3
    assert restored.extra["names"][1].tolist() == [1, 1]
    assert torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["student"].endswith("Extra")


def test_what_only_code_could_restore_is_refused_when_saving(path):
    sh.save(Net(seed=2), path)
    with pytest.raises(errors.CheckpointError, match="get_extra_state"):
        sh.save(Extra(Fraction(1, 3)), path)
    assert same(sh.restore(Net(seed=3), path), Net(seed=2))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


UNSAVABLE = {
    "quantised": lambda: torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}),
    "lambda": lambda: Extra(lambda: 1),
    "deep": lambda: Extra(functools.reduce(lambda inner, _: [inner], range(2000), [])),
    "lazy": lambda: nn.LazyLinear(3),
    "nested": lambda: with_buffer(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "opaque": lambda: with_buffer(torch.ones(3).to_mkldnn()),
    "no text": lambda: nn.ParameterDict({"\ud800": torch.ones(2)}),
}


@pytest.mark.parametrize("case", UNSAVABLE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_saved_is_refused(path, case):
    sh.save(Net(seed=2), path)
    before = path.read_bytes()
    with pytest.raises(errors.CheckpointError, match="uninitialised|nested|cannot be saved"):
        sh.save(UNSAVABLE[case](), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_extra_state_that_contains_itself(path):
    extra = {"steps": 3}
    extra["self"] = extra
    sh.save(Extra(extra), path)
    restored = sh.restore(Extra(None), path).extra
    assert restored["self"] is restored


def test_another_architecture_changes_nothing(path):
    student = Net(seed=2)
    student.more = nn.Linear(2, 2)
    sh.save(student, path)
    other = Net(8, seed=3)
    other.own = nn.Linear(3, 3)
    with pytest.raises(errors.CheckpointError) as caught:
        sh.restore(other, path)
    for part in ("body.weight is (16, 8) in the file and (8, 8)", "2 missing", "own.bias", "2 unknown", "more.weight"):
        assert part in str(caught.value)
    assert torch.equal(other.fc.weight, Net(8, seed=3).fc.weight)
    same_widths = Net(seed=3)
    same_widths.own = nn.Linear(3, 3)
    sh.restore(same_widths, path, strict=False)
    assert torch.equal(same_widths.fc.weight, Net(seed=2).fc.weight)


def sparse():
    return torch.eye(3).to_sparse()


MISFITS = {
    "list": ([1.0, 2.0, 3.0], torch.zeros(3), "no tensor but a list in the file and a tensor of layout torch.strided"),
    "None": (None, torch.zeros(3), "no tensor but a NoneType"),
    "str": ("abc", torch.zeros(3), "no tensor but a str"),
    "sparse": (sparse(), torch.zeros(3, 3), "torch.sparse_coo in the file and a tensor of layout torch.strided"),
    "dense": (torch.zeros(3, 3), sparse(), "torch.strided in the file and a tensor of layout torch.sparse_coo"),
    "quantised": (torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), torch.zeros(3), "quantised .*qint8"),
    "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.zeros(2, 3), "a nested tensor"),
    "meta": (torch.empty(3, device="meta"), torch.zeros(3), "without values in the file"),
    "complex": (torch.tensor([1 + 2j]), torch.zeros(1), "torch.complex64 in the file and torch.float32 in the model"),
    "float": (torch.tensor([1.5]), torch.tensor([1]), "torch.float32 in the file and torch.int64 in the model"),
    "bool": (torch.tensor([0.5]), torch.tensor([True]), "torch.float32 in the file and torch.bool in the model"),
    "expanded": (torch.ones(3), torch.zeros(1).expand(3), "1 expanded in the model.*contiguous.*: own"),
    "own nested": (torch.ones(3), torch.nested.nested_tensor([torch.ones(2)]), "1 nested in the model.*: own"),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantize_per_tensor")
def test_a_value_that_does_not_fit_changes_nothing(path, case):
    given, own, message = MISFITS[case]
    with path.open("wb") as file:
        torch.save({"own": given, **Net(seed=2).state_dict()}, file)
    student = Net(seed=3)
    before = bits(student)
    student.register_buffer("own", own)
    for strict in (True, False):
        with pytest.raises(errors.CheckpointError, match=f"unchanged.*{message}"):
            sh.restore(student, path, strict=strict)
        assert bits(student.body) == {name[5:]: value for name, value in before.items() if name.startswith("body.")}
    assert student.own is own


def test_a_lazy_student_is_told_to_run(path):
    sh.save(nn.Linear(2, 3), path)
    student = nn.LazyLinear(3)
    with pytest.raises(errors.CheckpointError, match=r"2 uninitialised in the model \(run a forward.*: bias, weight"):
        sh.restore(student, path)
    assert student.has_uninitialized_params()


def test_precision_may_change(path):
    with path.open("wb") as file:
        torch.save({"own": torch.tensor([1 + 2**-8, 3.0]), **Net(seed=2).state_dict()}, file)
    restored = sh.restore(with_buffer(torch.zeros(2, dtype=torch.bfloat16)), path)
    assert restored.own.tolist() == [1.0, 3.0]  # halfway to 1 + 2**-7, to the even one
    assert restored.own.dtype is torch.bfloat16
    with path.open("wb") as file:
        torch.save({"own": torch.tensor([1, 3]), **Net(seed=2).state_dict()}, file)
    assert sh.restore(with_buffer(torch.zeros(2)), path).own.tolist() == [1.0, 3.0]


class Refusing(Extra):
    def __init__(self, extra, fault):
        super().__init__(extra)
        self.fault = fault

    def set_extra_state(self, state):
        if state != self.extra:
            raise self.fault


def test_a_student_that_refuses_is_put_back(path):
    def make(seed, fault):
        student = nn.Sequential(Net(seed=seed), Extra([seed]), Refusing(seed, fault), Net(seed=seed))
        with torch.no_grad():
            student[0].fc.bias[:3] = torch.tensor([float("nan"), -0.0, float("-inf")])
        return student

    sh.save(make(2, None), path)
    student = make(3, ValueError("not mine"))
    before = bits(student)
    with pytest.raises(errors.CheckpointError, match=r"ValueError: not mine\); the student is unchanged$"):
        sh.restore(student, path)
    assert bits(student) == before
    assert student[1].extra == [3]
    with pytest.raises(KeyboardInterrupt):
        sh.restore(make(3, KeyboardInterrupt()), path)
    student.register_load_state_dict_post_hook(lambda *_: 1 / 0)
    student[2].extra = 2
    with pytest.raises(errors.CheckpointError, match="unchanged, except for what its own code"):
        sh.restore(student, path)
    assert bits(student) == before
    assert student[1].extra == [3]


SHARDED = """
import sys, schoolhouse as sh, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
class Refusing(nn.Linear):
    def get_extra_state(self):
        return self.seed
    def set_extra_state(self, seed):
        if seed != self.seed:
            raise ValueError("not mine")
def make(seed, own):
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(4, 4), Refusing(4, 4))
    student[1].seed = own
    for module in (*student, student):
        fully_shard(module)
    return student
def whole(model):
    return [p.full_tensor() for p in model.parameters()]
def equal(some, others):
    return all(map(torch.equal, some, others))
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.ranks", rank=0, world_size=1)
first, other = make(1, 1), make(2, 2)
sh.save(first, sys.argv[1])
before = whole(other)
try:
    sh.restore(other, sys.argv[1])
except sh.errors.CheckpointError:
    assert equal(whole(other), before)
    print("refused")
with torch.device("meta"):
    built = make(3, 1)
assert equal(whole(sh.restore(built, sys.argv[1])), whole(first))
print("restored")
dist.destroy_process_group()
"""


def test_a_sharded_student_that_refuses_is_put_back(path):
    ran = programs.run("-c", SHARDED, path)
    assert ran.stdout.split() == ["refused", "restored"], ran.stderr


def test_names_of_a_meta_model_in_a_plain_student(path):
    def make(seed):
        student = Net(seed=seed)
        student._loss_balancer, student._loss_modules = nn.Linear(2, 2), nn.Linear(3, 3)
        return student

    student, other = make(2), make(3)
    sh.save(student, path)
    assert sorted(safetensors.torch.load_file(path)) == sorted(student.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(sh.restore(other, path), student)
    safetensors.torch.save_file(dict(Net(seed=4).state_dict()), path)
    with pytest.raises(errors.CheckpointError, match=r"4 missing in the file.*_loss_balancer\.weight"):
        sh.restore(other, path)
    assert same(other, student)
