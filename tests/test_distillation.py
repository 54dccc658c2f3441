"""The meta-model: everything twice, with the teacher in this process and behind gRPC."""

import copy
import functools
import inspect
import io
import pickle
import warnings

import pytest
import schoolhouse as sh
import torch
from models import Net
from schoolhouse import errors
from schoolhouse_server import serve
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums", "ignore:reduction")


class Projected(nn.Module):
    """A loss with parameters."""

    def __init__(self, width_s=16, width_t=32):
        super().__init__()
        self.map = nn.Linear(width_s, width_t)

    def forward(self, out_s, out_t):
        return F.mse_loss(self.map(out_s), out_t)


def config(teacher, criterion=None, balancer=None, **more):
    criterion = sh.LogitsDistillationLoss() if criterion is None else criterion
    return {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer, **more}


def converted(student, *args, **kwargs):
    return sh.convert(student, mode=[("kd_loss", config(*args, **kwargs))])


@pytest.fixture
def teacher(teach):
    return teach(Net(32, seed=1))


@pytest.fixture
def x():
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(5))


def hooked(model, layers, x):
    """What plain hooks see of `layers`."""
    seen = {}

    def keep(layer, _module, _args, out):
        seen[layer] = out

    handles = [model.get_submodule(n).register_forward_hook(functools.partial(keep, n)) for n in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


# Config.


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
                with pytest.raises(errors.ConfigError, match="closed"):
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


# The step.


def test_losses_by_name_reduction_and_kwargs(teacher, x):
    class Masked(nn.Module):
        def forward(self, out_s, out_t, mask):
            return ((out_s - out_t) ** 2).mean(-1) * mask

    model = converted(Net(), teacher, {("fc", "fc"): Masked()}, sh.StaticLossBalancer(0.25))
    mask = torch.tensor([1.0, 0, 1, 0, 1, 1])
    out = model(x)
    loss = model.compute_kd_loss(student_loss=out.sum(), loss_reduction_fn=lambda v: v.sum() / mask.sum(), mask=mask)
    each = ((Net()(x) - Net(32, seed=1)(x)) ** 2).mean(-1) * mask
    assert torch.equal(loss, each.sum() / mask.sum() * 0.25 + 0.75 * out.sum())
    model(x)
    losses = model.compute_kd_loss(student_loss=out.sum(), skip_balancer=True, mask=mask)
    assert list(losses) == [sh.STUDENT_LOSS_KEY, "Masked_0"]


def test_a_repeated_forward_warns_and_the_later_batch_counts(teacher, x):
    model = converted(Net(), teacher, nn.MSELoss()).train()
    model(x)
    with pytest.warns(UserWarning, match="again without compute_kd_loss"):
        out = model(x * 2)
    assert torch.equal(model.compute_kd_loss(), F.mse_loss(out, Net(32, seed=1)(x * 2)))
    with pytest.raises(errors.FeatureMismatchError, match="forward"):
        model.compute_kd_loss()


def test_eval_works_and_a_change_of_mode_clears(teacher, x):
    model = converted(Net(), teacher, nn.MSELoss()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model(x)
        assert model.compute_kd_loss() > 0
        model(x)
    model.train()
    with pytest.raises(errors.FeatureMismatchError):
        model.compute_kd_loss()
    model(x)
    assert model.train() is model  # no change, so nothing is dropped
    assert model.compute_kd_loss() > 0
    model(x)
    model.eval()
    with pytest.raises(errors.FeatureMismatchError):
        model.compute_kd_loss()


def test_a_failed_forward_leaves_no_step(teacher, x):
    class Fails(Net):
        def forward(self, x, fail=False):
            if fail:
                raise RuntimeError("student")
            return super().forward(x)

    model = converted(Fails(), teacher, nn.MSELoss())
    with pytest.raises((RuntimeError, errors.TeacherForwardError)):
        model(x, fail=True)
    with pytest.raises(errors.FeatureMismatchError):
        model.compute_kd_loss()
    model(x)
    assert model.compute_kd_loss() > 0


def test_only_student_forward(teacher, x):
    model = converted(Net(), teacher, nn.MSELoss()).train()
    out = model(x)
    with model.only_student_forward(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x * 3)  # a validation between forward and loss
    assert torch.equal(model.compute_kd_loss(), F.mse_loss(out, Net(32, seed=1)(x)))
    with model.only_student_forward():
        model(x)
    with pytest.raises(errors.FeatureMismatchError, match="only_student_forward"):
        model.compute_kd_loss()
    with model.only_student_forward(enable=False):
        model(x)
    assert model.compute_kd_loss() > 0


@pytest.mark.parametrize("teacher_first", [True, False])
def test_teacher_and_student_in_separate_calls(teacher, x, teacher_first):
    model = converted(Net(), teacher, nn.MSELoss()).train()
    contexts = [model.only_teacher_forward, model.only_student_forward]
    outs = {}
    for context in contexts if teacher_first else contexts[::-1]:
        with context():
            outs[context.__name__] = model(x.clone())
    assert torch.equal(outs["only_teacher_forward"], Net(32, seed=1)(x))
    loss = model.compute_kd_loss()
    assert torch.equal(loss, F.mse_loss(outs["only_student_forward"], Net(32, seed=1)(x)))
    assert loss.requires_grad


@pytest.mark.parametrize("teacher_first", [True, False])
def test_separate_calls_on_different_batches_are_never_paired(teacher, x, teacher_first):
    model = converted(Net(), teacher, nn.MSELoss()).train()
    contexts = [model.only_teacher_forward, model.only_student_forward]
    for i, context in enumerate(contexts if teacher_first else contexts[::-1]):
        with context():
            model(x + i)
    with pytest.raises(errors.FeatureMismatchError):
        model.compute_kd_loss()


def test_a_batch_that_was_written_into_is_another_batch(teacher, x):
    model = converted(Net(), teacher, nn.MSELoss()).train()
    with model.only_teacher_forward():
        model(x)
    x.add_(1)
    with model.only_student_forward():
        model(x)
    with pytest.raises(errors.FeatureMismatchError):
        model.compute_kd_loss()


def test_gradient_accumulation_is_the_whole_batch(teacher, x):
    grads = []
    for parts in (1, 3):
        model = converted(Net(), teacher, nn.MSELoss(), sh.StaticLossBalancer(0.5))
        for part in x.chunk(parts):
            loss = model.compute_kd_loss(student_loss=model(part).pow(2).mean())
            (loss / parts).backward()
        grads.append([p.grad for p in model.body.parameters()])
        sh.export(model)
    torch.testing.assert_close(grads[0], grads[1])


class Reuses(nn.Module):
    """Runs a layer twice, and writes into the output of another."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.b(self.a(torch.tanh(self.a(x)))))


def test_both_sides_see_what_plain_hooks_see(teach, x):
    pairs = {("a", "a"): nn.MSELoss(), ("b", "b"): nn.MSELoss()}
    model = converted(Reuses(1), teach(Reuses(2)), pairs, sh.StaticLossBalancer([0.5, 0.5]))
    expected = [hooked(Reuses(seed), ["a", "b"], x) for seed in (1, 2)]
    for _ in range(3):
        model(x)
        losses = model.compute_kd_loss(skip_balancer=True)
        assert torch.equal(losses["MSELoss_0"], F.mse_loss(expected[0]["a"], expected[1]["a"]))
        assert torch.equal(losses["MSELoss_1"], F.mse_loss(expected[0]["b"], expected[1]["b"]))


def test_a_sequential_student(teach, x):
    student, module = (nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 5)) for _ in range(2))
    model = converted(student, teach(module), {("2", "2"): Projected(5, 5)}, sh.StaticLossBalancer(1.0))
    model(x)
    model.compute_kd_loss().backward()
    assert list(sh.export(model)._modules) == ["0", "1", "2"]


def test_a_forward_that_was_set_on_the_student(teacher, x):
    student = Net()
    student.forward = functools.partial(lambda inner, x: inner(x) * 2, student.forward)
    own = student.forward
    model = converted(student, teacher, nn.MSELoss())
    assert torch.equal(model(x), Net()(x) * 2)
    assert model.compute_kd_loss() > 0
    assert sh.export(model).forward is own


# The module tree.


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
    with pytest.raises(errors.FeatureMismatchError):
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


# Training as people do it.


class Blocks(nn.Module):
    """Two blocks under activation checkpointing, if asked for."""

    def __init__(self, seed, mode=None):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.mode = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8), mode
        self.runs = 0
        self.two.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.runs += 1

    def forward(self, x):
        for block in (self.one, self.two):
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return x


@pytest.mark.parametrize("kind", ["kd_loss", "layerwise_kd"])
def test_activation_checkpointing(teach, x, kind):
    grads = []
    for mode in (None, "plain"):
        pairs = {("two", "two"): nn.MSELoss(), ("one.0", "one.0"): nn.MSELoss()}
        fields = config(teach(Blocks(2)), pairs, sh.StaticLossBalancer([0.5, 0.5]))
        model = sh.convert(Blocks(1, mode), mode=[(kind, fields)])
        total = 0
        for batch in (x, x * 2):  # two graphs at once
            model(batch.requires_grad_())
            total = total + model.compute_kd_loss()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            total.backward()
            model(x)
            model.compute_kd_loss()
        grads.append([p.grad for p in (*model.one[0].parameters(), *model.two.parameters())])
        assert model.runs == (3 if mode is None else 5)
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def test_reentrant_checkpointing_is_told(teach, x):
    model = converted(Blocks(1, "reentrant"), teach(Blocks(2)), {("two", "two"): nn.MSELoss()})
    with pytest.warns(UserWarning, match="'two' runs without gradients.*use_reentrant=False"):
        model(x.requires_grad_())


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_torch_compile(teach, x, backend):
    pairs = {("body", "body"): Projected(), ("", ""): nn.MSELoss()}
    teacher = teach(Net(32, seed=1))
    plain = converted(Net(), teacher, pairs, sh.StaticLossBalancer([0.5, 0.5]))
    expected = []
    for batch in (x, x * 2, x * 3):
        plain(batch)
        expected.append(plain.compute_kd_loss().item())
    sh.export(plain)
    model = converted(Net(), teacher, pairs, sh.StaticLossBalancer([0.5, 0.5]))
    compiled = torch.compile(model, backend=backend)
    for batch, loss in zip((x, x * 2, x * 3), expected, strict=True):
        compiled(batch)
        got = compiled.compute_kd_loss()
        got.backward()
        assert got.item() == pytest.approx(loss, rel=1e-5)
    assert model.body.weight.grad is not None


# Layerwise.


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
