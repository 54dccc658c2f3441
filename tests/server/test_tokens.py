"""The tokens file by itself: what is taken of it, what is refused, and how it is followed."""

import contextlib
import hashlib
import hmac
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memfd import soon
from schoolhouse.errors import ConfigError
from schoolhouse_server.cli.main import app
from schoolhouse_server.security import tokens
from schoolhouse_server.security.tokens import PREFIX, Tokens, digest_of, new_token
from typer.testing import CliRunner

ONE, TWO = (PREFIX + letter * 43 for letter in "ab")  # the same in each worker


def line(token, more='teachers: ["*"]'):
    return f'- {{sha256: "{hashlib.sha256(token.encode()).hexdigest()}", {more}}}\n'


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "tokens.yaml"
    found.write_text("tokens:\n" + line(ONE, "teachers: [a, b], job: exp, max_in_flight: 3") + line(TWO))
    return found


def test_a_token_has_its_own_grant_and_others_have_none(path):
    found = Tokens(path)
    one, two = found.grant(ONE), found.grant(TWO)
    assert (one.job, one.teachers, one.max_in_flight, one.admin) == ("exp", ("a", "b"), 3, False)
    assert (two.job, two.teachers) == (None, ("*",))
    assert [one.allows(name) for name in ("a", "b", "c")] == [True, True, False]
    assert two.allows("whatever")
    for wrong in ("", ONE[:-1], ONE + "x", ONE.upper(), one.sha256, "x" * 10_000):
        assert found.grant(wrong) is None
    assert found.is_bound("exp")
    assert not found.is_bound("other")


@pytest.mark.parametrize("asked", [ONE, TWO, "wrong"])
def test_every_entry_is_compared_whichever_token_it_is(path, monkeypatch, asked):
    found, compared = Tokens(path), []
    original = hmac.compare_digest
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda a, b: compared.append(len(a)) or original(a, b))
    found.grant(asked)
    assert compared == [64, 64]


def test_new_tokens_are_random_and_long():
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(one.startswith("sht_") and len(one) == 4 + 43 for one in made)  # 256 bits in base64


SECRET = "a-secret-of-the-operator"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold a mapping with the key 'tokens'"),
        ("tokens:\n", "and a list under it"),
        (f"tokens: [{{token: {SECRET}, teachers: []}}]", "there is no such key; choices: sha256, job, teachers"),
        (f"tokens: [{{{SECRET}: 1, teachers: []}}]", "tokens.0.?: there is no such key"),
        (f"tokens: [{{sha256: {SECRET}, teachers: []}}]", "tokens.0.sha256: expected the 64 hexadecimal digits"),
        (f"tokens: [{SECRET}]", "tokens.0"),
        (f"tokens: [\n{SECRET}: [}}", "is not YAML (line 2)"),
        ("tokens:\n" + line(ONE) + line(ONE), "tokens 0 and 1 have the same sha256"),
        ("tokens:\n" + line(ONE, 'teachers: ["*"], max_in_flight: 2'), "max_in_flight needs job"),
        ("tokens:\n" + line(ONE, 'teachers: ["*"], job: j, weight: 1000'), "tokens.0.weight"),
        ("tokens:\n" + line(ONE, 'teachers: ["*"], job: j, max_job_bytes: 0'), "tokens.0.max_job_bytes"),
        ("tokens:\n" + line(ONE, "job: j"), "tokens.0.teachers"),
        ("tokens:\n" + line(ONE, f'teachers: [], taps: ["a:{SECRET}"]'), "taps.0 has something else than a side after"),
        ("tokens:\n" + line(ONE, "teachers: [], taps: []"), "taps must be a list of 1 to 256 patterns; choices: NAME"),
        ("tokens:\n" + line(ONE, f"teachers: [], taps: {SECRET}"), "tokens.0.taps"),
        ("[" * 1000, "is not YAML"),
    ],
)
def test_a_file_that_is_wrong_gives_one_sentence_that_holds_no_secret(tmp_path, text, said):
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Tokens(path)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@given(data=st.binary(max_size=200) | st.text(st.sampled_from("tokens: -[]{}'&*!|>0129eb_sha256\n\t"), max_size=200))
@settings(max_examples=300, deadline=None)
def test_whatever_is_in_a_file_is_taken_or_told(data):
    data = data.encode() if isinstance(data, str) else data
    with contextlib.suppress(ConfigError):
        assert isinstance(tokens._parse(data, Path("tokens.yaml")), tuple)


def test_the_command_makes_a_token_and_its_line(tmp_path):
    shown = CliRunner().invoke(app, ["token"]).output
    [token] = re.findall(r"sht_[\w-]{43}", shown)
    path = tmp_path / "tokens.yaml"
    path.write_text("tokens:\n" + next(line for line in shown.splitlines() if line.startswith("- {")))
    assert Tokens(path).grant(token).job == "NAME"
    assert token not in path.read_text()


def test_a_file_that_is_not_there_or_is_another_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the tokens file .*: No such file"):
        Tokens(tmp_path / "none")
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        Tokens(tmp_path / "large")
    (tmp_path / "binary").write_bytes(b"\x80\x81")
    with pytest.raises(ConfigError, match="is not YAML"):
        Tokens(tmp_path / "binary")


def test_a_change_is_taken_and_a_bad_one_is_told_once_and_not(path, caplog, monkeypatch):
    monkeypatch.setattr(tokens, "_LOOK_S", 0.05)

    def write(text):  # at once: who reads it meanwhile finds the old one
        (path.parent / "new").write_text(text)
        (path.parent / "new").replace(path)

    def told():
        return [record for record in caplog.records if record.name == tokens.__name__ and record.levelname == "WARNING"]

    found, called = Tokens(path), []
    found.on_change(lambda: called.append(len(found._grants)))
    found.start()
    try:
        write("tokens:\n" + line(TWO))
        assert soon(lambda: called == [1])
        assert found.grant(ONE) is None
        assert found.grant(TWO) is not None
        with caplog.at_level(logging.WARNING, "schoolhouse_server"):
            write("tokens: nonsense\n")
            assert soon(lambda: len(told()) == 1)
            path.unlink()
            assert soon(lambda: len(told()) == 2)
        assert all("the tokens known so far are kept" in record.message for record in told())
        assert found.grant(TWO) is not None
        write("tokens:\n" + line(ONE))
        assert soon(lambda: called == [1, 1])
        assert found.grant(ONE) is not None
        assert digest_of(ONE) == hashlib.sha256(ONE.encode()).hexdigest()
    finally:
        found.close()
