"""Where a server listens: one port, any free one, or the first free one of a range."""

import random
from collections.abc import Sequence

import grpc
from schoolhouse.errors import TeacherUnavailableError

from schoolhouse_server.tls import ServerTls


def listen(server: grpc.Server, host: str, ports: Sequence[int], tls: ServerTls | None = None) -> int:
    """Bind to one of `ports`, from a random one on, since several servers start side by side; 0 is any free one.

    Raises:
        TeacherUnavailableError: none is free; names them.
    """
    credentials = tls.credentials() if tls is not None else None
    first = random.SystemRandom().randrange(len(ports))  # not the global generator, which may be seeded
    for port in [*ports[first:], *ports[:first]]:
        try:
            if credentials is None:
                return server.add_insecure_port(f"{host}:{port}")
            return server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as err:
            failed = err
    if len(ports) == 1:
        text = f"cannot listen on {host}:{ports[0]}; is the port taken? Port 0 takes a free one"
    else:
        text = f"none of the ports {min(ports)}-{max(ports)} is free on {host}; widen the range"
    raise TeacherUnavailableError(text) from failed
