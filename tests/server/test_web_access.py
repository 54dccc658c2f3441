"""Who may see the page and the metrics."""

import base64
import hashlib
import ssl

import pytest
from authority import ours
from loads import fetch, sets
from schoolhouse_server import serve
from schoolhouse_server.observe.web import WebServer
from schoolhouse_server.security.auth import Gate
from schoolhouse_server.security.tokens import Tokens, new_token
from torch import nn

ADMIN, STUDENT = new_token(), new_token()
PATHS = ("/", "/metrics", "/api/state", "/api/panels", "/page.js", "/none")


@pytest.fixture
def gate(tmp_path):
    path = tmp_path / "tokens.yaml"
    lines = [(ADMIN, "teachers: [], admin: true"), (STUDENT, 'teachers: ["*"]')]
    digests = [f'{{sha256: "{hashlib.sha256(token.encode()).hexdigest()}", {rest}}}' for token, rest in lines]
    path.write_text(f"tokens: [{', '.join(digests)}]")
    return Gate(Tokens(path))


def login(name, token):
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()}


@pytest.mark.parametrize("path", PATHS)
def test_with_a_gate_only_an_admin_is_answered(gate, path):
    with WebServer(sets, gate=gate) as server:
        for wrong in ({}, {"Authorization": f"Bearer {new_token()}"}, login("x", "y"), {"Authorization": "Basic %%"},
                      {"Authorization": "Basic \xe9"}, {"Authorization": "Bearer \xe9"},
                      {"Authorization": ADMIN}, {"Authorization": "Bearer"}):  # fmt: skip
            code, headers, body = fetch(server.url + path, headers=wrong)
            assert code == 401
            assert headers["WWW-Authenticate"].startswith("Basic realm=")  # so that a browser asks
            assert b"resnet" not in body
        assert fetch(f"{server.url}{path}?token={ADMIN}")[0] == 401  # it would stand in histories and logs
        assert fetch(server.url + path, headers={"Authorization": f"Bearer {STUDENT}"})[0] == 403
        for right in ({"Authorization": f"Bearer {ADMIN}"}, login("anybody", ADMIN)):
            assert fetch(server.url + path, headers=right)[0] == (404 if path == "/none" else 200)


def test_where_the_port_asks(gate):
    with WebServer(sets, gate=Gate()) as server:
        assert fetch(server.url + "/metrics")[0] == 200  # nobody is asked
    # On loopback, too, which every user of the machine reaches.
    with serve(nn.Identity(), tokens=gate.tokens._path, http_port=0) as server:
        assert fetch(server.web.url + "/metrics")[0] == 401
        assert fetch(server.web.url + "/metrics", headers={"Authorization": f"Bearer {ADMIN}"})[0] == 200


def test_a_server_beyond_loopback_shows_its_page_to_an_admin_alone_and_over_tls(gate):
    tls = ours().server()
    with serve(nn.Identity(), host="0.0.0.0", tls=tls, tokens=gate.tokens._path, http_port=0) as server:
        url = f"https://127.0.0.1:{server.web.port}/metrics"
        context = ssl.create_default_context(cafile=ours().ca)
        for token, code in ((None, 401), (STUDENT, 403), (ADMIN, 200)):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            assert fetch(url, headers=headers, context=context)[0] == code


def test_without_one_everybody_is_answered():
    with WebServer(sets) as server:
        assert fetch(server.url + "/metrics")[0] == 200
