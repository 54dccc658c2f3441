"""Channel and server options that both sides must agree on."""

from typing import Any

from schoolhouse_wire.limits import FRAME_BYTES, Limits
from schoolhouse_wire.rpc import forks
from schoolhouse_wire.rpc.forks import grpc
from schoolhouse_wire.rpc.security import ClientSecurity

PROTOCOL = 5
SESSION_METHOD = "/schoolhouse.v1.TeacherService/Session"
MAX_MESSAGE_BYTES = Limits().max_header_bytes + FRAME_BYTES
TOKEN_KEY, TOKEN_PREFIX = "authorization", "Bearer "  # in the metadata of each RPC
MAX_CONNECTIONS = 4096  # that a server takes, unless it takes more sessions
_CLIENT_PING_MS = 30_000
_SERVER_MIN_PING_MS = 10_000  # must be below the client's interval, or a long forward ends in too_many_pings

_COMMON: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # only "identity", so that no message can inflate
]

CLIENT_OPTIONS: list[tuple[str, int | str]] = [
    *_COMMON,
    ("grpc.keepalive_time_ms", _CLIENT_PING_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
SERVER_OPTIONS: list[tuple[str, int | str]] = [
    *_COMMON,
    ("grpc.max_concurrent_streams", 1024),  # per connection, which all sessions of a process share
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 20_000),  # for connections on which nothing is sent
    ("grpc.max_connection_idle_ms", 60_000),  # without a stream; a channel connects again at its next use
    ("grpc.http2.min_ping_interval_without_data_ms", _SERVER_MIN_PING_MS),  # of received pings, under gRPC's C name
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.so_reuseport", 0),
]


def connect(target: str, security: ClientSecurity = ClientSecurity()) -> grpc.Channel:
    """A channel to `target`, which connects at its first use; each RPC is given `metadata(security)`.

    Raises:
        ConfigError: if `target` may be on another machine, and `security` is plaintext without `insecure`.
        UsageError: in a process that was forked from one that has used gRPC.
    """
    opened: grpc.Channel = _opened(grpc, target, security)
    return opened


def connect_aio(target: str, security: ClientSecurity = ClientSecurity()) -> grpc.aio.Channel:
    """As `connect`, for the event loop that runs in this thread."""
    opened: grpc.aio.Channel = _opened(grpc.aio, target, security)
    return opened


def metadata(security: ClientSecurity) -> tuple[tuple[str, str], ...]:
    """What each RPC carries: the token, if there is one."""
    return ((TOKEN_KEY, f"{TOKEN_PREFIX}{security.token}"),) if security.token else ()


def _opened(of: Any, target: str, security: ClientSecurity) -> Any:
    security.allow(target)
    forks.before_grpc()
    if not security.tls:
        return of.insecure_channel(target, options=CLIENT_OPTIONS)
    credentials = grpc.ssl_channel_credentials(security.ca, security.key, security.cert)
    options = [*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", security.server_name)]
    return of.secure_channel(target, credentials, options=options)


def with_its_own_status(call: Any) -> Any:
    """Have a stream of `grpc.aio` end with the status that its server gave, also if a message was being written then.

    gRPC puts an internal error in place of a status that has not been read yet, so that the reason would be lost. It
    has no setting for that; `_cython_call` is private.
    """
    call._cython_call = _OwnStatus(call._cython_call)
    return call


class _OwnStatus:
    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def set_internal_error(self, _error: str) -> None:
        """Wait for the status."""
