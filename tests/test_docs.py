"""What the pages say: the names exist, and their programs run."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/from-modelopt.md").read_text()
TOP = """
convert export DistillationModel LayerwiseDistillationModel KDLossConfig LayerwiseKDConfig ExportStudentConfig
DistillationLossBalancer StaticLossBalancer LogitsDistillationLoss MFTLoss MGDLoss DistillationDMRegistry
LayerwiseDistillationDMRegistry config distillation distillation_model layerwise_distillation_model loss_balancers
losses mode registry plugins
"""
MODEL = """
teacher_model loss_modules loss_balancer hide_teacher_model hide_loss_modules only_teacher_forward only_student_forward
train state_dict load_state_dict compute_kd_loss modify export
"""
SEED = [*TOP.split(), *(f"DistillationModel.{name}" for name in MODEL.split())]


def rows(heading):
    """Cells of the table below a heading."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


def find(path):
    """The object of a dotted path."""
    parts = path.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


def test_every_name_of_the_seed_is_in_the_table():
    assert sorted(set(SEED) - {row[0] for row in rows("Every public name")}) == []


@pytest.mark.parametrize("heading", ["Every public name", "Beyond the seed"])
def test_the_names_exist(heading):
    column = 1 if heading == "Every public name" else 0
    for row in rows(heading):
        if row[column] != "—":
            assert row[column].startswith("schoolhouse.")
            find(row[column])


def test_names_of_the_seed_keep_their_names():
    for seed, here, _ in rows("Every public name"):
        if here != "—" and "." not in seed and seed != "mode":
            assert here == f"schoolhouse.{seed}"


def test_a_wrong_name_would_be_found():
    with pytest.raises(ImportError):
        find("schoolhouse.NoSuchLoss")


def programs():
    for page in ("README.md", "docs/from-modelopt.md"):
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page}-{i}")


@pytest.mark.parametrize("code", [*programs()])
def test_programs_run(code, tmp_path):
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
