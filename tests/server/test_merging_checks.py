"""What is refused before a teacher is served: modules that mix rows, examples that show it, settings that cannot be."""

import logging
import random
import threading

import pytest
import schoolhouse as sh
import torch
from memfd import soon
from merging import Words, at_once, engine_of, ids, pair
from models import Net
from schoolhouse.errors import ConfigError
from schoolhouse_server import serve
from schoolhouse_server.merge.settings import MergeSettings, Padding
from schoolhouse_server.pool.config import TeacherSpec, load_pool
from schoolhouse_server.pool.loading import load_example
from test_merging_apart import Mixing
from torch import nn

PAD = {"values": {"ids": 0}, "mask": "mask"}


def test_modules_that_normalise_by_the_batch_are_named():
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False)))
    with pytest.raises(ConfigError, match="'1.0' normalise by the statistics.*merge='never'"):
        serve(module, merge="same-shape")
    with serve(module):
        pass
    with serve(nn.Sequential(nn.BatchNorm1d(8)), merge="same-shape") as server, sh.connect(server.url) as teacher:
        assert teacher.describe().merge == "same-shape"


def example():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


MIXING = ["batch_statistics", "attention_across_the_batch", "noise", "rare_noise", "state", "running_mean"]


@pytest.mark.parametrize("kind", MIXING)
def test_an_example_shows_that_rows_are_mixed(kind):
    with pytest.raises(ConfigError, match="'teacher' cannot be merged, as its example shows: .*merge='never'"):
        serve(Mixing(kind), merge="same-shape", example=example)


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: sh.Arguments((x,))])
def test_an_example_that_can_be_merged(kind):
    with serve(Net(), merge="same-shape", example=lambda: kind(example())) as server:
        assert server.engines["teacher"].merger.refusals == 0


def test_examples_that_do_not_do():
    for given, why in [
        (lambda: torch.zeros(1, 8), "1 rows; give at least 2"),
        (lambda: torch.zeros(4, 9), "raised RuntimeError"),
        (lambda: 5, "1 rows; give at least 2"),
        ({"other": example}, "by the teachers' names"),
        (3, "by the teachers' names"),
    ]:
        with pytest.raises(ConfigError, match=why):
            serve(Net(), merge="same-shape", example=given)
    with pytest.raises(ConfigError, match="merge is 'never'"):
        serve(Net(), example=example)
    with serve({"a": Net(), "b": Words()}, merge="same-shape", example={"a": example}):
        pass


class Deaf(Words):
    """Does not hear the mask."""

    def forward(self, ids, mask=None):
        return super().forward(ids)


def test_an_example_shows_that_padded_places_are_used():
    def tokens():
        return {"ids": ids(5, 9)}

    with serve(Words(), merge="pad", pad=PAD, example=tokens):
        pass
    with pytest.raises(ConfigError, match="differs from the single one"):
        serve(Deaf(), merge="pad", pad=PAD, example=tokens)
    with serve(Deaf(), merge="same-shape", example=tokens):
        pass


def test_padding_of_arguments_that_there_are_not():
    for pad in ({"values": {"tokens": 0}, "mask": "mask"}, {"values": {"ids": 0}, "mask": "attention"}):
        with pytest.raises(ConfigError, match="does not take; choices: 'ids', 'mask'"):
            serve(Words(), merge="pad", pad=pad)
    for more in ({"merge": "pad"}, {"merge": "same-shape", "pad": PAD}, {"merge": "often"}):
        with pytest.raises(ConfigError):
            serve(Words(), **more)


def test_a_pool_file_says_how_to_merge(tmp_path):
    (tmp_path / "made_for_merging.py").write_text(
        "import torch\ndef model(): return torch.nn.Linear(8, 5)\ndef inputs(): return torch.ones(3, 8)\n"
    )
    pool = tmp_path / "pool.yaml"
    start = "teachers:\n  one:\n    build: made_for_merging:model\n"
    pool.write_text(
        start + "    merge: pad\n    max_batch_rows: 64\n    max_batch_tokens: 4096\n    max_wait_ms: 1\n"
        "    pad: {values: {input: 0}, mask: mask}\n    example: made_for_merging:inputs\n"
    )
    config = load_pool(pool)
    spec = config.teachers["one"]
    assert spec.merging == MergeSettings(
        mode="pad",
        max_batch_rows=64,
        max_batch_tokens=4096,
        max_wait_ms=1,
        pad=Padding(values={"input": 0.0}, mask="mask"),
    )
    assert torch.equal(load_example(spec, config.folder)(), torch.ones(3, 8))
    assert load_example(TeacherSpec(build="a:b"), config.folder) is None
    with pytest.raises(ConfigError, match="example: cannot import 'made_for_merging:outputs'"):
        load_example(TeacherSpec(build="a:b", example="made_for_merging:outputs"), config.folder)
    for wrong in ("merge: often", "merge: pad", "max_batch_rows: 0", "example: inputs", "pad: {values: {}, mask: m}"):
        pool.write_text(f"{start}    {wrong}\n")
        with pytest.raises(ConfigError, match=r"teachers\.one"):
            load_pool(pool)


def bert(**more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        **more,
    )
    return transformers.BertModel(config).eval()


BERT_PAD = {"values": {"input_ids": 0, "token_type_ids": 0}, "mask": "attention_mask"}


def test_a_transformers_model_brings_its_own_example(caplog):
    with serve(bert(), merge="pad", pad=BERT_PAD) as server:
        assert server.engines["teacher"].counters.forwards == 0
    broken = bert()
    broken.encoder.layer[1].output.LayerNorm = Centred()
    with pytest.raises(ConfigError, match="as its example shows"):
        serve(broken, merge="pad", pad=BERT_PAD)
    broken.encoder.layer[1].output.LayerNorm = nn.Linear(3, 3)  # does not run at all
    with caplog.at_level(logging.INFO), serve(broken, merge="pad", pad=BERT_PAD):
        assert any("dummy inputs" in record.getMessage() for record in caplog.records)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean((0, 1))


def test_an_encoder_of_transformers_is_padded_and_each_gets_its_own_length(monkeypatch):
    model, alone = bert(), bert()
    taps = ["", "encoder.layer.0", ("encoder.layer.1.output.dense", "input"), "pooler"]
    rng = random.Random(0)
    with serve(model, merge="pad", pad=BERT_PAD, max_wait_ms=20) as server:
        engine = server.engines["teacher"]
        forward, go = engine.teacher.forward, threading.Event()
        monkeypatch.setattr(engine.teacher, "forward", lambda *args: go.wait(20) and forward(*args))
        teachers = [sh.connect(server.url, job=f"job-{i}") for i in range(3)]
        for step in range(12):
            batches = []
            for i in range(6):
                rows, length = rng.randint(1, 4), rng.randint(2, 20)
                batch = {"input_ids": ids(rows, length, 10 * step + i) * 5}
                if i % 2:
                    batch["attention_mask"] = torch.ones(rows, length, dtype=torch.int64)
                    batch["attention_mask"][0, length - length // 3 :] = 0
                batches.append(batch)
            go.clear()
            futures = [teachers[i % 3].submit((), batch, taps) for i, batch in enumerate(batches)]
            assert soon(lambda: engine.queued + engine.running == 6)
            go.set()
            for batch, future in zip(batches, futures, strict=True):
                features = future.result(30)
                with torch.no_grad():
                    expected = alone(**batch, output_hidden_states=True)
                counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                assert features[""].last_hidden_state.shape == expected.last_hidden_state.shape
                near(features[""].last_hidden_state[counts], expected.last_hidden_state[counts])
                near(features["pooler"], expected.pooler_output)
                first = features["encoder.layer.0"]
                first = first if isinstance(first, torch.Tensor) else first[0]
                near(first[counts], expected.hidden_states[1][counts])
                assert features[taps[2]][0].shape == (*batch["input_ids"].shape, 32)
        assert engine.merger.refusals == 0
        assert engine.counters.rows > 1.3 * engine.counters.forwards * 2.5  # of 2.5 in a request
        [teacher.close() for teacher in teachers]


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["fits", "linger", "join", "to_check"])
def test_an_error_in_the_policy_costs_the_merging_and_no_request(part, monkeypatch, caplog):
    def fail(*_args):
        raise MemoryError("no room to compare inputs")

    with engine_of(Net()) as engine:
        monkeypatch.setattr(engine.merger, part, fail)
        for _ in range(2):
            asked, expected = pair(2, 3)
            at_once(engine, *asked)
            for one, e in zip(asked, expected, strict=True):
                assert torch.equal(one.features[""], e)
        assert any("could not be found out" in record.getMessage() for record in caplog.records)
