"""A server's certificate: checked before it is used, and read again as its files change."""

import datetime
import logging
import os
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from schoolhouse_wire.errors import ConfigError
from schoolhouse_wire.rpc.security import check_authorities, check_pair, is_loopback, read_pem

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """PEM files of a server: its certificate with intermediate ones, and its key without a password.

    With `client_ca`, a file of authorities, the server answers only clients with a certificate that one of them signed.
    In a pool, every server's certificate must hold the name that students connect to.

    Raises:
        ConfigError: a file is missing, invalid or expired, or the key is not that of the certificate.
    """

    cert: str | Path
    key: str | Path
    client_ca: str | Path | None = None

    def __post_init__(self) -> None:
        _read(self)

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials for a gRPC server; they follow changes of the files."""
        files = _Files(self)

        def changed() -> Any:
            found = files.changed()
            return None if found is None else _configuration(found)

        initial = _configuration(_read(self))
        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(  # calls `changed` at each handshake
            initial, changed, require_client_authentication=self.client_ca is not None
        )
        return credentials

    def context(self) -> ssl.SSLContext:
        """The context for a Python socket, such as that of the HTTP server; it follows changes of the files."""
        context = _Context(ssl.PROTOCOL_TLS_SERVER)
        context.follow(self)
        return context


@dataclass(frozen=True, repr=False)
class _Read:
    """The contents of the files."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


class _Files:
    """Notices when the files have changed; invalid new files are not taken, and the log says so once."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._seen = self._state()

    def changed(self) -> _Read | None:
        """The contents of the files if they have changed; None if not, or if they are invalid."""
        with self._lock:
            state = self._state()
            if state == self._seen:
                return None
            self._seen = state
        try:
            found = _read(self._tls)
        except ConfigError as err:
            _log.error("the new certificate is not used, and the one before it stays: %s", err)
            return None
        _log.info("a new certificate is used from now on")
        return found

    def _state(self) -> list[tuple[int, int] | None]:
        paths = (self._tls.cert, self._tls.key, self._tls.client_ca)
        return [_stamp(path) for path in paths if path is not None]


class _Context(ssl.SSLContext):
    """Looks for changed files before each handshake."""

    def follow(self, tls: ServerTls) -> None:
        """Use these files."""
        self._tls, self._files = tls, _Files(tls)
        self._now = _context_of(tls)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """Begin a connection."""
        if self._files.changed() is not None:
            self._now = _context_of(self._tls)  # a new context, as one cannot forget an authority that it has loaded
        return self._now.wrap_socket(*args, **kwargs)


def _context_of(tls: ServerTls) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(tls.cert, tls.key)
    if tls.client_ca is not None:
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(tls.client_ca)
    return made


def check_exposure(host: str, tls: ServerTls | None, *, insecure: bool) -> None:
    """Raises `ConfigError` if a server would listen beyond this machine in plaintext without `insecure`."""
    if not isinstance(insecure, bool):
        raise ConfigError(f"insecure is {insecure!r}; choices: True, False")
    if tls is None and not insecure and not is_loopback(host):
        raise ConfigError(
            f"host is {host!r}, which other machines can reach, and there is no TLS: anybody on the network between "
            "could read and change everything. Give tls=ServerTls(cert=..., key=...), for which `schoolhouse certs` "
            "makes the files, listen on 127.0.0.1, or say insecure=True"
        )


def _configuration(found: _Read) -> grpc.ServerCertificateConfiguration:
    made: grpc.ServerCertificateConfiguration = grpc.ssl_server_certificate_configuration(
        [(found.key, found.cert)], root_certificates=found.client_ca
    )
    return made


def _stamp(path: str | Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _read(tls: ServerTls) -> _Read:
    cert, key, client_ca = (read_pem(name, getattr(tls, name)) for name in ("cert", "key", "client_ca"))
    if cert is None or key is None:
        raise ConfigError("tls: cert and key must be paths of PEM files")
    check_pair(tls.cert, tls.key)
    _check_times(cert, tls.cert)
    if client_ca is not None:
        check_authorities("client_ca", client_ca, tls.client_ca)
    return _Read(cert, key, client_ca)


def _check_times(data: bytes, path: str | Path) -> None:
    first, now = x509.load_pem_x509_certificates(data)[0], datetime.datetime.now(datetime.timezone.utc)
    since, until = first.not_valid_before_utc, first.not_valid_after_utc
    if now >= until:
        raise ConfigError(f"cert: {str(path)!r} expired at {until:%Y-%m-%d %H:%M} UTC; make or ask for a new one")
    if now < since:
        raise ConfigError(
            f"cert: {str(path)!r} is valid from {since:%Y-%m-%d %H:%M} UTC on; is this machine's clock right?"
        )
