"""The peers that a team would write by hand: Ray Serve's gRPC ingress, with `@serve.batch`."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import torch
from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value

METHOD = "/peer.Features/Get"


def add_to_server(servicer: Any, server: Any) -> None:
    """Register the service, as generated code would."""
    _add(servicer, server, METHOD, UInt64Value)


def _add(servicer: Any, server: Any, method: str, request: type[UInt64Value | BytesValue]) -> None:
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.Get, request_deserializer=request.FromString, response_serializer=BytesValue.SerializeToString
    )
    _, service, name = method.split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def ray_serve(largest: int) -> Iterator[str]:
    """Serve prepared bytes, as many as a request asks for; yields the address of the gRPC ingress."""
    from ray import serve

    class Features:
        """Prepared bytes, batched as Ray Serve does it."""

        def __init__(self) -> None:
            seeded = torch.Generator().manual_seed(0)  # as others have
            self._data = torch.randint(0, 256, (largest,), dtype=torch.uint8, generator=seeded)

        @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
        async def _batch(self, sizes: list[int]) -> list[bytes]:
            return [self._data[:size].numpy().tobytes() for size in sizes]

        async def Get(self, request: UInt64Value) -> BytesValue:  # noqa: N802  # the RPC's name
            """As many bytes as the request asks for."""
            return BytesValue(value=await self._batch(request.value))

    with _running(Features, "add_to_server", max_ongoing_requests=64) as address:
        yield address


TEACHER_METHOD = "/peer.Teacher/Get"


def add_teacher_to_server(servicer: Any, server: Any) -> None:
    """Register the service, as generated code would."""
    _add(servicer, server, TEACHER_METHOD, BytesValue)


@contextlib.contextmanager
def ray_serve_teacher(
    forward_s: float, s_per_row: float, input_bytes: int, feature_bytes: int, wait_s: float
) -> Iterator[str]:
    """Serve a teacher on an emulated device; yields the address of the gRPC ingress.

    Its forward takes `forward_s`, and `s_per_row` for each row, during which the replica goes on receiving. A batch
    stays open for `wait_s`, and only requests that come meanwhile are merged: those that wait for the device are in
    batches already. With 0, most batches have one request; Ray Serve's own default is 0.01.
    """
    from ray import serve

    class Teacher:
        """Batches as Ray Serve forms them: in the order of arrival, whichever job asks."""

        @serve.batch(max_batch_size=8, batch_wait_timeout_s=wait_s)  # type: ignore[untyped-decorator]
        async def _batch(self, rows: list[int]) -> list[bytes]:
            await asyncio.sleep(forward_s + s_per_row * sum(rows))
            return [bytes(feature_bytes * count) for count in rows]

        async def Get(self, request: BytesValue) -> BytesValue:  # noqa: N802  # the RPC's name
            """The features of a batch."""
            return BytesValue(value=await self._batch(len(request.value) // input_bytes))

    with _running(Teacher, "add_teacher_to_server", max_ongoing_requests=1000) as address:
        yield address


@contextlib.contextmanager
def _running(servicer: type, add: str, *, max_ongoing_requests: int) -> Iterator[str]:
    """Run a Ray Serve application on a local Ray cluster."""
    # Ray Serve's controller kills a proxy that is not ready within 5 s, as on a busy machine, and `start` fails. It
    # inherits these settings from the cluster's processes, and they from this one.
    for check in ("READY", "HEALTH"):
        os.environ.setdefault(f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S", "60")
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    port, http_port = _free_port(), _free_port()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        options = gRPCOptions(port=port, grpc_servicer_functions=[f"ray_serve_peer.{add}"])
        serve.start(http_options={"host": "127.0.0.1", "port": http_port}, grpc_options=options)
        deployment = serve.deployment(
            servicer, max_ongoing_requests=max_ongoing_requests, ray_actor_options={"num_cpus": 1}
        )
        serve.run(deployment.bind(), name="features", route_prefix="/features")
        yield f"127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
