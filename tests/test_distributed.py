"""Two students that are one: DistributedDataParallel and FSDP2 over gloo, each rank with its own rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_job import ROWS, Projected, batch
from models import Net
from schoolhouse_server import serve
from torch.nn import functional as F

pytestmark = pytest.mark.timeout(300)
JOB = Path(__file__).with_name("distributed_job.py")


@pytest.fixture(scope="module", params=["local", "remote"])
def ranks(request, tmp_path_factory):
    """What both ranks found, with a teacher in each or one that is served."""
    folder = tmp_path_factory.mktemp("ranks")
    if request.param == "local":
        return run(folder, "")
    with serve(Net(32, seed=1)) as server:
        return run(folder, server.url)


def run(folder, url):
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(2)]
    commands = [[sys.executable, JOB, str(rank), folder / "rendezvous", url, out] for rank, out in enumerate(outs)]
    started = [subprocess.Popen(c, stdout=log, stderr=log) for c, log in zip(commands, logs, strict=True)]
    try:
        codes = [process.wait(200) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
        texts = [Path(log.name).read_text() for log in logs]
        for log in logs:
            log.close()
    assert codes == [0, 0], "\n".join(texts)
    return [torch.load(out, weights_only=True) for out in outs]


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


def test_each_rank_asks_for_its_own_rows(ranks):
    row = 8 * 4
    for found in ranks:
        sent = found["ddp"]["sent"]
        if sent is not None:
            assert ROWS // 2 * row <= sent < ROWS * row + 1000


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
