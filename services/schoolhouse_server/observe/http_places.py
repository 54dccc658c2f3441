"""An HTTP server with few places for connections, which slow clients cannot keep from others.

A connection waits for its client until its request is whole, and again while its answer is read. When all places are
taken, or all of one address, the connection that has waited longest ends for the new one. One whose answer is being
made does not: if no other can end, the new one is told to come again.
"""

import contextlib
import functools
import io
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from schoolhouse_wire import background

_MAX_CONNECTIONS = 16
_MAX_OF_ADDRESS = 12
_REQUEST_S = 5.0  # for a whole request to come in, with the handshake of TLS
_ANSWER_S = 10.0  # for an answer to be read
_END_S = 1.0  # for the thread of a connection that gives up its place
_log = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """An HTTP server with a thread for each connection, whose handler is a `Handler`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: Callable[..., "Handler"], tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._changed = threading.Condition()
        self._addresses: dict[socket.socket, str] = {}  # of all connections that have a place
        self._waiting: dict[socket.socket, None] = {}  # those that wait for their clients, the longest first
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind, without asking a name server for this host's name, as HTTPServer does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a restarted server can bind it
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "", self.socket.getsockname()[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; the handshake of TLS is made in the connection's own thread, as it first reads."""
        request, client_address = super().get_request()
        if self._tls is not None:
            request = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return request, client_address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own; if there is no place for it, refuse it at once."""
        if self._place(request, client_address[0]):
            super().process_request(request, client_address)
            return
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.send(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        answer = functools.partial(super().process_request_thread, request, client_address)
        background.run(answer, "an HTTP connection", background.go_on)

    def _place(self, request: socket.socket, address: str) -> bool:
        with self._changed:
            rivals = self._rivals(address)
            oldest = next((one for one in self._waiting if one in rivals), None)
            if oldest is not None:
                del self._waiting[oldest]
                with contextlib.suppress(OSError):  # its client has gone
                    socket.socket.shutdown(oldest, socket.SHUT_RDWR)  # SSLSocket's own would let it go on in plaintext
                self._changed.wait_for(lambda: not self._rivals(address), _END_S)
            if self._rivals(address):
                return False
            self._addresses[request], self._waiting[request] = address, None
            return True

    def _rivals(self, address: str) -> list[socket.socket]:
        """The connections of which one must end before one of this address has a place; none if there is one."""
        own = [one for one, its in self._addresses.items() if its == address]
        if len(own) >= _MAX_OF_ADDRESS:
            return own
        return list(self._addresses) if len(self._addresses) >= _MAX_CONNECTIONS else []

    @contextlib.contextmanager
    def answering(self, request: socket.socket) -> Iterator[None]:
        """While it is entered, the connection keeps its place; `ConnectionAbortedError` if that is already lost."""
        with self._changed:
            if request not in self._waiting:
                raise ConnectionAbortedError("another connection has got its place")
            del self._waiting[request]
        yield
        with self._changed:
            self._waiting[request] = None

    def shutdown_request(self, request: Any) -> None:
        """Free the place of a connection, and close it."""
        with self._changed:
            self._waiting.pop(request, None)
            self._addresses.pop(request, None)
            self._changed.notify_all()
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log only for debugging, as a client that went away, or was too slow, is no error of this server."""
        _log.debug("an HTTP connection ended early", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One connection with one request."""

    server: Server
    timeout = _ANSWER_S  # for sending the whole answer, as Python's sendall counts it

    def setup(self) -> None:
        """Give the whole request one deadline, so that a client that sends a byte now and then cannot stay longer."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_UntilDeadline(self.connection, time.monotonic() + _REQUEST_S))


class _UntilDeadline(io.RawIOBase):
    """Reads from a socket until a deadline on time.monotonic's clock."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection, self._deadline = connection, deadline

    def readable(self) -> bool:
        """True, as it can be read from."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes until the deadline; raises `TimeoutError` then."""
        self._connection.settimeout(max(self._deadline - time.monotonic(), 0.001))
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(_ANSWER_S)
