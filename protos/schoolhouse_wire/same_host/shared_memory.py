"""Payloads between processes of one machine: a segment of memory without a name, made by the replica.

The replica offers it as /proc/PID/fd/FD; the client opens that and compares the segment's first bytes with the offer's
nonce, so nothing is guessed. It is sealed: neither side can shrink it, which would end the other by SIGBUS. Since it
has no name it cannot outlive the processes that map it, however they end.
"""

import contextlib
import ctypes
import functools
import importlib
import mmap
import os
import queue
import secrets
import stat
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeAlias

from google.protobuf.message import Message

from schoolhouse_wire import background, memory
from schoolhouse_wire.errors import ProtocolError
from schoolhouse_wire.outbox import Outbox
from schoolhouse_wire.same_host.blocks import PAGE_BYTES, Blocks, whole_pages
from schoolhouse_wire.v1 import teacher_pb2

_NONCE_BYTES = 32
_PIECE_BYTES = 256 << 10  # stays in a core's cache from the copy to the checksum
_SPLIT_BYTES = 2 << 20  # where a second thread is worth waking
_SPOTS_EVERY_BYTES, _SPOT_BYTES = 64 << 10, 1 << 10
_LARGE_PARTS = 64  # a block that is at least this part of its region is given back at once
_MANY_BLOCKS = 16
_KEPT_BYTES = 512 << 20  # of a region; free memory beyond goes back to the system


_NEEDED = ("os.memfd_create", "os.eventfd", "os.pipe2", "mmap.MADV_REMOVE", "fcntl.F_ADD_SEALS")  # Linux has them

_Message: TypeAlias = teacher_pb2.ClientMessage | teacher_pb2.ServerMessage


def lacks() -> str:
    """What payloads in shared memory, or messages in pipes, need and this system does not have; empty if it has all."""
    for needed in _NEEDED:
        module, _, name = needed.partition(".")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return needed
    return "" if os.path.isdir(f"/proc/{os.getpid()}/fd") else "/proc"


class Segment:
    """A mapping of shared memory, in which each side allocates the blocks of what it sends.

    It is unmapped once neither a session nor a tensor needs it any more.
    """

    sends_checksums = receives_checksums = True  # of all bytes; otherwise of spots

    def __init__(
        self, pages: mmap.mmap, message: type[_Message], outbox: Outbox[Message | bytes], *, own: range, peers: range
    ) -> None:
        self._pages = pages
        self._copier = _Copier()
        self._view = memoryview(pages)
        self._own, self._peers = own, peers
        self._blocks = Blocks(own.start, own.stop)
        self._message = message
        self._outbox: Outbox[Message | bytes] | None = outbox
        self._done: deque[int] = deque()  # blocks of the peer's of which it is not told yet

    def take(self, nbytes: int) -> int | None:
        """The offset of a new block of ours, or None if none is free."""
        return self._blocks.take(nbytes)

    def free(self, offset: int) -> None:
        """A block of ours that is used no more. Ignores what is none: the peer may say anything."""
        start, end = max(offset, self._own.start + _KEPT_BYTES), self._blocks.end_of(offset)
        if start < end:
            _give_to_system(self._pages, start, end)  # first: it may be taken again at once
        self._blocks.free(offset)

    def write(self, offset: int, data: memoryview, digest: Any) -> None:
        """Copy `data`, which must be writable, to there, and add it to `digest`. Other threads go on meanwhile."""
        place = self._view[offset : offset + data.nbytes]
        assert place.nbytes == data.nbytes
        to, source = _address_of(place), _address_of(data)
        for at in range(0, data.nbytes, _PIECE_BYTES):
            piece = place[at : at + _PIECE_BYTES]
            ctypes.memmove(to + at, source + at, piece.nbytes)
            digest.update(piece)

    def copy(self, offset: int, data: memoryview) -> None:
        """Copy `data`, which must be writable, to there."""
        place = self._view[offset : offset + data.nbytes]
        assert place.nbytes == data.nbytes
        self._copier.copy(_address_of(place), _address_of(data), data.nbytes)

    def spots(self, digest: Any, offset: int, nbytes: int) -> Any:
        """Add to `digest` what tells a block from others, in a fraction of the time that all of its bytes take."""
        return add_spots(digest, self._view[offset : offset + nbytes])

    def receive(self, block: teacher_pb2.Block, nbytes: int) -> Any:
        """A writable buffer with the bytes of a block of the peer's.

        Raises:
            ProtocolError: the block is not of that size, or is not where the peer's blocks are.
        """
        raise NotImplementedError

    def done(self, block: teacher_pb2.Block) -> None:
        """A block of the peer's is needed no more. It is told with the next message, or now if it has much to gain.

        May be called anywhere, in the garbage collector too: it takes no lock.
        """
        self._done.append(block.offset)
        large = block.nbytes >= len(self._peers) // _LARGE_PARTS or len(self._done) >= _MANY_BLOCKS
        if large and (outbox := self._outbox) is not None:
            outbox.put(self._tell())

    def released(self) -> list[int]:
        """What the next message tells the peer. From then on it may use these blocks again."""
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._done.popleft())
        return found

    def _tell(self) -> Iterator[Message]:
        if released := self.released():
            yield self._message(released=released)

    def _check(self, block: teacher_pb2.Block, nbytes: int) -> None:
        start, size = block.offset, block.nbytes
        if size != nbytes:
            raise ProtocolError(f"a block of {size} bytes came where {nbytes} were declared")
        if start % PAGE_BYTES or start < self._peers.start or start + size > self._peers.stop or not size:
            raise ProtocolError(
                f"a block of {size} bytes at {start} came; expected it at a multiple of {PAGE_BYTES} within "
                f"{self._peers.start} to {self._peers.stop}"
            )


def add_spots(digest: Any, data: memoryview) -> Any:
    """Add the first KiB of each 64 KiB to `digest`."""
    for at in range(0, data.nbytes, _SPOTS_EVERY_BYTES):
        digest.update(data[at : at + _SPOT_BYTES])
    return digest


class _Copier:
    """Copies with a second thread, from a size on: one core moves about half of what two do.

    Where the system has no thread left, it copies alone.
    """

    def __init__(self) -> None:
        self._halves: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy bytes from one address to another; one thread at a time."""
        half = nbytes // 2 if nbytes >= _SPLIT_BYTES and self._has_help() else 0
        if half:
            self._halves.put((to, source, half))
        ctypes.memmove(to + half, source + half, nbytes - half)
        if half and (error := self._done.get()) is not None:
            raise error

    def _has_help(self) -> bool:
        if self._thread is None:
            copy = functools.partial(_copy_halves, self._halves, self._done)
            thread = background.thread(copy, name="schoolhouse-copier", on_death=self._done.put)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread
                weakref.finalize(self, self._halves.put, None).atexit = False
        return self._thread is not None


def _copy_halves(halves: Any, done: Any) -> None:
    while (half := halves.get()) is not None:
        done.put(background.run(functools.partial(_copy, *half), "a copy", lambda err: err))


def _copy(to: int, source: int, nbytes: int) -> BaseException | None:
    ctypes.memmove(to, source, nbytes)
    return None


class ReplicaSegment(Segment):
    """The side that made it. What it receives it copies, so that a client cannot change what was checked."""

    def __init__(
        self, pages: mmap.mmap, offer: teacher_pb2.SharedMemory, outbox: Outbox[Message | bytes], *, checksums: bool
    ) -> None:
        self.sends_checksums = checksums
        self.withdraw = weakref.finalize(self, os.close, offer.fd)
        self.offer = offer
        pages[: len(offer.nonce)] = offer.nonce
        requests, replies = range(offer.requests_at, offer.replies_at), range(offer.replies_at, offer.nbytes)
        super().__init__(pages, teacher_pb2.ServerMessage, outbox, own=replies, peers=requests)

    def receive(self, block: teacher_pb2.Block, nbytes: int) -> Any:
        """A private copy of a block of the client's."""
        self._check(block, nbytes)
        buffer = memory.RECEIVE_BUFFERS.take(nbytes)
        place = self._view[block.offset : block.offset + nbytes]
        ctypes.memmove(_address_of(memoryview(buffer).cast("B")), _address_of(place), nbytes)
        return buffer


def create(replies_bytes: int, outbox: Outbox[Message | bytes], *, checksums: bool) -> ReplicaSegment:
    """A segment for up to that many bytes of replies at once, and a quarter of it for requests.

    `checksums` says whether replies carry them, or spot checks; requests always do.

    The system provides its memory as it is first used. It can be opened by others until `withdraw()`.

    Raises:
        OSError: there is none to be had.
    """
    import fcntl  # here, as not every system has it

    replies_at = PAGE_BYTES + whole_pages(replies_bytes // 4)
    fd = os.memfd_create("schoolhouse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    offer = teacher_pb2.SharedMemory(
        pid=os.getpid(),
        fd=fd,
        nbytes=replies_at + whole_pages(replies_bytes),
        requests_at=PAGE_BYTES,
        replies_at=replies_at,
        nonce=secrets.token_bytes(_NONCE_BYTES),
    )
    try:
        os.ftruncate(fd, offer.nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return ReplicaSegment(mmap.mmap(fd, offer.nbytes), offer, outbox, checksums=checksums)
    except OSError:
        os.close(fd)
        raise


class ClientSegment(Segment):
    """The side that attached it. What it receives it lends: a block is the client's until no tensor views it."""

    def __init__(
        self, pages: mmap.mmap, offer: teacher_pb2.SharedMemory, outbox: Outbox[Message | bytes], *, checksums: bool
    ) -> None:
        self.receives_checksums = checksums
        requests, replies = range(offer.requests_at, offer.replies_at), range(offer.replies_at, offer.nbytes)
        super().__init__(pages, teacher_pb2.ClientMessage, outbox, own=requests, peers=replies)
        self._pid = os.getpid()
        self._lent = Blocks(replies.start, replies.stop)

    def close(self) -> None:
        """End of the session: memory that no tensor views goes back to the system now, and the rest when it can."""
        self._outbox = None
        self.released()
        for start, end in [(self._own.start, self._own.stop), *self._lent.free_parts()]:
            if start < end:
                _give_to_system(self._pages, start, end)

    def refuse(self, block: teacher_pb2.Block) -> None:
        """Give a block back that came for nobody; one that is lent comes back by itself."""
        if not self._lent.end_of(block.offset):
            self.done(block)

    def receive(self, block: teacher_pb2.Block, nbytes: int) -> Any:
        """The block itself."""
        self._check(block, nbytes)
        if not self._lent.claim(block.offset, nbytes):
            raise ProtocolError(f"a block of {nbytes} bytes at {block.offset} came, of which a part is still in use")
        owner = (ctypes.c_char * nbytes).from_buffer(self._pages, block.offset)  # torch keeps it while a view lives
        weakref.finalize(owner, self._give_back, block).atexit = False
        return owner

    def released(self) -> list[int]:
        """What the next message tells the replica."""
        found = super().released()
        for offset in found:
            self._lent.free(offset)
        return found

    def _give_back(self, block: teacher_pb2.Block) -> None:
        if self._pid != os.getpid():
            return  # a fork: the block is the parent's
        if self._outbox is None:
            _give_to_system(self._pages, block.offset, block.offset + block.nbytes)
        else:
            self.done(block)


def attach(offer: teacher_pb2.SharedMemory, outbox: Outbox[Message | bytes], *, checksums: bool) -> ClientSegment:
    """Map the segment that a replica offers; what is done with is released through `outbox`.

    `checksums` are as the session was opened with.

    Raises:
        OSError: it cannot be opened, or what stands there is another thing; the message says why.
    """
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened, which to some devices does something
        raise OSError(f"{path} here is not the replica's memory")
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not _is_offered(fd, offer):
            raise OSError(f"{path} here is not the replica's memory")
        pages = mmap.mmap(fd, offer.nbytes)
    finally:
        os.close(fd)
    if pages[: len(offer.nonce)] != offer.nonce:
        raise OSError(f"{path} here is not the replica's memory")
    return ClientSegment(pages, offer, outbox, checksums=checksums)


def _is_offered(fd: int, offer: teacher_pb2.SharedMemory) -> bool:
    """Whether the regions and the nonce have their places in the file, and its size is sealed."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size < offer.nbytes or len(offer.nonce) < _NONCE_BYTES // 2:
        return False
    marks = [len(offer.nonce), offer.requests_at, offer.replies_at, offer.nbytes]
    if marks != sorted(marks) or offer.requests_at % PAGE_BYTES or offer.replies_at % PAGE_BYTES:
        return False
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)  # an error for a file that is no memory


def _address_of(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _give_to_system(pages: mmap.mmap, start: int, end: int) -> None:
    """Free the memory of a part; it reads as zeros from then on."""
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_REMOVE, start, whole_pages(end - start))
