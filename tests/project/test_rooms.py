"""The house: packages import downwards, rooms within a package too, no file is in a circle, and one room knows Ray."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"schoolhouse_wire": "protos", "schoolhouse": "client", "schoolhouse_server": "services"}  # upwards


def files():
    """Every module of ours by its name; generated ones count as what they were made of."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder / package).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def imported(path):
    """Whatever a file imports, wherever in it, for type checkers too: all the names that these may be."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from ((f"{node.module}.{alias.name}", node.module) for alias in node.names)


def ours(name):
    """The modules of ours that one imports; of `from a import b`, the module `a.b` if there is one, else `a`."""
    return {next(one for one in names if one in FILES) for names in imported(FILES[name]) if {*names} & {*FILES}} - {
        name
    }


IMPORTS = {name: ours(name) for name in FILES}


def room_of(name):
    """The room that a module stands in; a module that stands in none is a room by itself."""
    return ".".join(name.split(".")[:2])


def test_packages_import_downwards():
    order = [*PACKAGES]
    for name, found in IMPORTS.items():
        floor = order.index(name.split(".")[0])
        assert all(order.index(one.split(".")[0]) <= floor for one in found), name


@pytest.mark.parametrize("place", [room_of, str], ids=["rooms", "files"])
def test_there_is_no_circle(place):
    below = {}
    for name, found in IMPORTS.items():
        below.setdefault(place(name), set()).update({place(one) for one in found} - {place(name)})
    assert len([*graphlib.TopologicalSorter(below).static_order()]) == len(below)


def test_only_the_pool_imports_ray():
    importers = {
        room_of(name)
        for name, path in FILES.items()
        if any(found[0].split(".")[0] == "ray" for found in imported(path))
    }
    assert importers == {"schoolhouse_server.pool"}


def test_each_room_says_what_it_holds():
    for path in (path for path in FILES.values() if path.name == "__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
