"""A teacher behind gRPC answers as one in the process does, and bad input gets a typed error."""

import socket
import time

import pytest
import schoolhouse as sh
import torch
from directories import Scale, stopped_in_mid_forward
from models import Net
from schoolhouse import errors
from schoolhouse_server import serve
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def teacher():
    with serve(Net(32, seed=1)) as server, sh.connect(server.url) as remote:
        yield remote


def train(teacher_model):
    student = Net(16, seed=2)
    model = sh.convert(
        student,
        mode=[
            (
                "kd_loss",
                {
                    "teacher_model": teacher_model,
                    "criterion": {("fc", "fc"): sh.LogitsDistillationLoss(2.0), ("", ""): nn.MSELoss()},
                    "loss_balancer": sh.StaticLossBalancer([0.3, 0.3]),
                },
            )
        ],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(20):
        x = torch.randn(32, 8, generator=generator)
        y = torch.randint(0, 5, (32,), generator=generator)
        loss = model.compute_kd_loss(student_loss=F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert type(sh.export(model)) is Net
    return losses, student.state_dict()


def test_remote_equals_local_to_the_bit(teacher):
    local_losses, local_weights = train(Net(32, seed=1))
    remote_losses, remote_weights = train(teacher)
    assert local_losses == remote_losses
    assert all(torch.equal(local_weights[name], remote_weights[name]) for name in local_weights)
    assert local_losses[-1] != local_losses[0]


def test_a_replica_computes_with_as_many_threads_as_its_process():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # another number than the environment's, with which some processors give other bits
    try:
        with serve(Net(32, seed=1)) as server, sh.connect(server.url) as teacher:
            for x in torch.randn(5, 6, 8):
                assert torch.equal(teacher.submit((x,), {}, [""]).result(60)[""], Net(32, seed=1)(x))
    finally:
        torch.set_num_threads(before)


def test_taps_on_inputs_and_outputs(teacher):
    model, x = Net(32, seed=1), torch.randn(4, 8)
    got = teacher.submit((x,), {}, ["body", ("fc", "input"), ("", "output")]).result()
    hidden = F.linear(x, model.body.weight, model.body.bias)
    assert torch.equal(got["body"], hidden.relu())  # the in-place ReLU writes into it, as a plain hook would see
    assert torch.equal(got["fc", "input"][0], hidden.relu())
    assert torch.equal(got[""], F.linear(hidden.relu(), model.fc.weight, model.fc.bias))


def test_many_requests_in_flight_keep_their_batches(teacher):
    model = Net(32, seed=1).requires_grad_(False)
    batches = [torch.randn(4 + i % 5, 8) for i in range(200)]
    futures = [teacher.submit((x,), {}, [""]) for x in batches]
    for x, future in zip(batches, futures, strict=True):
        assert torch.equal(future.result()[""], model(x))


class Plain(nn.Module):
    """Three layers; the first is used twice if asked for, and the second writes into its input if asked to."""

    def __init__(self, twice=False, inplace=False):
        super().__init__()
        self.a, self.b, self.c, self.twice = nn.Linear(4, 4), nn.ReLU(inplace), nn.Linear(4, 4), twice

    def forward(self, x):
        x = self.b(self.a(x))
        return self.c(self.a(x) if self.twice else x)


@pytest.mark.parametrize("settings", [{"twice": True}, {"inplace": True}, {"twice": True, "inplace": True}])
def test_features_are_those_of_plain_hooks_in_the_end(settings):
    module, seen, x = Plain(**settings), {}, torch.randn(2, 4)
    local = sh.LocalTeacher(module)
    features = [local.submit((x,), {}, ["a", ("b", "input")]).result() for _ in range(3)]
    module.a.register_forward_hook(lambda _m, _i, out: seen.update(a=out))
    module.b.register_forward_hook(lambda _m, args, _o: seen.update(b=args))
    module(x)
    for got in features:
        assert torch.equal(got["a"], seen["a"])
        assert torch.equal(got["b", "input"][0], seen["b"][0])


class Cache:
    """What cannot travel."""


class WithCache(nn.Module):
    def forward(self, x):
        return {"logits": x * 2, "cache": Cache()}


def test_an_object_that_cannot_travel_stays_and_says_so():
    with serve(WithCache()) as server, sh.connect(server.url) as remote:
        got = remote.submit((torch.ones(2),), {}, [""]).result()[""]
    assert got["logits"].tolist() == [2, 2]
    assert isinstance(got["cache"], sh.Opaque)
    assert got["cache"].type_name.endswith("Cache")
    with pytest.raises(errors.UnsupportedValueError, match="key_states"):
        got["cache"].key_states  # noqa: B018


def test_unknown_tap_lists_close_matches(teacher):
    with pytest.raises(errors.UnknownTapError, match="body"):
        sh.convert(Net(), mode=[("kd_loss", {"teacher_model": teacher, "criterion": {("fc", "bodi"): nn.MSELoss()}})])


def test_unknown_teacher_lists_those_there_are():
    with serve({"one": Net(), "two": Net()}) as server:
        with pytest.raises(errors.UnknownTeacherError) as caught:
            sh.connect(server.urls["one"].replace("/one", "/three"))
        assert caught.value.choices == ("one", "two")


def test_refused_inputs_leave_the_replica_alive(teacher):
    with pytest.raises(errors.TeacherForwardError, match="shapes"):
        teacher.submit((torch.randn(2, 9),), {}, [""]).result()
    assert teacher.submit((torch.randn(2, 8),), {}, [""]).result()[""].shape == (2, 5)


def test_oversized_request():
    with serve(Net(), max_request_bytes=1000) as server, sh.connect(server.url) as remote:
        with pytest.raises(errors.MessageTooLargeError, match="1000"):
            remote.submit((torch.randn(100, 8),), {}, [""])


def test_no_server_within_the_connect_timeout():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        start = time.monotonic()
        with pytest.raises(errors.TeacherUnavailableError, match="no server"):
            sh.connect(f"grpc://127.0.0.1:{taken.getsockname()[1]}/x", timeouts=sh.Timeouts(connect_s=1.0))
        assert time.monotonic() - start < 10


def test_server_gone_mid_call():
    module = Scale()
    module.gate.clear()
    server = serve(module)
    with sh.connect(server.url, timeouts=sh.Timeouts(teacher_s=1.0)) as remote:
        remote.describe()  # has a session open
        future = remote.submit((torch.ones(1),), {}, [""])
        with stopped_in_mid_forward(server, module, remote), pytest.raises(errors.TeacherUnavailableError):
            future.result(30)


def test_the_deadline_ends_the_wait():
    module = Scale()
    module.gate.clear()
    with serve(module) as server, sh.connect(server.url, timeouts=sh.Timeouts(request_s=0.3, teacher_s=20)) as remote:
        with pytest.raises(errors.TeacherTimeoutError):
            remote.submit((torch.ones(1),), {}, [""]).result(30)
        module.gate.set()


def test_gradients_and_parameters_stay_with_the_student(teacher):
    student = Net()
    names = [name for name, _ in student.named_parameters()]
    config = {"teacher_model": teacher, "criterion": sh.LogitsDistillationLoss()}
    model = sh.convert(student, mode=[("kd_loss", config)])
    assert isinstance(model, Net)
    assert [name for name, _ in model.named_parameters()] == names
    model(torch.randn(2, 8))
    model.compute_kd_loss().backward()
    with pytest.raises(errors.UsageError):
        model.compute_kd_loss()


def test_a_closed_teacher_says_so():
    with serve(nn.Linear(2, 2)) as server:
        teacher = sh.connect(server.url)
        teacher.close()
        with pytest.raises(errors.UsageError, match=r"RemoteTeacher\('grpc://.*'\) is closed; connect again"):
            teacher.submit((torch.ones(1, 2),), {}, [""])
