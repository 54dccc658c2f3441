"""TLS and mutual TLS between clients and servers; plaintext only within a machine, or where it was asked for."""

import functools
import pickle
import socket
import threading
import urllib.request

import grpc
import pytest
import schoolhouse as sh
import torch
from authority import fetched, ours, theirs
from directories import DirectoryServer
from memfd import soon
from models import Net
from schoolhouse import errors
from schoolhouse.remote import handshake
from schoolhouse_server import ServerTls, serve
from schoolhouse_server.cli import probe
from schoolhouse_server.cli.main import app
from schoolhouse_server.security.certs import Authority
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.rpc.security import ClientSecurity, is_loopback
from schoolhouse_wire.v1 import directory_pb2, directory_pb2_grpc
from typer.testing import CliRunner

X = torch.randn(3, 8)
SECRET = "s3cret-of-the-job"


def expected():
    return Net(32, seed=1)(X)


def ask(teacher):
    return teacher.submit((X,), {}, [""]).result(60)[""]


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """With a server that is slow, where it is to be found out why it cannot be talked to."""
    monkeypatch.setattr(handshake, "_STEP_TIMEOUT_S", 20.0)
    monkeypatch.setattr(handshake, "_TIMEOUT_S", 40.0)


@pytest.fixture(scope="module")
def server():
    with serve(Net(32, seed=1), tls=ours().server(), http_port=0) as found:
        yield found


@pytest.fixture(scope="module")
def mutual():
    with serve(Net(32, seed=1), tls=ours().server(client_ca=ours().ca), http_port=0) as found:
        yield found


@pytest.mark.parametrize("shared_memory", [True, False])
def test_features_come_over_tls(server, shared_memory):
    assert server.url.startswith("grpcs://")
    with sh.connect(
        server.url, security=sh.Security(ca=ours().ca), transport=sh.Transport(shared_memory=shared_memory)
    ) as teacher:
        assert torch.equal(ask(teacher), expected())


def test_nothing_is_readable_on_the_way(server):
    """What a relay sees of a session over TLS and of one in plaintext."""
    with serve(Net(32, seed=1)) as open_server:
        for given, url, ca in ((server, "grpcs", ours().ca), (open_server, "grpc", None)):
            with Relay(given.port) as relay:
                with sh.connect(
                    f"{url}://127.0.0.1:{relay.port}/teacher",
                    job="the-name-of-a-job",
                    security=sh.Security(token=SECRET, ca=ca),
                    transport=sh.Transport(shared_memory=False),
                ) as teacher:
                    ask(teacher)
                seen = bytes(relay.seen)
            assert (b"the-name-of-a-job" in seen, SECRET.encode() in seen) == ((given is open_server),) * 2


class Relay:
    """Passes one port on to another, and keeps what clients send."""

    def __init__(self, port):
        self._to = port
        self.seen = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=self._pump, args=(client, there, self.seen), daemon=True).start()
            threading.Thread(target=self._pump, args=(there, client, bytearray()), daemon=True).start()

    @staticmethod
    def _pump(source, sink, seen):
        try:
            while data := source.recv(65536):
                seen += data
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                one.close()


def test_a_server_of_another_authority_is_not_trusted(server):
    for given in ({"ca": theirs().ca}, {}):
        with pytest.raises(errors.AuthenticationError, match=r"did not prove to be '127.0.0.1'.*unable to get local"):
            sh.connect(server.url, security=sh.Security(**given), timeouts=sh.Timeouts(connect_s=0.5))


def test_a_server_of_another_name_is_not_trusted(tmp_path):
    own = Authority.make(tmp_path)
    own.add_server("server", ["only.example"], days=1)
    tls = ServerTls(cert=tmp_path / "server.pem", key=tmp_path / "server-key.pem")
    with serve(Net(32, seed=1), tls=tls) as server:  # the name that the user typed counts, not where it leads
        right = ClientSecurity.read(ca=tmp_path / "ca.pem").towards("only.example", tls=True)
        assert listed(f"127.0.0.1:{server.port}", right) == ["teacher"]
        wrong = ClientSecurity.read(ca=tmp_path / "ca.pem").towards("other.example", tls=True)
        with pytest.raises(grpc.RpcError):
            listed(f"127.0.0.1:{server.port}", wrong)


def listed(target, security):
    with channel.connect(target, security) as opened:
        stub = directory_pb2_grpc.DirectoryServiceStub(opened)
        return [one.teacher for one in stub.ListTeachers(directory_pb2.ListTeachersRequest(), timeout=5).teachers]


def test_a_client_needs_a_certificate_where_the_server_wants_one(mutual):
    with sh.connect(mutual.url, security=sh.Security(**ours().client())) as teacher:
        assert torch.equal(ask(teacher), expected())
    with pytest.raises(errors.AuthenticationError, match="requires a certificate.*give cert and key"):
        sh.connect(mutual.url, security=sh.Security(ca=ours().ca), timeouts=sh.Timeouts(connect_s=0.5))
    strange = theirs().client() | {"ca": ours().ca}
    with pytest.raises(errors.AuthenticationError, match="does not accept this client's certificate"):
        sh.connect(mutual.url, security=sh.Security(**strange), timeouts=sh.Timeouts(connect_s=0.5))


def test_replicas_must_prove_the_name_of_the_directory(mutual):
    """A directory that lists a replica without a certificate of the pool: no request goes there."""
    with DirectoryServer(tls=ours().server()) as found, serve(Net(32, seed=1), tls=theirs().server()) as impostor:
        port = found.port
        found.directory.publish(replicas(impostor.port))
        with pytest.raises(errors.TeacherUnavailableError):
            sh.connect(
                f"grpcs://127.0.0.1:{port}/teacher",
                security=sh.Security(**ours().client()),
                timeouts=sh.Timeouts(connect_s=0.5),
            )
        found.directory.publish(replicas(impostor.port, mutual.port))
        with sh.connect(f"grpcs://127.0.0.1:{port}/teacher", security=sh.Security(**ours().client())) as teacher:
            assert torch.equal(ask(teacher), expected())
            assert [session.address for session in teacher.open_sessions()] == [f"127.0.0.1:{mutual.port}"]


def replicas(*ports):
    found = [directory_pb2.Replica(id=str(port), address=f"127.0.0.1:{port}") for port in ports]
    return directory_pb2.ReplicaSet(teacher="teacher", replicas=found, wanted=len(ports))


def test_who_speaks_tls_and_who_does_not_is_said(server):
    with pytest.raises(errors.ConfigError, match="speaks TLS: connect to grpcs://"):
        sh.connect(server.url.replace("grpcs", "grpc"), timeouts=sh.Timeouts(connect_s=0.5))
    with serve(Net(32, seed=1)) as plain:
        with pytest.raises(errors.ConfigError, match="does not speak TLS.*connect to grpc://"):
            sh.connect(
                plain.url.replace("grpc", "grpcs"),
                security=sh.Security(ca=ours().ca),
                timeouts=sh.Timeouts(connect_s=0.5),
            )


def test_who_is_not_there_is_no_matter_of_tls(monkeypatch):
    monkeypatch.setattr(handshake, "_STEP_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for url in (f"grpcs://127.0.0.1:{port}/x", f"grpc://127.0.0.1:{port}/x"):
            with pytest.raises(errors.SchoolhouseError, match="no server answered|does not speak TLS"):
                sh.connect(url, timeouts=sh.Timeouts(connect_s=0.3))
    with pytest.raises(errors.TeacherUnavailableError, match="no server answered"):
        sh.connect(f"grpcs://127.0.0.1:{port}/x", timeouts=sh.Timeouts(connect_s=0.3))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "teachers", ""])
def test_plaintext_beyond_loopback_needs_to_be_asked_for(host):
    assert not is_loopback(host)
    with pytest.raises(errors.ConfigError, match=r"tls=ServerTls\(cert=..., key=...\).*insecure=True"):
        serve(Net(32, seed=1), host=host)
    if host and ":" not in host:
        for token in (None, SECRET):
            with pytest.raises(errors.ConfigError, match="grpcs://.*insecure=True") as refused:
                sh.connect(f"grpc://{host}:7070/x", security=sh.Security(token=token))
            assert SECRET not in str(refused.value)


def test_plaintext_that_was_asked_for():
    with serve(Net(32, seed=1), host="0.0.0.0", insecure=True) as server:
        with sh.connect(
            f"grpc://0.0.0.0:{server.port}/teacher", security=sh.Security(insecure=True, token=SECRET)
        ) as teacher:
            assert torch.equal(ask(teacher), expected())


def test_a_directory_here_does_not_lead_elsewhere_in_plaintext():
    elsewhere = directory_pb2.Replica(id="a", address="192.0.2.1:7100")
    with DirectoryServer() as found:
        found.directory.publish(directory_pb2.ReplicaSet(teacher="teacher", replicas=[elsewhere], wanted=1))
        with pytest.raises(errors.ConfigError, match="192.0.2.1:7100 may be another machine"):
            sh.connect(f"grpc://127.0.0.1:{found.port}/teacher")


class Seen(grpc.aio.ServerInterceptor):
    """Keeps the authorization of each RPC, by its method."""

    def __init__(self):
        self.by_method = {}

    async def intercept_service(self, continuation, details):
        given = [value for key, value in details.invocation_metadata if key == "authorization"]
        self.by_method.setdefault(details.method.split("/")[-1], []).extend(given or [None])
        return await continuation(details)


@pytest.fixture
def seen(monkeypatch):
    """What the servers of the test see."""
    found = Seen()
    make = grpc.aio.server
    monkeypatch.setattr(grpc.aio, "server", lambda *args, **kwargs: make(*args, **kwargs | {"interceptors": [found]}))
    return found.by_method


def test_every_rpc_carries_the_token(seen):
    with serve(Net(32, seed=1)) as server:
        with sh.connect(server.url, security=sh.Security(token=SECRET)) as teacher:
            ask(teacher)
            assert soon(lambda: {"ListTeachers", "Describe", "Session", "Watch"} <= seen.keys())
        assert given_in(seen) == {f"Bearer {SECRET}"}
        seen.clear()
        with sh.connect(server.url) as teacher:
            ask(teacher)
            assert soon(lambda: "Watch" in seen)
        assert given_in(seen) == {None}


def given_in(seen):
    return {value for values in [*seen.values()] for value in [*values]}


def test_a_copy_has_the_token_and_the_certificates(seen):
    with serve(Net(32, seed=1), tls=ours().server(client_ca=ours().ca)) as server:
        teacher = sh.connect(server.url, security=sh.Security(token=SECRET, **ours().client()))
        with pickle.loads(pickle.dumps(teacher)) as copied:
            assert torch.equal(ask(copied), expected())
        teacher.close()
        assert given_in(seen) == {f"Bearer {SECRET}"}


def test_settings_do_not_show_secrets():
    given = sh.Security(**ours().client(), token=SECRET)
    teacher = sh.RemoteTeacher("grpcs://127.0.0.1:1/x", security=given)
    for shown in (repr(given), str(given), repr(teacher), repr(teacher._settings), repr(given.contents)):
        assert SECRET not in shown
        assert "PRIVATE KEY" not in shown


@pytest.mark.parametrize("token", ["", "two words", "näh", "x\r\ny", "x" * 5000, 5, b"bytes"])
def test_what_cannot_be_a_token(token):
    with pytest.raises(errors.ConfigError, match="token must be a string of 1 to 4096") as refused:
        sh.connect("grpc://127.0.0.1:1/x", security=sh.Security(token=token))
    assert not token or str(token) not in str(refused.value)


def test_a_new_certificate_is_taken_while_it_serves(tmp_path, caplog):
    for name in ("server.pem", "server-key.pem"):
        (tmp_path / name).write_bytes((theirs().folder / name).read_bytes())
    tls = ServerTls(cert=tmp_path / "server.pem", key=tmp_path / "server-key.pem")
    with (
        serve(Net(32, seed=1), tls=tls, http_port=0) as server,
        sh.connect(server.url, security=sh.Security(ca=theirs().ca)) as before,
    ):
        ask(before)
        (tmp_path / "server.pem").write_text("nonsense")
        assert probe.main([f"127.0.0.1:{server.port}", "--ca", str(theirs().ca)]) == 0  # a new connection
        assert "the new certificate is not used" in caplog.text
        for name in ("server.pem", "server-key.pem"):
            (tmp_path / name).write_bytes((ours().folder / name).read_bytes())
        with sh.connect(server.url, security=sh.Security(ca=ours().ca)) as after:
            assert torch.equal(ask(after), expected())
        assert fetched(server.web.url, ours().ca) == 200
        assert torch.equal(ask(before), expected())  # whose session goes on


def test_the_page_speaks_tls_too(server, mutual):
    assert server.web.url.startswith("https://")
    assert fetched(server.web.url, ours().ca) == 200
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        fetched(server.web.url, theirs().ca)
    assert fetched(mutual.web.url, **ours().client()) == 200
    with pytest.raises(OSError):  # noqa: PT011  # whichever of the alert and the reset comes first
        fetched(mutual.web.url, ours().ca)


def test_the_probe_speaks_tls(server, mutual, monkeypatch):
    """As a container runs it, but for its own process and how long it waits."""
    monkeypatch.setattr(probe, "serves", functools.partial(probe.serves, timeout_s=20.0))
    own = ours().folder
    shows = ["--cert", str(own / "server.pem"), "--key", str(own / "server-key.pem")]  # the server's own
    target, ca = f"127.0.0.1:{server.port}", ["--ca", str(ours().ca)]
    assert probe.main([target, *ca]) == 0
    assert probe.main([target, *ca, "--name", "pool.test"]) == 0
    assert probe.main([target, *ca, "--name", "other.test"]) == 1
    assert probe.main([target]) == 1
    assert probe.main([target, "--ca", str(theirs().ca)]) == 1
    assert probe.main([f"127.0.0.1:{mutual.port}", *ca, *shows]) == 0
    assert probe.main([f"127.0.0.1:{mutual.port}", *ca]) == 1
    assert probe.main([target, "--ca", "none.pem"]) == 2


def test_top_speaks_tls(mutual, tmp_path):
    (tmp_path / "token").write_text(f"{SECRET}\n")
    given = [f"--{name}={path}" for name, path in ours().client().items()]
    given.append(f"--token-file={tmp_path / 'token'}")
    shown = CliRunner().invoke(app, ["top", mutual.url, "--once", "--interval-s=0.1", *given])
    assert shown.exception is None
    assert "teacher" in shown.output
    with pytest.raises(errors.AuthenticationError, match="127.0.0.1"):
        raise CliRunner().invoke(app, ["top", mutual.url, "--once", given[0]]).exception
