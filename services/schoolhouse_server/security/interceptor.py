"""The interceptor of all our servers: who may call, when a request has to have come, and which errors go out."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from schoolhouse.errors import AuthenticationError, ProtocolError, SchoolhouseError, TeacherBusyError
from schoolhouse_wire.rpc import status

from schoolhouse_server.common.timer import Timer
from schoolhouse_server.security.auth import Gate

_OPEN = ("/grpc.health.v1.Health/Check",)  # probes have no token
_MAX_STRANGERS = 16  # calls without a token whose request is still to come
_REQUEST_S = 10.0  # that the only request of a call may take to come
_QUIET_S = 10.0  # between two log records of strangers

_log = logging.getLogger(__name__)


class Doorkeeper(grpc.ServerInterceptor):
    """Turns away RPCs without a known token, or whose request does not come, and lets no error out but ours.

    gRPC has a thread wait for the request of an RPC with just one, for as long as its client likes. So here all RPCs
    are of streams, which on the wire is the same: who is refused is so at once, and others have `request_s`.
    """

    def __init__(self, gate: Gate, timer: Timer, request_s: float = _REQUEST_S) -> None:
        self._gate = gate
        self._timer, self._request_s = timer, request_s
        self._refused, self._said_at = 0, -_QUIET_S
        self._strangers = threading.BoundedSemaphore(_MAX_STRANGERS)

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The method's handler, or one that says why not."""
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
            raise TeacherBusyError(f"{_MAX_STRANGERS} calls without a token have not said what they are for; try again")
        try:
            return self._wait(requests, context)
        finally:
            self._strangers.release()

    def _wait(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """The only request of an RPC, serialized. One that does not come in time is cancelled."""

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
    # That of the only request is called in `_guarded`, where it may fail.
    deserializer = handler.request_deserializer if handler.request_streaming else None
    made: grpc.RpcMethodHandler[Any, Any] = make(behavior, deserializer, handler.response_serializer)
    return made


def _guarded(handler: Any, wait: Callable[[Iterator[Any], grpc.ServicerContext], Any]) -> Callable[[Any, Any], Any]:
    """The handler's behavior; gRPC tells a client the text of what it raises, which is none of its business."""
    unary, streams = handler.unary_unary or handler.stream_unary, handler.unary_stream or handler.stream_stream

    def given(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        """What the behavior takes: all requests, or the only one."""
        if handler.request_streaming:
            return requests
        data = wait(requests, context)
        try:
            return handler.request_deserializer(data)
        except Exception as err:
            raise ProtocolError("a request came that cannot be parsed") from err

    def fail(context: grpc.ServicerContext, err: BaseException) -> None:
        try:
            if type(err) is Exception or isinstance(err, grpc.RpcError):  # context.abort raises it; the client is gone
                raise err
            if not isinstance(err, SchoolhouseError):
                _log.exception("an RPC failed")
            status.abort(context, err)
        finally:
            del err  # which has this frame; see `status.abort`

    def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        try:
            return unary(given(requests, context), context)
        except BaseException as err:  # gRPC ends no call by one that is no Exception
            return fail(context, err)

    def answers(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from streams(given(requests, context), context)
        except GeneratorExit:
            raise
        except BaseException as err:
            fail(context, err)

    return answers if streams is not None else answer
