"""gRPC's standard services, which every server of ours offers beside its own: health and reflection."""

from collections.abc import Callable, Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

_PREFIX = "schoolhouse.v1."


def add_standard_services(server: grpc.Server, names: Iterable[str]) -> Callable[[str], None]:
    """Report the server and each of `names` (services, teachers) as serving, and describe its services.

    Returns what reports one of them, and with it the server, as not serving any more.
    """
    names = tuple(names)
    checks = health.HealthServicer()
    for name in ("", *names):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    ours = [name for name in names if name.startswith(_PREFIX)]
    reflection.enable_server_reflection((*ours, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    def fail(name: str) -> None:
        for one in {"", name}.intersection(("", *names)):  # it tells no others
            checks.set(one, health_pb2.HealthCheckResponse.NOT_SERVING)

    return fail
