"""Two students that are one: DistributedDataParallel and FSDP2 over gloo, each rank with its own rows."""

from pathlib import Path

import pytest
import torch
from distributed_job import GIVE_UP_S, KINDS, LAYERS, ROWS, SHARDED, WHEN, Blocks, Projected, Taught, batch
from models import Net
from schoolhouse_server import serve
from torch.nn import functional as F
from two_ranks import two_ranks

HELPERS = Path(__file__).parents[1] / "helpers"

pytestmark = pytest.mark.timeout(300)
JOB = HELPERS / "distributed_job.py"


@pytest.fixture(scope="module", params=["local", "remote"])
def job(request, tmp_path_factory):
    """What both ranks found, with a teacher in each or one that is served, and the batches that the served one got."""
    folder = tmp_path_factory.mktemp("ranks")
    if request.param == "local":
        return two_ranks(JOB, folder), None
    seen = []
    with serve(Taught(seen)) as taught, serve(Blocks(1)) as blocks:
        return two_ranks(JOB, folder, taught.url, blocks.url), seen


@pytest.fixture
def ranks(job):
    return job[0]


def expected_step(student, loss, x):
    """The whole batch in one process, without Schoolhouse."""
    with torch.no_grad():
        teacher = Net(32, seed=1)
        hidden = teacher.body(x).relu()
        target = teacher.fc(hidden)
    out = student.body(x).relu()
    return 0.5 * loss(out, hidden) + 0.5 * F.mse_loss(student.fc(out), target)


def names_of(student, loss):
    own = dict(student.named_parameters())
    return {**own, **{f"_loss_modules.0.{name}": p for name, p in loss.named_parameters()}}


@pytest.fixture(scope="module")
def expected():
    student, loss = Net(16, seed=2), Projected()
    named = names_of(student, loss)
    expected_step(student, loss, batch()).backward()
    gradients = {name: p.grad.clone() for name, p in named.items()}
    optimizer = torch.optim.SGD(named.values(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        expected_step(student, loss, batch()).backward()
        optimizer.step()
    return {"gradients": gradients, "weights": {name: p.detach() for name, p in named.items()}}


@pytest.mark.parametrize("how", ["ddp", "fsdp_after", "fsdp_before"])
@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_two_ranks_are_one_process_on_the_whole_batch(ranks, expected, how, what):
    for found in ranks:
        assert sorted(found[how][what]) == sorted(expected[what])
        torch.testing.assert_close(found[how][what], expected[what], atol=1e-6, rtol=1e-4)
    for name, value in ranks[0][how][what].items():
        assert torch.equal(value, ranks[1][how][what][name])


def test_accumulated_gradients_are_averaged_once(ranks, expected):
    for found in ranks:
        torch.testing.assert_close(found["ddp"]["accumulated"], expected["gradients"], atol=1e-6, rtol=1e-4)


def test_each_rank_asks_for_its_own_rows(job):
    ranks, served = job
    own = [{tuple(row) for row in part.tolist()} for part in batch().split(ROWS // 2)]
    for rank, found in enumerate(ranks):
        seen = found["asked"]["seen"] if served is None else served
        asked = [rows for rows in seen if {tuple(row) for row in rows.tolist()} <= own[rank]]
        assert len(asked) == found["asked"]["requests"] > 10
        if served is None:
            assert len(asked) == len(seen)
    if served is not None:
        assert len(served) == sum(found["asked"]["requests"] for found in ranks)


def test_state_dicts_through_the_wrapper(ranks):
    for found in ranks:
        assert found["ddp"]["loaded"]
        assert found["ddp"]["names"] == [f"module.{name}" for name in names_of(Net(), Projected())]


def test_export_takes_the_wrapper_off(ranks):
    for found in ranks:
        assert found["ddp"]["exported"] == "Net"
        assert "DistributedDataParallel" in found["ddp"]["said"]


def test_what_would_go_wrong_is_refused(ranks):
    for found in ranks:
        refused = found["ddp_settings"]
        assert "static_graph=True" in refused["static_graph"]
        assert "find_unused_parameters=True" in refused["find_unused_parameters"]
        assert "inside first, then wrap" in refused["before"]
        assert "fully_shard each loss" in found["fsdp_before"]["refused"]
        assert "fully_shard the converted model" in found["fsdp_settings"]["losses alone"]
        assert "inside first, then shard it with fully_shard" in found["fsdp_settings"]["fsdp1"]


def test_unused_parameters_may_be_looked_for_without_trainable_losses(ranks):
    student, teacher = Net(16, seed=2), Net(32, seed=1)
    F.mse_loss(student(batch()), teacher(batch()).detach()).backward()
    for found in ranks:
        for name, p in student.named_parameters():
            torch.testing.assert_close(found["ddp_settings"]["unused"][name], p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", ["fsdp_after", "fsdp_before"])
def test_sharded_students_on_disk_and_exported(ranks, how):
    for found in ranks:
        assert found[how]["restored"]
        assert not any(name.startswith("_teacher") for name in found[how]["names"])
        assert "FSDPModule" in found[how]["bases"]
        assert "DistillationModel" not in found[how]["bases"]
    assert ranks[0][how]["names"] == list(names_of(Net(), Projected()))


@pytest.mark.parametrize("how", ["resharded", "loss by itself"])
def test_losses_have_their_parameters_however_they_are_sharded(ranks, expected, how):
    for found in ranks:
        torch.testing.assert_close(found["fsdp_settings"][how], expected["gradients"], atol=1e-6, rtol=1e-4)


def expected_inner(layers, kind):
    """Gradients of losses at inner layers, on the whole batch, without Schoolhouse."""
    student, teacher, x = Blocks(2), Blocks(1), batch()
    with torch.no_grad():
        early, between = teacher.one[:2](x), teacher.one(x)
        first, second = teacher.one[2](early), teacher.two(between)
    given = (student.one[:2](x), student.one(x)) if kind == "kd_loss" else (early, between)
    loss = F.mse_loss(student.one[2](given[0]), first)
    if "two" in layers:
        loss = loss + F.mse_loss(student.two(given[1]), second)
    (loss / len(layers)).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def check_inner(steps, layers, kind):
    for gradients in steps:
        moved = {name: gradient for name, gradient in gradients.items() if gradient.count_nonzero()}
        torch.testing.assert_close(moved, expected_inner(layers, kind), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("sharded", SHARDED)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_at_layers_inside_what_is_sharded(ranks, kind, layers, sharded, when):
    for found in ranks:
        steps = found["fsdp_inner"][kind, layers, sharded, when]
        assert len(steps) == 5
        check_inner(steps, layers, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_at_inner_layers_with_the_rest_frozen(ranks, kind):
    for found in ranks:
        assert len(found["ddp_inner"][kind]) == 3
        check_inner(found["ddp_inner"][kind], LAYERS[0], kind)


def test_a_teacher_that_is_sharded_on_its_own(job):
    ranks, served = job
    for found in ranks:
        assert list(found["sharded_teacher"]) == (list(SHARDED) if served is None else [])
        for steps in found["sharded_teacher"].values():
            check_inner(steps, LAYERS[1], "kd_loss")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_teacher_that_fails_on_one_rank(ranks, how):
    (waited, waited_s), (failed, failed_s) = (found["failing"][how] for found in ranks)
    assert failed == "TeacherForwardError"  # its own, and not that it waited for the other
    assert waited != "nothing"
    assert max(waited_s, failed_s) < GIVE_UP_S + 20  # of a group's 30 minutes
