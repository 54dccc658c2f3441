"""Certificates and keys that are wrong: one sentence at the side that has them, or at the one that is refused."""

import socket
import ssl

import pytest
import schoolhouse as sh
from authority import ours, theirs
from loads import fetch
from models import Net
from schoolhouse import errors
from schoolhouse_server import ServerTls, serve
from schoolhouse_server.security.certs import Authority

WRONG = {
    "a file that is missing": (lambda c, f: {"ca": f / "none.pem"}, "ca: cannot read .*No such file"),
    "no PEM": (lambda c, f: {"ca": written(f, b"\x00\x01")}, "ca: .*is not a PEM file"),
    "PEM that is none": (
        lambda c, f: {"ca": written(f, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")},
        "ca: .*holds no readable certificate of an authority",
    ),
    "a key alone": (lambda c, f: {"key": c.client()["key"]}, "cert is missing.*give both, or neither"),
    "a key of another": (
        lambda c, f: c.client() | {"key": theirs().client()["key"]},
        "key belongs to another certificate",
    ),
    "the files swapped": (
        lambda c, f: c.client() | {"cert": c.client()["key"], "key": c.client()["cert"]},
        "cert must hold a certificate, and key its private key",
    ),
    "an encrypted key": (lambda c, f: c.client() | {"key": encrypted(c.client()["key"], f)}, "without a password"),
    "a number": (lambda c, f: {"ca": 5}, "ca is of type int"),
}


def written(folder, data):
    (folder / "file.pem").write_bytes(data)
    return folder / "file.pem"


def encrypted(path, folder):
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(path.read_bytes(), None)
    return written(folder, key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"x")))


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_of_a_client_are_one_sentence(what, tmp_path):
    make, said = WRONG[what]
    with pytest.raises(errors.ConfigError, match=said):
        sh.Security(**make(ours(), tmp_path))


@pytest.mark.parametrize("what", [name for name in WRONG if name != "a key alone"])
def test_wrong_files_of_a_server_are_one_sentence(what, tmp_path):
    make, said = WRONG[what]
    given = make(ours(), tmp_path)
    right = {"cert": ours().folder / "server.pem", "key": ours().folder / "server-key.pem"}
    if "cert" in given:
        given.pop("ca")
    else:
        given = right | {"client_ca": given["ca"]}
    with pytest.raises(errors.ConfigError, match=said.replace("ca:", "client_ca:").replace("ca is", "client_ca is")):
        ServerTls(**given)


def test_certificates_and_schemes_that_do_not_go_together():
    with pytest.raises(errors.ConfigError, match="ca is given, but grpc:// uses no certificates"):
        sh.connect("grpc://127.0.0.1:1/x", security=sh.Security(ca=ours().ca))
    with pytest.raises(errors.ConfigError, match="grpcs:// always checks"):
        sh.connect("grpcs://127.0.0.1:1/x", security=sh.Security(insecure=True))


def test_an_expired_certificate_is_refused(tmp_path, monkeypatch):
    own = expired(tmp_path, monkeypatch)
    with pytest.raises(errors.ConfigError, match=r"server.pem' expired at \d{4}-"):
        ServerTls(cert=own / "server.pem", key=own / "server-key.pem")


def expired(folder, monkeypatch):
    from schoolhouse_server.security import certs

    authority = Authority.make(folder)
    monkeypatch.setattr(certs, "_SKEW", certs.datetime.timedelta(days=9))  # so that it may end in the past
    authority.add_server("server", ["localhost"], days=-1)
    authority.add_client("client", days=-1)
    return folder


@pytest.fixture
def patient(monkeypatch):
    """The look at why a server cannot be talked to has the time that a loaded machine takes."""
    monkeypatch.setattr("schoolhouse.remote.handshake._STEP_TIMEOUT_S", 20.0)
    monkeypatch.setattr("schoolhouse.remote.handshake._TIMEOUT_S", 30.0)


@pytest.mark.usefixtures("patient")
def test_an_expired_certificate_of_a_client_is_said(tmp_path, monkeypatch):
    own = expired(tmp_path, monkeypatch)
    with serve(Net(32, seed=1), tls=ours().server(client_ca=own / "ca.pem")) as server:
        given = {"ca": ours().ca, "cert": own / "client.pem", "key": own / "client-key.pem"}
        with pytest.raises(errors.AuthenticationError, match="has it expired"):
            sh.connect(server.url, security=sh.Security(**given), timeouts=sh.Timeouts(connect_s=0.5))


def test_a_server_that_says_nothing_is_not_told_to_speak_no_tls():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(errors.TeacherUnavailableError, match="no server answered"):
            sh.connect(
                f"grpcs://127.0.0.1:{silent.getsockname()[1]}/x",
                security=sh.Security(ca=ours().ca),
                timeouts=sh.Timeouts(connect_s=0.3),
            )


@pytest.mark.usefixtures("patient")
def test_an_authority_of_clients_that_was_taken_out_is_known_no_more(tmp_path):
    known = tmp_path / "clients.pem"
    known.write_bytes(theirs().ca.read_bytes())
    old = {"cert": theirs().client()["cert"], "key": theirs().client()["key"], "ca": ours().ca}
    with serve(Net(32, seed=1), tls=ours().server(client_ca=known), http_port=0) as server:
        assert page(server, **old) == 200
        sh.connect(server.url, security=sh.Security(**old)).close()
        known.write_bytes(ours().ca.read_bytes())
        assert page(server, **ours().client()) == 200
        with pytest.raises(OSError):  # noqa: PT011  # whichever of the alert and the reset comes first
            page(server, **old)
        sh.connect(server.url, security=sh.Security(**ours().client())).close()
        with pytest.raises(errors.AuthenticationError):
            sh.connect(server.url, security=sh.Security(**old), timeouts=sh.Timeouts(connect_s=0.5))


def page(server, ca, cert, key):
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(cert, key)
    return fetch(server.web.url + "/metrics", context=context)[0]
