"""A private certificate authority for a pool: its own certificate, and those of servers and clients, as PEM files."""

import contextlib
import datetime
import ipaddress
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from schoolhouse_wire.errors import ConfigError

_CA, _CA_KEY = "ca.pem", "ca-key.pem"
_CA_DAYS = 3650
_SKEW = datetime.timedelta(minutes=5)  # how far behind the clock of a machine may be that checks a new certificate
_HERE = ("localhost", "127.0.0.1", "::1")  # in every server's certificate, for clients on its own machine
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


class Authority:
    """Signs certificates; its key and certificate are `ca-key.pem` and `ca.pem` in a folder."""

    def __init__(self, folder: Path, key: ec.EllipticCurvePrivateKey, cert: x509.Certificate) -> None:
        self._folder, self._key, self._cert = folder, key, cert

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        """Make a new authority in a folder, which is created if it does not exist.

        Raises:
            ConfigError: the folder holds an authority already, or cannot be written.
        """
        for name in (_CA, _CA_KEY):
            if (folder / name).exists():
                raise ConfigError(
                    f"{folder / name} exists and is not overwritten, as the certificates that it signed would become "
                    "worthless: add to it with --add-server NAME --host HOST or --add-client NAME, or give another "
                    "folder"
                )
        key = ec.generate_private_key(ec.SECP256R1())
        own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "schoolhouse pool authority")])
        built = _builder(own, own, key, _CA_DAYS)
        built = built.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        built = built.add_extension(_usage(signs_certificates=True), critical=True)
        cert = built.sign(key, hashes.SHA256())
        with _written(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_key(folder / _CA_KEY, key)
            _write(folder / _CA, _pem(cert), 0o644)
        return cls(folder, key, cert)

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Load the authority in a folder.

        Raises:
            ConfigError: the folder holds none, or it cannot be read.
        """
        try:
            key = serialization.load_pem_private_key((folder / _CA_KEY).read_bytes(), password=None)
            cert = x509.load_pem_x509_certificate((folder / _CA).read_bytes())
        except (OSError, ValueError, TypeError) as err:
            why = err.strerror if isinstance(err, OSError) else "they must be PEM files that this command made"
            raise ConfigError(f"{folder} has no authority to add to: cannot read {_CA_KEY} and {_CA}: {why}") from err
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != cert.public_key():
            raise ConfigError(f"{_CA_KEY} in {folder} is not the key of {_CA}; restore both from one copy")
        return cls(folder, key, cert)

    def add_server(self, name: str, hosts: Sequence[str], days: int) -> list[Path]:
        """Make a certificate and key for servers that clients reach by these names and addresses, or on loopback."""
        if not hosts:
            raise ConfigError("a server's certificate needs the names or addresses that clients use: give --host")
        names = check_hosts([*hosts, *_HERE])
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]  # as a client too, for probes
        return self._add(name, days, usage, x509.SubjectAlternativeName(names))

    def add_client(self, name: str, days: int) -> list[Path]:
        """Make a certificate and key for a client of servers that have a `client_ca`."""
        return self._add(name, days, [ExtendedKeyUsageOID.CLIENT_AUTH], None)

    def _add(
        self,
        name: str,
        days: int,
        usage: list[x509.ObjectIdentifier],
        names: x509.SubjectAlternativeName | None,
    ) -> list[Path]:
        paths = [self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"]
        _check_name(name, paths)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        built = _builder(subject, self._cert.subject, key, days)
        built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        built = built.add_extension(_usage(signs_certificates=False), critical=True)
        built = built.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        built = built.add_extension(own, critical=False)
        if names is not None:
            built = built.add_extension(names, critical=False)
        with _written(self._folder):
            _write_key(paths[1], key)
            _write(paths[0], _pem(built.sign(self._key, hashes.SHA256())), 0o644)
        return paths


def open_to_others(folder: Path) -> list[str]:
    """What in an authority's folder other users of the machine may read or change, and how to mend each."""
    found = []
    if folder.stat().st_mode & 0o022:
        found.append(f"other users may put files of their own in {folder}: chmod go-w {folder}")
    for key in sorted(folder.glob("*-key.pem")):
        if key.stat().st_mode & 0o077:
            found.append(
                f"other users may read or change the key {key}: chmod go-rwx {key}, and make it anew if they did"
            )
    return found


def check_hosts(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The names and addresses as certificates hold them; raises `ConfigError` for invalid ones."""
    return [_general(host) for host in dict.fromkeys(hosts)]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if not all(0 < len(label) < 64 and set(label) <= _NAME_CHARACTERS for label in labels) or len(host) > 253:
        raise ConfigError(f"--host {host!r} is not a name or address; give one as students type it, without a port")
    return x509.DNSName(host)


def _check_name(name: str, paths: Sequence[Path]) -> None:
    if not 0 < len(name) <= 64 or not set(name) <= _NAME_CHARACTERS or name.startswith("."):
        raise ConfigError(f"{name!r} cannot be a certificate's name; give up to 64 of a-z, A-Z, 0-9, '-', '_' and '.'")
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists and is not overwritten; give another name, or move it away first")


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise ConfigError(f"cannot write to {folder}: {err.strerror}") from err


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(path, data, 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a new file; `mode` holds from its creation, so that a private key is never readable by others."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
