"""The committed wire code is what the .proto files say, and imports go one way."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_code_is_current(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate(tmp_path)
    written = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert written
    for path in written:
        assert path.read_text() == (ROOT / "protos" / path.relative_to(tmp_path)).read_text()


def imports_of(folder):
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from ((path, name.split(".")[0]) for name in names)


def test_imports_go_one_way():
    assert not [
        f for f in imports_of(ROOT / "protos/schoolhouse_wire") if f[1] in ("schoolhouse", "schoolhouse_server")
    ]
    assert not [f for f in imports_of(ROOT / "client/schoolhouse") if f[1] in ("schoolhouse_server", "ray")]


def test_few_modules_know_ray():
    importers = {path.name for path, name in imports_of(ROOT / "services/schoolhouse_server") if name == "ray"}
    assert importers == {"actors.py", "keeper.py", "members.py", "nodes.py", "pool.py"}


def test_the_student_side_works_where_ray_cannot_be_imported():
    code = "import sys; sys.modules['ray'] = None; import schoolhouse; print(schoolhouse.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=150)
