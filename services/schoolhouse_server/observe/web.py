"""A small HTTP server that shows replica sets: /metrics for Prometheus, /api/state as JSON, and the page at /.

The page draws what /api/panels says. The server only reads, answers only GET and HEAD of the paths that it knows, and
uses only a few threads (see http_places.py). With a gate it answers only clients with an admin's token, given as a
bearer token or as the password of a browser's login.
"""

import base64
import functools
import ipaddress
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

from schoolhouse_wire import background
from schoolhouse_wire.errors import (
    AuthenticationError,
    ConfigError,
    PermissionDeniedError,
    SchoolhouseError,
    TeacherUnavailableError,
)
from schoolhouse_wire.rpc.security import is_loopback
from schoolhouse_wire.scrubbing import scrub
from schoolhouse_wire.v1.directory_pb2 import ReplicaSet

from schoolhouse_server.observe import metrics
from schoolhouse_server.observe.http_places import Handler, Server
from schoolhouse_server.observe.state_json import state_json
from schoolhouse_server.observe.watched import Watched
from schoolhouse_server.security.auth import Gate, bearer_of
from schoolhouse_server.security.ports import joined, own_address

Source = Callable[[], Iterable[ReplicaSet]]
_Answer = tuple[int, bytes, str]  # status, body, type of the body

_REST_S = 1.0  # pause before serving again after a failure
_CLOSE_S = 10.0
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/chart.js": ("chart.js", "text/javascript; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_DATA = ("/metrics", "/api/state", "/api/panels")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",
}
_MORE = {  # further headers by status
    401: {"WWW-Authenticate": 'Basic realm="schoolhouse: the password is an admin\'s token", charset="UTF-8"'},
    405: {"Allow": "GET, HEAD"},
}


class WebServer:
    """Serves the replica sets that `source()` returns at each request.

    `start()` listens; `close()` ends it.
    """

    def __init__(
        self,
        source: Source,
        *,
        host: str = "127.0.0.1",
        port: int | range = 0,
        gate: Gate | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Make the server, which does not listen yet; of a range of ports it takes the first that is free.

        Clients need an admin's token if the `gate` has tokens; else everybody is answered. With `tls` it speaks HTTPS.

        Raises:
            ConfigError: for an invalid port.
        """
        self._ports = port if isinstance(port, range) else (port,)
        if not all(isinstance(one, int) and 0 <= one <= 65535 for one in self._ports):
            raise ConfigError(f"the HTTP port is {port!r}; it must be from 0, for any free one, to 65535")
        self._source = source
        self._watched, self._lock = Watched("this server"), threading.Lock()
        self._gate, self._tls = gate or Gate(), tls
        self._host, self._port = host, 0
        self._server: Server | None = None
        self._closing = threading.Event()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    @property
    def url(self) -> str:
        """The URL of the page: `http://HOST:PORT`, or `https` with TLS."""
        return f"{'https' if self._tls is not None else 'http'}://{joined(self._host, self._port)}"

    def start(self) -> "WebServer":
        """Listen.

        Raises:
            ConfigError: the host is not an address of this node.
            TeacherUnavailableError: the port, or each port of the range, is taken.
        """
        self._server = self._listen()
        self._port = self._server.server_port
        self._closing.clear()
        serve = functools.partial(self._serve, self._server)
        self._thread = background.thread(serve, name="schoolhouse-http", on_death=background.go_on)
        self._thread.start()
        return self

    def _serve(self, server: Server) -> None:
        while True:
            background.run(server.serve_forever, "the HTTP server", background.go_on)
            if self._closing.wait(_REST_S):
                return

    def _listen(self) -> Server:
        address = own_address(self._host)
        for port in self._ports:
            try:
                return Server(
                    (address, port), functools.partial(_Handler, self._source, self._panels, self._gate), self._tls
                )
            except OSError as err:
                failed = err
        ports = "-".join(map(str, sorted({self._ports[0], self._ports[-1]})))
        raise TeacherUnavailableError(
            f"cannot listen on {address}, port {ports}, for HTTP; is the port taken? Port 0 takes a free one"
        ) from failed

    def _panels(self, teacher: str) -> bytes:
        with self._lock:  # so that answers are taken in their order
            now = time.monotonic()
            self._watched.heard(self._source(), now)
            return self._watched.page_json(now, teacher)

    def close(self) -> None:
        """Stop listening; answers that are being sent end with their threads."""
        server, self._server = self._server, None
        if server is not None:
            self._closing.set()
            server.shutdown()
            self._thread.join(_CLOSE_S)
            server.server_close()

    def __enter__(self) -> "WebServer":
        return self if self._server is not None else self.start()

    def __exit__(self, *_exc: object) -> None:
        self.close()


class _Handler(Handler):
    """Answers a request for one of the paths."""

    def __init__(self, source: Source, panels: Callable[[str], bytes], gate: Gate, *args: Any) -> None:
        self._source, self._panels, self._gate = source, panels, gate
        super().__init__(*args)

    def version_string(self) -> str:
        """The name of the server in the answer."""
        return "schoolhouse"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, as scrapes come every few seconds."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a line of text."""
        self._send(*_line(code, message or self.responses.get(code, ("error",))[0]))

    def do_GET(self) -> None:  # noqa: N802
        """Answer a GET request for one of the paths."""
        with self.server.answering(self.connection):
            answer = self._answer()
        self._send(*answer)

    def _answer(self) -> _Answer:
        if not self._is_local_name():
            return _line(403, "this server answers to localhost alone; open it as http://127.0.0.1")
        try:
            self._check_admin()
            found = self._content(*self.path.partition("?")[::2])
        except AuthenticationError as err:
            return _line(401, err.message)
        except PermissionDeniedError as err:
            return _line(403, err.message)
        except SchoolhouseError as err:  # for example of a directory that has just started
            return _line(503, scrub(err.message))
        if found is None:
            return _line(404, f"not found; there are: {', '.join((*_DATA, *_PAGE))}")
        return 200, *found

    do_HEAD = do_GET  # noqa: N815

    def _refuse(self) -> None:
        self.send_error(405, "this server only answers GET and HEAD")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse  # noqa: N815

    def _check_admin(self) -> None:
        """Raises `AuthenticationError` or `PermissionDeniedError` if an admin's token is needed and was not given."""
        if self._gate.tokens is None:
            return
        given = self.headers.get_all("Authorization", [])
        if len(given) != 1:
            raise AuthenticationError("an admin's token is needed, as a bearer token or as the password of a login")
        if not self._gate.known(_token_of(given[0])).admin:
            raise PermissionDeniedError(
                "this token is not an admin's; the tokens file says `admin: true` for those that are"
            )

    def _is_local_name(self) -> bool:
        """Whether the request's Host is a name of loopback, if this server listens only there.

        Otherwise a foreign web page could read it, with a name of its own that it lets resolve to this machine.
        """
        if not is_loopback(self.connection.getsockname()[0]):
            return True
        try:
            name = urllib.parse.urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _content(self, path: str, query: str) -> tuple[bytes, str] | None:
        if path == "/metrics":
            return metrics.exposition(self._source), metrics.CONTENT_TYPE
        if path == "/api/state":
            return state_json(self._source()), "application/json"
        if path == "/api/panels":
            [teacher] = urllib.parse.parse_qs(query).get("teacher", [""])[:1]
            return self._panels(teacher), "application/json"
        if path in _PAGE:
            name, content_type = _PAGE[path]
            return _file(name), content_type
        return None

    def _send(self, code: int, body: bytes, content_type: str) -> None:
        self.send_response(code)
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)), **_HEADERS}
        for name, value in (headers | _MORE.get(code, {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _line(code: int, text: str) -> _Answer:
    return int(code), f"{text}\n".encode(), "text/plain; charset=utf-8"


def _token_of(authorization: str) -> str:
    """The token in `Bearer TOKEN`, or the password in `Basic` with any user name."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return bearer_of(authorization)
    try:
        return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    except ValueError as err:  # also for invalid base64 or text
        raise AuthenticationError("the Authorization header is not a valid login") from err


@functools.cache
def _file(name: str) -> bytes:
    return resources.files("schoolhouse_server.observe").joinpath("page", name).read_bytes()
