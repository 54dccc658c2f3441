"""How values travel: a header, and a payload inside it, in frames, or in a block of shared memory.

A frame is an ordinary protobuf message, but written and read by hand. Its last field is the data, so that each byte is
copied once to send it, and once into the receive buffer; the generated code would copy it twice on each side.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import xxhash
from google.protobuf.message import DecodeError, Message

from schoolhouse_wire import memory
from schoolhouse_wire.errors import CorruptPayloadError, MessageTooLargeError, ProtocolError
from schoolhouse_wire.limits import ALIGNMENT, FRAME_BYTES, INLINE_BYTES, Limits
from schoolhouse_wire.outbox import Elsewhere
from schoolhouse_wire.same_host.shared_memory import Segment, add_spots
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values import codec
from schoolhouse_wire.values.tensors import aligned, bytes_of

M = TypeVar("M", bound=Message)

_FRAME_TAG = 0x7A  # field 15, length-delimited: `frame` in both ClientMessage and ServerMessage
_REQUEST_TAG, _OFFSET_TAG, _DIGEST_TAG, _DATA_TAG = 0x08, 0x10, 0x1A, 0x7A
_UINT64 = (1 << 64) - 1
_NO_PAYLOAD = teacher_pb2.Payload()
_CORRUPT = "a payload arrived whose checksum does not match its bytes"
_PADDING = memoryview(bytearray(ALIGNMENT))  # writable, since only then ctypes gives its address
_TURN_BYTES = 16 << 20  # bytes that are copied before another reply gets its turn
_AT_ONCE_BYTES = 1 << 20  # so many are copied faster than they are handed to another thread


@dataclass(frozen=True)
class Frame:
    """A slice of a payload; only the last one has a `digest`."""

    request_id: int
    offset: int
    digest: bytes
    data: memoryview


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & _UINT64, at  # cut to 64 bits, as protobuf does
        shift += 7
    raise ProtocolError("a frame arrived that cannot be parsed: a number is too long")


def write_frame(request_id: int, offset: int, digest: bytes, slices: list[memoryview]) -> bytes:
    """Serialize a session message with one frame, whose data are the joined `slices`."""
    size = sum(part.nbytes for part in slices)
    fields = [bytes([_REQUEST_TAG]), _varint(request_id), bytes([_OFFSET_TAG]), _varint(offset)]
    if digest:
        fields += [bytes([_DIGEST_TAG]), _varint(len(digest)), digest]
    head = b"".join([*fields, bytes([_DATA_TAG]), _varint(size)])
    return b"".join([bytes([_FRAME_TAG]), _varint(len(head) + size), head, *slices])


def read_message(kind: type[M], data: bytes) -> M | Frame:
    """Parse a session message of type `kind`; a frame's data stays a view of `data`."""
    try:
        if data and data[0] == _FRAME_TAG:
            frame = _read_frame(data)
            if frame is not None:
                return frame
        message: Any = kind.FromString(data)
    except (DecodeError, IndexError) as err:
        raise ProtocolError("a message arrived that cannot be parsed") from err
    if message.WhichOneof("kind") != "frame":
        return message  # type: ignore[no-any-return]
    frame = message.frame  # parsed by protobuf, since the peer wrote the fields in another order
    return Frame(frame.request_id, frame.offset, frame.digest, memoryview(frame.data))


def received(kind: type[M], data: bytes) -> M | Frame | ProtocolError:
    """As `read_message`, but returns the error, since gRPC would log it and end the RPC without giving a reason."""
    try:
        return read_message(kind, data)
    except ProtocolError as err:
        return err


def parsed(kind: type[M], data: bytes) -> M | ProtocolError:
    """Parse any message, but return the error: see `received`."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return ProtocolError("a message arrived that cannot be parsed")


def _read_frame(data: bytes) -> Frame | None:
    size, at = _read_varint(data, 1)
    request_id = offset = 0
    digest = b""
    if at + size != len(data):
        return None
    while at < len(data):
        tag = data[at]
        value, at = _read_varint(data, at + 1)
        if tag == _REQUEST_TAG:
            request_id = value
        elif tag == _OFFSET_TAG:
            offset = value
        elif tag == _DIGEST_TAG:
            digest, at = data[at : at + value], at + value
        elif tag == _DATA_TAG and at + value == len(data):
            return Frame(request_id, offset, digest, memoryview(data)[at:])
        else:
            return None
    return None


def add_checksum(call: teacher_pb2.Call) -> None:
    """Set the checksum of a call before it is sent; the receiver checks it by `unchanged`."""
    call.checksum = _checksum(call)


def unchanged(call: teacher_pb2.Call) -> teacher_pb2.Call:
    """Check that a call arrived as it was sent, except for the payload, which has its own digest.

    Raises:
        CorruptPayloadError: if a field, possibly its id, differs from what was sent.
    """
    if call.checksum and call.checksum != _checksum(call):
        raise CorruptPayloadError("a call arrived whose checksum does not match its fields")
    return call


def _checksum(call: teacher_pb2.Call) -> int:
    bare = teacher_pb2.Call()
    bare.CopyFrom(call)
    bare.ClearField("checksum")
    if bare.HasField("payload"):
        bare.payload.ClearField("data")
    return xxhash.xxh3_64_intdigest(bare.SerializeToString(deterministic=True))


def write_message(message: Message | bytes) -> bytes:
    """Serialize a session message, unless it is a frame, which is serialized already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


class Outgoing:
    """A value to send: its serialized bundle, and its payload, inline, as frames or in shared memory."""

    def __init__(self, value: Any, *, limits: Limits, snapshot: bool) -> None:
        """Declare `value`, unless it is `Declared` already.

        With `snapshot`, a payload that is not inline is copied; without it, the tensors must not change until they are
        sent.
        """
        declared = value if isinstance(value, codec.Declared) else codec.pack(value)
        self.header, self.nbytes, tensors = declared.header, declared.nbytes, declared.tensors
        if self.nbytes > limits.max_payload_bytes:
            raise MessageTooLargeError(
                f"the tensors take {self.nbytes} bytes, over the receiver's limit of {limits.max_payload_bytes}; "
                "send smaller batches, tap fewer modules, or raise that limit"
            )
        if len(self.header) > limits.max_header_bytes:
            raise MessageTooLargeError(
                f"the structure takes {len(self.header)} bytes, over the limit of {limits.max_header_bytes}"
            )
        self.inline = self.nbytes <= INLINE_BYTES
        if snapshot and not self.inline:
            tensors = [bytes_of(tensor).clone() for tensor in tensors]
        self._tensors = tensors
        self.payload = _NO_PAYLOAD
        self.digest = b""  # known once the last byte was sent
        if self.inline:
            data = b"".join(self._small_slices())
            self.digest = xxhash.xxh3_128_digest(self.header + data)
            self.payload = teacher_pb2.Payload(digest=self.digest, data=data)
            self._tensors = []

    def _small_slices(self) -> Iterator[bytes]:
        end = 0
        for tensor in self._tensors:
            start = aligned(end)
            yield bytes(start - end)
            yield ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""
            end = start + tensor.nbytes

    def _slices(self) -> Iterator[memoryview]:
        end = 0
        for tensor in self._tensors:
            start = aligned(end)
            if start > end:
                yield _PADDING[: start - end]
            yield memory.memory_of(tensor)
            end = start + tensor.nbytes

    def messages(
        self,
        request_id: int,
        head: Callable[[teacher_pb2.Payload], Message],
        segment: Segment | None,
        wanted: Callable[[], bool],
    ) -> Iterator[Message | bytes | Elsewhere]:
        """Yield the message `head(payload)` and, unless the payload is inline or in shared memory, its frames.

        The payload goes into a block of `segment` if one is free; the block then belongs to the receiver. The iteration
        ends early once `wanted()` is false.
        """
        offset = segment.take(self.nbytes) if segment is not None and not self.inline else None
        if segment is not None and offset is not None:
            yield from self._shared(head, segment, offset, wanted)
        elif wanted():
            yield head(self.payload)
            for frame in self.frames(request_id):
                if not wanted():
                    return
                yield frame

    def _shared(
        self,
        head: Callable[[teacher_pb2.Payload], Message],
        segment: Segment,
        offset: int,
        wanted: Callable[[], bool],
    ) -> Iterator[Message | bytes | Elsewhere]:
        handed_over = False
        try:
            for step in self._fill(segment, offset):
                if not wanted():
                    return
                if self.nbytes > _AT_ONCE_BYTES:
                    yield Elsewhere(step)
                else:
                    step()
            if wanted():
                block = teacher_pb2.Block(offset=offset, nbytes=self.nbytes)
                yield head(teacher_pb2.Payload(digest=self.digest, shared=block))
                handed_over = True
        finally:
            if not handed_over:
                segment.free(offset)

    def _fill(self, segment: Segment, offset: int) -> Iterator[Callable[[], object]]:
        """The steps that copy the payload into a block, piece by piece, and compute its digest."""
        digest, at = xxhash.xxh3_128(self.header), offset
        for part in self._slices():
            for begin in range(0, part.nbytes, _TURN_BYTES):
                turn = part[begin : begin + _TURN_BYTES]
                if segment.sends_checksums:
                    yield functools.partial(segment.write, at, turn, digest)
                else:
                    yield functools.partial(segment.copy, at, turn)
                at += turn.nbytes
        self.digest = (digest if segment.sends_checksums else segment.spots(digest, offset, self.nbytes)).digest()

    def frames(self, request_id: int) -> Iterator[bytes]:
        """The payload as serialized frames, made one at a time; none if the payload is inline."""
        if self.inline:
            return
        digest = xxhash.xxh3_128(self.header)
        offset = 0
        pending: list[memoryview] = []
        for part in self._slices():
            while part.nbytes:
                room = FRAME_BYTES - sum(piece.nbytes for piece in pending)
                piece, part = part[:room], part[room:]
                digest.update(piece)
                pending.append(piece)
                size = sum(piece.nbytes for piece in pending)
                last = offset + size == self.nbytes
                if size == FRAME_BYTES or last:
                    frame = write_frame(request_id, offset, digest.digest() if last else b"", pending)
                    if last:
                        self.digest = digest.digest()
                    yield frame
                    offset += size
                    pending = []


class Incoming:
    """A value that arrives: in a receive buffer, filled by frames in order, or in shared memory; checked by digest."""

    def __init__(
        self, header: bytes, payload: teacher_pb2.Payload, limits: Limits, segment: Segment | None = None
    ) -> None:
        self._layout = codec.read_layout(header, limits)
        self.nbytes = self._layout.nbytes
        self._limits = limits
        self._filled = 0
        self.digest = b""
        if payload.HasField("shared"):
            self._take_shared(header, payload, segment)
            return
        if payload.digest:
            self._take_inline(header, payload)
            return
        self._hash = xxhash.xxh3_128(header)
        self._buffer = memory.RECEIVE_BUFFERS.take(self.nbytes)
        self._memory = memoryview(self._buffer).cast("B")

    def _take_inline(self, header: bytes, payload: teacher_pb2.Payload) -> None:
        if len(payload.data) != self.nbytes:
            raise ProtocolError(f"{len(payload.data)} bytes arrived where {self.nbytes} were declared")
        if xxhash.xxh3_128_digest(header + payload.data) != payload.digest:
            raise CorruptPayloadError(_CORRUPT)
        self.digest = payload.digest
        self._buffer = bytearray(payload.data)

    def _take_shared(self, header: bytes, payload: teacher_pb2.Payload, segment: Segment | None) -> None:
        if segment is None:
            raise ProtocolError("a payload arrived in shared memory, which this session does not use")
        self._buffer = segment.receive(payload.shared, self.nbytes)
        digest, data = xxhash.xxh3_128(header), memoryview(self._buffer).cast("B")[: self.nbytes]
        if segment.receives_checksums:
            digest.update(data)
        else:
            add_spots(digest, data)
        if digest.digest() != payload.digest:
            raise CorruptPayloadError(_CORRUPT)
        self.digest = payload.digest

    @property
    def complete(self) -> bool:
        """Whether all bytes have arrived and match their digest."""
        return bool(self.digest)

    def add(self, offset: int, data: memoryview, digest: bytes) -> None:
        """Take the next slice of the payload; only the last one has a `digest`."""
        end = offset + data.nbytes
        follows = offset == self._filled and end <= self.nbytes and bool(digest) == (end == self.nbytes)
        if not follows or self.complete or not (data.nbytes or digest):
            raise ProtocolError(
                f"a frame of {data.nbytes} bytes at {offset} does not follow the {self._filled} of {self.nbytes} bytes "
                "that have arrived"
            )
        self._hash.update(data)
        self._memory[offset:end] = data
        self._filled = end
        if digest:
            if self._hash.digest() != digest:
                raise CorruptPayloadError(_CORRUPT)
            self.digest = digest

    def value(self) -> Any:
        """The value, whose tensors are views of the receive buffer."""
        assert self.complete
        return codec.unpack(self._layout, self._buffer, self._limits)
