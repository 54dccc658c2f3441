"""Hugging Face students: converted, they return, save and generate what they did unconverted."""

import copy
import json
import pickle

import pytest
import schoolhouse as sh
import torch
from models import converted
from torch import nn

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CAUSAL = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
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
    return getattr(transformers, family)._from_config(
        getattr(transformers, config)(**fields), attn_implementation="eager"
    ).eval()


class First(nn.Module):
    """Between the first tensors of floats, whatever the family."""

    def forward(self, student, teacher):
        return nn.functional.mse_loss(*(floats(output)[0] for output in (student, teacher)))


def floats(output):
    return [tensor for tensor in flat(output) if tensor.is_floating_point()]


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in flat(part)]


def distilled(family, **more):
    return converted(made(family), made(family, seed=1), First(), **more).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_student_returns_what_it_did(family):
    plain, model = made(family), distilled(family)
    asked = {**FAMILIES[family][2], "output_attentions": True, "output_hidden_states": True}
    expected, got = plain(**asked), model(**asked)
    assert list(got.keys()) == list(expected.keys())
    assert any("attentions" in name for name in flattened_keys(expected))
    for one, other in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(one, other)
    assert model.compute_kd_loss().item() == First()(expected, made(family, seed=1)(**asked)).item()
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
