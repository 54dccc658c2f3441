"""Steps of the meta-model, and training as people do it; with the teacher in this process and behind gRPC."""

import functools
import warnings
from pathlib import Path

import pytest
import schoolhouse as sh
import torch
from models import Blocks, Net, Projected, config, converted
from schoolhouse import errors
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums")


@pytest.fixture
def teacher(teach):
    return teach(Net(32, seed=1))


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
    with pytest.warns(UserWarning, match="again without compute_kd_loss") as told:
        out = model(x * 2)
    assert told[0].filename == __file__
    assert torch.equal(model.compute_kd_loss(), F.mse_loss(out, Net(32, seed=1)(x * 2)))
    with pytest.raises(errors.UsageError, match="forward"):
        model.compute_kd_loss()


def test_a_warning_names_code_beside_torch_whose_folders_name_begins_like_torchs(teacher, x):
    model, space = converted(Net(), teacher, nn.MSELoss()).train(), {}
    beside = f"{Path(torch.__file__).parent}vision/train.py"
    exec(compile("def twice(model, x): model(x), model(x)", beside, "exec"), space)
    with pytest.warns(UserWarning, match="again without compute_kd_loss") as told:
        space["twice"](model, x)
    assert told[0].filename == beside


def test_eval_works_and_a_change_of_mode_clears(teacher, x):
    model = converted(Net(), teacher, nn.MSELoss()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model(x)
        assert model.compute_kd_loss() > 0
        model(x)
    model.train()
    with pytest.raises(errors.UsageError):
        model.compute_kd_loss()
    model(x)
    assert model.train() is model  # no change, so nothing is dropped
    assert model.compute_kd_loss() > 0
    model(x)
    model.eval()
    with pytest.raises(errors.UsageError):
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
    with pytest.raises(errors.UsageError, match="only_student_forward"):
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


class Scaled(Net):
    def forward(self, x, how):
        return super().forward(x) * len(how["word"])


def test_what_is_not_a_tensor_belongs_to_the_batch_too(teach, x):
    model = converted(Scaled(), teach(Scaled(32, seed=1)), nn.MSELoss())
    for other in ({"word": "abc"}, {"word": "ab", "more": 1}):
        with model.only_teacher_forward():
            model(x, how={"word": "ab"})
        with model.only_student_forward():
            model(x, how=other)
        with pytest.raises(errors.FeatureMismatchError):
            model.compute_kd_loss()
    with model.only_teacher_forward():
        model(x, how={"word": "ab"})
    with model.only_student_forward():
        model(x, how={"word": "ab"})
    assert model.compute_kd_loss() > 0


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


class Names(nn.Module):
    """Uses names that a careless mixin would take: a method, a submodule, and plain attributes."""

    def __init__(self, names=()):
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            setattr(self, name, nn.Linear(8, 8))
        self.names = names
        self._step, self._future = [], 3
        self.fc = nn.Linear(8, 5)

    def _forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return self.fc(x)

    def forward(self, x):
        assert self._step == []
        return self._forward(x)


def test_a_students_own_names_are_its_own(teacher, x):
    names = ("_hidden", "_losses", "_taps", "_hook", "_mark", "_attach", "_detach", "_distillation", "_begin", "_end")
    plain, model = Names(names), converted(Names(names), teacher)
    assert torch.equal(model(x), plain(x))
    want = sh.LogitsDistillationLoss()(plain(x), teacher.submit((x,), {}, [""]).result()[""])
    assert torch.equal(model.compute_kd_loss(), want)
    inherited = {name for name in vars(nn.Module) if name.startswith("_")}
    for kind in (sh.DistillationModel, sh.LayerwiseDistillationModel):
        private = {name for name in vars(kind) if name.startswith("_")} - inherited - {"__module__", "__reduce_ex__"}
        assert [name for name in private if not name.startswith(("_schoolhouse", "__"))] == []


def test_the_whole_output_is_what_a_call_returns(teacher, x):
    def loss(output):
        return sh.LogitsDistillationLoss()(output, teacher.submit((x,), {}, [""]).result()[""])

    student = Net()
    student.register_forward_hook(lambda _module, _args, output: output * 2)
    model = converted(student, teacher)
    output = model(x)
    assert torch.equal(output, 2 * Net()(x))
    assert torch.equal(model.compute_kd_loss(), loss(output))

    inner = model.forward
    model.forward = lambda *args: inner(*args) * 3  # as accelerate wraps it for mixed precision
    output = model(x)
    assert torch.equal(output, 6 * Net()(x))
    with model.only_student_forward():
        model(x + 1)  # a validation in between leaves the step alone
    assert torch.equal(model.compute_kd_loss(), loss(output))
    assert torch.equal(model.forward(x), 3 * Net()(x))  # not called as a module, so no hook ran
    assert torch.equal(model.compute_kd_loss(), loss(Net()(x)))


class Halves(nn.Module):
    """Its forward calls itself."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(8, 5)

    def forward(self, x, depth=1):
        return self(x, depth - 1) + self(x.flip(-1), 0) if depth else self.fc(x)


def test_a_student_that_calls_itself(teach, x):
    model = converted(
        Halves(0),
        teach(Halves(1)),
        {("", ""): nn.MSELoss(), ("fc", "fc"): nn.MSELoss()},
        sh.StaticLossBalancer([0.5, 0.5]),
    )
    for _ in range(2):
        output = model(x)
        assert torch.equal(output, Halves(0)(x))
        losses = model.compute_kd_loss(skip_balancer=True)
        assert torch.equal(losses["MSELoss_0"], F.mse_loss(output, Halves(1)(x)))
        last = [half.fc(x.flip(-1)) for half in (Halves(0), Halves(1))]
        assert torch.equal(losses["MSELoss_1"], F.mse_loss(*last))


class Weighted(nn.Module):
    def forward(self, out_s, out_t, labels, *, weight=1.0):
        return weight * ((out_s - out_t) ** 2).mean(-1)[labels >= 0].mean()


class Anything(nn.Module):
    def __init__(self):
        super().__init__()
        self.got = []

    def forward(self, out_s, out_t, **settings):
        self.got.append(settings)
        return ((out_s - out_t) ** 2).mean()


def test_each_loss_gets_the_keyword_arguments_that_it_takes(teacher, x):
    labels, anything = torch.tensor([0, -100, 1, 2, -100, 3]), Anything()
    criterion = {("body", "body"): Weighted(), ("fc", "fc"): nn.MSELoss(), ("", ""): anything}
    model = converted(Net(32), teacher, criterion, sh.StaticLossBalancer([0.25, 0.25, 0.5]))
    for given in ({"labels": labels}, {"labels": labels, "weight": 3.0}, {"labels": labels, "name": "a"}):
        model(x)
        losses = model.compute_kd_loss(skip_balancer=True, **given)
        seen, theirs = (hooked(net, ["body", "fc"], x) for net in (Net(32), Net(32, seed=1)))
        each = ((seen["body"] - theirs["body"]) ** 2).mean(-1)[labels >= 0].mean() * given.get("weight", 1.0)
        assert torch.equal(losses["Weighted_0"], each)
        assert torch.equal(losses["MSELoss_1"], F.mse_loss(seen["fc"], theirs["fc"]))
        assert anything.got.pop() == given


def test_a_keyword_argument_that_no_loss_takes_is_an_error_and_the_step_stays(teacher, x):
    criterion = {("body", "body"): Weighted(), ("fc", "fc"): nn.MSELoss(), ("", ""): sh.MFTLoss()}
    model = converted(Net(32), teacher, criterion, sh.StaticLossBalancer([0.25, 0.25, 0.5]))
    labels = torch.zeros(len(x), dtype=torch.int64)
    model(x)
    says = (
        r"got the keyword arguments \['label', 'target'\], which no loss takes: Weighted takes labels, weight; "
        "MSELoss takes none; MFTLoss takes labels"
    )
    with pytest.raises(errors.UsageError, match=says):
        model.compute_kd_loss(label=labels, labels=labels, target=labels)
    assert model.compute_kd_loss(labels=labels) > 0


def test_signatures_are_read_once_a_conversion(teacher, x, monkeypatch):
    model = converted(Net(), teacher, {("fc", "fc"): Weighted()})
    monkeypatch.setattr("inspect.signature", None)
    for _ in range(2):
        with model.only_teacher_forward():
            model(x)
        with model.only_student_forward():
            model(x)
        model.compute_kd_loss(labels=torch.zeros(len(x), dtype=torch.int64))


@pytest.mark.parametrize("loss", [sh.LogitsDistillationLoss, sh.ReverseKLLoss, sh.JSDLoss, sh.SkewedKLLoss])
def test_no_error_names_a_private_class(loss):
    with pytest.raises(TypeError, match=rf"^{loss.__name__}\.forward\(\) got an unexpected keyword argument 'labels'"):
        loss()(torch.zeros(2, 3), torch.zeros(2, 3), labels=torch.zeros(2))
    with pytest.raises(TypeError, match=r"^LogitsLoss\.per_example\(\) got an unexpected keyword argument 'label'"):
        loss().per_example(torch.zeros(2, 3), torch.zeros(2, 3), label=torch.zeros(2))


@pytest.mark.parametrize(
    "make", [lambda: sh.StaticLossBalancer(0.5), lambda: sh.ScheduledLossBalancer(lambda step: 0.5 + step / 10)]
)
def test_a_missing_student_loss_warns_where_it_is_missing_and_not_before(teacher, x, make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = converted(Net(), teacher, {("fc", "fc"): nn.MSELoss()}, make())
        model.compute_kd_loss(student_loss=model(x).sum())
        model(x)
        model.compute_kd_loss(skip_balancer=True)
    model(x)
    with pytest.warns(UserWarning, match="less than 1.*pass student_loss to compute_kd_loss") as told:
        loss = model.compute_kd_loss()
    assert [warning.filename for warning in told] == [__file__]
    share = 0.5 if isinstance(model.loss_balancer, sh.StaticLossBalancer) else 0.6
    want = F.mse_loss(Net()(x), Net(32, seed=1)(x)) * share
    torch.testing.assert_close(loss, want)  # as ModelOpt's: the weights are what they are


def test_usage_errors_are_errors_of_ours_and_runtime_errors():
    assert issubclass(errors.UsageError, errors.SchoolhouseError)
    assert issubclass(errors.UsageError, RuntimeError)
    assert not issubclass(errors.UsageError, ValueError)
    assert "UsageError" in errors.__all__
