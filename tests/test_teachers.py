"""What a teacher promises wherever it lives: features as modules made them, and the student's batch left alone."""

import socket
from dataclasses import dataclass

import pytest
import schoolhouse as sh
import torch
from models import Net
from schoolhouse import errors
from schoolhouse.teachers import revision_of
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
