"""Connections to the HTTP server that send or read slowly, and a scrape that comes after them."""

import contextlib
import select
import socket
import ssl
import threading
import time

import pytest
from authority import ours
from loads import fetch, sets
from schoolhouse_server.observe import http_places
from schoolhouse_server.observe.web import WebServer
from schoolhouse_wire.v1.directory_pb2 import JobLoad

GET = b"GET /api/state HTTP/1.0\r\n\r\n"
WITHIN_S = 60.0


def large():
    """More than a small buffer of the system keeps of an answer for a client that does not read."""
    found = sets()
    found[0].replicas[0].load.jobs.extend(JobLoad(job=f"{n}".rjust(128, "x")) for n in range(2_000))
    return found


@pytest.fixture(params=["plain", "tls"])
def served(request):
    """Starts a server of a source; gives it, and a scrape's status."""
    stack, tls = contextlib.ExitStack(), None
    context = None
    if request.param == "tls":
        tls, context = ours().server().context(), ssl.create_default_context(cafile=ours().ca)
        context.check_hostname = False

    def start(source):
        server = stack.enter_context(WebServer(source, tls=tls))
        return server, lambda: fetch(server.url + "/metrics", context=context)[0]

    with stack:
        yield start


@pytest.fixture
def connect():
    with contextlib.ExitStack() as stack:

        def connected(server, said=b"", source="127.0.0.1"):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(WITHIN_S)
            one.bind((source, 0))
            one.connect(("127.0.0.1", server.port))
            one.sendall(said)
            return one

        yield connected


def ended(connection):
    """Whether the server has ended it, or has told it to come again."""
    if not select.select([connection], [], [], 0)[0]:
        return False
    try:
        return connection.recv(1 << 16) == b"" or ended(connection)
    except ConnectionError:
        return True


def wait_until(condition):
    end = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.0\r\nX: "], ids=["silent", "half"])
def test_connections_that_send_slowly_stop_no_scrape(served, connect, n, said):
    server, scrape = served(sets)
    for _ in range(n):
        connect(server, said)  # accepted before the scrapes, as these come later
    assert [scrape() for _ in range(20)] == [200] * 20


def test_connections_that_read_slowly_stop_no_scrape(connect):
    found, n = large(), 20
    with WebServer(lambda: found) as server:
        server._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow = [connect(server, GET) for _ in range(n)]
        wait_until(lambda: len(select.select(slow, [], [], WITHIN_S)[0]) == n)  # answers have begun, or places are lost
        assert fetch(server.url + "/page.js")[0] == 200


def test_connections_of_one_address_take_no_place_of_another(connect):
    with WebServer(sets) as server:
        kept = connect(server, b"GET /metrics HTTP/1.0\r\n")
        crowd = [connect(server, source="127.0.0.2") for _ in range(64)]
        places = http_places._MAX_OF_ADDRESS
        wait_until(lambda: all(map(ended, crowd[:-places])))
        assert not any(map(ended, crowd[-places:]))
        kept.sendall(b"\r\n")
        assert kept.makefile("rb").readline().startswith(b"HTTP/1.0 200")


def test_an_answer_that_is_being_made_keeps_its_place_and_the_others_are_told_to_come_again(connect):
    made, go = threading.Semaphore(0), threading.Event()

    def source():
        made.release()
        assert go.wait(WITHIN_S)
        return sets()

    with WebServer(source) as server:
        asking = [connect(server, GET) for _ in range(http_places._MAX_OF_ADDRESS)]
        assert all(made.acquire(timeout=WITHIN_S) for _ in asking)
        assert fetch(server.url + "/metrics")[0] == 503
        go.set()
        assert all(one.makefile("rb").readline().startswith(b"HTTP/1.0 200") for one in asking)
        assert fetch(server.url + "/metrics")[0] == 200


def test_a_client_that_drips_is_ended_at_the_deadline_of_its_whole_request(monkeypatch, connect):
    monkeypatch.setattr(http_places, "_REQUEST_S", 1.0)
    with WebServer(sets) as server:
        slow = connect(server)

        def drip():
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"G")
            return ended(slow)

        wait_until(drip)
