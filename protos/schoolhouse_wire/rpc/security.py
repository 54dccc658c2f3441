"""Security of a client: TLS, its certificate and its token; plaintext only within a machine unless asked for."""

import dataclasses
import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from schoolhouse_wire.errors import ConfigError

_MAX_TOKEN = 4096
_MAX_PEM_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ClientSecurity:
    """The token, and the contents of the files, that `connect` was given. Copies hold them too, also pickled ones.

    With `tls` every server must prove to be `server_name`, by a certificate from `ca` or, without one, from an
    authority that gRPC knows. `server_name` is the host that the user typed. Replicas that a directory lists must prove
    to be the same host, whatever their addresses.
    """

    tls: bool = False
    server_name: str = ""
    ca: bytes | None = field(default=None, repr=False)
    cert: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    token: str = field(default="", repr=False)
    insecure: bool = False

    @classmethod
    def read(
        cls,
        *,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        token: str | None = None,
        insecure: bool = False,
    ) -> "ClientSecurity":
        """Read the PEM files, which are not read again later.

        Raises:
            ConfigError: if a file is missing or invalid, if certificate and key do not match, or for an invalid token.
        """
        if (cert is None) != (key is None):
            raise ConfigError(f"cert is {_shown(cert)} and key is {_shown(key)}; give both, or neither")
        if not isinstance(insecure, bool):
            raise ConfigError(f"insecure is {insecure!r}; choices: True, False")
        found = cls(
            ca=read_pem("ca", ca),
            cert=read_pem("cert", cert),
            key=read_pem("key", key),
            token=_checked(token),
            insecure=insecure,
        )
        if found.ca is not None:
            check_authorities("ca", found.ca, ca)
        if cert is not None and key is not None:
            check_pair(cert, key)
        return found

    def towards(self, host: str, *, tls: bool) -> "ClientSecurity":
        """A copy of these settings for the servers that the user knows as `host`.

        Raises:
            ConfigError: for certificates without TLS, or `insecure` with TLS.
        """
        given = [name for name in ("ca", "cert") if getattr(self, name) is not None]
        if given and not tls:
            raise ConfigError(f"{given[0]} is given, but grpc:// uses no certificates; connect to grpcs://")
        if self.insecure and tls:
            raise ConfigError(
                "insecure=True allows grpc:// to other machines; grpcs:// always checks the server's certificate. "
                "Leave it out, or connect to grpc://"
            )
        return dataclasses.replace(self, tls=tls, server_name=host if tls else "")

    def allow(self, target: str) -> None:
        """Raise `ConfigError` for plaintext to a `target` that may be on another machine, without `insecure`."""
        if self.tls or self.insecure or is_loopback(target.rpartition(":")[0]):
            return
        raise ConfigError(
            f"{target} may be another machine, and grpc:// is plaintext: anyone on the network path can read and "
            "change inputs, features and the token. Connect to grpcs://, to a loopback address (127.0.0.1, ::1, "
            "localhost), or say security=Security(insecure=True) in connect() (--insecure)"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` is on this machine for certain; names are not looked up, so of names only `localhost` is."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_pem(name: str, path: str | Path | None) -> bytes | None:
    """The bytes of a PEM file; None without a path.

    Raises:
        ConfigError: if the file cannot be read, or is not PEM.
    """
    if path is None:
        return None
    if not isinstance(path, str | Path):
        raise ConfigError(f"{name} is of type {type(path).__name__}; it must be the path of a PEM file")
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_PEM_BYTES)
    except (OSError, ValueError) as err:
        raise ConfigError(f"{name}: cannot read {str(path)!r}: {getattr(err, 'strerror', None) or err}") from err
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{name}: {str(path)!r} is not a PEM file; it must have a line -----BEGIN ...-----")
    return data


def check_pair(cert: str | Path, key: str | Path) -> None:
    """Raise `ConfigError` unless `cert` holds certificates, and `key` the unencrypted key of the first of them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as err:
        if err.reason == "KEY_VALUES_MISMATCH":
            why = "the key belongs to another certificate"
        else:
            why = "cert must hold a certificate, and key its private key, without a password, both as PEM"
        raise ConfigError(f"cert {str(cert)!r} and key {str(key)!r} do not go together: {why}") from err
    except (OSError, ValueError) as err:
        raise ConfigError(f"key {str(key)!r} cannot be used: {err}") from err


def check_authorities(name: str, data: bytes, path: str | Path | None) -> None:
    """Raise `ConfigError` unless `data` holds certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=data.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as err:
        raise ConfigError(f"{name}: {str(path)!r} holds no readable certificate of an authority") from err


def _no_password() -> str:
    raise ValueError("it is encrypted; give a key without a password, in a file that only its owner can read")


def _checked(token: str | None) -> str:
    if token is None:
        return ""
    if not isinstance(token, str) or not 0 < len(token) <= _MAX_TOKEN or not all("!" <= c <= "~" for c in token):
        raise ConfigError(  # the message must not show the token
            f"token must be a string of 1 to {_MAX_TOKEN} printable ASCII characters without spaces, as "
            "`schoolhouse token` makes them, or None"
        )
    return token


def _shown(path: str | Path | None) -> str:
    return "missing" if path is None else repr(str(path))
