"""The documentation: its programs run, its pool files are valid, and what its pages and tables name exists."""

import ast
import importlib
import re
import textwrap
from pathlib import Path

import programs
import pytest
import schoolhouse as sh
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/pages"
README = ROOT / "README.md"
PAGE = DOCS / "from-modelopt.md"
GUARANTEES = DOCS / "guarantees.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
GUIDES = sorted((DOCS / "guides").glob("*.md"))
WITHOUT_PROGRAMS = {"security", "scaling-and-rolling"}  # guides to the pool file and the command line

PUBLIC = """
convert export KDLossConfig LayerwiseKDConfig ExportStudentConfig LogitsDistillationLoss MFTLoss MGDLoss
DistillationLossBalancer DistillationLossBalancer.forward DistillationLossBalancer.set_student_loss_reduction_fn
StaticLossBalancer DistillationModel DistillationModel.teacher_model DistillationModel.loss_modules
DistillationModel.loss_balancer DistillationModel.original_cls DistillationModel.hide_teacher_model
DistillationModel.hide_loss_modules DistillationModel.only_teacher_forward DistillationModel.only_student_forward
DistillationModel.compute_kd_loss DistillationModel.state_dict DistillationModel.load_state_dict
DistillationModel.train DistillationModel.forward DistillationModel.export DistillationModel.modify
LayerwiseDistillationModel LayerwiseDistillationModel.modify LayerwiseDistillationModel.export
DistillationDMRegistry LayerwiseDistillationDMRegistry
config config.Criterion distillation distillation_model layerwise_distillation_model loss_balancers losses mode
registry plugins loss_balancers.STUDENT_LOSS_KEY
distillation_model.student_output_capture_fwd_hook distillation_model.teacher_output_capture_fwd_hook
layerwise_distillation_model.student_input_bypass_fwd_hook
layerwise_distillation_model.teacher_input_output_capture_fwd_hook
mode.DistillModeRegistry mode.KnowledgeDistillationModeDescriptor mode.LayerwiseKDModeDescriptor
mode.ExportStudentModeDescriptor
plugins.huggingface plugins.huggingface.KDTrainer plugins.huggingface.DistillArguments
plugins.huggingface.DistillArgsWithTeacherModel plugins.huggingface.IGNORE_INDEX
plugins.megatron plugins.megatron.DistillationConfig plugins.megatron.setup_distillation_config
plugins.megatron.BaseLoss plugins.megatron.MSELoss plugins.megatron.HiddenStateCosineLoss
plugins.megatron.LogitsKLLoss plugins.megatron.TopKLogitsKLLoss plugins.megatron.LogitsAndIntermediatesLossBalancer
plugins.megatron.ProjectionLayer plugins.megatron.adjust_distillation_model_for_mcore
plugins.megatron.get_tensor_shapes_adjust_fn_for_distillation
"""
SEED = PUBLIC.split()
SAME_NAME = [name for name in SEED if not name.startswith(("plugins", "mode", "registry"))]


def rows(heading, page=PAGE):
    """The cells of the table under a heading of the page, without its head."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def resolve(dotted):
    """The object of a dotted path: modules are imported as far as they go, the rest are attributes."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


NAMES = rows("Every name")
BEYOND = rows("Beyond ModelOpt")


def test_the_table_has_every_name_of_the_seed_once():
    assert sorted(cells[0].strip("`") for cells in NAMES) == sorted(SEED)


@pytest.mark.parametrize("cells", NAMES, ids=lambda cells: cells[0].strip("`"))
def test_where_a_name_is_here(cells):
    seed, here, note = cells
    if here == "—":
        assert len(note) > 3
        return
    assert re.fullmatch(r"`schoolhouse\.[\w.]+`", here)
    assert resolve(here.strip("`")) is not None
    name = seed.strip("`")
    if name in SAME_NAME:
        assert here.strip("`") == f"schoolhouse.{name}"


@pytest.mark.parametrize("cells", BEYOND, ids=lambda cells: cells[0].strip("`"))
def test_what_is_beyond_the_seed(cells):
    here, _, source = cells
    found = resolve(here.strip("`"))
    for paper in re.findall(r"\[([0-9.]+)\]", source):
        bases = "".join(base.__doc__ or "" for base in found.__mro__)
        assert paper in bases


def test_every_public_loss_and_balancer_is_in_a_table():
    ends = ("Loss", "Balancer", "Schedule")
    public = [name for name in sh.__all__ if name.endswith(ends)]
    named = {cell.strip("`") for cells in NAMES for cell in cells[1:2]} | {cells[0].strip("`") for cells in BEYOND}
    assert [name for name in public if f"schoolhouse.{name}" not in named] == []


@pytest.mark.parametrize("wrong", ["schoolhouse.Convert", "schoolhouse.DistillationModel.fetch", "schoolhous.convert"])
def test_a_wrong_name_does_not_resolve(wrong):
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        resolve(wrong)


def blocks(page, language):
    """What follows the language, and the text, of each block of a page; those in lists are indented."""
    pattern = rf"^( *)```{language}\b *([^\n]*)\n(.*?)^\1```$"
    found = re.findall(pattern, page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [(kind, textwrap.dedent(text)) for _, kind, text in found]


def fenced():
    for page in PAGES:
        for i, (kind, code) in enumerate(blocks(page, "python")):
            if kind != "fragment" and not code.startswith("# "):  # those are the files of the walk-through
                yield pytest.param(code, id=f"{page.stem}-{i}")


@pytest.mark.parametrize("code", list(fenced()))
def test_programs_run(code, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(f"import warnings; warnings.filterwarnings('error', 'kd_loss_weight sums')\n{code}")
    done = programs.run(path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


@pytest.mark.parametrize(
    ("code", "why"), [("1 / 0", "ZeroDivisionError"), ("import time\ntime.sleep(60)", "Timeout"), ("exit(3)", "")]
)
def test_a_program_that_fails_is_seen_and_the_next_one_runs(code, why):
    done = programs.run("-c", code, timeout_s=0.2 if "sleep" in code else 60)
    assert done.returncode != 0
    assert why in done.stderr
    assert programs.run("-c", "import torch, schoolhouse").returncode == 0


def test_where_programs_are():
    pages = {param.id.rsplit("-", 1)[0] for param in fenced()}
    assert {page.stem for page in GUIDES} - WITHOUT_PROGRAMS <= pages
    assert {"README", "getting-started", "from-modelopt", "recipes"} <= pages
    assert all("import schoolhouse" in code for (code,) in (param.values for param in fenced()))


def test_fragments_are_python():
    """Programs that cannot stand alone, and the files of the walk-through, which tests/project/test_deploy.py runs."""
    fragments = [code for page in PAGES for kind, code in blocks(page, "python") if kind == "fragment"]
    assert len(fragments) >= 2
    for code in fragments:
        ast.parse(code.replace(", ...)", ")"))
    files = [code.splitlines()[0] for page in PAGES for _, code in blocks(page, "python") if code.startswith("# ")]
    assert files == ["# my_models.py", "# train.py"]


def test_pool_files_are_valid():
    pytest.importorskip("pydantic")
    from pydantic import TypeAdapter
    from schoolhouse_server.pool.config import PoolConfig

    found = [text for page in PAGES for _, text in blocks(page, "yaml") if text.startswith("# pool.yaml")]
    assert len(found) >= 3
    for text in found:
        TypeAdapter(PoolConfig).validate_python(yaml.safe_load(text))


def test_tokens_files_are_valid():
    pytest.importorskip("pydantic")
    from pydantic import TypeAdapter
    from schoolhouse_server.security.tokens import Grant

    found = [text for page in PAGES for _, text in blocks(page, "yaml") if text.startswith("tokens:")]
    (tokens,) = (yaml.safe_load(text)["tokens"] for text in found)
    assert len(tokens) == 3
    for token in tokens:
        TypeAdapter(Grant).validate_python({**token, "sha256": "0" * 64})


def default(field):
    """As the page has it: as YAML, and a dash for none, or one that is made."""
    value = field.default
    if value is None or not isinstance(value, bool | int | float | str):
        return "—"
    return f"`{str(value).lower() if isinstance(value, bool) else format_number(value)}`"


def format_number(value):
    return f"{int(value)}" if isinstance(value, float) and value.is_integer() else f"{value}"


@pytest.mark.parametrize(
    ("heading", "where"),
    [
        ("The pool", "pool.config.PoolConfig"),
        ("Security", "pool.config.SecuritySpec"),
        ("A teacher", "pool.config.TeacherSpec"),
        ("Resources", "pool.config.Resources"),
        ("Autoscaling", "pool.config.Autoscale"),
        ("A token", "security.tokens.Grant"),
    ],
)
def test_each_field_of_the_pool_file_is_in_the_reference(heading, where):
    pytest.importorskip("pydantic")
    fields = resolve(f"schoolhouse_server.{where}").__pydantic_fields__
    wanted = [[f"`{name}`", default(field)] for name, field in fields.items() if name != "folder"]
    assert [cells[:2] for cells in rows(heading, DOCS / "reference/pool-file.md")] == wanted


def test_each_error_is_found_by_its_name():
    page = (DOCS / "errors.md").read_text()
    assert re.findall(r"^## (\w+)$", page, flags=re.MULTILINE) == sorted(sh.errors.__all__)


def test_each_public_name_is_in_the_reference():
    reference = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", reference, flags=re.MULTILINE))
    wanted = {f"schoolhouse.{name}" for name in sh.__all__} - {"schoolhouse.RemoteTeacher"}  # where it is defined
    assert wanted - shown == {"schoolhouse.STUDENT_LOSS_KEY"}
    assert "schoolhouse.remote.teacher.RemoteTeacher" in shown
    assert [name for name in shown if resolve(name) is None] == []


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_links_lead_to_files_that_exist():
    """Within the site, `mkdocs build --strict` looks at anchors too."""
    for page in [*PAGES, *ROOT.glob("*.md"), ROOT / "deploy/README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_pages_name_files_that_exist():
    folders = "benchmarks|client|deploy|docs|examples|protos|services|tests"
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
            assert (ROOT / name).exists() or name == "docs/site", (page, name)


TEST_ID = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def missing_tests(text):
    """The tests that a page names and that are not there."""
    found = []
    for path, name in sorted(set(TEST_ID.findall(text))):
        tree = ast.parse((ROOT / path).read_text()) if (ROOT / path).exists() else ast.Module([], [])
        if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
            found.append(f"{path}::{name}")
    return found


def test_every_test_that_the_guarantees_name_exists():
    assert missing_tests(GUARANTEES.read_text()) == []


def test_a_test_that_is_not_there_is_missed():
    here = "tests/project/test_docs.py"
    named = f"`{here}::test_a_test_that_is_not_there_is_missed` `{here}::test_none` `tests/test_none.py::test_none`"
    assert missing_tests(named) == [f"{here}::test_none", "tests/test_none.py::test_none"]


def test_each_guarantee_is_held_by_a_test():
    promises = GUARANTEES.read_text().split("\n## What is promised\n")[1].split("\n## ")[0]
    tables = [block.splitlines() for block in promises.split("\n\n") if block.startswith("|")]
    rows = [row for table in tables for row in table[2:]]
    assert len(rows) > 30
    for row in rows:
        promise, faults, tests = [cell.strip() for cell in row.strip("|").split("|")]
        assert promise, row
        assert faults, row
        assert TEST_ID.sub("", tests).strip(", ") == "", row
        assert TEST_ID.search(tests), row


def test_the_map_of_the_house_has_every_room_and_names_files_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    packages = [ROOT / "services/schoolhouse_server", ROOT / "client/schoolhouse", ROOT / "protos/schoolhouse_wire"]
    rooms = {found.parent.name for package in packages for found in package.glob("*/__init__.py")} - {"demo"}
    assert {name for line in page.splitlines() if line[:1] == "|" for name in re.findall(r"`(\w+)/`", line)} == {
        *rooms,
        *("services", "client", "protos"),
    }
    paths = re.findall(r"`((?:services|client|protos|tests|docs)/[\w./-]+)`", page)
    assert paths
    assert {path for path in paths if not (ROOT / path).exists()} <= {"docs/site/"}  # which is built
