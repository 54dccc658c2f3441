"""Find out why a server cannot be reached, by a handshake in plain Python, since gRPC's errors do not say."""

import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator

from schoolhouse_wire import background
from schoolhouse_wire.rpc.security import ClientSecurity

from schoolhouse.errors import AuthenticationError, ConfigError, SchoolhouseError, TeacherUnavailableError

_STEP_TIMEOUT_S = 1.0
_TIMEOUT_S = 3.0
_HTTP1 = b"GET / HTTP/1.1\r\nHost: schoolhouse\r\nConnection: close\r\n\r\n"
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # its preface, and empty settings


def why_not(target: str, security: ClientSecurity) -> SchoolhouseError | None:
    """The reason why the server at `target` did not answer in time, as an error; None if it stays unknown."""
    found: list[SchoolhouseError | None] = []

    def look() -> None:
        found.append(_look(target, security))

    # In a thread, since looking up a name may take any time.
    looking = background.thread(look, name="schoolhouse-handshake", on_death=background.go_on)
    looking.start()
    looking.join(_TIMEOUT_S)
    return found[0] if found else None


def _look(target: str, security: ClientSecurity) -> SchoolhouseError | None:
    try:
        opened = _connected(target)
    except (socket.gaierror, ValueError) as err:
        name, why = target.rpartition(":")[0], getattr(err, "strerror", None) or err
        return TeacherUnavailableError(f"the name {name!r} does not resolve ({why}); is HOST right?")
    except ConnectionRefusedError:
        return TeacherUnavailableError(f"nothing listens at {target}; is the teacher up, and is the port right?")
    except OSError as err:
        return TeacherUnavailableError(
            f"{target} cannot be reached ({err.strerror or err}); is HOST right, and does a firewall block it?"
        )
    try:
        with opened:
            return _over_tls(opened, target, security) if security.tls else _in_plaintext(opened, target)
    except (OSError, ValueError):
        return None


def _connected(target: str) -> socket.socket:
    host, _, port = target.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), _STEP_TIMEOUT_S)


def _in_plaintext(opened: socket.socket, target: str) -> SchoolhouseError | None:
    with contextlib.suppress(OSError):  # raised if the server does not speak TLS
        return _if_tls(opened, target)
    with _connected(target) as another:
        another.sendall(_HTTP1)
        return _no_grpc(target) if another.recv(5) == b"HTTP/" else None


def _no_grpc(target: str) -> SchoolhouseError:
    return ConfigError(
        f"the server at {target} speaks HTTP/1 and not gRPC: it is another service, or the http_port of a pool; "
        "students connect to the pool's port"
    )


def _if_tls(opened: socket.socket, target: str) -> SchoolhouseError:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only to see whether it is TLS; nothing is sent
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(opened):
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
    except ConnectionError:  # not for a timeout: a slow server may speak TLS
        return ConfigError(f"the server at {target} does not speak TLS; connect to grpc://{target}/NAME if it has none")
    with wrapped:
        if wrapped.selected_alpn_protocol() != "h2":
            return _no_grpc(target)
        return _after_handshake(wrapped, target, security)


def _after_handshake(wrapped: ssl.SSLSocket, target: str, security: ClientSecurity) -> SchoolhouseError | None:
    """Check that the server takes the client's certificate: in TLS 1.3 it does so after the client's handshake."""
    try:
        wrapped.sendall(_HTTP2)
        refused = not wrapped.recv(1)
    except (ssl.SSLError, ConnectionError):
        refused = True
    if not refused:
        return None
    if security.cert is None:
        text = "requires a certificate of the client; give cert and key"
    else:
        text = "does not accept this client's certificate; has it expired, or is it from an authority of another pool?"
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
    """A temporary file that only this user can read, since Python's ssl takes keys only by path."""
    descriptor, path = tempfile.mkstemp()
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        yield path
    finally:
        os.unlink(path)
