"""Encodings from a config to a loss, with a teacher in this process or behind gRPC."""

import functools
import warnings

import pytest
import schoolhouse as sh
import torch
from models import Net, config, converted
from schoolhouse import encodings, functional
from schoolhouse.errors import (
    ConfigError,
    FeatureMismatchError,
    ProtocolError,
    UnknownTapError,
    UnsupportedValueError,
)
from schoolhouse.remote.request import Question
from schoolhouse.sparse import HiddenLogits, PositionedFeatures, SampledLogits, TopKLogits
from schoolhouse.taps import HEAD, Tap
from schoolhouse.teachers.query import Wanted
from schoolhouse_server import serve
from schoolhouse_wire import framing
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.values.codec import Arguments
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore", message=".*generation flags.*")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "use_cache": False,
}


def language_model(seed=0, kind="llama", **more):
    torch.manual_seed(seed)
    if kind == "gemma":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.2, **more)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, **more)).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 97, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_heads_at_home(tmp_path, monkeypatch):
    monkeypatch.setattr(sh.connect, "__kwdefaults__", {**sh.connect.__kwdefaults__, "head_folder": tmp_path / "heads"})


def ask(teacher, args, tap, encoding, positions=None, **kwargs):
    future = teacher.submit(args, kwargs, [tap], encodings={tap: encoding}, positions=positions)
    return future.result(60)[tap]


@pytest.mark.parametrize(
    ("encoding", "error"),
    [(encodings.bf16, 2**-8), (encodings.fp16, 2**-11), (encodings.int8, 1 / 254), (encodings.fp8, 2**-4)],
)
def test_dense_encodings_arrive_as_tensors_of_the_teachers_dtype(teach, x, encoding, error):
    teacher = teach(Net(32))
    exact = Net(32).eval()(x)
    given = ask(teacher, (x,), "fc", encoding)
    assert given.dtype == torch.float32
    assert not torch.equal(given, exact)
    assert (given - exact).abs().max() <= error * exact.abs().amax() * 1.01
    features = teacher.submit((x,), {}, ["body", "fc"], encodings={"fc": encoding}).result(60)
    assert torch.equal(features["body"], Net(32).eval().act(Net(32).eval().body(x)))  # of another tap, as computed


def test_topk_and_sampled_arrive_as_forms(teach, x):
    teacher = teach(Net(32))
    exact = Net(32).eval()(x)
    top = ask(teacher, (x,), "", encodings.topk(2))
    assert isinstance(top, TopKLogits)
    assert torch.equal(top.values, exact.topk(2).values)
    assert torch.equal(top.indices, exact.topk(2).indices)
    torch.testing.assert_close(top.logsumexp, exact.logsumexp(-1))
    drawn = [ask(teacher, (x,), "", encodings.sampled(7, seed=seed)) for seed in (3, 3, None, None)]
    assert all(isinstance(form, SampledLogits) and form.counts.sum(-1).eq(7).all() for form in drawn)
    assert torch.equal(drawn[0].indices, drawn[1].indices)
    assert not (drawn[2].counts.shape == drawn[3].counts.shape and torch.equal(drawn[2].indices, drawn[3].indices))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("tap", ["", "lm_head"])
def test_hidden_states_and_the_head_make_the_teachers_own_logits(teach, ids, kind, tap):
    plain = language_model(kind=kind)
    teacher = teach(language_model(kind=kind))
    with torch.no_grad():
        exact = plain(input_ids=ids).logits
        if tap == "lm_head":  # before the cap
            exact = plain.lm_head(plain.model(input_ids=ids).last_hidden_state)
    for _ in range(2):
        form = ask(teacher, (), tap, encodings.hidden("lm_head"), input_ids=ids)
        assert isinstance(form, HiddenLogits)
        assert form.hidden.shape == (3, 10, 16)
        torch.testing.assert_close(form.dense(), exact, rtol=1e-5, atol=1e-6)
    coarse = ask(teacher, (), tap, encodings.hidden("lm_head", encodings.bf16), input_ids=ids).dense()
    assert not torch.equal(coarse, exact)
    torch.testing.assert_close(coarse, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


def test_only_positions_travel(teach, ids):
    plain, teacher = language_model(), teach(language_model())
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(2)) > 0.5
    with torch.no_grad():
        exact = plain(input_ids=ids).logits
    for encoding in (None, encodings.topk(5), encodings.hidden("lm_head")):
        form = ask(teacher, (), "lm_head", encodings.at_positions(encoding), mask.long(), input_ids=ids)
        assert isinstance(form, PositionedFeatures)
        assert torch.equal(form.mask, mask)
        assert form.values.shape == (int(mask.sum()), 97)
        if encoding is None:
            assert torch.equal(form.values, exact[mask])
    inner = encodings.at_positions(encodings.hidden("lm_head", encodings.bf16))
    hidden = ask(teacher, (), "lm_head", inner, mask, input_ids=ids).values.hidden
    assert hidden.shape == (int(mask.sum()), 16)


def labels_of(ids):
    labels = ids.clone()
    labels[:, :4] = -100  # a prompt
    return labels


EVERY = {
    "plain": (None, 1e-6),
    "bf16": (encodings.bf16, 1e-2),
    "int8": (encodings.int8, 2e-2),
    "hidden": (encodings.hidden("lm_head"), 1e-5),
    "hidden_bf16": (encodings.hidden("lm_head", encodings.bf16), 2e-2),
    "all_of_them": (encodings.topk(97), 1e-5),
    "positions": (encodings.at_positions(), 1e-5),
    "hidden_positions": (encodings.at_positions(encodings.hidden("lm_head")), 1e-5),
    "topk_positions": (encodings.at_positions(encodings.topk(97)), 1e-5),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_causal_loss_over_every_encoding(teach, ids, name):
    encoding, tolerance = EVERY[name]
    at_positions = encoding is not None and encoding.positions
    labels = labels_of(ids)
    student, plain = language_model(seed=5, initializer_range=0.3), language_model(initializer_range=0.3)
    made = sh.convert(
        student,
        mode=[
            (
                "kd_loss",
                {
                    "teacher_model": teach(language_model(initializer_range=0.3)),
                    "criterion": {("lm_head", "lm_head"): sh.CausalLMLoss(sh.LogitsDistillationLoss())},
                    "encodings": encoding,
                    "positions": (lambda input_ids: functional.causal_positions(labels)) if at_positions else None,
                },
            )
        ],
    )
    made(input_ids=ids)
    loss = made.compute_kd_loss(labels=labels)
    loss.backward()
    twin = language_model(seed=5, initializer_range=0.3)
    log_s = F.log_softmax(twin(input_ids=ids).logits.double()[:, :-1], -1)
    with torch.no_grad():
        p = F.softmax(plain(input_ids=ids).logits.double()[:, :-1], -1)
    counted = labels[:, 1:] != -100
    expected = (p * (p.log() - log_s)).sum(-1)[counted].mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    theirs = twin.model.layers[0].mlp.up_proj.weight.grad
    error = (made.model.layers[0].mlp.up_proj.weight.grad - theirs).norm() / theirs.norm()
    assert error < max(tolerance * 3, 1e-5)


def test_prefetch_pairs_encoded_features(teach, ids):
    given = [{"input_ids": (ids + i) % 97} for i in range(4)]
    model = sh.convert(
        language_model(seed=5),
        mode=[
            (
                "kd_loss",
                {
                    "teacher_model": teach(language_model()),
                    "criterion": {("lm_head", "lm_head"): sh.CausalLMLoss(sh.LogitsDistillationLoss())},
                    "encodings": {"lm_head": encodings.at_positions(encodings.hidden())},
                    "positions": lambda input_ids: input_ids > 40,
                },
            )
        ],
    )
    for batch in model.prefetch(given, depth=2):
        student = model(**batch).logits
        loss = model.compute_kd_loss()
        with torch.no_grad():
            exact = language_model()(**batch).logits
        counted = (batch["input_ids"] > 40)[:, :-1]
        p = F.softmax(exact.double()[:, :-1], -1)
        kl = (p * (p.log() - F.log_softmax(student.detach().double()[:, :-1], -1))).sum(-1)
        assert loss.item() == pytest.approx(kl[counted].mean().item(), rel=1e-4)


class Capped(nn.Module):
    """Changes its logits after the head in a way that nothing tells."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.scale = nn.Linear(8, 6), nn.Linear(6, 5), scale

    def forward(self, x, double=False):
        out = self.head(self.body(x)) * self.scale
        return out * 2 if double else out


def test_a_head_that_does_not_make_the_logits_is_refused(teach, x):
    teacher = teach(Capped(3.0))
    for _ in range(2):
        with pytest.raises(UnsupportedValueError, match="does not compute this teacher's logits"):
            ask(teacher, (x,), "", encodings.hidden("head"))
    assert ask(teacher, (x,), "head", encodings.hidden("head")).dense().shape == (6, 5)
    teacher = teach(Capped(1.0))
    assert ask(teacher, (x,), "", encodings.hidden("head")).dense().shape == (6, 5)
    with pytest.raises(UnsupportedValueError, match="does not compute this teacher's logits"):
        ask(teacher, (x,), "", encodings.hidden("head"), double=True)  # other inputs, looked at anew


def test_what_cannot_be_had_is_refused_with_the_choices(teach, x):
    teacher = teach(Net(32))
    with pytest.raises(ConfigError, match=r"has 'body', which is not among the taps; choices: \['fc'\]"):
        teacher.submit((x,), {}, ["fc"], encodings={"body": encodings.bf16}).result()
    with pytest.raises(ConfigError, match="positions is None"):
        ask(teacher, (x,), "fc", encodings.at_positions())
    with pytest.raises(ConfigError, match="no encoding reads them"):
        ask(teacher, (x,), "fc", encodings.bf16, torch.ones(6))
    with pytest.raises(ConfigError, match="positions is 'a torch.float32 of 1 dimensions'"):
        ask(teacher, (x,), "fc", encodings.at_positions(), torch.ones(6))
    with pytest.raises(ConfigError, match=r"a torch.int64 with numbers other than 0 and 1.*causal_positions\(labels\)"):
        ask(teacher, (x,), "fc", encodings.at_positions(), torch.tensor([-100, 0, 1, 2, 3, 4]))  # labels
    with pytest.raises(UnsupportedValueError, match="positions were asked for with a mask of the shape"):
        ask(teacher, (x,), "fc", encodings.at_positions(), torch.ones(7, dtype=torch.bool))
    with pytest.raises(UnknownTapError, match="no submodule 'lm_head'"):
        ask(teacher, (x,), "fc", encodings.hidden("lm_head"))
    with pytest.raises(UnsupportedValueError, match="choices: bf16"):
        ask(teacher, (x * torch.inf,), "fc", encodings.int8)
    with pytest.raises(ConfigError, match="choices: None, or an encoding of schoolhouse.encodings"):
        ask(teacher, (x,), "fc", "bf16")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"encodings": {"body": encodings.bf16}}, r"has 'body', which is not among the taps; choices: \['fc'\]"),
        ({"encodings": {("fc", "input"): encodings.bf16}}, r"has \('fc', 'input'\), which is not among the taps"),
        ({"encodings": {5: encodings.bf16}}, "5 is not a tap; choices: a layer's name"),
        ({"encodings": {("fc", "fc", "fc"): encodings.bf16}}, "is not a tap"),
        ({"encodings": "int8"}, "choices: None, or an encoding of"),
        ({"encodings": {"fc": encodings.at_positions()}}, "positions is None, and encodings are at_positions"),
        ({"positions": lambda x: x}, "no encoding needs it"),
    ],
)
def test_convert_refuses_wrong_settings(more, says):
    settings = config(Net(32), {("fc", "fc"): sh.LogitsDistillationLoss()}, **more)
    with pytest.raises(ConfigError, match=says):
        sh.convert(Net(), mode=[("kd_loss", settings)])
    with pytest.raises(UnknownTapError, match="the teacher has no submodule 'heed'"):
        converted(Net(), Net(32), {("fc", "fc"): sh.LogitsDistillationLoss()}, encodings=encodings.hidden("heed"))


def test_convert_refuses_encodings_for_a_teacher_that_has_none():
    class Recording(sh.LocalTeacher):
        def submit(self, args, kwargs, taps):
            return super().submit(args, kwargs, taps)

    settings = config(Recording(Net(32)), {("fc", "fc"): nn.MSELoss()}, encodings=encodings.bf16)
    with pytest.raises(ConfigError, match=r"submit method of teacher_model, a Recording, does not take.*encodings="):
        sh.convert(Net(), mode=[("kd_loss", settings)])


def test_a_call_for_features_is_none_for_a_head(x):
    with serve(Net(32), allow_head=True) as server, sh.connect(server.url) as teacher:
        teacher.describe()
        wanted = Wanted((Tap("fc"), Tap("fc", HEAD)), (None, encodings.hidden("fc")))
        facts, dispatcher = teacher._connected()
        outgoing = framing.Outgoing(Arguments((x,)), limits=facts.limits, snapshot=True)
        asked = Question(outgoing=outgoing, wanted=wanted, revision=facts.revision, heads={}, limits=Limits())
        with pytest.raises(ProtocolError, match="a call for a head must name one, as the encoding of its only tap"):
            teacher._send(dispatcher, teacher._request(asked)).result(60)


def test_the_head_is_fetched_once_and_kept_on_disk(ids, tmp_path):
    folder = tmp_path / "kept"
    module = language_model()
    with serve(module, name="lm", allow_head=True) as server:
        sizes = []
        for _ in range(2):
            with sh.connect(server.url, head_folder=folder) as teacher:
                for _ in range(3):
                    ask(teacher, (), "lm_head", encodings.hidden(), input_ids=ids)
                sizes.append(teacher.traffic().received_bytes)
        assert sizes[0] - sizes[1] >= module.lm_head.weight.nbytes
        assert sizes[1] < module.lm_head.weight.nbytes + 3 * (3 * 10 * 16 * 4 + 500)
        assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_a_teacher_that_was_changed_has_another_revision(ids):
    assert serve_revision("llama") == serve_revision("llama")
    assert serve_revision("gemma", attn_logit_softcapping=30.0) != serve_revision("gemma", attn_logit_softcapping=50.0)


def serve_revision(kind, **more):
    return sh.LocalTeacher(language_model(kind=kind, **more)).describe().revision


def test_features_of_another_encoding_are_refused(x, monkeypatch):
    """A server that reads another encoding than was asked for says so in its reply."""
    from schoolhouse.teachers.query import Wanted
    from schoolhouse_server.session import calls

    original = Wanted.from_wire.__func__

    def misread(cls, taps, mask):
        wanted = original(cls, taps, mask)
        return cls(wanted.taps, (encodings.fp16,), mask)

    with serve(Net(32), allow_head=True) as server, sh.connect(server.url) as teacher:
        monkeypatch.setattr(Wanted, "from_wire", classmethod(misread))
        monkeypatch.setattr(calls, "_asked", functools.lru_cache(calls._asked.__wrapped__))  # as others fill its cache
        with pytest.raises(FeatureMismatchError, match="cast: BFLOAT16"):
            ask(teacher, (x,), "fc", encodings.bf16)
        assert ask(teacher, (x,), "fc", encodings.fp16).shape == (6, 5)


def test_temperatures_must_agree(teach, x):
    loss = sh.LogitsDistillationLoss(temperature=2.0)
    model = converted(Net(seed=1), teach(Net(32)), {("fc", "fc"): loss}, encodings=encodings.topk(3))
    model(x)
    with pytest.raises(ValueError, match="temperature"):
        model.compute_kd_loss()
    model = converted(Net(seed=2), teach(Net(32)), {("fc", "fc"): loss}, encodings=encodings.topk(5, temperature=2.0))
    out = model(x)
    exact = F.kl_div(F.log_softmax(out / 2, -1), F.softmax(Net(32).eval()(x) / 2, -1), reduction="mean") * 4
    assert model.compute_kd_loss().item() == pytest.approx(exact.item(), rel=1e-4)


def test_a_loss_that_cannot_take_a_form_says_so(teach, x):
    model = converted(Net(seed=1), teach(Net(32)), {("fc", "fc"): nn.MSELoss()}, encodings=encodings.topk(3))
    model(x)
    with pytest.raises((TypeError, AttributeError), match="TopKLogits"):
        model.compute_kd_loss()


def test_layerwise_outputs_are_encoded_and_inputs_are_not(teach, x):
    settings = config(teach(Net()), {("fc", "fc"): nn.MSELoss()}, encodings=encodings.bf16)
    model = sh.convert(Net(seed=1), mode=[("layerwise_kd", settings)])
    model(x)
    teacher, fresh = Net().eval(), Net(seed=1)
    inputs = teacher.act(teacher.body(x))
    expected = F.mse_loss(fresh.fc(inputs), teacher.fc(inputs).bfloat16().float())
    assert model.compute_kd_loss().item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_cache_and_equal_requests_tell_encodings_apart(x):
    class Counted(Net):
        runs = 0

        def forward(self, x):
            Counted.runs += 1
            return super().forward(x)

    with serve(Counted(32), cache_bytes=1 << 20) as server, sh.connect(server.url) as teacher:
        for _ in range(2):
            plain = ask(teacher, (x,), "fc", None)
            coarse = ask(teacher, (x,), "fc", encodings.int8)
            rows = [ask(teacher, (x,), "fc", encodings.at_positions(), torch.arange(6) < n).values for n in (2, 3)]
            assert torch.equal(plain, Net(32).eval()(x))
            assert not torch.equal(plain, coarse)
            assert [len(one) for one in rows] == [2, 3]
        assert Counted.runs == 4
