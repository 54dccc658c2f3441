"""Hugging Face students: converted, they return, save and generate what they did unconverted."""

import copy
import inspect
import itertools
import json
import pickle
from collections.abc import Mapping

import pytest
import schoolhouse as sh
import torch
from models import Counts, converted
from schoolhouse.errors import FeatureMismatchError, UnsupportedValueError
from schoolhouse_server import serve
from torch import nn

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CAUSAL = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
T5 = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
IMAGE = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
CLIP = {"text_config": {**CAUSAL, "max_position_embeddings": 16}, "vision_config": IMAGE, "projection_dim": 8}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
LABELS = torch.tensor([0, 1])

FAMILIES = {
    "BertModel": ("BertConfig", TEXT, {"input_ids": IDS}),
    "BertForMaskedLM": ("BertConfig", TEXT, {"input_ids": IDS, "labels": IDS}),
    "BertForSequenceClassification": ("BertConfig", TEXT, {"input_ids": IDS, "labels": LABELS}),
    "BertForTokenClassification": ("BertConfig", TEXT, {"input_ids": IDS, "labels": IDS % 2}),
    "LlamaModel": ("LlamaConfig", CAUSAL, {"input_ids": IDS}),
    "LlamaForCausalLM": ("LlamaConfig", CAUSAL, {"input_ids": IDS, "labels": IDS}),
    "LlamaForSequenceClassification": ("LlamaConfig", CAUSAL, {"input_ids": IDS, "labels": LABELS}),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, {"input_ids": IDS, "labels": IDS}),
    "ViTModel": ("ViTConfig", IMAGE, {"pixel_values": PIXELS}),
    "ViTForImageClassification": ("ViTConfig", IMAGE, {"pixel_values": PIXELS, "labels": LABELS}),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGE, {"pixel_values": PIXELS}),
    "CLIPModel": ("CLIPConfig", CLIP, {"input_ids": IDS, "pixel_values": PIXELS, "return_loss": True}),
    "T5EncoderModel": ("T5Config", T5, {"input_ids": IDS}),
    "T5ForConditionalGeneration": ("T5Config", T5, {"input_ids": IDS, "labels": IDS}),
}


def made(family, seed=0):
    config, fields, _ = FAMILIES[family]
    torch.manual_seed(seed)
    return (
        getattr(transformers, family)
        ._from_config(getattr(transformers, config)(**fields), attn_implementation="eager")
        .eval()
    )


class First(nn.Module):
    """Between the first tensors of floats, whatever the family."""

    def forward(self, student, teacher):
        return nn.functional.mse_loss(*(floats(output)[0] for output in (student, teacher)))


def floats(output):
    return [tensor for tensor in flat(output) if tensor.is_floating_point()]


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in flat(part)]


def distilled(family, **more):
    return converted(made(family), made(family, seed=1), First(), **more).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_student_returns_what_it_did(family, recwarn):
    plain, model = made(family), distilled(family)
    asked = {**FAMILIES[family][2], "output_attentions": True, "output_hidden_states": True, "return_dict": True}
    expected, got = plain(**asked), model(**asked)
    assert list(got.keys()) == list(expected.keys())
    assert any("attentions" in name for name in flattened_keys(expected))
    for one, other in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(one, other)
    assert model.compute_kd_loss().item() == First()(expected, made(family, seed=1)(**asked)).item()
    assert not [warning for warning in recwarn if "no parameter" in str(warning.message)]
    student = sh.export(model)
    assert type(student) is type(plain)
    assert len(flat(student(**asked))) == len(flat(expected))


def flattened_keys(output):
    return [name for key, value in output.items() for name in (key, *getattr(value, "keys", tuple)())]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_converted_student_saves_is_loaded_by_its_own_class(family, tmp_path):
    plain, model = made(family), distilled(family)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [family]
    eager = {"attn_implementation": "eager", "output_loading_info": True}
    loaded, info = model.from_pretrained(tmp_path, **eager)
    assert not any(info.values())
    assert type(loaded) is type(plain)
    batch = FAMILIES[family][2]
    assert all(map(torch.equal, flat(loaded.eval()(**batch)), flat(plain(**batch))))


def test_other_ways_to_go_by_the_class():
    model = distilled("LlamaForCausalLM")
    kind = type(model)
    assert isinstance(model, sh.DistillationModel)
    assert (kind.__module__, kind.__qualname__, kind.__name__) == (
        "transformers.models.llama.modeling_llama",
        "LlamaForCausalLM",
        "LlamaForCausalLM",
    )
    assert repr(model).startswith("DistillationLlamaForCausalLM(")
    assert kind.can_generate()
    assert type(kind(model.config)) is transformers.LlamaForCausalLM  # what others make of it is a plain student
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert type(twin) is kind
        assert len(twin(IDS, output_hidden_states=True).hidden_states) == 3
    assert repr(sh.export(model)).startswith("LlamaForCausalLM(")


def generates(**more):
    return {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, **more}


HOW = {
    "greedy": generates(do_sample=False),
    "sampling": generates(do_sample=True, top_k=20),
    "beams": generates(do_sample=False, num_beams=3),
    "without a cache": generates(do_sample=False, use_cache=False),
}


CAUSAL_FAMILIES = ["LlamaForCausalLM", "GPT2LMHeadModel"]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("family", "how"), [*itertools.product(CAUSAL_FAMILIES, HOW), ("T5ForConditionalGeneration", "greedy")]
)
def test_generation_asks_nobody(family, how, mode, recwarn):
    plain, teacher = made(family), Counts(made(family, seed=1))
    model = converted(made(family), teacher, First())
    for each in (plain, model):
        each.config.attention_dropout = each.config.dropout_rate = 0.0
        each.train(mode == "train")
        for module in each.modules():  # so that both draw the same numbers in training
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    torch.manual_seed(3)
    expected = plain.generate(IDS, **HOW[how])
    torch.manual_seed(3)
    assert torch.equal(model.generate(IDS, **HOW[how]), expected)
    assert teacher.asked == 0
    assert not [w for w in recwarn if "schoolhouse" in str(w.filename) or "compute_kd_loss" in str(w.message)]


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_step_after_generation_is_what_it_was(family):
    with serve(made(family, seed=1)) as server:
        model = converted(made(family), server.url, First())
        model.generate(IDS, **HOW["greedy"])
        if model.generation_config.use_cache:
            with pytest.raises(UnsupportedValueError, match="key-value cache .*only_student_forward"):
                model.compute_kd_loss()
        for training in (False, True):
            model.train(training)
            model(IDS)
            want = First()(made(family)(IDS), made(family, seed=1)(IDS))
            loss = model.compute_kd_loss().item()
            if not training or family.startswith("Llama"):  # GPT-2 drops out
                assert loss == pytest.approx(want.item(), rel=1e-6)
        model.train()
        model.generate(IDS, **HOW["greedy"])
        model(IDS)
        model.compute_kd_loss().backward()
        sh.export(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_cache_among_the_inputs(where, training):
    """An empty one is left out; the teacher cannot follow one that holds earlier tokens."""
    family = "LlamaForCausalLM"
    module, plain = made(family, seed=1), made(family)
    with serve(made(family, seed=1)) as server:
        model = converted(made(family), module if where == "local" else server.url, First()).train(training)
        cache = transformers.DynamicCache()
        (name,) = {"cache", "past_key_values"} & set(inspect.signature(plain.forward).parameters)
        first = model(IDS, use_cache=True, **{name: cache})
        want = First()(plain(IDS), made(family, seed=1)(IDS))
        assert model.compute_kd_loss().item() == pytest.approx(want.item(), rel=1e-6)
        assert cache.get_seq_length() == IDS.shape[1]  # the student's own
        token = first.logits[:, -1:].argmax(-1)
        if training:
            with pytest.raises(UnsupportedValueError, match="only_student_forward"):
                model(token, **{name: cache})
        with model.only_student_forward():
            assert model(token, **{name: cache}).logits.shape[1] == 1
        sh.export(model)


class Distils(transformers.Trainer):
    """As docs/pages/recipes.md has it, and looking ahead."""

    depth = 4

    def get_train_dataloader(self):
        return self.model.prefetch(super().get_train_dataloader(), depth=self.depth)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.accelerator.unwrap_model(model).compute_kd_loss(labels=labels)
        return (loss, outputs) if return_outputs else loss


def trainer(folder, depth=4, **more):
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (16, 6))]
    teacher = Counts(made("LlamaForCausalLM", seed=1))
    criterion = {("lm_head", "lm_head"): sh.CausalLMLoss(sh.LogitsDistillationLoss())}
    model = converted(made("LlamaForCausalLM"), teacher, criterion)
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    settings = {
        **quiet,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "use_cpu": True,
        "learning_rate": 0.1,
        **more,
    }
    made_of = Distils(model, transformers.TrainingArguments(folder, **settings), train_dataset=rows)
    made_of.model_accepts_loss_kwargs = False
    made_of.depth = depth
    return made_of, teacher


def test_a_trainer_resumes_within_an_epoch(tmp_path):
    whole, teacher = trainer(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    assert teacher.asked >= 6
    again, _ = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    fresh = made("LlamaForCausalLM")
    assert not torch.equal(fresh.lm_head.weight, whole.model.lm_head.weight)


def test_a_trainer_whose_accumulation_is_above_depth_says_so(tmp_path):
    accumulates, _ = trainer(tmp_path, depth=2, gradient_accumulation_steps=4)
    with pytest.raises(FeatureMismatchError, match="gradient accumulation.*: depth=4 or above"):
        accumulates.train()
    assert accumulates.state.global_step == 0
    accumulates, _ = trainer(tmp_path, depth=4, gradient_accumulation_steps=4, max_steps=2)
    accumulates.train()
    assert accumulates.state.global_step == 2
