"""Who may do what, at real servers: tokens, what they are for, and their end."""

import contextlib
import hashlib
import queue
import threading

import grpc
import pytest
import schoolhouse as sh
import torch
from authority import ours
from directories import Scale
from grpc_health.v1 import health_pb2, health_pb2_grpc
from memfd import soon
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_server.cli import probe as health
from schoolhouse_server.security.tokens import new_token
from schoolhouse_wire import framing
from schoolhouse_wire.rpc import channel, status
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc, teacher_pb2
from torch import nn

STUDENT, BOUND, ADMIN, OTHER = (new_token() for _ in range(4))
LINES = {
    STUDENT: "teachers: [one, two]",
    BOUND: "teachers: [one], job: exp, weight: 4, max_in_flight: 2, max_job_bytes: 100000",
    ADMIN: "teachers: [], admin: true",
    OTHER: "teachers: [three]",
}


def write(path, lines=LINES):
    """The tokens file with these lines."""
    digests = {token: hashlib.sha256(token.encode()).hexdigest() for token in lines}
    path.write_text("tokens:\n" + "".join(f"- {{sha256: '{digests[token]}', {lines[token]}}}\n" for token in lines))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("schoolhouse_server.security.tokens._LOOK_S", 0.05)


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "tokens.yaml"
    write(found)
    return found


@pytest.fixture
def server(path):
    with serve({"one": Scale(2), "two": Scale(3), "three": Scale(4)}, tokens=path) as found:
        yield found


def connected(server, teacher, token, **more):
    return sh.connect(
        server.urls[teacher], security=sh.Security(token=token), timeouts=sh.Timeouts(request_s=20), **more
    )


def result(teacher, number=1.0):
    return teacher.submit((torch.full((2,), number),), {}, [""]).result(20)[""].tolist()


def first_answer(session, message, **how):
    """What a stream answers to its first request. Who ends the requests wants no answer any more, so they stay open."""
    requests = queue.SimpleQueue()
    requests.put(message)
    try:
        return next(session(iter(requests.get, None), **how))
    finally:
        requests.put(None)


@pytest.fixture
def ask(server):
    """Calls an RPC with the authorization that is given, and returns the answer, or the error."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=channel.CLIENT_OPTIONS) as opened:
        directory = directory_pb2_grpc.DirectoryServiceStub(opened)
        serializers = {
            "request_serializer": lambda message: message.SerializeToString(),
            "response_deserializer": lambda data: data,
        }
        describe = opened.unary_unary("/schoolhouse.v1.TeacherService/Describe", **serializers)
        session = opened.stream_stream(channel.SESSION_METHOD, **serializers)
        reflect = opened.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", **serializers)
        opening = teacher_pb2.ClientMessage(open=teacher_pb2.Open(protocol=channel.PROTOCOL, teacher="one"))
        health = health_pb2_grpc.HealthStub(opened)
        calls = {
            "list": lambda **how: directory.ListTeachers(directory_pb2.ListTeachersRequest(), **how),
            "watch": lambda **how: next(directory.Watch(directory_pb2.WatchRequest(teacher="one"), **how)),
            "describe": lambda **how: describe(teacher_pb2.DescribeRequest(teacher="one"), **how),
            "session": lambda **how: first_answer(session, opening, **how),
            "reflection": lambda **how: first_answer(reflect, directory_pb2.ListTeachersRequest(), **how),
            "health": lambda **how: health.Check(health_pb2.HealthCheckRequest(), **how),
            "health of a teacher": lambda **how: health.Check(health_pb2.HealthCheckRequest(service="one"), **how),
            "health, watched": lambda **how: next(health.Watch(health_pb2.HealthCheckRequest(), **how)),
        }

        def call(name, *authorizations):
            try:
                return calls[name](timeout=20, metadata=[("authorization", one) for one in authorizations])
            except grpc.RpcError as err:
                return status.from_rpc_error(err, "it")

        yield call


@pytest.mark.parametrize("name", ["list", "watch", "describe", "session", "reflection", "health, watched"])
def test_nothing_is_answered_without_a_known_token(ask, name):
    for wrong in ([], [f"Bearer {new_token()}"], [STUDENT], ["Bearer "], [f"Bearer {STUDENT}"] * 2, ["Basic eDp5"]):
        assert isinstance(ask(name, *wrong), errors.AuthenticationError), wrong
    assert not isinstance(ask(name, f"Bearer {STUDENT}"), Exception)


def test_probes_have_no_token_and_learn_nothing_but_that_it_serves(ask):
    assert ask("health").status == health_pb2.HealthCheckResponse.SERVING
    assert isinstance(ask("health of a teacher"), Exception)


def test_probes_learn_no_name_of_a_teacher_that_serves_no_more(path):
    with serve({"wide": nn.Linear(2, 2)}, tokens=path) as server:
        server._server.report_failed("wide")
        assert soon(lambda: not health.serves(f"127.0.0.1:{server.port}"))
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened, pytest.raises(grpc.RpcError) as refused:
            health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(service="wide"), timeout=20)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_client_without_a_token_is_told_what_to_do_and_the_log_that_it_was_there(server, caplog):
    unknown = new_token()
    for token, said in ((None, r"connect\(security=Security\(token=...\)\)"), (unknown, "does not know the token")):
        with pytest.raises(errors.AuthenticationError, match=said) as caught:
            connected(server, "one", token)
        assert unknown not in str(caught.value)
    assert "calls without a known token were refused, the last from ipv4:127.0.0.1" in caplog.text
    assert unknown not in caplog.text
    with connected(server, "one", STUDENT) as teacher:
        assert result(teacher) == [2, 2]


def test_a_token_is_for_its_teachers_and_tells_of_no_others(server, ask):
    with connected(server, "two", STUDENT) as teacher:
        assert result(teacher) == [3, 3]
    for name in ("three", "nine"):  # whether there is one or not
        with pytest.raises(errors.UnknownTeacherError, match=f"'{name}' at .*; there are: one, two$") as caught:
            sh.connect(
                f"grpc://127.0.0.1:{server.port}/{name}",
                security=sh.Security(token=STUDENT),
                timeouts=sh.Timeouts(request_s=20),
            )
        assert caught.value.choices == ("one", "two")
    for token, names in ((STUDENT, ["one", "two"]), (OTHER, ["three"]), (ADMIN, ["one", "three", "two"])):
        listed = ask("list", f"Bearer {token}").teachers
        assert sorted(one.teacher for one in listed) == names
    for name in ("watch", "describe", "session"):
        for token in (OTHER, ADMIN):
            found = ask(name, f"Bearer {token}")
            assert isinstance(found, errors.PermissionDeniedError)
            assert found.choices == (("three",) if token == OTHER else ())


def test_a_tokens_job_is_the_job_and_no_others(server, ask):
    with connected(server, "one", BOUND, job="mine", sharing=sh.Sharing(weight=0.5)) as teacher:
        result(teacher)
        [job] = server.load("one").jobs
        assert (job.job, job.weight) == ("exp", 4)
        with connected(server, "one", STUDENT, job="sweep", sharing=sh.Sharing(weight=50.0)) as second:
            result(second)
            assert {job.job: job.weight for job in server.load("one").jobs} == {"exp": 4, "sweep": 1}
            for token, jobs in ((ADMIN, {"exp", "sweep"}), (BOUND, {"exp"}), (STUDENT, set())):
                one = next(i for i in ask("list", f"Bearer {token}").teachers if i.teacher == "one") if jobs else None
                assert {job.job for job in one.replicas[0].load.jobs} == jobs if one else True
    with (
        connected(server, "one", STUDENT, job="exp") as teacher,
        pytest.raises(errors.PermissionDeniedError, match="'exp' is bound to another token"),
    ):
        result(teacher)


def test_the_tokens_quota_holds_beside_the_teachers(path):
    module = Scale(2)
    module.gate.clear()
    with serve(module, name="one", tokens=path, max_in_flight=8) as server, contextlib.ExitStack() as stack:
        bound = stack.enter_context(connected(server, "one", BOUND))
        free = stack.enter_context(connected(server, "one", STUDENT, job="free"))
        futures = [each.submit((torch.ones(1, 10),), {}, [""]) for each in (bound, free) for _ in range(10)]
        in_flight = lambda: {job.job: job.in_flight for job in server.load("one").jobs}  # noqa: E731
        assert soon(lambda: in_flight() == {"exp": 2, "free": 8})
        module.gate.set()
        for future in futures:
            future.result(20)


def test_a_session_ends_when_its_name_is_bound_to_another_token(server, path):
    with connected(server, "one", STUDENT, job="mine") as teacher, connected(server, "one", BOUND) as other:
        assert result(teacher) == result(other) == [2, 2]
        write(path, LINES | {OTHER: "teachers: [one], job: mine"})
        assert soon(lambda: {job.job: job.sessions for job in server.load("one").jobs} == {"exp": 1, "mine": 0})
        with pytest.raises(errors.PermissionDeniedError, match="'mine' is bound to another token"):
            result(teacher)
        assert result(other) == [2, 2]  # whose token is as it was
        with connected(server, "one", OTHER, job="whatever") as owner:
            assert result(owner) == [2, 2]


def test_who_is_no_admin_sees_only_its_own_numbers(server, ask):
    with connected(server, "one", BOUND) as mine, connected(server, "one", STUDENT, job="sweep") as other:
        result(mine), result(other), result(other)
        assert soon(lambda: sum(job.requests for job in server.load("one").jobs) == 3)
        seen = {
            token: next(one for one in ask("list", f"Bearer {token}").teachers if one.teacher == "one").replicas[0].load
            for token in (ADMIN, BOUND, STUDENT)
        }
    assert (seen[ADMIN].served, len(seen[ADMIN].jobs)) == (3, 2)
    assert [job.job for job in seen[BOUND].jobs] == ["exp"]
    assert not seen[STUDENT].jobs
    for token in (BOUND, STUDENT):
        assert {field.name for field, _ in seen[token].ListFields()} <= {"queued", "jobs"}


@pytest.mark.parametrize(("scope", "tokens", "shared"), [("auto", True, False), ("auto", False, True),
                                                         ("teacher", True, True), ("job", False, False)])  # fmt: skip
def test_who_gets_what_was_computed_for_another_job(path, scope, tokens, shared):
    module = Scale(2)
    more = {"tokens": path} if tokens else {}
    with (
        serve(module, name="one", cache_bytes=1 << 20, cache_scope=scope, **more) as server,
        contextlib.ExitStack() as stack,
    ):
        token = STUDENT if tokens else None
        security = sh.Security(token=token)
        a, b = (stack.enter_context(sh.connect(server.url, job=job, security=security)) for job in ("a", "b"))
        for teacher in (a, a, b, b):
            assert result(teacher, 7) == [14, 14]
        assert server.load("one").forwards == (1 if shared else 2)  # from the cache
        module.gate.clear()
        futures = [one.submit((torch.full((2,), 8.0),), {}, [""]) for one in (a, a, b, b)]
        assert soon(lambda: server.load("one").joined == (3 if shared else 2))  # in flight
        module.gate.set()
        assert [future.result(20)[""].tolist() for future in futures] == [[16, 16]] * 4


def test_no_request_takes_more_bytes_than_its_token_has(server):
    with connected(server, "one", BOUND) as teacher:
        fits, large = (torch.ones(1, size) for size in (20_000, 30_000))  # 80,000 and 120,000 bytes
        with pytest.raises(errors.MessageTooLargeError, match="max_job_bytes is 100000"):
            teacher.submit((large,), {}, [""]).result(20)
        assert torch.equal(teacher.submit((fits,), {}, [""]).result(20)[""], 2 * fits)
        assert server.load("one").forwards == 1
    with connected(server, "one", STUDENT, job="free") as teacher:
        assert torch.equal(teacher.submit((large,), {}, [""]).result(20)[""], 2 * large)


def test_a_client_is_told_its_tokens_quota(ask):
    told = {token: framing.read_message(teacher_pb2.ServerMessage, ask("session", f"Bearer {token}")).opened
            for token in (BOUND, STUDENT)}  # fmt: skip
    assert (told[BOUND].max_in_flight, told[BOUND].max_bytes_in_flight) == (2, 100_000)
    assert (told[STUDENT].max_in_flight, told[STUDENT].max_bytes_in_flight) == (64, 2 << 30)


@pytest.mark.parametrize("change", ["revoked", "changed", "bad file"])
def test_sessions_follow_the_file(server, path, change, caplog):
    with connected(server, "one", STUDENT) as teacher, connected(server, "three", OTHER) as other:
        assert result(teacher) == [2, 2]
        assert result(other) == [4, 4]
        if change == "revoked":
            write(path, {token: text for token, text in LINES.items() if token != STUDENT})
        elif change == "changed":
            write(path, LINES | {STUDENT: "teachers: [two]"})
        else:
            path.write_text("tokens: 3")
        kind = errors.AuthenticationError if change == "revoked" else errors.PermissionDeniedError
        if change == "bad file":
            assert soon(lambda: "is not used" in caplog.text)
            assert result(teacher) == [2, 2]
        else:
            assert soon(lambda: _fails(teacher, kind))
        assert result(other) == [4, 4]
        write(path)
        assert soon(lambda: _works(server))


def _fails(teacher, kind):
    try:
        result(teacher)
    except kind:
        return True
    return False


def _works(server):
    with contextlib.suppress(errors.SchoolhouseError), connected(server, "one", STUDENT) as teacher:
        return result(teacher) == [2, 2]
    return False


def test_what_is_in_flight_ends_as_the_token_is_revoked(path):
    module = Scale(2)
    module.gate.clear()
    with serve(module, name="one", tokens=path) as server, connected(server, "one", STUDENT) as teacher:
        future = teacher.submit((torch.ones(2),), {}, [""])
        assert module.entered.wait(20)
        write(path, {OTHER: LINES[OTHER]})
        with pytest.raises(errors.AuthenticationError, match="revoked"):
            future.result(20)
        module.gate.set()


def test_a_watch_ends_as_its_token_is_revoked(server, path):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        stub = directory_pb2_grpc.DirectoryServiceStub(opened)
        how = {"metadata": [("authorization", f"Bearer {STUDENT}")], "timeout": 20}
        news = stub.Watch(directory_pb2.WatchRequest(teacher="one"), **how)
        next(news)
        write(path, {OTHER: LINES[OTHER]})
        with pytest.raises(grpc.RpcError) as caught:
            list(news)
    assert isinstance(status.from_rpc_error(caught.value, "it"), errors.AuthenticationError)


def test_a_head_is_given_out_only_where_that_is_allowed():
    wish = {"fc": sh.encodings.hidden("fc")}
    module = nn.Sequential()
    module.add_module("fc", nn.Linear(3, 2))
    for allowed in (False, True):
        with (
            serve(module, allow_head=allowed) as server,
            sh.connect(server.url, head_folder=None, timeouts=sh.Timeouts(request_s=20)) as teacher,
        ):
            ask = lambda: teacher.submit((torch.ones(4, 3),), {}, ["fc"], encodings=wish).result(20)["fc"]  # noqa: E731
            if allowed:
                assert torch.allclose(ask().dense(), module(torch.ones(4, 3)))
            else:
                with pytest.raises(errors.PermissionDeniedError, match=r"serve\(allow_head=True\)"):
                    ask()
                assert teacher.submit((torch.ones(4, 3),), {}, ["fc"]).result(20)["fc"].shape == (4, 2)


@pytest.mark.parametrize(("settings", "allowed"), [({}, True), ({"host": "0.0.0.0", "insecure": True}, False)])
def test_serve_gives_heads_out_on_loopback_alone_unless_it_is_told(settings, allowed):
    with serve(nn.Identity(), **settings) as server:
        assert server._context.allow_head is allowed


def test_serve_gives_no_heads_out_where_there_are_tokens(path):
    with serve(nn.Identity(), tokens=path) as server:
        assert not server._context.allow_head


def test_tokens_go_over_tls(path):
    with serve(Scale(2), name="one", tls=ours().server(), tokens=path) as server:
        with sh.connect(
            server.url, security=sh.Security(ca=ours().ca, token=STUDENT), timeouts=sh.Timeouts(request_s=20)
        ) as teacher:
            assert result(teacher) == [2, 2]
        with pytest.raises(errors.AuthenticationError):
            sh.connect(server.url, security=sh.Security(ca=ours().ca), timeouts=sh.Timeouts(request_s=20))


class Telling(nn.Module):
    """Raises what it should not tell."""

    def __init__(self, text):
        super().__init__()
        self.weight, self.text = nn.Parameter(torch.randn(9)), text

    def forward(self, x):
        raise ValueError(f"{self.text} {self.weight} in {__file__}")


def test_errors_tell_no_tokens_paths_or_weights(path, caplog):
    module = Telling(f"got {STUDENT},")
    with (
        serve(module, name="one", tokens=path) as server,
        caplog.at_level("DEBUG", "schoolhouse_server"),
        connected(server, "one", STUDENT) as teacher,
        pytest.raises(errors.TeacherForwardError) as caught,
    ):
        result(teacher)
    assert str(caught.value) == "the teacher's forward raised ValueError: got <token>, <tensor> in <path>"
    assert all(token not in caplog.text for token in LINES)


def test_an_error_that_is_none_of_ours_is_told_without_its_text(server, ask, monkeypatch):
    def broken(self, name, grant):
        raise KeyError("what is in /srv/secret")

    monkeypatch.setattr("schoolhouse_server.session.context.ReplicaContext.find", broken)
    found = ask("describe", f"Bearer {STUDENT}")
    assert isinstance(found, errors.TeacherInternalError)
    assert "KeyError" in str(found)
    assert "secret" not in str(found)


def test_no_thread_of_the_file_is_left(path):
    def followers():
        return {one for one in threading.enumerate() if one.name == "schoolhouse-tokens"}

    before = followers()  # of earlier tests, and about to end
    with serve(nn.Identity(), tokens=path):
        [own] = followers() - before
    assert soon(lambda: not own.is_alive())


def test_a_wrong_file_starts_no_server(tmp_path):
    with pytest.raises(errors.ConfigError, match="cannot read the tokens file"):
        serve(nn.Identity(), tokens=tmp_path / "none")
