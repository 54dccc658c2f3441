"""Checkpoints: the student alone, safe to read, and safe from crashes."""

import io
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
import warnings
import zipfile
from fractions import Fraction

import pytest
import safetensors.torch
import schoolhouse as sh
import torch
from models import Net
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


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "student.safetensors"


def test_the_student_alone(teach, path):
    teacher = teach(Net(32, seed=1))
    model = converted(Net(seed=2), teacher, expose_minimal_state_dict=False)
    sh.save(model, path)
    assert sorted(safetensors.torch.load_file(path)) == sorted(Net().state_dict())
    student = Net(seed=3)
    with pytest.warns(UserWarning, match=r"restored the student alone.*convert\(student.*'body', 'body'\): Projected"):
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
    with pytest.warns(UserWarning, match="alone"):
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


class Extra(Net):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


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


class Payload:
    def __reduce__(self):
        return (os.mkdir, (str(Payload.where),))


def test_no_code_of_a_file_is_run(path, tmp_path):
    Payload.where = tmp_path / "ran"
    with path.open("wb") as file:
        torch.save({"fc.weight": Payload()}, file)
    with pytest.raises(errors.CheckpointError, match="nothing of it was run"):
        sh.restore(Net(), path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(errors.CheckpointError, match="neither"):
        sh.restore(Net(), path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
    with pytest.raises(errors.CheckpointError):
        sh.restore(Net(), path)
    assert not Payload.where.exists()


@pytest.mark.parametrize("make", [lambda: Net(seed=2), lambda: Extra({"a": 1})])
def test_damaged_files(path, make):
    sh.save(make(), path)
    whole = path.read_bytes()
    student = Net(seed=3)
    for size in (0, 4, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(errors.CheckpointError):
            sh.restore(student, path)
    assert same(student, Net(seed=3))
    with pytest.raises(FileNotFoundError):
        sh.restore(student, path.with_name("none"))
    for function in (sh.save, sh.restore):
        with pytest.raises(errors.CheckpointError, match="folder"):
            function(student, path.parent)


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


def test_files_of_others(path):
    safetensors.torch.save_file(dict(Net(seed=2).state_dict()), path)
    assert same(sh.restore(Net(seed=3), path), Net(seed=2))
    with path.open("wb") as file:
        torch.save(Net(seed=4).state_dict(), file)
    assert same(sh.restore(Net(seed=3), path), Net(seed=4))


def test_meta_tensors_are_refused(path):
    with torch.device("meta"):
        student = nn.Linear(2, 2)
    with pytest.raises(errors.CheckpointError, match="meta device"):
        sh.save(student, path)
    assert list(path.parent.iterdir()) == []


def test_the_mode_follows_the_umask(path):
    before = os.umask(0o027)
    try:
        sh.save(Net(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_former_checkpoint(path, monkeypatch):
    sh.save(Net(seed=2), path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        sh.save(Net(seed=3), path)
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(sh.restore(Net(seed=4), path), Net(seed=2))


KILLED = """
import os, sys, time, schoolhouse as sh
from torch import nn
def slowly(_descriptor):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = slowly
sh.save(nn.Linear(50, 50), sys.argv[1])
"""


def test_a_killed_writer_leaves_the_former_checkpoint(path):
    sh.save(Net(seed=2), path)
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    sh.save(Net(seed=3), path)  # one who writes at the same time is left alone
    assert len(list(path.parent.iterdir())) == 2
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    writer.stdout.close()
    assert same(sh.restore(Net(seed=4), path), Net(seed=3))
    time.sleep(0.1)
    sh.save(Net(seed=5), path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(sh.restore(Net(seed=4), path), Net(seed=5))
