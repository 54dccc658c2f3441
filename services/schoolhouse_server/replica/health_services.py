"""gRPC's standard services, health and reflection, which every server of ours offers beside its own."""

from collections.abc import Awaitable, Callable, Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

_PREFIX = "schoolhouse.v1."


async def add_standard_services(server: grpc.aio.Server, names: Iterable[str]) -> Callable[[str], Awaitable[None]]:
    """Report the server and each of `names` (services and teachers) as serving, and offer reflection of the services.

    Returns a function that reports one of these names, and with it the whole server, as no longer serving.
    """
    names = tuple(names)
    checks = health.aio.HealthServicer()
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    ours = [name for name in names if name.startswith(_PREFIX)]
    reflection.enable_server_reflection((*ours, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    async def fail(name: str) -> None:
        for one in {"", name}.intersection(("", *names)):  # names that are kept secret are not reported either
            await checks.set(one, health_pb2.HealthCheckResponse.NOT_SERVING)

    return fail
