"""Pool files, weights and checkpoints that are wrong, in whatever way: one sentence of the typed error says so."""

import json
import zipfile

import pytest
import safetensors.torch
import schoolhouse as sh
import torch
from fuzzing import Source, changed_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Extra, Net, converted
from schoolhouse import errors
from schoolhouse_server.pool.config import TeacherSpec, load_pool
from schoolhouse_server.pool.loading import load_teacher
from torch import nn

POOL = b"""teachers:
  net:
    build: models:make
    kwargs: {a: [1, 2, {b: c}], width: 3}
    weights: w.safetensors
    replicas: {min: 1, max: 4}
    autoscale: {target_delay_s: 0.1, max_busy: 0.5}
    labels: {accelerator-type: "in(H100,H200)"}
    merge: pad
    pad: {values: {input_ids: 0}, mask: attention_mask}
    resources: {num_cpus: 1, custom: {x: 1.5}}
host: 127.0.0.1
ports: 7100-7199
advertise: {10.0.0.1: example}
log_format: json
"""
ODD = (b"[", b"}", b": ", b"&a ", b"*a", b"!!binary x ", b"!!timestamp ", b"2001-99-99", b"? ", b"!!set ", b"!!int ")
ODD += (b"!!float ", b"!!bool ", b"<<: ", b".inf", b"1e999", b"9" * 5000, b"[" * 1000, b"\x00", b"\xff", b"1:2:3", b"~")


def is_a_sentence(error):
    assert 10 < len(str(error)) < 4000
    assert "\n" not in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=60))
def test_a_pool_file_is_taken_or_said_to_be_wrong(tmp_path, data):
    source, text = Source(data), POOL
    while source.left:
        if source.below(2):
            at = source.below(len(text) + 1)
            text = text[:at] + source.one_of(ODD) + text[at:]
        else:
            text = changed_bytes(source, text)
    path = tmp_path / "pool.yaml"
    path.write_bytes(text)
    try:
        load_pool(path)
    except errors.ConfigError as err:
        is_a_sentence(err)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
WRONG_POOLS = {
    "not text": (b"teachers: \xff", "byte 10 is not UTF-8"),
    "deep": (b"[" * 1000, "nested too deeply"),
    "no date": (b"teachers: 2001-99-99", "is not YAML: month must be in 1..12"),
    "an empty number": (b"teachers: !!int ''", "is not YAML"),
    "large": (b"#" * (2 << 20), "more than 1048576 bytes"),
    "a bomb": (BOMB.encode(), "more than 100000 values"),
    "within itself": (b"teachers: &a {b: *a}", "more than 100000 values"),
    "many errors": (b"teachers: {a: {%s}}" % b", ".join(b"k%d: 1" % i for i in range(50)), "and 40 more"),
}


@pytest.mark.parametrize("name", WRONG_POOLS)
def test_pool_files_that_are_wrong(tmp_path, name):
    content, says = WRONG_POOLS[name]
    path = tmp_path / "pool.yaml"
    path.write_bytes(content)
    with pytest.raises(errors.ConfigError, match=says) as caught:
        load_pool(path)
    is_a_sentence(caught.value)


def test_weights_that_are_damaged(tmp_path):
    spec = TeacherSpec(build="models:Net", weights="w.safetensors")
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(dict(Net(seed=2).state_dict()), path)
    whole = path.read_bytes()
    assert load_teacher(spec, tmp_path) is not None
    for content in (b"", whole[:20], whole[:-1], b"\xff" * 100, json.dumps({"a": 1}).encode()):
        path.write_bytes(content)
        with pytest.raises(errors.ConfigError, match=r"weights: w\.safetensors cannot be read") as caught:
            load_teacher(spec, tmp_path)
        is_a_sentence(caught.value)
    safetensors.torch.save_file({"other": torch.ones(1)}, path)
    with pytest.raises(errors.ConfigError, match="does not fit the model") as caught:
        load_teacher(spec, tmp_path)
    is_a_sentence(caught.value)


def test_a_teachers_checkpoint_that_is_damaged(tmp_path):
    pytest.importorskip("transformers")
    spec = TeacherSpec(transformers="folder")
    (tmp_path / "folder").mkdir()
    for content in ("{", '{"model_type": "no such"}', '{"model_type": "bert"}'):
        (tmp_path / "folder/config.json").write_text(content)
        with pytest.raises(errors.ConfigError, match="transformers: folder cannot be loaded") as caught:
            load_teacher(spec, tmp_path)
        is_a_sentence(caught.value)


STUDENTS = {
    "plain": lambda: Net(seed=2),
    "torch": lambda: Extra({"a": 1}),
    "converted": lambda: converted(Net(seed=2), Net(), nn.MSELoss()),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "student"
    found = {}
    for name, make in STUDENTS.items():
        sh.save(make(), path, include_losses=True)
        found[name] = path.read_bytes()
    return found


@pytest.mark.filterwarnings("ignore:restored only the student")
@pytest.mark.parametrize("name", STUDENTS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=60))
def test_a_checkpoint_is_restored_or_said_to_be_wrong(saved, tmp_path, name, data):
    source, content = Source(data), saved[name]
    while source.left:
        content = changed_bytes(source, content)
    path = tmp_path / "student"
    path.write_bytes(content)
    try:
        sh.restore(STUDENTS[name](), path)
    except errors.CheckpointError as err:
        is_a_sentence(err)


def test_a_checkpoint_of_compressed_parts_is_not_inflated(tmp_path):
    path = tmp_path / "student"
    sh.save(Extra({"a": torch.zeros(1 << 20)}), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    with pytest.raises(errors.CheckpointError, match="has compressed parts"):
        sh.restore(Extra(None), path)
