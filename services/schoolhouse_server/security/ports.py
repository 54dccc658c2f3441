"""Where a server listens: an address of its node, and a port: a given one, any free one, or a free one of a range."""

import ipaddress
import random
import socket
from collections.abc import Sequence

import grpc
import psutil
from schoolhouse_wire.errors import ConfigError, TeacherUnavailableError
from schoolhouse_wire.rpc.security import is_loopback

from schoolhouse_server.security.tls import ServerTls

EVERYWHERE = ("0.0.0.0", "::")


def own_address(host: str) -> str:
    """The address of this node that a server for `host` listens on.

    `host` is an address of this node, a name that resolves to one, or a network (`10.0.0.0/24`) in which this node has
    an address. All interfaces (`0.0.0.0`, `::`) and loopback are returned as they are.

    Raises:
        ConfigError: this node has no such address; the message names those that it has.
    """
    host = host.strip("[]")
    if host in EVERYWHERE or is_loopback(host):
        return "127.0.0.1" if host == "localhost" else host
    own = _addresses()
    wanted = [] if "/" in host else _looked_up(host)
    found = [one for one in wanted if one in own]
    if "/" in host:
        network = ipaddress.ip_network(host, strict=False)
        found = [one for one in own if ipaddress.ip_address(one) in network]
    if not found:
        known = "" if wanted or "/" in host else ", no name server knows it"
        has = ", ".join(one for one in own if not is_loopback(one))
        raise ConfigError(
            f"host is {host!r}{known}, and this node has: {has}. Give one of its addresses, or, for a pool "
            "on several nodes, their network, such as 10.0.0.0/24, in which each listens on its own address; 0.0.0.0 "
            "means all interfaces"
        )
    return found[0]


def joined(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and host[0] != "[" else f"{host}:{port}"


def listen(server: grpc.Server | grpc.aio.Server, host: str, ports: Sequence[int], tls: ServerTls | None = None) -> int:
    """Bind to one of `ports`, and return it; 0 stands for any free one.

    The ports are tried from a random one on, since several servers may start side by side.

    Raises:
        ConfigError: `host` is not an address of this node.
        TeacherUnavailableError: none of the ports is free; the message names them.
    """
    address = own_address(host)
    credentials = tls.credentials() if tls is not None else None
    first = random.SystemRandom().randrange(len(ports))  # not the global generator, which may be seeded
    for port in [*ports[first:], *ports[:first]]:
        try:
            if credentials is None:
                return server.add_insecure_port(joined(address, port))
            return server.add_secure_port(joined(address, port), credentials)
        except RuntimeError as err:
            failed = err
    if len(ports) == 1:
        text = f"cannot listen on {joined(address, ports[0])}; is the port taken? Port 0 takes a free one"
    else:
        text = f"none of the ports {min(ports)}-{max(ports)} is free on {address}; widen the range"
    raise TeacherUnavailableError(text) from failed


def _addresses() -> list[str]:
    """This node's addresses, IPv4 first, without link-local ones that need a scope."""
    found = [one for ones in psutil.net_if_addrs().values() for one in ones]
    own = [one.address for family in (socket.AF_INET, socket.AF_INET6) for one in found if one.family == family]
    return [one for one in own if "%" not in one]


def _looked_up(host: str) -> list[str]:
    """The addresses that a name resolves to; for an address, itself."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []
