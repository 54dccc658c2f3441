"""Teacher side of Schoolhouse: serve frozen PyTorch models to students over gRPC."""

import importlib.util

if importlib.util.find_spec("grpc_health") is None or importlib.util.find_spec("grpc_reflection") is None:
    raise ImportError("schoolhouse_server needs the extra 'serve': pip install 'schoolhouse[serve]'")

from schoolhouse_server.replica import Replica, serve

__all__ = ["Replica", "serve"]
