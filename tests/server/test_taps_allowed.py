"""Which taps a client may ask for: what is kept back by default, and what patterns of teachers and tokens allow."""

import hashlib

import pytest
import schoolhouse as sh
import torch
from memfd import soon
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_server.security.lookups import lookups
from schoolhouse_server.security.tokens import new_token
from schoolhouse_server.session.tappable import TeacherTaps
from torch import nn
from torch.nn.utils import parametrizations

TOKEN, NARROW = new_token(), new_token()
IDS = torch.arange(11)[None]


class LM(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.body = nn.Embedding(11, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.lm_head = nn.Linear(4, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        return self.lm_head(self.body(self.wte(ids)))


@pytest.fixture
def write(tmp_path):
    """Writes a tokens file in which the second token has these patterns."""

    def written(narrow="['*']"):
        digests = [hashlib.sha256(token.encode()).hexdigest() for token in (TOKEN, NARROW)]
        path = tmp_path / "tokens.yaml"
        path.write_text(
            f"tokens:\n- {{sha256: '{digests[0]}', teachers: ['*']}}\n"
            f"- {{sha256: '{digests[1]}', teachers: ['*'], taps: {narrow}}}\n"
        )
        return path

    return written


def connected(server, token=None):
    security = sh.Security(token=token) if token else sh.Security()
    return sh.connect(server.url, security=security, head_folder=None, timeouts=sh.Timeouts(request_s=20))


@pytest.fixture
def unchecked(monkeypatch):
    """A client that asks for whatever it likes, as a hostile one does."""
    monkeypatch.setattr("schoolhouse.remote.facts.check_modules", lambda *_, **__: None)


def asked(teacher, *taps, **more):
    return teacher.submit((IDS,), {}, taps, **more).result(20)


def test_a_withheld_head_is_not_taken_from_the_embedding_that_is_tied_to_it(write, unchecked):
    module = LM()
    with serve(module) as server, connected(server) as teacher:  # without tokens everybody may tap everything
        assert torch.equal(asked(teacher, "wte")["wte"][0], module.lm_head.weight)
    with serve(module, tokens=write()) as server:
        for token in (TOKEN, NARROW):
            with connected(server, token) as teacher:
                for tap in ("wte", ("wte", "input")):
                    with pytest.raises(errors.PermissionDeniedError, match=r"wte:\w+ of the teacher .* all but embedd"):
                        asked(teacher, "lm_head", tap)
                found = asked(teacher, "", "lm_head", "body", ("lm_head", "input"))
                assert torch.equal(found[""], module(IDS))
                assert torch.equal(found["lm_head"], found[""])
                assert torch.equal(found["body"], found["lm_head", "input"][0])


def test_what_receives_the_embedding_as_it_is_takes_a_list_to_keep_back(write, unchecked):
    module, places = LM(), [("body", "input"), ("body.0", "input")]
    with serve(module, tokens=write()) as server, connected(server, TOKEN) as teacher:  # as the documentation says
        assert torch.equal(asked(teacher, *places)["body", "input"][0][0], module.lm_head.weight)
    listed = ["lm_head:output", "body*:output"]
    with serve(module, tokens=write(), taps=listed) as server, connected(server, TOKEN) as teacher:
        for tap in (*places, "wte", ("lm_head", "input"), ""):
            with pytest.raises(errors.PermissionDeniedError):
                asked(teacher, tap)


def test_who_converts_a_student_is_told_at_once_what_may_be_tapped(write):
    with serve(LM(), tokens=write()) as server, connected(server, TOKEN) as teacher:
        described = teacher.describe()
        assert described.modules == ("", "body", "body.0", "body.1", "lm_head")
        assert described.module_classes == ("LM", "Sequential", "Linear", "Tanh", "Linear")
        config = {"teacher_model": teacher, "criterion": {("wte", "wte"): nn.MSELoss()}}
        with pytest.raises(errors.UnknownTapError, match="no submodule 'wte' that you may tap; close .* 'body'"):
            sh.convert(LM(), mode=[("kd_loss", config)])
        with pytest.raises(errors.UnknownTapError, match="no submodule 'wte' that you may tap"):
            asked(teacher, "wte")


def test_a_module_that_there_is_not_is_told_with_those_that_may_be_tapped(write, unchecked):
    with serve(LM(), tokens=write("['body*']")) as server, connected(server, NARROW) as teacher:
        with pytest.raises(errors.UnknownTapError) as caught:
            asked(teacher, "wtf")
        assert caught.value.choices
        assert not {"wte", "lm_head"} & {*caught.value.choices}


@pytest.mark.parametrize(
    ("taps", "allowed"),
    [
        (["*"], {"wte", "body", "body.0", "lm_head", ("wte", "input"), ("lm_head", "input"), ""}),
        (["body*"], {"body", "body.0"}),
        (["body.?:output", ""], {"body.0", ""}),
        (["*:input"], {("wte", "input"), ("lm_head", "input")}),
        (["lm_head", "wte:input"], {"lm_head", ("lm_head", "input"), ("wte", "input")}),
        ([":output"], {""}),
    ],
)
def test_patterns_name_modules_and_sides(taps, allowed, unchecked):
    everything = ["wte", "body", "body.0", "lm_head", ("wte", "input"), ("lm_head", "input"), ""]
    with serve(LM(), taps=taps) as server, connected(server) as teacher:
        for tap in everything:
            if tap in allowed:
                asked(teacher, tap)
            else:
                with pytest.raises(errors.PermissionDeniedError, match="by this client; it may tap") as caught:
                    asked(teacher, tap)
                assert [*caught.value.choices] == taps


def test_a_token_narrows_what_its_teachers_allow(write, unchecked):
    path = write("['body', 'lm_head:output', 'wte']")
    with serve(LM(), tokens=path, taps=["body*", "lm_head"]) as server:
        with connected(server, TOKEN) as teacher:
            asked(teacher, "body", "body.0", "lm_head", ("lm_head", "input"))
        with connected(server, NARROW) as teacher:
            assert teacher.describe().modules == ("body", "lm_head")
            asked(teacher, "body", ("body", "input"), "lm_head")
            for refused in ("body.0", ("lm_head", "input"), "wte", ""):
                with pytest.raises(
                    errors.PermissionDeniedError, match=r"body, lm_head:output, wte, and of that body\*"
                ):
                    asked(teacher, refused)


def test_a_session_follows_the_taps_of_its_token(write, unchecked, monkeypatch):
    monkeypatch.setattr("schoolhouse_server.security.tokens._LOOK_S", 0.05)
    with serve(LM(), tokens=write("['body']")) as server, connected(server, NARROW) as teacher:
        asked(teacher, "body")
        write("['lm_head']")
        assert soon(lambda: _denied(teacher, "body"))
        asked(teacher, "lm_head")


def _denied(teacher, tap):
    try:
        asked(teacher, tap)
    except errors.PermissionDeniedError:
        return True
    return False


def test_hidden_states_are_the_input_of_their_head(write, unchecked):
    wish = {"lm_head": sh.encodings.hidden("lm_head")}
    module, path = LM(), write("['lm_head:output']")
    with serve(module, tokens=path, allow_head=True) as server:
        with connected(server, TOKEN) as teacher:  # the head is tied, and allowed
            assert torch.allclose(asked(teacher, "lm_head", encodings=wish)["lm_head"].dense(), module(IDS))
            with pytest.raises(errors.PermissionDeniedError, match="wte:output"):
                asked(teacher, "wte")
        with connected(server, NARROW) as teacher:
            asked(teacher, "lm_head")
            with pytest.raises(errors.PermissionDeniedError, match="lm_head:input"):
                asked(teacher, "lm_head", encodings=wish)
    with serve(module, tokens=path) as server, connected(server, TOKEN) as teacher:
        with pytest.raises(errors.PermissionDeniedError, match="allow_head"):
            asked(teacher, "lm_head", encodings=wish)


class Table(nn.Module):
    """A lookup that is no Embedding."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, ids):
        return self.weight[ids]


def test_what_is_kept_back():
    tied, other = LM(), LM(tied=False)
    assert lookups(tied, heads_withheld=True) == lookups(other, heads_withheld=True) == {"wte"}
    assert lookups(tied, heads_withheld=False) == {"wte"}  # its features are a table, whoever else has it
    other.copy, other.view = Table(other.lm_head.weight), Table(nn.Parameter(other.lm_head.weight.data[:3]))
    assert lookups(other, heads_withheld=True) == {"wte", "copy", "view"}
    assert lookups(other, heads_withheld=False) == {"wte"}
    other.again = Table(other.wte.weight)
    assert lookups(other, heads_withheld=False) == {"wte", "again"}


def test_a_linear_layer_that_reads_a_withheld_head_is_kept_back():
    model = nn.ModuleDict({"into": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    model["into"].weight = model["out"].weight
    assert lookups(model, heads_withheld=True) == {"into"}
    assert lookups(model, heads_withheld=False) == frozenset()


def test_what_only_wraps_an_embedding_is_kept_back_and_a_block_with_weights_is_not():
    model = nn.ModuleDict(
        {
            "wrapped": nn.Sequential(nn.Embedding(3, 2), nn.Dropout()),
            "block": nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)),
            "bag": nn.EmbeddingBag(3, 2),
            "norm": nn.LayerNorm(2),
        }
    )
    assert lookups(model, heads_withheld=True) == {"wrapped", "wrapped.0", "block.0", "bag"}
    assert lookups(nn.Embedding(3, 2), heads_withheld=True) == frozenset()  # the model is what the teacher is for


def test_a_parametrization_is_kept_back_as_it_returns_the_weight(write, unchecked):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh())
    kept = {"0.parametrizations.weight", "0.parametrizations.weight.0"}
    assert lookups(model, heads_withheld=True) == kept
    with serve(model, tokens=write()) as server, connected(server, TOKEN) as teacher:
        for tap in (*kept, ("0.parametrizations.weight.0", "input")):
            with pytest.raises(errors.PermissionDeniedError):
                teacher.submit((torch.ones(1, 3),), {}, [tap]).result(20)


def test_weights_in_one_storage_share_nothing():
    """Tensors of a checkpoint may be parts of one storage."""
    model = LM(tied=False)
    flat = torch.zeros(sum(one.numel() for one in model.parameters()))
    for one in model.parameters():
        one.data, flat = flat[: one.numel()].view_as(one), flat[one.numel() :]
    assert len({one.untyped_storage().data_ptr() for one in model.parameters()}) == 1
    assert lookups(model, heads_withheld=True) == {"wte"}


@pytest.mark.parametrize("kind", ["GPT2", "Bert", "Llama"])
def test_models_of_transformers_keep_their_embeddings_back_and_nothing_else(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=8, tie_word_embeddings=True)
    name = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM", "Llama": "LlamaForCausalLM"}[kind]
    model = getattr(transformers, name)(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert lookups(model, heads_withheld=True) == embeddings


def test_models_that_say_which_layer_makes_their_logits_are_believed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.reads = nn.Linear(4, 4), nn.Linear(4, 4)
            self.reads.weight = self.head.weight

        def get_output_embeddings(self):
            return self.head

    assert lookups(Model(), heads_withheld=True) == {"reads"}


@pytest.mark.parametrize(
    ("taps", "said"),
    [
        (["wte", "layer.*"], r"'layer\.\*', which no module of 'teacher' matches; some are: 'wte', 'body'"),
        (["body:in"], r"taps.0 has something else than a side .* choices: NAME, NAME:input, NAME:output"),
        ([], "a list of 1 to 256 patterns; choices: NAME"),
        ("body", "expected a list of patterns"),
        ([3], r"taps.0 is no text"),
        ({"other": ["body"]}, r"by the teachers' names: \['teacher'\]"),
        (["x" * 2000], "at most 1024 characters"),
    ],
)
def test_wrong_patterns_start_no_server(taps, said):
    with pytest.raises(errors.ConfigError, match=said):
        serve(LM(), taps=taps)


def test_each_of_several_teachers_has_its_own():
    with serve({"one": LM(), "two": LM()}, taps={"one": ["body"]}) as server:
        for name, modules in (("one", 1), ("two", 6)):
            with sh.connect(server.urls[name]) as teacher:
                assert len(teacher.describe().modules) == modules
    for wrong in (["body"], []):
        with pytest.raises(errors.ConfigError, match="with several teachers, a dict"):
            serve({"one": LM(), "two": LM()}, taps=wrong)


def test_a_tokens_pattern_that_matches_nothing_is_logged_once(caplog):
    taps = TeacherTaps("lm", LM())
    for _ in range(3):
        assert taps.within(("body", "layer.*")).modules == ("body",)
    assert caplog.text.count("'layer.*', which no module of the teacher 'lm' matches") == 1
