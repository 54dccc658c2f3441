"""`python -m schoolhouse_server.cli.probe HOST:PORT`: exit status 0 if a directory or replica there serves, 1 if not.

It asks gRPC's standard health service, as probes of containers and schedulers do. Of a server with TLS it must know who
vouches for it, and for which name: `--ca ca.pem --name HOST`. Where the server wants certificates of its clients,
`--cert cert.pem --key key.pem` is one to show, as the server's own.
"""

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from schoolhouse.errors import ConfigError
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.rpc.security import ClientSecurity

_TIMEOUT_S = 3.0


def serves(address: str, timeout_s: float = _TIMEOUT_S, security: ClientSecurity = ClientSecurity()) -> bool:
    """Whether the server at `address` answers that it serves, within `timeout_s`."""
    with channel.connect(address, security) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main(arguments: list[str]) -> int:
    """The exit status for these arguments: one address, and what TLS takes; 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m schoolhouse_server.cli.probe", description="Ask if a server serves."
    )
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--ca", help="PEM file of who vouches for the server; with it, TLS is spoken")
    parser.add_argument("--name", help="that the server's certificate is for; HOST without it")
    parser.add_argument("--cert", help="PEM file of a certificate to show")
    parser.add_argument("--key", help="PEM file of its key")
    try:
        given = parser.parse_args(arguments)
        if not given.address.rpartition(":")[0]:
            parser.error(f"{given.address!r} is no address; give HOST:PORT")
        return 0 if serves(given.address, security=_security(given)) else 1
    except ConfigError as err:
        sys.stderr.write(f"{err}\n")
    except SystemExit as err:
        return int(err.code or 0)
    return 2


def _security(given: argparse.Namespace) -> ClientSecurity:
    """A probe asks for nothing and tells nothing, so that it may do so in plaintext."""
    read = ClientSecurity.read(ca=given.ca, cert=given.cert, key=given.key, insecure=given.ca is None)
    return read.towards(given.name or given.address.rpartition(":")[0].strip("[]"), tls=given.ca is not None)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
