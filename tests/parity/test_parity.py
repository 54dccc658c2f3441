"""The same script with NVIDIA ModelOpt and with Schoolhouse: equal to the last bit. Run by `make parity`.

Each script gets the module that it imports as `mtd` and what it gives as `teacher_model`, and returns what is compared.
"""

import copy
import inspect
import warnings

import pytest
import schoolhouse as sh
import torch
from schoolhouse_server import serve
from torch import nn
from torch.nn import functional as F

mtd = pytest.importorskip("modelopt.torch.distill", reason="make parity installs it into an environment of its own")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


class Net(nn.Module):
    """Convolutions with batch norm, an in-place ReLU that writes into a tapped tensor, dropout, and a reused module."""

    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.mix(self.mix(x)))
        return self.fc(self.drop(x.mean((2, 3))))


BATCHES = 4


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    for _ in range(BATCHES):
        yield torch.randn(5, 1, 6, 6, generator=generator).to(dtype), torch.randint(0, 10, (5,), generator=generator)


def trained(mtd, model, step, dtype=torch.float32, eval_between=False):
    """Train with `step`; losses, gradients of the student (the seed's order of losses is a set's), and the state."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for x, y in batches(dtype):
        loss = step(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and n[0] != "_"}
        losses += [loss.detach(), grads]
        optimizer.step()
        if eval_between:
            model.eval()
            losses.append(model(x).detach())
            losses.append(step(model, x, y).detach())
            model.train()
    return losses, dict(model.state_dict())


def convert(mtd, teacher, criterion, balancer=None, kind="kd_loss", student=None, **more):
    fields = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer, **more}
    return mtd.convert(Net(6, 1) if student is None else student, mode=[(kind, fields)])


def soft_label(mtd, teacher):
    return trained(
        mtd, convert(mtd, teacher, mtd.LogitsDistillationLoss()), lambda m, x, _: (m(x), m.compute_kd_loss())[1]
    )


def with_student_loss(mtd, teacher):
    model = convert(mtd, teacher, mtd.LogitsDistillationLoss(3.0, "batchmean"), mtd.StaticLossBalancer(0.7))
    step = lambda m, x, y: m.compute_kd_loss(student_loss=F.cross_entropy(m(x), y))  # noqa: E731
    return trained(mtd, model, step, eval_between=True)


def layer_pairs(mtd, teacher):
    torch.manual_seed(4)
    pairs = {
        ("norm", "norm"): mtd.MGDLoss(6, 8, alpha_mgd=0.5, lambda_mgd=0.3),
        ("mix", "mix"): mtd.MGDLoss(6, 8),
        ("fc", "fc"): mtd.LogitsDistillationLoss(2.0),
    }
    model = convert(mtd, teacher, pairs, mtd.StaticLossBalancer([0.2, 0.1, 0.3]))
    return trained(mtd, model, lambda m, x, y: m.compute_kd_loss(student_loss=F.cross_entropy(m(x), y)))[0]


def one_trainable_loss(mtd, teacher):
    torch.manual_seed(4)
    model = convert(mtd, teacher, {("stem", "stem"): mtd.MGDLoss(6, 8)})
    return trained(mtd, model, lambda m, x, _: (m(x), m.compute_kd_loss())[1])


def minifinetuning(mtd, teacher):
    model = convert(mtd, teacher, mtd.MFTLoss(1.5, 0.3))
    return trained(mtd, model, lambda m, x, y: (m(x), m.compute_kd_loss(labels=y))[1])


def reduction_and_reducer(mtd, teacher):
    balancer = mtd.StaticLossBalancer([0.4])
    balancer.set_student_loss_reduction_fn(lambda loss: loss.sum() / 7)
    model = convert(mtd, teacher, {("fc", "fc"): mtd.LogitsDistillationLoss(2.0, "none")}, balancer)

    def step(m, x, y):
        student_loss = F.cross_entropy(m(x), y, reduction="none")
        return m.compute_kd_loss(student_loss, loss_reduction_fn=lambda v: (v * (y > 3)).sum() / 3)

    return trained(mtd, model, step)


def by_name(mtd, teacher):
    pairs = {("fc", "fc"): nn.MSELoss(), ("", ""): nn.SmoothL1Loss()}
    model = convert(mtd, teacher, pairs, mtd.StaticLossBalancer([0.5, 0.5]))
    found = []

    def step(m, x, y):
        losses = m.compute_kd_loss(student_loss=F.cross_entropy(m(x), y), skip_balancer=True)
        found.append(list(losses))
        return sum(losses.values())

    return found, trained(mtd, model, step)


def separate_forwards(mtd, teacher):
    model = convert(mtd, teacher, mtd.LogitsDistillationLoss())

    def step(m, x, _):
        with m.only_teacher_forward():
            out_t = m(x)
        with m.only_student_forward():
            m(x)
        return m.compute_kd_loss() + out_t.mean()

    return trained(mtd, model, step)


def changed_outputs(mtd, teacher):
    """By a hook that was there before, and by a forward that is wrapped later, as accelerate does."""
    student = Net(6, 1)
    student.register_forward_hook(lambda _module, _args, output: output * 2)
    model = convert(mtd, teacher, mtd.LogitsDistillationLoss(), student=student)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs).double() * 3
    return trained(mtd, model, lambda m, x, _: (m(x), m.compute_kd_loss())[1])


def channels_last(mtd, teacher):
    model = convert(mtd, teacher, {("stem", "norm"): mtd.MGDLoss(6, 8)})
    return trained(mtd, model, lambda m, x, _: (m(x.to(memory_format=torch.channels_last)), m.compute_kd_loss())[1])


def in_double(mtd, teacher):
    model = convert(mtd, teacher, mtd.LogitsDistillationLoss(2.0), student=Net(6, 1).double())
    return trained(mtd, model, lambda m, x, _: (m(x), m.compute_kd_loss())[1], torch.float64)


def in_bfloat16(mtd, teacher):
    model = convert(mtd, teacher, mtd.LogitsDistillationLoss(2.0), student=Net(6, 1).bfloat16())
    return trained(mtd, model, lambda m, x, _: (m(x), m.compute_kd_loss())[1], torch.bfloat16)


def exported(mtd, teacher):
    model = convert(mtd, teacher, mtd.LogitsDistillationLoss())
    trained(mtd, model, lambda m, x, _: (m(x), m.compute_kd_loss())[1])
    student = mtd.export(model).eval()
    assert type(student) is Net
    return dict(student.state_dict()), student(next(batches())[0]), [n for n, _ in student.named_modules()]


def layerwise(mtd, teacher):
    """Only the student's own: the seed gives lm_head other names, and takes no head away here."""
    pairs = {("mix", "mix"): nn.MSELoss()}
    model = convert(mtd, teacher, pairs, kind="layerwise_kd", student=Net(8, 1))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    return trainable, trained(mtd, model, lambda m, x, _: (m(x), m.compute_kd_loss())[1])


def layerwise_pairs(mtd, teacher):
    pairs = {("norm", "norm"): nn.MSELoss(), ("fc", "fc"): mtd.LogitsDistillationLoss()}
    model = convert(mtd, teacher, pairs, mtd.StaticLossBalancer([0.5, 0.5]), "layerwise_kd", Net(8, 1))
    return trained(mtd, model, lambda m, x, _: (m(x), m.compute_kd_loss())[1])


SCRIPTS = [
    soft_label,
    with_student_loss,
    layer_pairs,
    one_trainable_loss,
    minifinetuning,
    reduction_and_reducer,
    by_name,
    separate_forwards,
    changed_outputs,
    channels_last,
    in_double,
    in_bfloat16,
    exported,
    layerwise,
    layerwise_pairs,
]
DTYPES = {in_double: torch.float64, in_bfloat16: torch.bfloat16}


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert_same(list(ours.values()), list(theirs.values()))
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair)
    else:
        assert ours == theirs


@pytest.mark.parametrize("where", ["local", "remote"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripts(script, where):
    def teacher():
        return Net(8, 2).to(DTYPES.get(script, torch.float32))

    theirs = script(mtd, teacher())
    if where == "local":
        return assert_same(script(sh, teacher()), theirs)
    with serve(teacher()) as server, sh.connect(server.url) as remote:
        return assert_same(script(sh, remote), theirs)


SAME = [
    "LogitsDistillationLoss",
    "MFTLoss",
    "MGDLoss",
    "StaticLossBalancer",
    "DistillationLossBalancer",
    "convert",
    "export",
]
METHODS = [
    "compute_kd_loss",
    "hide_teacher_model",
    "hide_loss_modules",
    "only_teacher_forward",
    "only_student_forward",
    "train",
    "export",
]


BEYOND = ("vocabulary", inspect.Parameter.KEYWORD_ONLY, "equal")


def parameters(function):
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize("name", SAME)
def test_arguments_and_defaults(name):
    ours = [parameter for parameter in parameters(getattr(sh, name)) if parameter != BEYOND]
    assert ours == parameters(getattr(mtd, name))


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    assert parameters(getattr(sh.DistillationModel, name)) == parameters(getattr(mtd.DistillationModel, name))


@pytest.mark.parametrize("name", ["KDLossConfig", "LayerwiseKDConfig", "ExportStudentConfig"])
def test_config_fields(name):
    theirs = {key: field.default for key, field in getattr(mtd, name).model_fields.items()}
    ours = {key: field.default for key, field in getattr(sh, name).__dataclass_fields__.items()}
    beyond = {key: ours.pop(key, None) for key in ("encodings", "positions", "eval_kd")}
    assert ours == theirs
    assert not any(beyond.values())  # and without them nothing changes


def both(minimal=True, criterion=None):
    models = []
    for module in (mtd, sh):
        torch.manual_seed(4)
        loss = criterion(module) if criterion else {("stem", "stem"): module.MGDLoss(6, 8)}
        models.append(convert(module, Net(8, 2), loss, expose_minimal_state_dict=minimal))
    return models


def test_the_module_tree():
    theirs, ours = both()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert ours.original_cls is theirs.original_cls


@pytest.mark.parametrize("minimal", [True, False])
def test_checkpoints_move_across(minimal):
    theirs, ours = both(minimal)
    state = theirs.state_dict()
    assert list(state) == list(ours.state_dict())
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    ours.load_state_dict(changed)
    assert_same(dict(ours.state_dict()), changed)
    theirs.load_state_dict(ours.state_dict())
    assert_same(dict(theirs.state_dict()), changed)
    student = Net(6, 9).state_dict()
    assert_same(ours.load_state_dict(student), theirs.load_state_dict(student))
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    extra = {**state, "_teacher_model.more": torch.ones(1)}
    for model in (theirs, ours):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict(extra)


def test_hidden_parts():
    theirs, ours = both(minimal=False)
    for enable in (True, False):
        names = []
        for model in (theirs, ours):
            with model.hide_teacher_model(enable), model.hide_loss_modules(enable=enable):
                names.append([n for n, _ in model.named_parameters()])
        assert names[0] == names[1]


def test_warnings_on_repeated_forwards():
    x = next(batches())[0]
    for model in both(criterion=lambda module: module.LogitsDistillationLoss()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="reduction")
            model.train()
            model(x)
            model.eval()  # drops what was captured
            model.train()
            model(x)
            model.compute_kd_loss()
            model(x)
        with pytest.warns(UserWarning, match="compute_kd_loss|already has"):
            model(x)


@pytest.mark.parametrize("weights", [0.5, 1.0, 0.0, [0.3], [0.3, 0.3], [0.1, 0.2, 0.3], [1 / 3, 1 / 3, 1 / 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_static_balancer(weights, dtype):
    count = 1 if isinstance(weights, float) else len(weights)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(count + 1, generator=generator, dtype=dtype)
    losses = {f"A_{i}": value for i, value in enumerate(values[1:])}
    for student in ({}, {"student_loss": values[0]}):
        found = [module.StaticLossBalancer(weights)({**student, **losses}) for module in (mtd, sh)]
        assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["LogitsDistillationLoss", "MFTLoss"])
def test_losses_and_their_gradients(name, temperature, reduction, dtype):
    generator = torch.Generator().manual_seed(1)
    shape = (4, 9) if name == "MFTLoss" else (2, 4, 9)
    logits = [torch.randn(shape, generator=generator, dtype=torch.float64).mul(4).to(dtype) for _ in range(2)]
    labels = (torch.randint(0, 9, (4,), generator=generator),) if name == "MFTLoss" else ()
    found = []
    for module in (mtd, sh):
        student = copy.deepcopy(logits[0]).requires_grad_()
        value = getattr(module, name)(temperature=temperature, reduction=reduction)(student, logits[1], *labels)
        value.sum().backward()
        found.append([value.detach(), student.grad])
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_logits_of_a_language_model(reduction, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(3, 64, 8192, generator=generator).mul(5).to(dtype) for _ in range(2)]
    found = []
    for module in (mtd, sh):
        student = logits[0].clone().requires_grad_()
        value = module.LogitsDistillationLoss(2.0, reduction)(student, logits[1])
        value.mean().backward()
        found.append([value.detach(), student.grad])
    assert_same(*found)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_mft_on_sequences(threshold):
    generator = torch.Generator().manual_seed(2)
    logits = [torch.randn(2, 5, 11, generator=generator) * 3 for _ in range(2)]
    labels = torch.randint(0, 11, (10,), generator=generator)
    assert_same(*[module.MFTLoss(threshold=threshold)(*logits, labels) for module in (mtd, sh)])
