"""Replica sets as JSON: /api/state, which the web page shows."""

import json
import math
import time
from collections.abc import Iterable
from typing import Any

from google.protobuf.message import Message
from schoolhouse_wire.v1.directory_pb2 import Replica, ReplicaSet

from schoolhouse_server.observe.counters import QUEUE_DELAY_BUCKETS_S

VERSION = 1


def state_json(sets: Iterable[ReplicaSet]) -> bytes:
    """The replica sets as one JSON object, with these keys.

    - `version`: 1; it changes when a field is removed or changes its meaning, not when one is added.
    - `time_s`: this server's clock, in seconds since 1970.
    - `queue_delay_buckets_s`: the upper bounds of the buckets of `load.queue_delay_counts`; one more bucket has what
      waited longer.
    - `teachers`: a list of `{teacher, wanted, revision, replicas}`. A replica has `id`, `address` (empty: this server),
      `revision`, `state` ("serving", "draining"), `host`, `zone` and `load`, which has all fields of `Load` and
      `JobLoad` in directory.proto under the same names. Numbers that are not finite are null.
    """
    teachers = [_as_json(found) for found in sets]
    state = {
        "version": VERSION,
        "time_s": time.time(),
        "queue_delay_buckets_s": QUEUE_DELAY_BUCKETS_S,
        "teachers": teachers,
    }
    return json.dumps(state, allow_nan=False).encode()


def _as_json(value: Any) -> Any:
    """A message as a mapping of all its fields, empty ones included."""
    if isinstance(value, Message):
        found = {field.name: _as_json(getattr(value, field.name)) for field in value.DESCRIPTOR.fields}
        return found | {"state": Replica.State.Name(value.state).lower()} if isinstance(value, Replica) else found
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int):
        return value
    if hasattr(value, "items"):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value]
