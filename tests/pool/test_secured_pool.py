"""Tokens and heads of a pool: its file, its directory, and its replicas."""

import contextlib
import hashlib
import logging
from dataclasses import replace

import pytest
import schoolhouse as sh
import torch
from models import Net
from schoolhouse import errors
from schoolhouse_server.pool.config import load_pool
from schoolhouse_server.pool.pool_state import Desired
from schoolhouse_server.security.tokens import new_token
from schoolhouse_server.session.quotas import Sharing
from schoolhouse_wire.v1 import directory_pb2

STUDENT, OTHER = new_token(), new_token()


@pytest.fixture
def load(tmp_path):
    digests = [hashlib.sha256(token.encode()).hexdigest() for token in (STUDENT, OTHER)]
    lines = zip(digests, ("net", "else"), strict=True)
    (tmp_path / "tokens.yaml").write_text(
        "tokens:\n" + "".join(f"- {{sha256: '{digest}', teachers: [{name}]}}\n" for digest, name in lines)
    )

    def read(security, more=""):
        path = tmp_path / "pool.yaml"
        path.write_text(f"security: {security}\nteachers: {{net: {{build: 'models:Net'{more}}}}}\n")
        return load_pool(path)

    return read


def test_the_file_says_where_tokens_are(load, tmp_path):
    pool = load("{tokens: tokens.yaml, allow_head: true}")
    assert pool.tokens == tmp_path / "tokens.yaml"
    assert pool.security.allow_head
    plain = load("{}")
    assert plain.tokens is None
    assert not plain.security.allow_head


@pytest.mark.parametrize(
    ("security", "said"),
    [
        ("{tokens: none.yaml}", "security.tokens: cannot read the tokens file .*none.yaml: No such file"),
        ("{tokens: pool.yaml}", "security.tokens: the tokens file .* must hold a mapping with the key 'tokens'"),
        ("{tokens: 3}", "security.tokens"),
        ("{allow_head: perhaps}", "security.allow_head"),
    ],
)
def test_what_is_wrong_is_told_as_the_file_is_read(load, security, said):
    with pytest.raises(errors.ConfigError, match=said):
        load(security)


@pytest.mark.parametrize(
    ("taps", "said"),
    [
        (
            "['fc:both']",
            "teachers.net: .*taps.0 has something else than a side .* choices: NAME, NAME:input, NAME:output",
        ),
        ("[]", "taps must be a list of 1 to 256 patterns"),
        ("fc", "teachers.net.taps"),
    ],
)
def test_wrong_patterns_of_taps_are_told_as_the_file_is_read(load, taps, said):
    with pytest.raises(errors.ConfigError, match=said):
        load("{}", f", taps: {taps}")


def test_a_replica_lets_tap_what_the_pool_file_says(load, actors):
    def made(pool):
        actor = actors.TeacherActor("net", pool.teachers["net"], pool)
        logging.getLogger().removeHandler(actor._ring)
        return actor._make(Net())

    with made(load("{tokens: tokens.yaml}", ", taps: ['fc', 'body:input']")) as replica:
        security = sh.Security(token=STUDENT)
        with sh.connect(replica.url, security=security, timeouts=sh.Timeouts(request_s=20)) as teacher:
            assert teacher.describe().modules == ("body", "fc")
            with pytest.raises(errors.PermissionDeniedError, match="body:output .* it may tap fc, body:input"):
                teacher.submit((torch.ones(1, 8),), {}, ["body"]).result(20)
    with pytest.raises(errors.ConfigError, match="'layer', which no module of 'net' matches"):
        made(load("{}", ", taps: [layer]"))


def test_a_roll_changes_no_tokens_file(load):
    now = Desired.of(load("{tokens: tokens.yaml}"))
    with pytest.raises(errors.ConfigError, match=r"security.tokens of the file differs from that of the pool"):
        now.rolled(load("{}"), ["net"])
    assert now.rolled(load("{tokens: tokens.yaml, allow_head: true}"), ["net"]).config.security.allow_head


def test_a_replica_shares_as_the_pool_file_says(load, actors):
    words = {"cost": "tokens", "cache_scope": "job"}
    said = {name: i + 2 for i, name in enumerate(vars(Sharing())) if name not in words} | words
    pool = load("{}")
    actor = actors.TeacherActor("net", replace(pool.teachers["net"], **said), pool)
    logging.getLogger().removeHandler(actor._ring)
    assert actor._make(Net())._sharing == Sharing(**said)


def test_directory_and_replicas_ask_for_the_same_tokens(load, actors):
    pool = replace(load("{tokens: tokens.yaml}"), port=0)
    directory = actors.DirectoryActor(pool)
    actor = actors.TeacherActor("net", pool.teachers["net"], pool)
    with contextlib.ExitStack() as stack:
        for each in (directory, actor):
            stack.callback(logging.getLogger().removeHandler, each._ring)
        stack.callback(directory._server.stop, 0)
        stack.callback(directory._gate.close)
        replica = stack.enter_context(actor._make(Net()))
        entry = directory_pb2.Replica(
            id="a1", address=f"127.0.0.1:{replica.port}", revision=replica.engines["net"].description.revision
        )
        directory.publish([directory_pb2.ReplicaSet(teacher="net", replicas=[entry], wanted=1).SerializeToString()])
        for url in (f"{directory.url()}/net", replica.url):
            for token, kind in ((None, errors.AuthenticationError), (OTHER, errors.UnknownTeacherError)):
                with pytest.raises(kind):
                    sh.connect(url, security=sh.Security(token=token), timeouts=sh.Timeouts(request_s=20))
            with sh.connect(
                url, security=sh.Security(token=STUDENT), timeouts=sh.Timeouts(request_s=20), head_folder=None
            ) as teacher:
                assert teacher.describe().class_name == "models.Net"
