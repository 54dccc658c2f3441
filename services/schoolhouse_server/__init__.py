"""Teacher side of Schoolhouse: serve frozen PyTorch models to students over gRPC."""

import importlib.util
from typing import TYPE_CHECKING, Any

from schoolhouse_wire.rpc import forks as forks  # must come before anything else imports gRPC

if any(importlib.util.find_spec(name) is None for name in ("grpc_health", "grpc_reflection", "cryptography")):
    raise ImportError("schoolhouse_server needs the extra 'serve': pip install 'schoolhouse[serve]'")

if TYPE_CHECKING:
    from schoolhouse_server.replica.replica import Replica
    from schoolhouse_server.replica.serving import serve
    from schoolhouse_server.security.tls import ServerTls

__all__ = ["Replica", "ServerTls", "serve"]
_MODULES = {"Replica": "replica.replica", "ServerTls": "security.tls", "serve": "replica.serving"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: most commands, and a pool's keeper, need no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
