"""The gRPC interceptor of all our servers: checks tokens, bounds the wait for requests, and maps errors."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from schoolhouse_wire.errors import AuthenticationError, ProtocolError, SchoolhouseError, TeacherBusyError
from schoolhouse_wire.rpc import status

from schoolhouse_server.common.timer import Timer
from schoolhouse_server.security.auth import Gate

_OPEN = ("/grpc.health.v1.Health/Check",)  # needs no token, as probes have none
_MAX_STRANGERS = 16  # calls without a token that may wait for their request at once
_REQUEST_S = 10.0  # how long a call with a single request may take to send it
_QUIET_S = 10.0  # the least time between two log records about refused calls

_log = logging.getLogger(__name__)


class Doorkeeper(grpc.ServerInterceptor):
    """Refuses RPCs without a known token, cancels those that send no request in time, and lets only our errors out.

    For an RPC with a single request gRPC blocks a thread until the client sends it, however long that takes. So here
    all RPCs are handled as streams of requests, which is the same on the wire: a call without a known token is refused
    at once, and the others have `request_s` to send their request.
    """

    def __init__(self, gate: Gate, timer: Timer, request_s: float = _REQUEST_S) -> None:
        self._gate = gate
        self._timer, self._request_s = timer, request_s
        self._refused, self._said_at = 0, -_QUIET_S
        self._strangers = threading.BoundedSemaphore(_MAX_STRANGERS)

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The method's handler with these checks, or one that refuses the call."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        is_open = handler_call_details.method in _OPEN and self._gate.tokens is not None
        if not is_open:
            try:
                self._gate.grant_of(handler_call_details.invocation_metadata)
            except AuthenticationError as err:
                return _with_behavior(handler, self._refusing(err.with_traceback(None)))
        return _with_behavior(handler, _guarded(handler, self._wait_as_stranger if is_open else self._wait))

    def _refusing(self, error: AuthenticationError) -> Callable[[Any, Any], Any]:
        def refuse(_requests: Any, context: grpc.ServicerContext) -> Any:
            self._refused += 1
            if time.monotonic() - self._said_at >= _QUIET_S:
                _log.warning(
                    "%d calls without a known token were refused, the last from %s", self._refused, context.peer()
                )
                self._refused, self._said_at = 0, time.monotonic()
            status.abort(context, error)

        return refuse

    def _wait_as_stranger(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        if not self._strangers.acquire(blocking=False):
            raise TeacherBusyError(f"{_MAX_STRANGERS} calls without a token have not sent their request yet; try again")
        try:
            return self._wait(requests, context)
        finally:
            self._strangers.release()

    def _wait(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """The only request of an RPC, serialized; the RPC is cancelled if it does not come in time."""

        def late() -> None:
            context.cancel()

        alarm = self._timer.at(time.monotonic() + self._request_s, late)
        try:
            for request in requests:
                return request
            raise ProtocolError("a call came without its request")
        finally:
            self._timer.cancel(alarm)


def _with_behavior(handler: Any, behavior: Callable[[Any, Any], Any]) -> "grpc.RpcMethodHandler[Any, Any]":
    make: Any = grpc.stream_stream_rpc_method_handler
    if not handler.response_streaming:
        make = grpc.stream_unary_rpc_method_handler
    # A single request is deserialized in `_guarded`, where a failure becomes one of our errors.
    deserializer = handler.request_deserializer if handler.request_streaming else None
    made: grpc.RpcMethodHandler[Any, Any] = make(behavior, deserializer, handler.response_serializer)
    return made


def _guarded(handler: Any, wait: Callable[[Iterator[Any], grpc.ServicerContext], Any]) -> Callable[[Any, Any], Any]:
    """The handler's behavior, with errors mapped: gRPC would send a client the text of any exception."""
    unary, streams = handler.unary_unary or handler.stream_unary, handler.unary_stream or handler.stream_stream

    def given(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """What the behavior takes: the iterator of requests, or the only request."""
        if handler.request_streaming:
            return requests
        data = wait(requests, context)
        try:
            return handler.request_deserializer(data)
        except Exception as err:
            raise ProtocolError("the request cannot be parsed") from err

    def fail(context: grpc.ServicerContext, err: BaseException) -> None:
        try:
            if type(err) is Exception or isinstance(err, grpc.RpcError):  # from context.abort, or as the client is gone
                raise err
            if not isinstance(err, SchoolhouseError):
                _log.exception("an RPC failed")
            status.abort(context, err)
        finally:
            del err  # its traceback refers to this frame; see `status.abort`

    def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        try:
            return unary(given(requests, context), context)
        except BaseException as err:  # gRPC would leave the call open after one that is not an Exception
            return fail(context, err)

    def answers(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from streams(given(requests, context), context)
        except GeneratorExit:
            raise
        except BaseException as err:
            fail(context, err)

    return answers if streams is not None else answer
