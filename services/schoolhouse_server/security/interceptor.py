"""The gRPC interceptor of all our servers: checks tokens, bounds the wait for requests, and maps errors."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
from schoolhouse_wire.errors import AuthenticationError, ProtocolError, SchoolhouseError
from schoolhouse_wire.rpc import status

from schoolhouse_server.security.auth import Gate
from schoolhouse_server.security.places import Places

_OPEN = ("/grpc.health.v1.Health/Check",)  # needs no token, as probes have none
SHORT_RPCS = 128  # beside sessions and watches: those that wait for their request, and those that are answered
_MAX_STRANGERS = 16  # calls without a token that may wait for their request at once
_MAX_WAITING = 64  # the same of all others
_REQUEST_S = 10.0  # how long a call with a single request may take to send it
_PATIENCE_S = 1.0  # after which it gives its place up if that is wanted
_QUIET_S = 10.0  # the least time between two log records about refused calls

_log = logging.getLogger(__name__)
_WAITING = f"{_MAX_WAITING} calls have not sent their request yet; try again"
_STRANGERS = f"{_MAX_STRANGERS} calls without a token have not sent their request yet; try again"
_Context = grpc.aio.ServicerContext[Any, Any]
_Behavior = Callable[[Any, _Context], Awaitable[None]]


class _LateError(Exception):
    """The request did not come in time."""


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Refuses RPCs without a known token, ends those that send no request in time, and lets only our errors out.

    All RPCs are handled as streams, which is the same on the wire: so a call without a known token is refused
    before its request is read, the others have `request_s` to send it, unless their place is wanted, and an error
    comes without an answer before it, which gRPC would send with the status of a single answer. A handler raises
    the error that its client is to be told; gRPC would send the text of any exception.
    """

    def __init__(self, gate: Gate, request_s: float = _REQUEST_S) -> None:
        self._gate = gate
        self._request_s = request_s
        self._refused, self._said_at = 0, -_QUIET_S
        self._strangers = Places(_MAX_STRANGERS, _STRANGERS, _PATIENCE_S)
        self._waiting = Places(_MAX_WAITING, _WAITING, _PATIENCE_S)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's handler with these checks, or one that refuses the call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        is_open = handler_call_details.method in _OPEN and self._gate.tokens is not None
        if not is_open:
            try:
                self._gate.grant_of(handler_call_details.invocation_metadata)
            except AuthenticationError as err:
                return _with_behavior(handler, self._refusing(err.with_traceback(None)))
        return _with_behavior(handler, self._guarded(handler, stranger=is_open))

    def _refusing(self, error: AuthenticationError) -> _Behavior:
        async def refuse(_requests: Any, context: _Context) -> None:
            self._refused += 1
            if time.monotonic() - self._said_at >= _QUIET_S:
                _log.warning(
                    "%d calls without a known token were refused, the last from %s", self._refused, context.peer()
                )
                self._refused, self._said_at = 0, time.monotonic()
            status.end(context, error)

        return refuse

    def _guarded(self, handler: Any, *, stranger: bool) -> _Behavior:
        unary, streams = handler.unary_unary or handler.stream_unary, handler.unary_stream or handler.stream_stream

        async def answer(requests: Any, context: _Context) -> None:
            try:
                given = requests if handler.request_streaming else await self._given(handler, context, stranger)
                if unary is not None:
                    await context.write(await unary(given, context))
                    return
                answers = streams(given, context)
                if not isinstance(answers, AsyncGenerator):
                    await answers
                    return
                async with contextlib.aclosing(answers):
                    async for one in answers:
                        await context.write(one)
            except _LateError:
                context.set_code(grpc.StatusCode.CANCELLED)
            except grpc.aio.AbortError as err:
                err.__traceback__ = None  # gRPC raises it once more; its frames refer to the call, which refers to it
            except grpc.aio.BaseError:
                pass  # the client is gone, or the server has stopped: nobody can be told anything
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as err:
                if not isinstance(err, SchoolhouseError):
                    _log.exception("an RPC failed")
                status.end(context, err)

        return answer

    async def _given(self, handler: Any, context: _Context, stranger: bool) -> Any:
        """The only request of an RPC; raises `_LateError` if it does not come in time."""
        peer, began = context.peer(), time.monotonic()
        if stranger:
            places, holder = self._strangers, peer
        else:
            places, holder = self._waiting, self._gate.holder(self._gate.grant(context), peer)
        try:
            async with asyncio.timeout(self._request_s) as clock:
                with places.held(holder, lambda _error: clock.reschedule(0.0), lambda: began):
                    data = await context.read()
        except TimeoutError:
            raise _LateError from None
        if data is grpc.aio.EOF:
            raise ProtocolError("a call came without its request")
        try:
            return handler.request_deserializer(data)
        except Exception as err:
            raise ProtocolError("the request cannot be parsed") from err


def _with_behavior(handler: Any, behavior: _Behavior) -> "grpc.RpcMethodHandler[Any, Any]":
    # A single request is deserialized in `_given`, where a failure becomes one of our errors.
    deserializer = handler.request_deserializer if handler.request_streaming else None
    make: Any = grpc.stream_stream_rpc_method_handler
    made: grpc.RpcMethodHandler[Any, Any] = make(behavior, deserializer, handler.response_serializer)
    return made
