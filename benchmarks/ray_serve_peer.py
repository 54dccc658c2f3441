"""The peer that a team writes by hand: Ray Serve's gRPC ingress, with `@serve.batch`, serving prepared features."""

import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import torch
from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value

METHOD = "/peer.Features/Get"


def add_to_server(servicer: Any, server: Any) -> None:
    """Register the service, as generated code would."""
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Get,
        request_deserializer=UInt64Value.FromString,
        response_serializer=BytesValue.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer.Features", {"Get": handler}),))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def ray_serve(largest: int) -> Iterator[str]:
    """Run the peer on a local Ray cluster; yields the address of its gRPC ingress."""
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    from ray.serve.config import gRPCOptions

    port, http_port = _free_port(), _free_port()

    class Features:
        """Prepared bytes, batched as Ray Serve does it."""

        def __init__(self) -> None:
            self._data = torch.randint(0, 256, (largest,), dtype=torch.uint8)

        @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
        async def _batch(self, sizes: list[int]) -> list[bytes]:
            return [self._data[:size].numpy().tobytes() for size in sizes]

        async def Get(self, request: UInt64Value) -> BytesValue:  # noqa: N802  # the RPC's name
            """As many bytes as asked for."""
            return BytesValue(value=await self._batch(request.value))

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        options = gRPCOptions(port=port, grpc_servicer_functions=["ray_serve_peer.add_to_server"])
        serve.start(http_options={"host": "127.0.0.1", "port": http_port}, grpc_options=options)
        deployment = serve.deployment(Features, max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
        serve.run(deployment.bind(), name="features", route_prefix="/features")
        yield f"127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
