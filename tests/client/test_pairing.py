"""A step never uses features of another batch, whatever is written into tensors and whoever else uses the model."""

import copy
import gc
import threading

import numpy as np
import pytest
import schoolhouse as sh
import torch
from memfd import soon
from models import Net, config, converted
from schoolhouse import errors
from schoolhouse_server import serve
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def teacher(teach):
    return teach(Net(width=32, seed=1))


class Passes(nn.Module):
    """Its first layer returns its input itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fc = nn.Dropout(0.1), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.first(x))


def test_a_batch_that_is_written_into_before_its_loss(teach):
    teacher, student = teach(Passes()), nn.Sequential(nn.Linear(8, 8))
    model = converted(student, teacher, {("0", "first"): nn.MSELoss()})
    given = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        x = given.clone()
        want = F.mse_loss(model(x).detach(), given)
        x.fill_(100)
        assert torch.equal(model.compute_kd_loss().detach(), want)


def test_a_student_that_writes_into_its_batch(teach):
    student = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))
    model = converted(student, teach(Passes()), {("1", "first"): nn.MSELoss()})
    given = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        want = F.mse_loss(model(given.clone()).detach(), given)
        assert torch.equal(model.compute_kd_loss().detach(), want)


def test_features_that_are_written_into_before_their_loss_are_refused(teach, x):
    model = converted(Net(), teach(Net(width=32, seed=1)))
    with model.only_teacher_forward():
        answer = model(x)
    answer.mul_(2)
    with model.only_student_forward():
        model(x)
    with pytest.raises(errors.FeatureMismatchError, match="were changed in place after its forward"):
        model.compute_kd_loss()
    model(x)
    assert torch.isfinite(model.compute_kd_loss())


class Erases(nn.Module):
    """A loss that writes into the features."""

    def forward(self, out_s, out_t):
        loss = F.mse_loss(out_s, out_t)
        out_t.zero_()
        return loss


def test_a_batch_that_is_forwarded_again_has_its_own_features_though_a_loss_wrote_into_them(teach, x):
    model = converted(Net(), teach(Net(width=32, seed=1)), Erases())
    for batch in model.prefetch([(x,), (x + 1,)]):
        for _ in range(2):
            want = F.mse_loss(model(*batch), Net(width=32, seed=1)(*batch))
            assert torch.equal(model.compute_kd_loss(), want)


class Writes(nn.Module):
    """Returns memory of its own that it writes again: a buffer, or a plain attribute."""

    def __init__(self, registered):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 5)
        if registered:
            self.register_buffer("out", torch.zeros(6, 5))
        else:
            self.out = torch.zeros(6, 5)

    def forward(self, x):
        return self.out.copy_(self.fc(x))


@pytest.mark.parametrize("registered", [True, False])
def test_a_teacher_that_returns_memory_which_it_writes_again(registered, x):
    teacher = sh.LocalTeacher(Writes(registered))
    one, other = converted(Net(), teacher), converted(Net(), teacher)
    want = sh.LogitsDistillationLoss()(one(x), teacher.module.fc(x)).detach()
    other(x + 1)
    assert torch.equal(one.compute_kd_loss().detach(), want)


def test_layers_that_write_into_injected_inputs_leave_the_features(teach):
    """The input of the teacher's second layer is the output of its first, whose loss is wanted too."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    criterion = {("0", "0"): nn.MSELoss(), ("1", "1"): nn.MSELoss()}
    layers = copy.deepcopy(student)
    settings = config(teach(module), criterion, sh.StaticLossBalancer([0.5, 0.5]))
    model = sh.convert(student, mode=[("layerwise_kd", settings)])
    x = torch.randn(6, 8)
    for _ in range(2):
        model(x)
        losses = model.compute_kd_loss(skip_balancer=True)
        first = module[0](x)
        second = F.mse_loss(layers[1](first.clone()), module[1](first))
        assert torch.equal(losses["MSELoss_0"].detach(), F.mse_loss(layers[0](x), first).detach())
        assert torch.equal(losses["MSELoss_1"].detach(), second.detach())


@pytest.mark.parametrize("how", ["numpy", "data", "in place"])
@pytest.mark.parametrize("teacher_first", [True, False])
def test_separate_calls_compare_the_values_that_were(teacher, how, teacher_first):
    model = converted(Net(), teacher)
    memory = np.ones((2, 8), "float32")
    x = torch.from_numpy(memory)
    modes = [model.only_teacher_forward, model.only_student_forward]
    first, second = modes if teacher_first else modes[::-1]
    with first():
        model(x)
    if how == "numpy":
        memory += 1
    elif how == "data":
        x.data.add_(1)
    else:
        x.add_(1)
    with second():
        model(x)
    with pytest.raises(errors.FeatureMismatchError):
        model.compute_kd_loss()


def test_a_batch_of_one_with_any_stride(teacher):
    model = converted(Net(), teacher)
    x = torch.randn(3, 8)[2::2]
    assert x.stride() == (16, 1)
    for batch in (x, x[:, :1].expand(1, 8), torch.randn(8).as_strided((1, 8), (3, 1))):
        with model.only_teacher_forward():
            model(batch)
        with model.only_student_forward():
            model(batch.clone())
        assert torch.isfinite(model.compute_kd_loss())


class Weighs(nn.Module):
    """Takes a numpy array beside its batch."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(8, 5)

    def forward(self, x, weights):
        return self.fc(x) * torch.from_numpy(weights)


def test_arrays_and_nans_belong_to_the_batch_too(x):
    model = converted(Weighs(0), Weighs(1))
    x[0, 0] = torch.nan
    for other, same in [([1, 2, 3, 4, 5], True), ([1, 2, 3, 4, 6], False)]:
        with model.only_teacher_forward():
            model(x, np.array([1, 2, 3, 4, 5], "float32"))
        with model.only_student_forward():
            model(x, np.array(other, "float32"))
        if same:
            assert model.compute_kd_loss().isnan()
        else:
            with pytest.raises(errors.FeatureMismatchError):
                model.compute_kd_loss()


def test_a_teacher_that_ran_alone_does_not_block_later_steps(teacher, x):
    model = converted(Net(), teacher)
    with model.only_teacher_forward():
        model(x - 1)
    for step in range(3):
        with model.only_student_forward():
            output = model(x + step)
        with model.only_teacher_forward():
            answer = model(x + step)
        assert torch.equal(model.compute_kd_loss(), sh.LogitsDistillationLoss()(output, answer))


class Waits(nn.Module):
    """Waits in its forward until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 5)
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def forward(self, x):
        self.inside.set()
        assert self.go_on.wait(30)
        return self.fc(x)


def test_threads_cannot_mix_their_batches(teacher, x):
    student = Waits()
    model = converted(student, teacher, nn.MSELoss())
    student.go_on.clear()
    errors_there = []

    def forward_and_loss():
        try:
            errors_there.append(model(x).detach())
        except Exception as err:
            errors_there.append(err)

    thread = threading.Thread(target=forward_and_loss)
    thread.start()
    assert student.inside.wait(30)
    with pytest.raises(errors.UsageError, match="another thread"):
        model(x + 1)
    with pytest.raises(errors.UsageError, match="another thread"), model.only_teacher_forward():
        model(x + 1)
    states = []
    saver = threading.Thread(target=lambda: states.append(model.state_dict()))
    saver.start()  # waits for the forward, during which the losses are hidden
    student.go_on.set()
    thread.join(30)
    saver.join(30)
    assert torch.equal(errors_there[0], student.fc(x).detach())
    assert list(states[0]) == list(model.state_dict())
    with pytest.raises(errors.UsageError, match="another thread"):
        model.compute_kd_loss()
    assert torch.isfinite((model(x), model.compute_kd_loss())[1])


class Saves(nn.Module):
    """Takes its time to give its state."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 5)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def get_extra_state(self):
        self.inside.set()
        assert self.go_on.wait(30)
        return {"n": 1}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return self.fc(x)


def test_a_forward_waits_for_another_threads_checkpoint(teacher, x):
    student = Saves()
    model = converted(student, teacher, nn.MSELoss())
    states = []
    saver = threading.Thread(target=lambda: states.append(model.state_dict()))
    saver.start()
    assert student.inside.wait(30)
    threading.Timer(0.3, student.go_on.set).start()
    output = model(x)
    assert student.go_on.is_set()
    answer = teacher.submit((x,), {}, [""]).result()[""]
    assert torch.equal(model.compute_kd_loss(), F.mse_loss(output, answer))
    saver.join(30)
    assert sorted(states[0]) == ["_extra_state", "fc.bias", "fc.weight"]


class Fails(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.fail = nn.Linear(8, 8), nn.Linear(8, 8), False

    def forward(self, x):
        hidden = self.one(x)
        if self.fail:
            raise RuntimeError("no")
        return self.two(hidden)


@pytest.mark.parametrize("kind", ["kd_loss", "layerwise_kd"])
def test_after_a_failed_forward_layers_are_plain_ones(teach, x, kind):
    model = sh.convert(Fails(0), mode=[(kind, config(teach(Fails(1)), {("two", "two"): nn.MSELoss()}))])
    model.fail = True
    with pytest.raises(RuntimeError, match="no"):
        model(x)
    assert torch.equal(model.two(x), F.linear(x, model.two.weight, model.two.bias))
    model.fail = False
    model(x)
    assert torch.isfinite(model.compute_kd_loss())


def clients():
    ours = ("schoolhouse-session", "schoolhouse-deadlines")
    return {thread for thread in threading.enumerate() if thread.name.startswith(ours)}


def test_models_that_are_dropped_leave_no_session(x):
    with serve(Net()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x,), {}, [""]).result()
        before = clients()
        for make in (lambda: teacher, lambda: server.url):
            model = converted(Net(), make())
            for _ in range(3):
                twin = copy.deepcopy(model)
                twin(x)
                twin.compute_kd_loss()
                assert (twin.teacher_model is teacher) == (model.teacher_model is teacher)
            del model, twin
            gc.collect()
        assert soon(lambda: server.load("teacher").sessions == 1 and clients() <= before)  # those of earlier tests end
