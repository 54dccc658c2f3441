"""Why a server that is there cannot be talked to: a handshake of Python's own, as gRPC's errors don't tell in types."""

import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator

from schoolhouse_wire import background
from schoolhouse_wire.security import ClientSecurity

from schoolhouse.errors import AuthenticationError, ConfigError, SchoolhouseError

_STEP_TIMEOUT_S = 1.0
_TIMEOUT_S = 3.0
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # its preface, and empty settings


def why_not(target: str, security: ClientSecurity) -> SchoolhouseError | None:
    """What about TLS keeps a client from the server at `target`; None if that is not it, or cannot be found out."""
    found: list[SchoolhouseError | None] = []

    def look() -> None:
        found.append(_look(target, security))

    # In a thread, as looking up a name may take any time.
    looking = background.thread(look, name="schoolhouse-handshake", on_death=background.go_on)
    looking.start()
    looking.join(_TIMEOUT_S)
    return found[0] if found else None


def _look(target: str, security: ClientSecurity) -> SchoolhouseError | None:
    host, _, port = target.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _STEP_TIMEOUT_S) as opened:
            return _over_tls(opened, target, security) if security.tls else _in_plaintext(opened, target)
    except (OSError, ValueError):
        return None


def _in_plaintext(opened: socket.socket, target: str) -> SchoolhouseError | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent: only whether it is TLS
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(opened):  # raises an OSError for who speaks none
        return ConfigError(f"the server at {target} speaks TLS: connect to grpcs://{target}/NAME")


def _over_tls(opened: socket.socket, target: str, security: ClientSecurity) -> SchoolhouseError | None:
    try:
        wrapped = _context(security).wrap_socket(opened, server_hostname=security.server_name)
    except ssl.SSLCertVerificationError as err:
        own = "the authorities in ca"
        vouches = own if security.ca is not None else "an authority of the public web, as no ca is given"
        return AuthenticationError(
            f"the server at {target} did not prove to be {security.server_name!r}: {err.verify_message}. It needs a "
            f"certificate for that name from {vouches}"
        )
    except ssl.SSLError as err:
        return ConfigError(
            f"the server at {target} does not speak TLS as it should ({err.reason}); connect to grpc://{target}/NAME "
            "if it has none"
        )
    except ConnectionError:  # one that is slow may speak it
        return ConfigError(f"the server at {target} does not speak TLS; connect to grpc://{target}/NAME if it has none")
    with wrapped:
        return _after_handshake(wrapped, target, security)


def _after_handshake(wrapped: ssl.SSLSocket, target: str, security: ClientSecurity) -> SchoolhouseError | None:
    """In TLS 1.3 a server looks at the client's certificate when the client takes the handshake to be over."""
    try:
        wrapped.sendall(_HTTP2)
        refused = not wrapped.recv(1)
    except (ssl.SSLError, ConnectionError):
        refused = True
    if not refused:
        return None
    if security.cert is None:
        text = "wants a certificate of the client's; give cert and key"
    else:
        text = "does not take this client's certificate; has it expired, or is it from an authority of another pool?"
    return AuthenticationError(f"the server at {target} {text}")


def _context(security: ClientSecurity) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=security.ca.decode("ascii", "replace") if security.ca else None)
    context.set_alpn_protocols(["h2"])
    if security.cert is not None and security.key is not None:
        with _file(security.cert + b"\n" + security.key) as path:
            context.load_cert_chain(path)
    return context


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[str]:
    """A file that only this user can read, for a moment: Python takes keys by path alone."""
    descriptor, path = tempfile.mkstemp()
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        yield path
    finally:
        os.unlink(path)
