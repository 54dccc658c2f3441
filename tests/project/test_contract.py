"""The committed wire code is what the .proto files say; students need no Ray, and what runs no teacher no torch."""

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


def test_the_student_side_works_where_ray_cannot_be_imported():
    code = "import sys; sys.modules['ray'] = None; import schoolhouse; print(schoolhouse.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=150)


def test_commands_the_keeper_and_the_directory_work_where_torch_cannot_be_imported():
    code = "import sys; sys.modules['torch'] = None; import schoolhouse_server.cli.main, schoolhouse_server.pool.keeper"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=150)
