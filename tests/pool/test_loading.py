"""Pool files and teacher specs: what is right loads, what is wrong says where in one sentence."""

import pytest
import torch
from models import Net
from safetensors.torch import save_model
from schoolhouse.errors import ConfigError
from schoolhouse_server.pool.config import load_pool
from schoolhouse_server.pool.loading import load_teacher


def write(tmp_path, text):
    path = tmp_path / "pool.yaml"
    path.write_text(text)
    return path


def test_build_with_weights_and_dtype(tmp_path):
    trained = Net(24, seed=9)
    save_model(trained, tmp_path / "w.safetensors")
    text = "teachers: {net: {build: 'models:Net', kwargs: {width: 24}, weights: w.safetensors, dtype: float64}}"
    pool = load_pool(write(tmp_path, text))
    built = load_teacher(pool.teachers["net"], pool.folder)
    assert built.fc.weight.dtype == torch.float64
    assert torch.equal(built.fc.weight, trained.fc.weight.double())


def test_transformers_checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    saved = transformers.BertModel(config)
    saved.save_pretrained(tmp_path / "checkpoint")
    pool = load_pool(write(tmp_path, "teachers: {bert: {transformers: checkpoint}}"))
    built = load_teacher(pool.teachers["bert"], pool.folder)
    assert type(built) is transformers.BertModel
    assert torch.equal(built.pooler.dense.weight, saved.pooler.dense.weight)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teachers: {a: {}}", "exactly one of 'build"),
        ("teachers: {}", "teachers"),
        ("teachers: {a: {build: 'm:f', replcas: 2}}", "replcas"),
        ("teachers: {a: {build: 'm:f', replicas: 0}}", "replicas"),
        ("teachers: {a: {build: 'm:f', device: cuda}}", "num_gpus"),
        ("teachers: [", "not YAML"),
        ("3", "mapping"),
    ],
)
def test_wrong_pool_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_pool(write(tmp_path, text))


def test_what_cannot_be_imported_is_named(tmp_path):
    pool = load_pool(write(tmp_path, "teachers: {a: {build: 'no_such_module:f'}}"))
    with pytest.raises(ConfigError, match="no_such_module"):
        load_teacher(pool.teachers["a"], pool.folder)
