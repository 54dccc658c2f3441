"""A head made from a model makes the model's own logits, to the bit, or is refused."""

import pytest
import torch
from schoolhouse import errors
from schoolhouse.lm_head.describe import check_head, head_of
from test_heads import DTYPES, Parts, chains, hidden_states, random_weights, trip
from torch import nn

# Hugging Face's models, as they are.

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
MODELS = {
    "Llama": ("lm_head", TINY),
    "Gemma2": ("lm_head", {**TINY, "final_logit_softcapping": 0.7}),
    "RecurrentGemma": ("lm_head", {**TINY, "num_hidden_layers": 3, "logits_soft_cap": 0.7, "lru_width": 16}),
    "Cohere": ("lm_head", {**TINY, "logit_scale": 0.3}),
    "Granite": ("lm_head", {**TINY, "logits_scaling": 6.0}),
    "HyperCLOVAX": ("lm_head", {**TINY, "logits_scaling": 6.0}),
    "GPT2": ("lm_head", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
}


def built(name, kind="ForCausalLM", dtype=torch.float32, **settings):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this version of transformers has no {name}")
    torch.manual_seed(0)
    kind = {"GPT2": "LMHeadModel"}.get(name, kind)
    model = getattr(transformers, name + kind)(getattr(transformers, f"{name}Config")(**settings))
    return model.to(dtype).eval().requires_grad_(False)


def run(model, head):
    """What the head receives and the logits that the model returns, captured by a plain hook."""
    seen = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits
    handle.remove()
    return seen[-1], logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_causal_language_models(name, dtype):
    where, config = MODELS[name]
    model = built(name, dtype=dtype, **config)
    hidden, logits = run(model, where)
    head = trip(head_of(model, where, ""))
    assert torch.equal(head.logits(hidden), logits)
    check_head(head, hidden, logits)
    alone = head_of(model, where, where)
    assert torch.equal(alone.logits(hidden), model.get_submodule(where)(hidden))
    if name not in ("Llama", "GPT2"):
        with pytest.raises(errors.UnsupportedValueError, match="soft-capping, a scale"):
            check_head(alone, hidden, logits)


def test_tied_embeddings_are_sent_whole():
    model = built("GPT2", **MODELS["GPT2"][1])
    head = head_of(model, "lm_head", "")
    assert head.classes == 40
    assert head.nbytes == 40 * 16 * 4
    assert head.operations[0].weights["weight"].data_ptr() == model.transformer.wte.weight.data_ptr()


def test_a_wrapper_around_a_model():
    model = nn.ModuleDict({"teacher": built("Gemma2", **MODELS["Gemma2"][1])})
    hidden, logits = run(model.teacher, "lm_head")
    for tap in ("", "teacher"):
        assert torch.equal(head_of(model, "teacher.lm_head", tap).logits(hidden), logits)
    with pytest.raises(errors.UnsupportedValueError, match="not within 'teacher.model'"):
        head_of(model, "teacher.lm_head", "teacher.model")


def test_the_config_of_the_text_part_of_a_composite_model():
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.Gemma2Config(**MODELS["Gemma2"][1])
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=transformers.SiglipVisionConfig(**vision))
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval().requires_grad_(False)
    hidden, logits = run(model, "lm_head")
    head = head_of(model, "lm_head", "")
    assert [step.kind for step in head.operations] == ["linear", "softcap"]
    assert torch.equal(head.logits(hidden), logits)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "silu", "relu"])
@pytest.mark.parametrize("where", ["cls", "cls.predictions", "cls.predictions.decoder"])
def test_bert(where, act):
    model = built("Bert", "ForMaskedLM", hidden_act=act, **{**TINY, "max_position_embeddings": 16})
    random_weights(model.cls)
    hidden, logits = run(model, where)
    head = trip(head_of(model, where, ""))
    assert torch.allclose(head.logits(hidden), logits, rtol=1e-6, atol=1e-6)


def test_a_head_that_calls_functions_names_its_linear_layers():
    model = built("Roberta", "ForMaskedLM", **{**TINY, "max_position_embeddings": 16})
    random_weights(model.lm_head)
    with pytest.raises(errors.UnsupportedValueError, match=r"else .*lm_head\.dense, lm_head\.decoder") as caught:
        head_of(model, "lm_head", "")
    assert caught.value.choices == ("lm_head.dense", "lm_head.decoder")
    hidden, logits = run(model, "lm_head.decoder")
    assert torch.equal(head_of(model, "lm_head.decoder", "").logits(hidden), logits)


# Weights that a module makes of others.


def test_parametrized_weights_are_the_effective_ones():
    module = nn.utils.parametrizations.weight_norm(random_weights(nn.Linear(8, 5)))
    module.parametrizations.weight.original0.data.mul_(3)
    assert torch.equal(head_of(module, "", "").logits(hidden_states(4, 8)), module(hidden_states(4, 8)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_older_weight_norm():
    module = nn.utils.weight_norm(random_weights(nn.Linear(8, 5)))
    module.weight_g.data.mul_(3)  # as loading a checkpoint does: `weight` follows at the next forward
    head = head_of(module, "", "")
    assert torch.equal(head.logits(hidden_states(4, 8)), module(hidden_states(4, 8)))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv1d(8, 5, 1), "is a Conv1d"),
        (nn.Sequential(nn.Linear(8, 5), nn.Softmax(-1)), "is a Softmax"),
        (nn.Sequential(nn.Linear(8, 5), nn.ReLU6()), "is a ReLU6"),
        (nn.Sequential(nn.Linear(8, 5), nn.Linear(8, 5)), "takes 8 values where 5 arrive"),
        (nn.Sequential(nn.LayerNorm((2, 8)), nn.Linear(8, 5)), "over 2 dimensions"),
        (nn.Sequential(nn.LayerNorm(8)), "at least one linear"),
        (nn.Linear(8, 5, device="meta"), "plain tensors with values"),
        (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5, dtype=torch.float64)), "one dtype"),
        (Parts(nn.Linear(8, 5), after=lambda x: x + 1), "something else"),
        (Parts(nn.Linear(8, 5), after=lambda x: x[..., :-1]), "something else"),
        (Parts(nn.Linear(8, 5), after=lambda x: x.double()), "something else"),
        (Parts(nn.Linear(8, 5), after=lambda x: (x, x)), "returns a tuple"),
        (Parts(nn.Linear(8, 5), after=lambda x: x.view(0)), "raised RuntimeError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_modules_that_are_no_heads(module, message):
    with pytest.raises(errors.UnsupportedValueError, match=message) as caught:
        head_of(nn.ModuleDict({"head": module.eval()}), "head", "head")
    assert type(module).__name__ in str(caught.value)
    assert "LayerNorm" in str(caught.value)


def test_a_module_whose_hook_changes_its_output():
    module = nn.Linear(8, 5)
    module.register_forward_hook(lambda _module, _args, output: output * 1.5)
    with pytest.raises(errors.UnsupportedValueError, match="something else"):
        head_of(module, "", "")


def test_unknown_names():
    with pytest.raises(errors.UnknownTapError, match="lm_head") as caught:
        head_of(nn.ModuleDict({"lm_head": nn.Linear(2, 2)}), "lm_haed", "")
    assert "lm_head" in caught.value.choices


def test_describing_draws_no_random_numbers():
    module = random_weights(chains()["bert"])
    before = torch.get_rng_state()
    head_of(module, "", "")
    assert torch.equal(before, torch.get_rng_state())


# The check.


def capped(x, cap=2.0):
    return cap * torch.tanh(x / cap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: capped(logits),
        lambda logits: logits * 1.05,
        lambda logits: logits + torch.linspace(0, 1, 11, dtype=logits.dtype),
        lambda logits: logits.masked_fill(torch.arange(11) == 3, -torch.inf),
        lambda logits: logits.masked_fill(torch.arange(11) == 3, torch.nan),
        lambda logits: logits.flip(0),
    ],
)
def test_the_check_sees_what_the_head_lacks(change, dtype):
    module = random_weights(nn.Linear(8, 11)).to(dtype)
    head, hidden = head_of(module, "", ""), hidden_states(40, 8, dtype=dtype)
    check_head(head, hidden, module(hidden))
    with pytest.raises(errors.UnsupportedValueError, match="largest difference"):
        check_head(head, hidden, change(module(hidden)))


def test_the_check_sees_a_wrong_cap():
    model = built("Gemma2", **MODELS["Gemma2"][1])
    hidden, logits = run(model, "lm_head")
    model.config.final_logit_softcapping = 0.5
    with pytest.raises(errors.UnsupportedValueError, match="largest difference"):
        check_head(head_of(model, "lm_head", ""), hidden, logits)


def test_the_check_sees_rows_of_other_shapes():
    model = built("Llama", **TINY)
    head = head_of(model, "lm_head", "")
    hidden, logits = run(model, "lm_head")
    for mine, own in [(hidden, logits[:, -1:]), (hidden[..., :-1], logits), (hidden, logits[..., :-1])]:
        with pytest.raises(errors.UnsupportedValueError, match="logits_to_keep"):
            check_head(head, mine, own)
    with pytest.raises(errors.UnsupportedValueError, match="cast its logits"):
        check_head(head, hidden, logits.double())


def test_the_check_accepts_nan_where_both_have_it_and_no_rows():
    module = random_weights(nn.Linear(8, 11))
    head, hidden = head_of(module, "", ""), hidden_states(40, 8)
    hidden[3, 2], hidden[4] = torch.nan, torch.inf
    check_head(head, hidden, module(hidden))
    check_head(head, hidden[:0], module(hidden[:0]))
    check_head(head, hidden[1], module(hidden[1]))


def test_the_check_takes_evenly_spread_rows():
    module = random_weights(nn.Linear(8, 11))
    head, hidden = head_of(module, "", ""), hidden_states(4, 500, 8)
    for row in (0, -1):
        logits = module(hidden)
        logits.view(-1, 11)[row] += 1
        with pytest.raises(errors.UnsupportedValueError):
            check_head(head, hidden, logits)
