from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    BOOL: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    INT8: _ClassVar[DType]
    INT16: _ClassVar[DType]
    INT32: _ClassVar[DType]
    INT64: _ClassVar[DType]
    UINT16: _ClassVar[DType]
    UINT32: _ClassVar[DType]
    UINT64: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    FLOAT64: _ClassVar[DType]
    COMPLEX32: _ClassVar[DType]
    COMPLEX64: _ClassVar[DType]
    COMPLEX128: _ClassVar[DType]
    FLOAT8_E4M3FN: _ClassVar[DType]
    FLOAT8_E5M2: _ClassVar[DType]
    FLOAT8_E4M3FNUZ: _ClassVar[DType]
    FLOAT8_E5M2FNUZ: _ClassVar[DType]
    FLOAT8_E8M0FNU: _ClassVar[DType]
    FLOAT4_E2M1FN_X2: _ClassVar[DType]
    INT1: _ClassVar[DType]
    INT2: _ClassVar[DType]
    INT3: _ClassVar[DType]
    INT4: _ClassVar[DType]
    INT5: _ClassVar[DType]
    INT6: _ClassVar[DType]
    INT7: _ClassVar[DType]
    UINT1: _ClassVar[DType]
    UINT2: _ClassVar[DType]
    UINT3: _ClassVar[DType]
    UINT4: _ClassVar[DType]
    UINT5: _ClassVar[DType]
    UINT6: _ClassVar[DType]
    UINT7: _ClassVar[DType]
    BITS1X8: _ClassVar[DType]
    BITS2X4: _ClassVar[DType]
    BITS4X2: _ClassVar[DType]
    BITS8: _ClassVar[DType]
    BITS16: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
BOOL: DType
UINT8: DType
INT8: DType
INT16: DType
INT32: DType
INT64: DType
UINT16: DType
UINT32: DType
UINT64: DType
FLOAT16: DType
BFLOAT16: DType
FLOAT32: DType
FLOAT64: DType
COMPLEX32: DType
COMPLEX64: DType
COMPLEX128: DType
FLOAT8_E4M3FN: DType
FLOAT8_E5M2: DType
FLOAT8_E4M3FNUZ: DType
FLOAT8_E5M2FNUZ: DType
FLOAT8_E8M0FNU: DType
FLOAT4_E2M1FN_X2: DType
INT1: DType
INT2: DType
INT3: DType
INT4: DType
INT5: DType
INT6: DType
INT7: DType
UINT1: DType
UINT2: DType
UINT3: DType
UINT4: DType
UINT5: DType
UINT6: DType
UINT7: DType
BITS1X8: DType
BITS2X4: DType
BITS4X2: DType
BITS8: DType
BITS16: DType

class TensorHeader(_message.Message):
    __slots__ = ("dtype", "shape", "dim_order")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DIM_ORDER_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    dim_order: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., dim_order: _Optional[_Iterable[int]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("none", "boolean", "integer", "big_integer", "real", "complex", "text", "raw", "tensor", "tuple", "list", "dict", "record", "arguments", "opaque", "packed")
    NONE_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    BIG_INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    COMPLEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    DICT_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    OPAQUE_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    none: Nothing
    boolean: bool
    integer: int
    big_integer: bytes
    real: float
    complex: Complex
    text: str
    raw: bytes
    tensor: int
    tuple: Sequence
    list: Sequence
    dict: Mapping
    record: Record
    arguments: Arguments
    opaque: str
    packed: Packed
    def __init__(self, none: _Optional[_Union[Nothing, _Mapping]] = ..., boolean: _Optional[bool] = ..., integer: _Optional[int] = ..., big_integer: _Optional[bytes] = ..., real: _Optional[float] = ..., complex: _Optional[_Union[Complex, _Mapping]] = ..., text: _Optional[str] = ..., raw: _Optional[bytes] = ..., tensor: _Optional[int] = ..., tuple: _Optional[_Union[Sequence, _Mapping]] = ..., list: _Optional[_Union[Sequence, _Mapping]] = ..., dict: _Optional[_Union[Mapping, _Mapping]] = ..., record: _Optional[_Union[Record, _Mapping]] = ..., arguments: _Optional[_Union[Arguments, _Mapping]] = ..., opaque: _Optional[str] = ..., packed: _Optional[_Union[Packed, _Mapping]] = ...) -> None: ...

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Complex(_message.Message):
    __slots__ = ("real", "imaginary")
    REAL_FIELD_NUMBER: _ClassVar[int]
    IMAGINARY_FIELD_NUMBER: _ClassVar[int]
    real: float
    imaginary: float
    def __init__(self, real: _Optional[float] = ..., imaginary: _Optional[float] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, items: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Mapping(_message.Message):
    __slots__ = ("keys", "values")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Value]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, keys: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("kind", "type_name", "names", "values")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Record.Kind]
        NAMED_TUPLE: _ClassVar[Record.Kind]
        DATACLASS: _ClassVar[Record.Kind]
        MODEL_OUTPUT: _ClassVar[Record.Kind]
    KIND_UNSPECIFIED: Record.Kind
    NAMED_TUPLE: Record.Kind
    DATACLASS: Record.Kind
    MODEL_OUTPUT: Record.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    TYPE_NAME_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    kind: Record.Kind
    type_name: str
    names: _containers.RepeatedScalarFieldContainer[str]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, kind: _Optional[_Union[Record.Kind, str]] = ..., type_name: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Packed(_message.Message):
    __slots__ = ("form", "fields")
    class Form(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FORM_UNSPECIFIED: _ClassVar[Packed.Form]
        CAST_TENSOR: _ClassVar[Packed.Form]
        SCALED_ROWS: _ClassVar[Packed.Form]
        TOP_K_ROWS: _ClassVar[Packed.Form]
        SAMPLED_ROWS: _ClassVar[Packed.Form]
        POSITIONED_ROWS: _ClassVar[Packed.Form]
    FORM_UNSPECIFIED: Packed.Form
    CAST_TENSOR: Packed.Form
    SCALED_ROWS: Packed.Form
    TOP_K_ROWS: Packed.Form
    SAMPLED_ROWS: Packed.Form
    POSITIONED_ROWS: Packed.Form
    FORM_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    form: Packed.Form
    fields: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, form: _Optional[_Union[Packed.Form, str]] = ..., fields: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Arguments(_message.Message):
    __slots__ = ("positional", "keyword")
    class KeywordEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    POSITIONAL_FIELD_NUMBER: _ClassVar[int]
    KEYWORD_FIELD_NUMBER: _ClassVar[int]
    positional: _containers.RepeatedCompositeFieldContainer[Value]
    keyword: _containers.MessageMap[str, Value]
    def __init__(self, positional: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., keyword: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class Bundle(_message.Message):
    __slots__ = ("root", "tensors")
    ROOT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    root: Value
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHeader]
    def __init__(self, root: _Optional[_Union[Value, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[TensorHeader, _Mapping]]] = ...) -> None: ...
