"""`schoolhouse certs`: an authority of one's own, and the pool file's section that uses it."""

import ipaddress
import re
import stat

import pytest
from authority import ours
from cryptography import x509
from schoolhouse import errors
from schoolhouse_server import ServerTls
from schoolhouse_server.cli.main import app
from schoolhouse_server.pool.config import PoolConfig, TeacherSpec, load_pool
from schoolhouse_server.pool.pool_state import Desired
from typer.testing import CliRunner


def certs(*arguments):
    found = CliRunner().invoke(app, ["certs", *map(str, arguments)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_it_makes_an_authority_a_server_and_a_client(tmp_path):
    folder = tmp_path / "certs"
    shown = certs(folder, "--host", "teachers.example", "--host", "10.0.0.10", "--host", "fd00::1").output
    assert [line.rpartition("/")[2] for line in shown.split()] == [
        "server.pem", "server-key.pem", "client.pem", "client-key.pem"
    ]  # fmt: skip
    for path in folder.iterdir():
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o600 if "key" in path.name else 0o644), path
        assert ("PRIVATE KEY" in path.read_text()) == ("key" in path.name)
    server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["teachers.example", "localhost"]
    addresses = ["10.0.0.10", "fd00::1", "127.0.0.1", "::1"]
    assert names.get_values_for_type(x509.IPAddress) == list(map(ipaddress.ip_address, addresses))
    ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    server.verify_directly_issued_by(ca)
    assert 364 <= (server.not_valid_after_utc - server.not_valid_before_utc).days <= 366
    ServerTls(cert=folder / "server.pem", key=folder / "server-key.pem", client_ca=folder / "ca.pem")


def test_an_authority_is_not_overwritten(tmp_path):
    certs(tmp_path, "--host", "h")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(errors.ConfigError, match="exists and is not overwritten.*--add-server"):
        certs(tmp_path, "--host", "h")
    with pytest.raises(errors.ConfigError, match=r"client.pem exists and is not overwritten"):
        certs(tmp_path, "--add-client", "client")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_it_warns_of_what_other_users_can_read_or_change(tmp_path):
    folder = tmp_path / "certs"
    assert "warning" not in certs(folder, "--host", "h").stderr
    folder.chmod(0o777)
    (folder / "ca-key.pem").chmod(0o640)
    warned = certs(folder, "--add-client", "team-b").stderr
    assert f"chmod go-w {folder}\n" in warned
    assert f"chmod go-rwx {folder / 'ca-key.pem'}" in warned
    assert "server-key.pem" not in warned


def test_more_certificates_of_the_same_authority(tmp_path):
    certs(tmp_path, "--host", "h")
    certs(tmp_path, "--add-server", "second", "--host", "other", "--days", 3)
    certs(tmp_path, "--add-client", "team-b")
    ca = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    for name in ("second", "team-b"):
        x509.load_pem_x509_certificate((tmp_path / f"{name}.pem").read_bytes()).verify_directly_issued_by(ca)
        ServerTls(cert=tmp_path / f"{name}.pem", key=tmp_path / f"{name}-key.pem")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--host HOST"),
        (["--host", "a b"], "is not a name or address"),
        (["--host", "h:7070"], "without a port"),
        (["--add-server", "x"], "has no authority to add to.*No such file"),
        (["--add-client", "x", "--host", "h"], "--host is for a server"),
    ],
)
def test_wrong_arguments_leave_nothing(arguments, said, tmp_path):
    with pytest.raises(errors.ConfigError, match=said):
        certs(tmp_path / "new", *arguments)
    assert not (tmp_path / "new").exists()


def test_a_broken_authority_is_one_sentence(tmp_path):
    certs(tmp_path, "--host", "h")
    (tmp_path / "ca.pem").write_bytes((ours().folder / "ca.pem").read_bytes())
    with pytest.raises(errors.ConfigError, match=r"ca-key.pem in .* is not the key of ca.pem"):
        certs(tmp_path, "--add-client", "x")
    (tmp_path / "ca-key.pem").write_text("nonsense")
    with pytest.raises(errors.ConfigError, match="cannot read ca-key.pem and ca.pem: they must be PEM"):
        certs(tmp_path, "--add-client", "x")
    with pytest.raises(errors.ConfigError, match="cannot be a certificate's name"):
        certs(ours().folder, "--add-client", "../x")


POOL = "teachers: {a: {build: 'm:f'}}\n"


def pool(folder, text):
    (folder / "pool.yaml").write_text(POOL + text)
    return load_pool(folder / "pool.yaml")


def test_a_pool_beyond_loopback_says_how_it_is_safe(tmp_path):
    for host in ("0.0.0.0", "::", "teachers.example", "10.0.0.0/24"):
        with pytest.raises(
            errors.ConfigError, match=r"traffic would be plaintext: give security: {tls: .*insecure: tr"
        ):
            pool(tmp_path, f"host: '{host}'")
        assert pool(tmp_path, f"host: '{host}'\nsecurity: {{insecure: true}}").tls is None
    for host in ("127.0.0.1", "localhost", "::1"):
        assert pool(tmp_path, f"host: '{host}'").tls is None


def test_the_certificate_of_a_pool_lies_beside_its_file(tmp_path):
    certs(tmp_path / "certs", "--host", "h")
    files = "cert: certs/server.pem, key: certs/server-key.pem, client_ca: certs/ca.pem"
    found = pool(tmp_path, f"host: 0.0.0.0\nsecurity: {{tls: {{{files}}}}}").tls
    assert found.cert == tmp_path / "certs/server.pem"
    assert found.client_ca == tmp_path / "certs/ca.pem"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("tls: {cert: none.pem, key: none.pem}", "security.tls: cert: cannot read .*none.pem.*No such file"),
        ("tls: {cert: none.pem}", "security.tls.key: .*required"),
        ("tls: {cert: pool.yaml, key: pool.yaml}", "is not a PEM file"),
        ("insecure: maybe", "security.insecure"),
        ("tls: {cert: a, key: b}, insecure: true", "tls and insecure: true are both given"),
        ("tsl: {}", "security.tsl"),
    ],
)
def test_a_wrong_section_is_one_sentence(section, said, tmp_path):
    with pytest.raises(errors.ConfigError, match=re.compile("pool.yaml is wrong: " + ".*" + said)):
        pool(tmp_path, f"host: 0.0.0.0\nsecurity: {{{section}}}")


def test_a_roll_does_not_turn_tls_on():
    teachers = {"a": TeacherSpec(build="m:f")}
    before = Desired.of(PoolConfig(teachers=teachers))
    tls = {"cert": "server.pem", "key": "key.pem"}
    with pytest.raises(errors.ConfigError, match="security.tls of the file differs from that of the pool"):
        before.rolled(PoolConfig(teachers=teachers, security={"tls": tls}), ["a"])
