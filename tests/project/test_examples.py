"""Each example, as a reader runs it: with the teacher in its process and behind gRPC, which print the same lines."""

import re
from pathlib import Path

import programs
import pytest

pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[2] / "examples"
ALONE = ("common", "shared_teacher")  # run on its own below: it measures, and has no local form
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ALONE)


def number(pattern, lines):
    """The number that the group in `pattern` finds in the one line that it fits."""
    (found,) = [match for line in lines if (match := re.search(pattern, line))]
    return float(found[1])


def soft_label_distillation(lines):
    assert number(r"^student: .*accuracy (.*)", lines) < 0.3
    assert number(r"^student, distilled: accuracy (.*)", lines) > 0.8
    assert number(r"^agreement with the teacher: (.*)", lines) > 0.8


def layer_pairs(lines):
    for name in ("HiddenMSELoss_0", "LogitsDistillationLoss_1", "student_loss"):
        before, after = (number(rf"^after epoch {epoch}: .*{name} ([0-9.]+)", lines) for epoch in (1, 12))
        assert after < before / 2
    assert number(r"^agreement with the teacher: (.*)", lines) > 0.8


def custom_loss_with_kwargs(lines):
    teacher, alone, helped = (number(rf"^{who}: accuracy (.*)", lines) for who in ("teacher", ".*Only", ".*OrLabel"))
    assert helped > max(teacher, alone)


def minifinetuning(lines):
    plain, mft = (rf"^{who}, .*: old domain (.*), new" for who in ("cross entropy", "minifinetuning 0.8"))
    assert number(mft, lines) > number(plain, lines)
    for who in ("cross entropy", "minifinetuning 0.8"):
        assert number(rf"^{who}, .*new domain (.*)", lines) > 0.65
    assert number(r"^before: .*new domain (.*)", lines) < 0.3


def module_replacement(lines):
    assert number(r"^body replaced: accuracy (.*),", lines) < 0.5
    assert number(r"^agreement with the teacher: (.*)", lines) > 0.9
    assert "all else is as it was: True" in lines


def export_and_checkpoint(lines):
    assert "half-way: 9 tensors, of the losses: ['_loss_modules.0.projection.weight']" in lines
    assert "exported: a Digits with 8 tensors" in lines
    restored, ended = (number(rf"^{when}: accuracy (.*)", lines) for when in ("restored", "student"))
    assert 0.6 < restored < ended


def causal_lm(lines):
    teacher, before, after = (
        number(rf"^{who}: next letter right (.*)", lines) for who in ("teacher", "student", "student, distilled")
    )
    assert before < 0.1
    assert after > teacher - 0.1 > 0.1
    assert number(r"^agreement with the teacher: (.*)", lines) > 0.5


def test_every_example_has_a_check():
    assert [name for name in EXAMPLES if not callable(globals().get(name))] == []
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    if name == "causal_lm":
        pytest.importorskip("transformers")
    local, remote = (programs.run(FOLDER / f"{name}.py", "--teacher", where) for where in ("local", "remote"))
    assert [local.returncode, remote.returncode] == [0, 0], local.stderr + remote.stderr
    assert local.stderr + remote.stderr == ""
    same = [line for line in remote.stdout.splitlines() if not line.startswith("over the wire:")]
    assert local.stdout.splitlines() == same
    globals()[name](same)


def test_shared_teacher():
    done = programs.run(FOLDER / "shared_teacher.py", "--seconds", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rates, shares = zip(
        *(
            (number(rf"^{job} batches of .*: (\d+) rows/s", lines), number(rf"^{job} .*, (\d+)% of all", lines))
            for job in ("small", "large")
        ),
        strict=True,
    )
    assert min(rates) > 0
    assert abs(sum(rates) - number(r"^together: (\d+) rows/s", lines)) <= 2
    assert abs(sum(shares) - 100) <= 1
