"""`host`: a server listens on that address, on its node's own in that network, or on all; never on more."""

import socket
from types import SimpleNamespace

import psutil
import pytest
import schoolhouse as sh
import torch
from models import Net
from schoolhouse import errors
from schoolhouse_server import serve
from schoolhouse_server.pool.config import load_pool
from schoolhouse_server.security import ports

OWN = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5", "fe80::1%eth0"], "ib0": ["10.1.7.5", "fd00::5"]}


@pytest.fixture
def node(monkeypatch):
    """A machine of these addresses, whose name servers know one name."""

    def addresses():
        return {
            name: [
                SimpleNamespace(family=socket.AF_INET6 if ":" in one else socket.AF_INET, address=one) for one in ones
            ]
            for name, ones in OWN.items()
        }

    def looked_up(name, *_args, **_kwargs):
        if name != "teachers.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", (one, 0)) for one in ("198.51.100.1", "10.1.7.5")]

    monkeypatch.setattr(psutil, "net_if_addrs", addresses)
    monkeypatch.setattr(socket, "getaddrinfo", looked_up)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("0.0.0.0", "0.0.0.0"),
        ("::", "::"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.7", "127.0.0.7"),
        ("::1", "::1"),
        ("localhost", "127.0.0.1"),
        ("10.0.0.5", "10.0.0.5"),
        ("fd00::5", "fd00::5"),
        ("10.1.0.0/16", "10.1.7.5"),
        ("fd00::/64", "fd00::5"),
        ("teachers.example", "10.1.7.5"),
    ],
)
def test_a_host_is_one_address_of_each_node(node, host, address):
    assert ports.own_address(host) == address


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("10.0.0.6", "host is '10.0.0.6', and this node has: 10.0.0.5, 10.1.7.5, fd00::5. Give .*10.0.0.0/24.*0.0.0.0"),
        ("10.2.0.0/16", "host is '10.2.0.0/16', and this node has: 10.0.0.5, 10.1.7.5"),
        ("nowhere.example", "host is 'nowhere.example', .*no name server knows it"),
    ],
)
def test_what_a_node_does_not_have_is_said(node, host, said):
    with pytest.raises(errors.ConfigError, match=said):
        ports.own_address(host)


def listening(port):
    """The addresses on which this process listens on a port; gRPC has IPv4 in sockets of IPv6."""
    found = psutil.Process().net_connections(kind="tcp")
    ours = [one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port]
    return {address.removeprefix("::ffff:") for address in ours}


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_a_server_listens_on_its_host_alone(host, x):
    with serve(Net(32, seed=1), host=host, http_port=0) as server:
        assert listening(server.port) == {host}
        assert listening(server.web.port) == {host}
        with sh.connect(server.url) as teacher:
            assert torch.equal(teacher.submit((x,), {}, [""]).result(60)[""], Net(32, seed=1)(x))


def test_a_server_of_another_machines_address_says_what_this_one_has():
    with pytest.raises(errors.ConfigError, match=r"host is '198\.51\.100\.7', and this node has: "):
        serve(Net(32, seed=1), host="198.51.100.7", insecure=True)


def pool(folder, host):
    (folder / "pool.yaml").write_text(
        f"host: '{host}'\nport: 0\nhttp_port: 0\nmetrics_ports: 21900-21999\nsecurity: {{insecure: true}}\n"
        "teachers: {net: {build: 'models:Net', kwargs: {width: 32, seed: 1}}}\n"
    )
    return load_pool(folder / "pool.yaml")


@pytest.mark.parametrize(("host", "address"), [("127.0.0.2", "127.0.0.2"), ("127.0.0.0/8", "127.0.0.1")])
def test_all_servers_of_a_pool_listen_on_its_host_alone(actors, tmp_path, host, address):
    config = pool(tmp_path, host)
    directory = actors.DirectoryActor(config)
    teacher = actors.TeacherActor("net", config.teachers["net"], config)
    try:
        reached = [directory.address(), directory.page().removeprefix("http://"), teacher.start().address]
        assert {one.rpartition(":")[0] for one in reached} == {address}  # what students are told
        reached_ports = [int(one.rpartition(":")[2]) for one in reached]
        assert [listening(port) for port in reached_ports] == [{address}] * 3
        assert listening(teacher._replica.web.port) == {address}
    finally:
        teacher.stop()
        directory._server.stop(0)


def test_a_pool_of_all_interfaces_is_known_by_rays_address(actors, tmp_path, monkeypatch):
    monkeypatch.setattr(actors.ray.util, "get_node_ip_address", lambda: "10.0.0.5")
    assert actors.advertised(pool(tmp_path, "0.0.0.0")) == "10.0.0.5"
    assert actors.advertised(pool(tmp_path, "127.0.0.2")) == "127.0.0.2"


@pytest.mark.parametrize("host", ["10.0.0.0/33", "10.0.0/8", "a b", ""])
def test_what_is_no_host_is_refused_as_the_file_is_read(tmp_path, host):
    with pytest.raises(errors.ConfigError, match=r"pool.yaml is wrong: .*(host is|IPv4 or IPv6 network)"):
        pool(tmp_path, host)


@pytest.mark.ray
def test_a_pool_on_an_address_of_another_machine_fails_with_its_reason(cluster, tmp_path):
    from schoolhouse_server.pool.driver import launch

    with pytest.raises(errors.TeacherUnavailableError, match=r"host is '198\.51\.100\.7', and this node has: "):
        launch(pool(tmp_path, "198.51.100.7"))
