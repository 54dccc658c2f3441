"""Channel and server options that both sides must agree on."""

import grpc

from schoolhouse_wire import forks
from schoolhouse_wire.limits import FRAME_BYTES, Limits

PROTOCOL = 4
SESSION_METHOD = "/schoolhouse.v1.TeacherService/Session"
MAX_MESSAGE_BYTES = Limits().max_header_bytes + FRAME_BYTES
_CLIENT_PING_MS = 30_000
_SERVER_MIN_PING_MS = 10_000  # strictly below the client's interval, or a long forward ends in too_many_pings

_COMMON: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # identity alone: nothing that comes is ever inflated
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
    ("grpc.max_concurrent_streams", 64),  # of one connection
    ("grpc.max_allowed_incoming_connections", 2048),
    ("grpc.server_handshake_timeout_ms", 20_000),  # for a connection that does not say what it is for
    ("grpc.max_connection_idle_ms", 300_000),  # without a stream; a channel connects again as it is used
    ("grpc.http2.min_ping_interval_without_data_ms", _SERVER_MIN_PING_MS),  # received ones; gRPC's C name for it
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.so_reuseport", 0),
]


def connect(target: str) -> grpc.Channel:
    """A channel to `target`; it connects at its first use."""
    forks.before_grpc()
    return grpc.insecure_channel(target, options=CLIENT_OPTIONS)
