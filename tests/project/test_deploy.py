"""Images, `ray up` files, the Slurm script and the walk-through: valid, and of things that exist."""

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import programs
import pytest
import yaml
from models import Net
from schoolhouse_server import serve
from schoolhouse_server.cli import probe as health

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
SBATCH = ROOT / "deploy/slurm/schoolhouse.sbatch"
PAGES = ROOT / "docs/pages"
WALK_THROUGH = PAGES / "deploying.md"
CLUSTERS = sorted((ROOT / "deploy/ray").glob("*.yaml"))


def tool(name):
    """The program, as pip put it beside this Python."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return found or pytest.skip(f"{name} is not installed")


def stages():
    """The instructions of each stage of the Dockerfile, by its name: (instruction, rest) pairs."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found, current = {}, []
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            current = found.setdefault(rest.split(" AS ")[1], [])
        current.append((word, rest.strip()))
    return found


def test_the_dockerfile_is_clean():
    done = subprocess.run([tool("hadolint"), DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_dockerfile_copies_is_there():
    ignore = DOCKERFILE.with_suffix(".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignore if line.startswith("!")}
    copied = [rest.split()[:-1] for lines in stages().values() for word, rest in lines if word == "COPY"]
    own = [name for names in copied for name in names if not names[0].startswith("--from")]
    assert set(own) == admitted
    assert all((ROOT / name).exists() for name in own)
    assert {"client", "services", "protos", "README.md", "LICENSE"} <= admitted  # what pyproject.toml names


def test_images_run_as_nobody_special():
    found = stages()
    assert list(found) == ["build", "client", "server"]  # the last is what `docker build` makes
    for name in ("client", "server"):
        assert [rest for word, rest in found[name] if word == "USER"][-1] == "1000:1000"
        assert [word for word, _ in found[name]][-1] == "CMD"
        assert not [word for word, _ in found[name] if word == "ENTRYPOINT"]


def test_the_server_image_has_the_compiler_that_triton_wants():
    packages = next(rest for word, rest in stages()["server"] if "apt-get install" in rest)
    assert "g++" in packages.split()


def test_ray_in_a_container_asks_for_a_token(tmp_path):
    server = stages()["server"]
    assert ("ENV", "RAY_AUTH_MODE=token") in server
    shell, flag, script = json.loads(next(rest for word, rest in server if word == "CMD"))
    program = tmp_path / "ray"
    program.write_text('#!/bin/sh\necho "$*" >> "$CALLS"; echo a-token\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    done = subprocess.run([shell, flag, script], env=environment, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "calls").read_text().splitlines() == ["get-auth-token --generate", "start --head --block"]
    assert done.stdout == "a-token\n"  # that of the second: the token is in no log


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_rays_cluster_files_have_its_token(path):
    config = yaml.safe_load(path.read_text())
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert [c for c in config[commands] if "ray start" in c and "RAY_AUTH_MODE=token" not in c] == []


def test_the_health_check_asks_the_pool(capsys):
    (check,) = [rest for word, rest in stages()["server"] if word == "HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    assert command[:3] == ["python", "-m", health.__name__]
    with serve(Net(32, seed=1)) as server:
        address = f"127.0.0.1:{server.port}"
        asked = programs.run(*command[1:3], address)
        assert asked.returncode == 0, asked.stderr
    assert health.main([address]) == 1
    assert health.main([]) == 2
    assert "HOST:PORT" in capsys.readouterr().err


def test_the_slurm_script_is_clean():
    assert subprocess.run(["bash", "-n", SBATCH]).returncode == 0
    done = subprocess.run([tool("shellcheck"), SBATCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    directives = re.findall(r"^#SBATCH (--[\w-]+)", SBATCH.read_text(), flags=re.MULTILINE)
    assert directives == [
        "--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--time", "--signal", "--no-kill"
    ]  # fmt: skip


def cluster_schema():
    ray = pytest.importorskip("ray")
    return json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_takes_its_cluster_files(path):
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, cluster_schema())
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert sum(node.get("min_workers", 0) for node in types.values()) >= 1
    assert types[prepared["head_node_type"]]


def test_a_misspelt_field_of_a_cluster_file_is_an_error():
    assert [path.stem for path in CLUSTERS] == ["aws", "local"]
    config = yaml.safe_load(CLUSTERS[0].read_text())
    with pytest.raises(jsonschema.ValidationError, match="head_node"):
        jsonschema.validate({**config, "head_node": config.pop("head_node_type")}, cluster_schema())


def commands():
    """Every `schoolhouse COMMAND ...` that a file of the deploy folder or a page has anybody or anything type."""
    known = "up|down|status|demo|scale|roll|logs|jobs|top|certs|token|describe"
    files = [path for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    texts = [path.read_text() for path in (*files, ROOT / "README.md", *PAGES.rglob("*.md"))]
    return sorted(set(re.findall(rf"(?<![\w./=-])schoolhouse (?:{known})\b[^|;&`')#\n]*", "\n".join(texts))))


def test_commands_exist():
    pytest.importorskip("ray")
    import typer.main
    from schoolhouse_server.cli.main import app

    group = typer.main.get_command(app)
    found = commands()
    assert len(found) > 5
    for line in found:
        _, name, *rest = line.split()
        assert name in group.commands, line
        options = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options, line


def test_files_of_the_walk_through_exist():
    text = WALK_THROUGH.read_text()
    named = set(re.findall(r"(?<![\w/.-])(deploy/[\w./-]+\w)", text))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (WALK_THROUGH.parent / link).exists()] == []


def laptop():
    """The files and the commands of the walk-through's first section."""
    section = WALK_THROUGH.read_text().split("\n## A laptop\n")[1].split("\n## ")[0]
    files = dict(re.findall(r"```\w+\n# (\S+\.\w+)\n(.*?)```", section, flags=re.DOTALL))
    (shell,) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    return files, shell


def installed(folder):
    """A folder with `schoolhouse` and `python` as they are after an installation."""
    folder.mkdir()
    code = "from schoolhouse_server.cli.main import main; main()"
    for name, arguments in (("schoolhouse", f"-c '{code}'"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return str(folder)


def free_port():
    """One that is free until it is taken: the system gives ports below 32768 to nobody who asks for any."""
    for port in random.SystemRandom().sample(range(25_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)
    pytest.fail("no port is free")


@pytest.mark.ray
@pytest.mark.timeout(360)
def test_the_laptop_of_the_walk_through(tmp_path):
    pytest.importorskip("ray")
    files, shell = laptop()
    assert sorted(files) == ["my_models.py", "pool.yaml", "train.py"]
    port = free_port()
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace("7070", port))
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    environment["PATH"] = os.pathsep.join([installed(tmp_path / "bin"), os.environ["PATH"]])
    script = f"set -e\ntrap 'schoolhouse down' ERR\n{shell}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=340
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"students connect to  grpc://127.0.0.1:{port}/teacher" in done.stdout
    assert re.search(r"^loss \d", done.stdout, flags=re.MULTILINE)


def test_the_example_of_a_student_pod_is_valid():
    manifests = pytest.importorskip("manifests")
    blocks = re.findall(r"```yaml\n(apiVersion.*?)```", WALK_THROUGH.read_text(), flags=re.DOTALL)
    (pod,) = map(yaml.safe_load, blocks)
    manifests.validate(pod)
    labels = yaml.safe_load((manifests.CHART / "values.yaml").read_text())["networkPolicy"]["studentLabels"]
    assert labels.items() <= pod["metadata"]["labels"].items()
