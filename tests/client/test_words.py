"""What a user is told of a wrong address, of time, and of arguments that a teacher may ignore."""

import http.server
import re
import socket
import ssl
import threading
import warnings
from typing import TypedDict

import pytest
import schoolhouse as sh
import torch
from authority import ours
from models import Net, converted
from schoolhouse import errors
from schoolhouse_server import serve
from torch import nn
from typing_extensions import Unpack


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The look at why a server cannot be talked to has the time that a loaded machine takes."""
    monkeypatch.setattr("schoolhouse.remote.handshake._STEP_TIMEOUT_S", 20.0)
    monkeypatch.setattr("schoolhouse.remote.handshake._TIMEOUT_S", 60.0)


@pytest.fixture
def unused():
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


@pytest.fixture(params=["http", "https"])
def web(request):
    """The URL of a teacher where a web server stands."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    if request.param == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own = ours().server()
        context.load_cert_chain(own.cert, own.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"{'grpcs' if request.param == 'https' else 'grpc'}://127.0.0.1:{server.server_address[1]}/teacher"
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_where_nobody_listens(unused):
    says = rf"no server answered at 127.0.0.1:{unused} within 0\.3 s: nothing listens at 127.0.0.1:{unused}"
    with pytest.raises(errors.TeacherUnavailableError, match=says):
        sh.connect(f"grpc://127.0.0.1:{unused}/teacher", timeouts=sh.Timeouts(connect_s=0.3))


def test_a_name_that_does_not_resolve(unused, monkeypatch):
    def unknown(*_args, **_kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)  # of the look; gRPC has a resolver of its own
    says = r"within 0\.3 s: the name 'localhost' does not resolve \(Name or service not known\); is HOST right"
    with pytest.raises(errors.TeacherUnavailableError, match=says):
        sh.connect(f"grpc://localhost:{unused}/teacher", timeouts=sh.Timeouts(connect_s=0.3))


def test_a_port_that_speaks_http(web):
    with pytest.raises(errors.ConfigError, match=r"speaks HTTP/1 and not gRPC: .* http_port of a pool"):
        sh.connect(
            web,
            timeouts=sh.Timeouts(connect_s=0.5),
            security=sh.Security(ca=ours().ca if web.startswith("grpcs") else None),
        )


def test_the_http_port_of_a_server():
    with serve(nn.Identity(), http_port=0) as server:
        port = re.search(r":(\d+)", server.web.url.removeprefix("http"))[1]
        with pytest.raises(errors.ConfigError, match=rf"127.0.0.1:{port} speaks HTTP/1 and not gRPC"):
            sh.connect(f"grpc://127.0.0.1:{port}/teacher", timeouts=sh.Timeouts(connect_s=0.5))


def test_seconds_are_round(unused):
    for given, said in ((0.25, "0.25 s"), (1, "1 s")):
        with pytest.raises(errors.TeacherUnavailableError, match=rf" within {said}: "):
            sh.connect(f"grpc://127.0.0.1:{unused}/teacher", timeouts=sh.Timeouts(connect_s=given))


class Known(TypedDict, total=False):
    """As transformers types the rest of what its forwards take."""

    num_items_in_batch: int


class Greedy(Net):
    """Takes anything."""

    def forward(self, x, scale=1.0, **kwargs: Unpack[Known]):
        return super().forward(x) * scale


class Wrapper(nn.Module):
    """Hands all on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_arguments_that_a_teacher_takes_unseen_are_named_once(teach):
    model = converted(Greedy(seed=1), teach(Greedy(32, seed=2)), nn.MSELoss())
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in ({}, {"scale": 2.0}, {"num_items_in_batch": 3}):
            model(x, **given)
            model.compute_kd_loss()
    with pytest.warns(UserWarning, match=r"no parameter 'scael': it takes it through its \*\*kwargs") as told:
        model(x, scael=2.0)
    assert [warning.filename for warning in told] == [__file__]
    model.compute_kd_loss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, scael=2.0)
        model.compute_kd_loss()
    loop = iter(model.prefetch([(x,)], inputs=lambda batch: ((batch[0],), {"other": 1})))
    with pytest.warns(UserWarning, match="no parameter 'other'"):
        next(loop)
    model(x, other=1)
    model.compute_kd_loss()


def test_a_teacher_that_names_nothing_hands_all_on(teach):
    model = converted(Greedy(seed=1), teach(Wrapper(Greedy(32, seed=2))), nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 8), scael=2.0)
        model.compute_kd_loss()


def test_what_a_forward_takes_is_in_its_description(teach):
    assert teach(Greedy()).describe().parameters == ("x", "scale", "**kwargs", "num_items_in_batch")
    assert teach(Wrapper(Net())).describe().parameters == ("*args", "**kwargs")
