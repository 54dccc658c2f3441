"""The file of a checkpoint: whole or not there, read without running code, and never believed."""

import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import schoolhouse as sh
import torch
from models import Extra, Net, bits, same
from schoolhouse import errors
from torch import nn


@pytest.fixture
def path(tmp_path):
    return tmp_path / "student.safetensors"


def test_a_name_that_safetensors_keeps_for_itself(path):
    sh.save(nn.ParameterDict({"__metadata__": torch.ones(2)}), path)
    assert sh.restore(nn.ParameterDict({"__metadata__": torch.zeros(2)}), path)["__metadata__"].tolist() == [1, 1]


def test_one_memory_read_in_two_ways_is_not_tied(path):
    number = torch.tensor([1.0, 2.0])
    views = {"number": number, "bits": number.view(torch.int32), "column": number[:, None], "minus": number._neg_view()}
    views["alone"] = torch.tensor([1.0, 2.0])._neg_view()
    student, other = nn.Module(), nn.Module()
    for name, view in views.items():
        student.register_buffer(name, view)
        other.register_buffer(name, torch.zeros_like(view.resolve_neg()))
    sh.save(student, path)
    sh.restore(other, path)
    assert other.number.tolist() == [1.0, 2.0]
    assert other.bits.tolist() == [0x3F800000, 0x40000000]
    assert other.column.tolist() == [[1.0], [2.0]]
    assert other.minus.tolist() == other.alone.tolist() == [-1.0, -2.0]


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


@pytest.mark.parametrize("make", [lambda: Net(seed=2), lambda: Extra({"a": torch.ones(3)})])
def test_a_bit_that_was_flipped_is_found(path, make):
    """Wherever it is: in a weight, a name, a shape or the record of the distillation."""
    sh.save(make(), path)
    whole, student, chance, unchanged = path.read_bytes(), make(), random.Random(1), 0
    before = bits(student)
    with torch.no_grad():
        student.fc.weight.zero_()
    zeroed = bits(student)
    for bit in [chance.randrange(8 * len(whole)) for _ in range(400)]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            sh.restore(student, path)
        except errors.CheckpointError:
            assert bits(student) == zeroed
        else:  # in what a zip file has between its parts
            assert bits(student) == before
            unchanged += 1
            with torch.no_grad():
                student.fc.weight.zero_()
    assert unchanged < 200
    assert not unchanged or isinstance(student, Extra)


def test_files_of_other_programs_have_no_digest(path):
    safetensors.torch.save_file(dict(Net(seed=2).state_dict()), path, {"format": "pt"})
    assert same(sh.restore(Net(seed=3), path), Net(seed=2))


def test_what_is_no_regular_file_is_refused(tmp_path):
    pipe, student = tmp_path / "pipe", Net(seed=3)
    os.mkfifo(pipe)  # to open it would wait for a writer
    for where in (pipe, "/dev/zero"):
        for function in (sh.save, sh.restore):
            with pytest.raises(errors.CheckpointError, match="regular file"):
                function(student, where)
    assert same(student, Net(seed=3))


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "facts",
    [
        *({"tied": tied} for tied in ('["fc.bias"]', '"fc"', "null", '{"a": 1}', '{"a": ["fc.bias"]}', '{"a": "b"}')),
        {"tied": "{"},
        {"tied": DEEP},
        {"distillation": DEEP},
        {"distillation": '{"mode": "kd_loss"}'},
    ],
    ids=lambda facts: str(facts)[:30],
)
def test_damaged_metadata(path, facts):
    safetensors.torch.save_file(dict(Net(seed=2).state_dict()), path, facts)
    student = Net(seed=3)
    with pytest.raises(errors.CheckpointError, match="is damaged"):
        sh.restore(student, path)
    assert same(student, Net(seed=3))


def test_a_shape_beyond_integers(path):
    header = json.dumps({"fc.bias": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    student = Net(seed=3)
    with pytest.raises(errors.CheckpointError, match="is damaged"):
        sh.restore(student, path, strict=False)
    assert same(student, Net(seed=3))


def test_mutated_pickles(path):
    """Whatever the pickle of a torch file says, a student is restored, or unchanged."""
    sh.save(Extra({"a": [1, torch.ones(2)]}), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    student, chance, refused = Extra(None), random.Random(1), 0
    for _ in range(500):
        parts[name], whole, before = bytearray(parts[name]), bytes(parts[name]), bits(student)
        parts[name][chance.randrange(len(whole))] = chance.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for part, content in parts.items():
                archive.writestr(part, bytes(content))
        try:
            sh.restore(student, path)
        except errors.CheckpointError:
            refused += 1
            assert bits(student) == before
        parts[name] = whole
    assert refused > 300


def test_files_of_others(path):
    safetensors.torch.save_file(dict(Net(seed=2).state_dict()), path)
    assert same(sh.restore(Net(seed=3), path), Net(seed=2))
    with path.open("wb") as file:
        torch.save(Net(seed=4).state_dict(), file)
    assert same(sh.restore(Net(seed=3), path), Net(seed=4))


def test_meta_tensors_are_refused(path):
    with torch.device("meta"):
        student = nn.Linear(2, 2)
    beside_a_complex_one = nn.ParameterDict({"a": torch.ones(2, dtype=torch.complex64), "b": student.weight})
    for model in (student, beside_a_complex_one, Extra({"a": [student.weight]})):
        with pytest.raises(errors.CheckpointError, match="meta device"):
            sh.save(model, path)
    assert list(path.parent.iterdir()) == []
    sh.save(nn.Linear(2, 2), path)
    with pytest.raises(errors.CheckpointError, match=r"2 on the meta device.*to_empty.*bias, weight"):
        sh.restore(student, path)
    assert same(sh.restore(student.to_empty(device="cpu"), path), sh.restore(nn.Linear(2, 2), path))


def test_the_mode_follows_the_umask(path):
    before = os.umask(0o027)
    try:
        sh.save(Net(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_keeps_its_mode(path):
    for mode in (0o600, 0o666):
        sh.save(Net(), path)
        path.chmod(mode)
        before = os.umask(0o022)
        try:
            sh.save(Net(seed=2), path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert same(sh.restore(Net(seed=3), path), Net(seed=2))


def test_a_link_stays_one(path, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    path.symlink_to("runs/first")  # there is none yet
    sh.save(Net(seed=2), path)
    assert [p.name for p in folder.iterdir()] == ["first"]
    (folder / "first").chmod(0o600)
    sh.save(Net(seed=4), path)
    assert path.readlink().name == "first"
    assert stat.S_IMODE((folder / "first").stat().st_mode) == 0o600
    assert same(sh.restore(Net(seed=3), folder / "first"), Net(seed=4))
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "runs"}


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
    writer.wait(20)
    writer.stdout.close()
    assert same(sh.restore(Net(seed=4), path), Net(seed=3))
    sh.save(Net(seed=5), path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(sh.restore(Net(seed=4), path), Net(seed=5))


def test_savers_at_the_same_time(path):
    def save_often(seed):
        for _ in range(100):
            sh.save(Net(seed=seed), path)

    with ThreadPoolExecutor(4) as savers:
        list(savers.map(save_often, range(4)))
    restored = sh.restore(Net(seed=9), path)
    assert sum(same(restored, Net(seed=seed)) for seed in range(4)) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]
