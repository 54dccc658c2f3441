from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListTeachersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTeachersResponse(_message.Message):
    __slots__ = ("teachers",)
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    teachers: _containers.RepeatedCompositeFieldContainer[ReplicaSet]
    def __init__(self, teachers: _Optional[_Iterable[_Union[ReplicaSet, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    def __init__(self, teacher: _Optional[str] = ...) -> None: ...

class ReplicaSet(_message.Message):
    __slots__ = ("teacher", "replicas", "wanted", "revision")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    wanted: int
    revision: str
    def __init__(self, teacher: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., wanted: _Optional[int] = ..., revision: _Optional[str] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("id", "address", "revision", "load", "state", "host", "zone")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SERVING: _ClassVar[Replica.State]
        DRAINING: _ClassVar[Replica.State]
    SERVING: Replica.State
    DRAINING: Replica.State
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    revision: str
    load: Load
    state: Replica.State
    host: str
    zone: str
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., revision: _Optional[str] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., state: _Optional[_Union[Replica.State, str]] = ..., host: _Optional[str] = ..., zone: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("queued", "in_flight", "served", "sessions", "joined", "cached", "missed", "cache_bytes", "stage_s", "queue_delay_s", "queue_delay_counts", "forwards", "rows", "batch_limit_rows", "errors", "feature_bytes", "uptime_s", "jobs")
    class StageSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ErrorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FeatureBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DELAY_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DELAY_COUNTS_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_LIMIT_ROWS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    queued: int
    in_flight: int
    served: int
    sessions: int
    joined: int
    cached: int
    missed: int
    cache_bytes: int
    stage_s: _containers.ScalarMap[str, float]
    queue_delay_s: float
    queue_delay_counts: _containers.RepeatedScalarFieldContainer[int]
    forwards: int
    rows: int
    batch_limit_rows: float
    errors: _containers.ScalarMap[str, int]
    feature_bytes: _containers.ScalarMap[str, int]
    uptime_s: float
    jobs: _containers.RepeatedCompositeFieldContainer[JobLoad]
    def __init__(self, queued: _Optional[int] = ..., in_flight: _Optional[int] = ..., served: _Optional[int] = ..., sessions: _Optional[int] = ..., joined: _Optional[int] = ..., cached: _Optional[int] = ..., missed: _Optional[int] = ..., cache_bytes: _Optional[int] = ..., stage_s: _Optional[_Mapping[str, float]] = ..., queue_delay_s: _Optional[float] = ..., queue_delay_counts: _Optional[_Iterable[int]] = ..., forwards: _Optional[int] = ..., rows: _Optional[int] = ..., batch_limit_rows: _Optional[float] = ..., errors: _Optional[_Mapping[str, int]] = ..., feature_bytes: _Optional[_Mapping[str, int]] = ..., uptime_s: _Optional[float] = ..., jobs: _Optional[_Iterable[_Union[JobLoad, _Mapping]]] = ...) -> None: ...

class JobLoad(_message.Message):
    __slots__ = ("job", "weight", "sessions", "queued", "in_flight", "requests", "rows", "cost", "queue_s", "errors", "waits", "received_bytes", "sent_bytes", "device_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    weight: float
    sessions: int
    queued: int
    in_flight: int
    requests: int
    rows: int
    cost: float
    queue_s: float
    errors: int
    waits: int
    received_bytes: int
    sent_bytes: int
    device_s: float
    def __init__(self, job: _Optional[str] = ..., weight: _Optional[float] = ..., sessions: _Optional[int] = ..., queued: _Optional[int] = ..., in_flight: _Optional[int] = ..., requests: _Optional[int] = ..., rows: _Optional[int] = ..., cost: _Optional[float] = ..., queue_s: _Optional[float] = ..., errors: _Optional[int] = ..., waits: _Optional[int] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., device_s: _Optional[float] = ...) -> None: ...
