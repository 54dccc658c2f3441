"""What a teacher is: in a few lines for a program, and as a tree of its modules for a person."""

import functools
import hashlib
import os
from pathlib import Path

import programs
import pytest
import schoolhouse as sh
from authority import ours
from models import Net
from schoolhouse_server import serve
from schoolhouse_server.security.tokens import new_token
from torch import nn

HELPERS = Path(__file__).parents[1] / "helpers"


class Block(nn.Module):
    def __init__(self, extra=False):
        super().__init__()
        self.attention = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        self.norm = nn.LayerNorm(4)
        if extra:
            self.extra = nn.Linear(4, 4)


class Deep(nn.Module):
    """Layers of which all but the fourth are alike, and a module that stands twice."""

    def __init__(self, count=12):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Block(extra=i == 3) for i in range(count))
        self.steps = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 4))
        self.again = self.embed

    def forward(self, input_ids, attention_mask=None, **more):
        return self.steps(self.embed(input_ids))


TREE = """\
Deep(
  (embed): Embedding
  (layers): ModuleList(
    (0-2): 3 x Block(
      (attention): ModuleDict(
        (q): Linear
        (k): Linear
      )
      (norm): LayerNorm
    )
    (3): Block(
      (attention): ModuleDict(
        (q): Linear
        (k): Linear
      )
      (norm): LayerNorm
      (extra): Linear
    )
    (4-11): 8 x Block(
      (attention): ModuleDict(
        (q): Linear
        (k): Linear
      )
      (norm): LayerNorm
    )
  )
  (steps): Sequential(
    (0): Linear
    (1-2): 2 x ReLU
    (3): Linear
  )
  (again): Embedding
)"""


def test_the_tree_is_the_one_that_print_shows_with_equal_layers_as_one(teach):
    found = teach(Deep()).describe()
    assert found.tree() == TREE
    assert len(found.modules) == 1 + 1 + 1 + 12 * 5 + 1 + 5 + 1
    assert teach(nn.Linear(2, 2)).describe().tree() == "Linear"
    class_of = dict(zip(found.modules, found.module_classes, strict=True))
    assert class_of == {name: type(inner).__name__ for name, inner in Deep().named_modules(remove_duplicate=False)}


def test_a_tree_of_names_alone():
    """Those of a server that says no classes."""
    found = sh.TeacherDescription(
        name="t", revision="r", class_name="models.Net", parameters=(), dtype="", device="cpu",
        modules=("", "a", "a.0", "a.0.fc", "a.1", "a.1.fc", "a.3", "a.3.fc", "b"),
    )  # fmt: skip
    expected = """\
Net(
  (a): (
    (0-1): 2 x (
      (fc)
    )
    (3): (
      (fc)
    )
  )
  (b)
)"""
    assert found.tree() == expected


def test_a_description_prints_a_few_lines_however_large_the_teacher(teach):
    found = teach(Deep(200)).describe()
    lines = repr(found).splitlines()
    assert len(lines) <= 5
    assert max(map(len, lines)) <= 120
    for fact in (found.revision, "test_describe.Deep", "float32", "1010", ".modules", ".tree()", "attention_mask"):
        assert fact in repr(found)
    assert len(repr(teach(Wide()).describe())) < 800


class Wide(nn.Module):
    def forward(self, a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q):
        return a


@pytest.fixture
def describe(tmp_path):
    environment = os.environ | {"COLUMNS": "80", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HELPERS), environment.get("PYTHONPATH", "")])

    return functools.partial(programs.command, "describe", cwd=tmp_path, env=environment)


def test_the_command_shows_a_served_teacher(describe):
    with serve(Deep(), name="deep", merge="same-shape") as server, sh.connect(server.url) as teacher:
        found = teacher.describe()
        done = describe(server.url)
        wrong = describe(server.url.replace("/deep", "/deeb"))
    assert done.returncode == 0, done.stderr
    facts, _, tree = done.stdout.partition("\n\n")
    assert tree.strip() == TREE
    assert dict(line.split(None, 1) for line in facts.splitlines()) == {
        "teacher": "deep",
        "revision": found.revision,
        "class": "test_describe.Deep",
        "dtype": "float32",
        "device": "cpu",
        "merge": "same-shape",
        "transport": "shared memory",
        "parameters": ", ".join(found.parameters),
        "modules": "70",
    }
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    assert wrong.returncode == 1
    assert "no teacher 'deeb'" in wrong.stderr
    assert "there are: deep" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.timeout(360)  # commands take seconds to begin, and more on a busy machine
def test_the_command_takes_the_files_of_a_connection(describe, tmp_path):
    token = new_token()
    (tmp_path / "token").write_text(f"{token}\n")
    digest = hashlib.sha256(token.encode()).hexdigest()
    (tmp_path / "tokens.yaml").write_text(f"tokens:\n- {{sha256: '{digest}', teachers: [teacher]}}\n")
    files = [part for name, path in ours().client().items() for part in (f"--{name}", path)]
    tls = ours().server(client_ca=ours().ca)
    with serve(Net(), tls=tls, tokens=tmp_path / "tokens.yaml") as server:
        done = describe(server.url, *files, "--token-file", tmp_path / "token")
        without = describe(server.url, *files)
    assert done.returncode == 0, done.stderr
    assert "models.Net" in done.stdout
    assert "(fc): Linear" in done.stdout
    assert without.returncode == 1
    assert "token" in without.stderr
