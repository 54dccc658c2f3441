"""What we use of torch under private names stands in one file, still exists, and does what we rely on."""

import ast
import re
from pathlib import Path

import pytest
import schoolhouse as sh
import torch
from schoolhouse_wire import torch_private
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[2]
HOME = ROOT / "protos/schoolhouse_wire/torch_private.py"
FILES = sorted(path for folder in ("client", "services", "protos") for path in (ROOT / folder).rglob("*.py"))
OBJECTS = (torch.empty(1), torch.empty(1).untyped_storage(), torch.compile(nn.Linear(1, 1)), DistributedDataParallel)
PRIVATE = {name for one in OBJECTS for name in dir(one) if re.match(r"_[^_]", name)}


def imported(tree):
    """The whole names that a program imports, by the names that it gives them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for alias in node.names:
                yield (alias.asname or alias.name).split(".")[0], ".".join((*source, alias.name))


def uses(text):
    """The private names of torch in a program, as they are written there: imported, as attributes, or as strings.

    An attribute is taken for torch's if some object of torch has one of that name, unless the program sets one on
    `self`, or it stands in a method that overrides it.
    """
    tree = ast.parse(text)
    found = dict(imported(tree))
    yield from (whole for whole in found.values() if re.match(r"torch\b.*\._", whole))
    of_torch = {name for name, whole in found.items() if re.match(r"torch\b", whole)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)]
    own = {node.attr for node in nodes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    for node in nodes:
        written = ast.unparse(node)
        above = written == f"super().{node.attr}"
        if written.split(".")[0] in of_torch or (node.attr in PRIVATE - own and not above):
            yield written
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    yield from (text for text in strings if text in PRIVATE - own or re.fullmatch(r"torch[\w.]*\._[\w.]+", text))


def overrides(text):
    """The private methods of modules that the classes of a program define."""
    for kind in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)):
        yield from (
            node.name for node in kind.body if isinstance(node, ast.FunctionDef) and node.name in dir(nn.Module)
        )


@pytest.mark.parametrize(
    "program",
    [
        "import torch; torch._C._current_graph_task_id()",
        "import torch as t; t.utils._pytree.tree_map(f, x)",
        "from torch.utils import _pytree",
        "from torch.nn.modules.loss import _Loss as Base",
        "import torch._dynamo",
        "x._version",
        "model._modules.pop('a')",
        "getattr(model, '_compiled_call_impl')",
        "kind == 'torch._dynamo.eval_frame'",
        "from torch import nn; nn.Module._call_impl",
    ],
)
def test_a_use_is_found(program):
    assert [*uses(program)]


def test_one_file_has_them_all():
    found = {path: [*uses(path.read_text())] for path in FILES if path != HOME}
    assert not {str(path.relative_to(ROOT)): names for path, names in found.items() if names}
    assert len({*uses(HOME.read_text())}) > 5


def test_what_is_overridden_is_what_the_file_says_and_torch_has():
    private = {name for path in FILES for name in overrides(path.read_text()) if re.match(r"_[^_]", name)}
    assert private == {*torch_private.OVERRIDDEN}
    assert private <= {*vars(nn.Module)}


def test_each_says_why():
    functions = [node for node in ast.parse(HOME.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert all(map(ast.get_docstring, functions))


def test_versions_count_changes():
    tensor = torch.zeros(3)
    before = torch_private.version_of(tensor)
    tensor.detach()[1:].add_(1)  # through a view
    assert torch_private.version_of(tensor) == before + 1
    _ = tensor + 1
    assert torch_private.versions_of([tensor, tensor]) == [before + 1] * 2
    with torch.inference_mode():
        assert torch_private.version_of(torch.zeros(1)) == 0


def test_storages():
    tensor, other = torch.zeros(6), torch.zeros(6)
    assert torch_private.storage_of(tensor) == torch_private.storage_of(tensor[2:])
    assert torch_private.storage_of(tensor) != torch_private.storage_of(other)
    empty = [torch.empty(0), torch.empty(0)]
    assert len({*map(torch_private.storage_of, empty)}) == 2
    assert torch_private.is_unshared(tensor, 1)
    view = tensor[2:]
    assert not torch_private.is_unshared(tensor, 1)
    assert torch_private.is_unshared(view, 2)
    held = tensor.untyped_storage()
    assert not torch_private.is_unshared(tensor, 2)
    del held


def test_a_backward_is_seen_from_within_alone():
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _gradient: seen.append(torch_private.in_backward()))
    assert not torch_private.in_backward()
    y.backward()
    assert seen == [True]
    assert not torch_private.in_backward()


def test_children_are_taken_out_and_put_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    taken = torch_private.children_of(model).pop("0")
    assert [*model.named_children()] == [("1", model[0])]
    torch_private.children_of(model)["0"] = taken
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    model.register_module("none", None)
    assert torch_private.children_of(model)["none"] is None


def test_what_is_compiled_is_known():
    plain, inside = nn.Linear(2, 2), nn.Linear(2, 2)
    wrapped = torch.compile(plain, backend="eager")
    assert torch_private.original_of(wrapped) is plain
    assert torch_private.original_of(plain) is plain
    assert torch_private.is_compiled(wrapped)
    assert not torch_private.is_compiled(inside)
    inside.compile(backend="eager")
    assert torch_private.is_compiled(inside)
    assert torch_private.original_of(inside) is inside


def test_the_wrapper_whose_forward_runs_is_known(tmp_path):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            wrappers.append(torch_private.active_ddp())
            return self.fc(x)

    wrappers = []
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapper = DistributedDataParallel(Asking())
        wrapper(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
    assert wrappers[0] is wrapper
    assert torch_private.active_ddp() is None


def test_our_losses_are_what_torch_and_modelopt_call_a_loss():
    ours = [getattr(sh, name) for name in sh.__all__ if name.endswith("Loss")]
    assert len(ours) > 10
    assert all(issubclass(kind, torch_private.Loss) for kind in (nn.MSELoss, nn.KLDivLoss, *ours))
