"""`python -m schoolhouse_server.cli.probe HOST:PORT`: exit status 0 if a directory or replica there serves, 1 if not.

It asks gRPC's standard health service, as the probes of containers and schedulers do. A server with TLS needs
`--ca ca.pem`, the authority that signed its certificate, and `--name HOST` if the certificate is for another name. A
server that wants certificates of its clients needs `--cert cert.pem --key key.pem`, for which the server's own will do.
"""

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from schoolhouse_wire.errors import ConfigError
from schoolhouse_wire.rpc import channel
from schoolhouse_wire.rpc.security import ClientSecurity

_TIMEOUT_S = 3.0


def serves(address: str, timeout_s: float = _TIMEOUT_S, security: ClientSecurity = ClientSecurity()) -> bool:
    """Whether the server at `address` answers that it serves, within `timeout_s`."""
    with channel.connect(address, security) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, metadata=channel.metadata(security))
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main(arguments: list[str]) -> int:
    """Probe the address in `arguments`; returns the exit status, which is 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m schoolhouse_server.cli.probe", description="Ask if a server serves."
    )
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--ca", help="PEM file of the authority that signed the server's certificate; turns on TLS")
    parser.add_argument("--name", help="the name in the server's certificate (default: HOST)")
    parser.add_argument("--cert", help="PEM file of this client's certificate")
    parser.add_argument("--key", help="PEM file of the key to --cert")
    try:
        given = parser.parse_args(arguments)
        if not given.address.rpartition(":")[0]:
            parser.error(f"{given.address!r} is not an address; give HOST:PORT")
        return 0 if serves(given.address, security=_security(given)) else 1
    except ConfigError as err:
        sys.stderr.write(f"{err}\n")
    except SystemExit as err:
        return int(err.code or 0)
    return 2


def _security(given: argparse.Namespace) -> ClientSecurity:
    """What the arguments say of TLS; plaintext is fine, as a probe neither sends nor gets anything secret."""
    read = ClientSecurity.read(ca=given.ca, cert=given.cert, key=given.key, insecure=given.ca is None)
    return read.towards(given.name or given.address.rpartition(":")[0].strip("[]"), tls=given.ca is not None)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
