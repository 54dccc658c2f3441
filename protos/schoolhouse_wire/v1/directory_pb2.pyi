from google.protobuf.internal import containers as _containers
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
    __slots__ = ("teacher", "replicas", "wanted")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    wanted: int
    def __init__(self, teacher: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., wanted: _Optional[int] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("id", "address", "revision", "load")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    revision: str
    load: Load
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., revision: _Optional[str] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("queued", "in_flight", "served", "sessions", "joined", "cached", "missed", "cache_bytes", "stage_s")
    class StageSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGE_S_FIELD_NUMBER: _ClassVar[int]
    queued: int
    in_flight: int
    served: int
    sessions: int
    joined: int
    cached: int
    missed: int
    cache_bytes: int
    stage_s: _containers.ScalarMap[str, float]
    def __init__(self, queued: _Optional[int] = ..., in_flight: _Optional[int] = ..., served: _Optional[int] = ..., sessions: _Optional[int] = ..., joined: _Optional[int] = ..., cached: _Optional[int] = ..., missed: _Optional[int] = ..., cache_bytes: _Optional[int] = ..., stage_s: _Optional[_Mapping[str, float]] = ...) -> None: ...
