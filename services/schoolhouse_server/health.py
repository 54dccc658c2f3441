"""`python -m schoolhouse_server.health HOST:PORT`: exit status 0 if a directory or replica there serves, 1 if not.

It asks gRPC's standard health service, as probes of containers and schedulers do.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 3.0


def serves(address: str, timeout_s: float = _TIMEOUT_S) -> bool:
    """Whether the server at `address` answers that it serves, within `timeout_s`."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main(arguments: list[str]) -> int:
    """The exit status for these arguments: one address."""
    if len(arguments) != 1 or ":" not in arguments[0]:
        sys.stderr.write("give the address to ask: python -m schoolhouse_server.health HOST:PORT\n")
        return 2
    return 0 if serves(arguments[0]) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
