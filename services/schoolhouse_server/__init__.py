"""Teacher side of Schoolhouse: serve frozen PyTorch models to students over gRPC."""

import importlib.util

from schoolhouse_wire.rpc import forks as forks  # must come before anything else imports gRPC

if any(importlib.util.find_spec(name) is None for name in ("grpc_health", "grpc_reflection", "cryptography")):
    raise ImportError("schoolhouse_server needs the extra 'serve': pip install 'schoolhouse[serve]'")

from schoolhouse_server.replica.replica import Replica
from schoolhouse_server.replica.serving import serve
from schoolhouse_server.security.tls import ServerTls

__all__ = ["Replica", "ServerTls", "serve"]
