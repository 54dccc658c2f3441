"""The lock files: what pyproject.toml and the images ask for is locked by hashes, at a version that they admit."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_deploy import stages

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy/locks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = (LOCKS / "server.in").read_text()
OF_TORCH = r"torch|triton|(nvidia|cuda)-.*"  # what each of its builds has its own of
EXTRAS = {"client": [], "server": ["serve"], "dev": ["dev"]}
LINUX = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.9", "sys_platform": "linux",
     "platform_system": "Linux", "platform_machine": machine}
    for minor in (11, 12, 13) for machine in ("x86_64", "aarch64")
]  # fmt: skip


def entries(text):
    """The requirements of a lock file, each with its hashes."""
    joined = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    for line in joined.splitlines():
        requirement, *hashes = line.split(" --hash=")
        yield Requirement(requirement), [one.strip() for one in hashes]


def locked(name, where):
    """What a lock file has for such a machine: versions by names."""
    found = {}
    for requirement, _ in entries((LOCKS / f"{name}.lock").read_text()):
        if requirement.marker is None or requirement.marker.evaluate(where):
            assert found.setdefault(canonicalize_name(requirement.name), requirement) is requirement, "locked twice"
    return {key: next(iter(one.specifier)).version for key, one in found.items()}


def wanted(name):
    """What is asked for directly: the project's dependencies, those of its extras, and the image's."""
    lines, extras = [*PROJECT["dependencies"]], [*EXTRAS[name]]
    for extra in extras:  # grows, as extras name extras
        for line in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == PROJECT["name"]:
                extras += requirement.extras - {*extras}
            else:
                lines.append(line)
    image = [] if name == "client" else [line for line in IMAGE.splitlines() if not line.startswith("#")]
    return [Requirement(line) for line in lines + image]


def missing(name, where):
    """What is asked for and not locked, or locked at a version that is not admitted."""
    versions = locked(name, where)
    asked = [one for one in wanted(name) if one.marker is None or one.marker.evaluate(where)]
    asked = [one for one in asked if not re.fullmatch(OF_TORCH, one.name)]
    of = {str(one): versions.get(canonicalize_name(one.name)) for one in asked}
    return [str(one) for one in asked if of[str(one)] is None or not one.specifier.contains(of[str(one)])]


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("where", LINUX, ids=lambda where: f"{where['python_version']}-{where['platform_machine']}")
def test_what_is_asked_for_is_locked_at_an_admitted_version(name, where):
    assert missing(name, where) == [], "run `make lock`"


def test_a_dependency_that_is_not_locked_is_missed(monkeypatch):
    monkeypatch.setitem(PROJECT, "dependencies", ["grpcio>=999", "xxhash>=3.4", "not-locked"])
    assert missing("client", LINUX[0]) == ["grpcio>=999", "not-locked"]


@pytest.mark.parametrize("name", EXTRAS)
def test_each_entry_is_one_version_with_hashes_and_none_is_of_a_build_of_torch(name):
    found = list(entries((LOCKS / f"{name}.lock").read_text()))
    assert len(found) > 10
    for requirement, hashes in found:
        assert [one.operator for one in requirement.specifier] == ["=="]
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes), requirement.name
        assert not re.fullmatch(OF_TORCH, requirement.name), "a library of CUDA that OF_TORCH in the Makefile has not"


def test_images_have_the_versions_that_the_tests_run_with():
    dev, server, client = (locked(name, LINUX[0]) for name in ("dev", "server", "client"))
    assert client.items() <= server.items() <= dev.items()
    assert "ray" not in client
    assert {"ray", "transformers", "accelerate"} <= {*server}


def test_images_install_only_what_is_locked():
    installs = [one.strip() for lines in stages().values() for word, rest in lines if word == "RUN"
                for one in rest.split("&&") if "pip install" in one]  # fmt: skip
    hashed = [one for one in installs if "--require-hashes --no-deps -r " in one]
    assert [re.search(r"(\w+)\.lock$", one)[1] for one in hashed] == ["client", "client", "server"]
    torch, own = [one for one in installs if one not in hashed]
    assert torch.endswith("--constraint /opt/schoolhouse/constraints.txt torch")
    assert own == "pip install --no-deps /opt/schoolhouse/wheels/*.whl"
    assert re.search(r"^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
