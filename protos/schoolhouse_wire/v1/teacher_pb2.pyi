from schoolhouse_wire.v1 import values_pb2 as _values_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    def __init__(self, teacher: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("teacher", "revision", "class_name", "modules", "parameters", "dtype", "device", "merge", "max_request_bytes", "max_in_flight", "module_classes")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MODULE_CLASSES_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    revision: str
    class_name: str
    modules: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    dtype: str
    device: str
    merge: str
    max_request_bytes: int
    max_in_flight: int
    module_classes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, teacher: _Optional[str] = ..., revision: _Optional[str] = ..., class_name: _Optional[str] = ..., modules: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Iterable[str]] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., merge: _Optional[str] = ..., max_request_bytes: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., module_classes: _Optional[_Iterable[str]] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("open", "call", "cancel", "attached", "renew", "frame", "released")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    open: Open
    call: Call
    cancel: Cancel
    attached: Attached
    renew: Renew
    frame: Frame
    released: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., call: _Optional[_Union[Call, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., released: _Optional[_Iterable[int]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("opened", "reply", "failure", "wait", "resume", "draining", "frame", "released")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    reply: Reply
    failure: Failure
    wait: Wait
    resume: Resume
    draining: Draining
    frame: Frame
    released: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., reply: _Optional[_Union[Reply, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., released: _Optional[_Iterable[int]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "teacher", "job", "shared_memory", "checksums", "weight", "revision")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    teacher: str
    job: str
    shared_memory: bool
    checksums: bool
    weight: float
    revision: str
    def __init__(self, protocol: _Optional[int] = ..., teacher: _Optional[str] = ..., job: _Optional[str] = ..., shared_memory: _Optional[bool] = ..., checksums: _Optional[bool] = ..., weight: _Optional[float] = ..., revision: _Optional[str] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("revision", "max_in_flight", "max_request_bytes", "shared_memory", "max_bytes_in_flight", "lease_s")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    revision: str
    max_in_flight: int
    max_request_bytes: int
    shared_memory: SharedMemory
    max_bytes_in_flight: int
    lease_s: float
    def __init__(self, revision: _Optional[str] = ..., max_in_flight: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., max_bytes_in_flight: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Wait(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("pid", "fd", "nbytes", "requests_at", "replies_at", "nonce", "to_replica_fd", "to_client_fd", "to_replica_inode", "to_client_inode")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_AT_FIELD_NUMBER: _ClassVar[int]
    REPLIES_AT_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    TO_REPLICA_FD_FIELD_NUMBER: _ClassVar[int]
    TO_CLIENT_FD_FIELD_NUMBER: _ClassVar[int]
    TO_REPLICA_INODE_FIELD_NUMBER: _ClassVar[int]
    TO_CLIENT_INODE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    nbytes: int
    requests_at: int
    replies_at: int
    nonce: bytes
    to_replica_fd: int
    to_client_fd: int
    to_replica_inode: int
    to_client_inode: int
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., nbytes: _Optional[int] = ..., requests_at: _Optional[int] = ..., replies_at: _Optional[int] = ..., nonce: _Optional[bytes] = ..., to_replica_fd: _Optional[int] = ..., to_client_fd: _Optional[int] = ..., to_replica_inode: _Optional[int] = ..., to_client_inode: _Optional[int] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("attached", "pipes", "proof")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    PIPES_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    attached: bool
    pipes: bool
    proof: bytes
    def __init__(self, attached: _Optional[bool] = ..., pipes: _Optional[bool] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("offset", "nbytes")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    offset: int
    nbytes: int
    def __init__(self, offset: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class Tap(_message.Message):
    __slots__ = ("module", "side", "encoding")
    class Side(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SIDE_UNSPECIFIED: _ClassVar[Tap.Side]
        INPUT: _ClassVar[Tap.Side]
        OUTPUT: _ClassVar[Tap.Side]
        HEAD: _ClassVar[Tap.Side]
    SIDE_UNSPECIFIED: Tap.Side
    INPUT: Tap.Side
    OUTPUT: Tap.Side
    HEAD: Tap.Side
    MODULE_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    module: str
    side: Tap.Side
    encoding: Encoding
    def __init__(self, module: _Optional[str] = ..., side: _Optional[_Union[Tap.Side, str]] = ..., encoding: _Optional[_Union[Encoding, _Mapping]] = ...) -> None: ...

class Encoding(_message.Message):
    __slots__ = ("cast", "per_row", "topk", "sampled", "hidden", "positions")
    CAST_FIELD_NUMBER: _ClassVar[int]
    PER_ROW_FIELD_NUMBER: _ClassVar[int]
    TOPK_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    cast: _values_pb2.DType
    per_row: _values_pb2.DType
    topk: TopK
    sampled: Sampled
    hidden: Hidden
    positions: bool
    def __init__(self, cast: _Optional[_Union[_values_pb2.DType, str]] = ..., per_row: _Optional[_Union[_values_pb2.DType, str]] = ..., topk: _Optional[_Union[TopK, _Mapping]] = ..., sampled: _Optional[_Union[Sampled, _Mapping]] = ..., hidden: _Optional[_Union[Hidden, _Mapping]] = ..., positions: _Optional[bool] = ...) -> None: ...

class TopK(_message.Message):
    __slots__ = ("k", "temperature")
    K_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    k: int
    temperature: float
    def __init__(self, k: _Optional[int] = ..., temperature: _Optional[float] = ...) -> None: ...

class Sampled(_message.Message):
    __slots__ = ("n", "temperature", "seed")
    N_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    n: int
    temperature: float
    seed: int
    def __init__(self, n: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Hidden(_message.Message):
    __slots__ = ("head", "encoding")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    head: str
    encoding: Encoding
    def __init__(self, head: _Optional[str] = ..., encoding: _Optional[_Union[Encoding, _Mapping]] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("request_id", "taps", "revision", "timeout_s", "inputs", "payload", "traceparent", "alone", "broke", "checksum")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    BROKE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    taps: _containers.RepeatedCompositeFieldContainer[Tap]
    revision: str
    timeout_s: float
    inputs: bytes
    payload: Payload
    traceparent: str
    alone: bool
    broke: int
    checksum: int
    def __init__(self, request_id: _Optional[int] = ..., taps: _Optional[_Iterable[_Union[Tap, _Mapping]]] = ..., revision: _Optional[str] = ..., timeout_s: _Optional[float] = ..., inputs: _Optional[bytes] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., traceparent: _Optional[str] = ..., alone: _Optional[bool] = ..., broke: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("request_id", "revision", "taps", "input_digest", "features", "payload", "queued")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    INPUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    revision: str
    taps: _containers.RepeatedCompositeFieldContainer[Tap]
    input_digest: bytes
    features: bytes
    payload: Payload
    queued: int
    def __init__(self, request_id: _Optional[int] = ..., revision: _Optional[str] = ..., taps: _Optional[_Iterable[_Union[Tap, _Mapping]]] = ..., input_digest: _Optional[bytes] = ..., features: _Optional[bytes] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ..., queued: _Optional[int] = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("digest", "data", "shared")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    data: bytes
    shared: Block
    def __init__(self, digest: _Optional[bytes] = ..., data: _Optional[bytes] = ..., shared: _Optional[_Union[Block, _Mapping]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("request_id", "offset", "digest", "data")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    offset: int
    digest: bytes
    data: bytes
    def __init__(self, request_id: _Optional[int] = ..., offset: _Optional[int] = ..., digest: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("request_id", "code", "message", "choices", "broke")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CODE_UNSPECIFIED: _ClassVar[Failure.Code]
        UNKNOWN_TEACHER: _ClassVar[Failure.Code]
        UNKNOWN_TAP: _ClassVar[Failure.Code]
        TEACHER_FORWARD: _ClassVar[Failure.Code]
        MESSAGE_TOO_LARGE: _ClassVar[Failure.Code]
        UNSUPPORTED_VALUE: _ClassVar[Failure.Code]
        CORRUPT_PAYLOAD: _ClassVar[Failure.Code]
        PROTOCOL: _ClassVar[Failure.Code]
        UNAVAILABLE: _ClassVar[Failure.Code]
        TIMEOUT: _ClassVar[Failure.Code]
        BUSY: _ClassVar[Failure.Code]
        REVISION_CHANGED: _ClassVar[Failure.Code]
        INTERNAL: _ClassVar[Failure.Code]
        LEASE_EXPIRED: _ClassVar[Failure.Code]
        OUT_OF_MEMORY: _ClassVar[Failure.Code]
        UNAUTHENTICATED: _ClassVar[Failure.Code]
        PERMISSION_DENIED: _ClassVar[Failure.Code]
    CODE_UNSPECIFIED: Failure.Code
    UNKNOWN_TEACHER: Failure.Code
    UNKNOWN_TAP: Failure.Code
    TEACHER_FORWARD: Failure.Code
    MESSAGE_TOO_LARGE: Failure.Code
    UNSUPPORTED_VALUE: Failure.Code
    CORRUPT_PAYLOAD: Failure.Code
    PROTOCOL: Failure.Code
    UNAVAILABLE: Failure.Code
    TIMEOUT: Failure.Code
    BUSY: Failure.Code
    REVISION_CHANGED: Failure.Code
    INTERNAL: Failure.Code
    LEASE_EXPIRED: Failure.Code
    OUT_OF_MEMORY: Failure.Code
    UNAUTHENTICATED: Failure.Code
    PERMISSION_DENIED: Failure.Code
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    BROKE_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    code: Failure.Code
    message: str
    choices: _containers.RepeatedScalarFieldContainer[str]
    broke: bool
    def __init__(self, request_id: _Optional[int] = ..., code: _Optional[_Union[Failure.Code, str]] = ..., message: _Optional[str] = ..., choices: _Optional[_Iterable[str]] = ..., broke: _Optional[bool] = ...) -> None: ...
