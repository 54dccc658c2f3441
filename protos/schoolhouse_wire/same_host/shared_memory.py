"""Payloads between processes of one machine: a memory segment without a name, made by the replica.

The replica offers it as /proc/PID/fd/FD; the client opens that and compares the segment's first bytes with the nonce in
the offer, so it knows that it has the right one. It sends back the bytes that follow, which stand nowhere else, so the
replica knows that the client has opened it, and does not merely say so from another machine. The segment is sealed:
neither side can shrink it, which would end the other one by SIGBUS. Since it has no name, it cannot outlive the
processes that map it, however they end.
"""

import contextlib
import ctypes
import functools
import hmac
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
from typing import Any, Protocol, TypeAlias

from google.protobuf.message import Message

from schoolhouse_wire import background, memory
from schoolhouse_wire.errors import ProtocolError
from schoolhouse_wire.same_host.blocks import PAGE_BYTES, Blocks, whole_pages
from schoolhouse_wire.v1 import teacher_pb2

_NONCE_BYTES = 32
_PROOF_BYTES = 32  # after the nonce
_PIECE_BYTES = 256 << 10  # small enough to stay in a core's cache between the copy and the checksum
_SPLIT_BYTES = 2 << 20  # the size from which waking a second thread pays off
_SPOTS_EVERY_BYTES, _SPOT_BYTES = 64 << 10, 1 << 10
_LARGE_PARTS = 64  # a block of at least 1/64 of its region is given back at once
_MANY_BLOCKS = 16  # as are so many small ones
_KEPT_BYTES = 512 << 20  # of a region; free memory beyond this goes back to the system


_NEEDED = ("os.memfd_create", "os.eventfd", "os.pipe2", "mmap.MADV_REMOVE", "fcntl.F_ADD_SEALS")  # all are in Linux

_Message: TypeAlias = teacher_pb2.ClientMessage | teacher_pb2.ServerMessage


class _Outbox(Protocol):
    def put(self, messages: Iterator[Message]) -> None: ...


class Budget(Protocol):
    """Counts the bytes of a segment that the system has provided; any thread may call."""

    def take(self, nbytes: int) -> bool:
        """Count more bytes, if there is room for them."""

    def add(self, nbytes: int) -> None:
        """Count more bytes, also where there is no room; fewer if negative."""


def lacks() -> str:
    """A feature that shared memory or pipes need and this system lacks; empty if it has all."""
    for needed in _NEEDED:
        module, _, name = needed.partition(".")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return needed
    return "" if os.path.isdir(f"/proc/{os.getpid()}/fd") else "/proc"


class Segment:
    """A mapping of shared memory, in which each side allocates blocks for what it sends.

    It is unmapped once neither a session nor a tensor needs it any more.
    """

    sends_checksums = receives_checksums = True  # digests are over all bytes; otherwise over the first KiB of each 64

    def __init__(self, pages: mmap.mmap, message: type[_Message], outbox: _Outbox, *, own: range, peers: range) -> None:
        self._pages = pages
        self._copier = _Copier()
        self._view = memoryview(pages)
        self._own, self._peers = own, peers
        self._blocks = Blocks(own.start, own.stop)
        self._message = message
        self._outbox: _Outbox | None = outbox
        self._done: deque[int] = deque()  # blocks of the peer that we are done with, but have not said so yet

    def take(self, nbytes: int) -> int | None:
        """Take a block of our own and return its offset; None if there is no room."""
        return self._blocks.take(nbytes)

    def free(self, offset: int) -> None:
        """Free a block of our own. An invalid offset is ignored, since the peer may send anything."""
        start, end = max(offset, self._own.start + _KEPT_BYTES), self._blocks.end_of(offset)
        if start < end:
            _give_to_system(self._pages, start, end)  # first, since the block may be taken again at once
        self._blocks.free(offset)

    def write(self, offset: int, data: memoryview, digest: Any) -> None:
        """Copy `data`, which must be writable, to `offset`, and add it to `digest`. Other threads run meanwhile."""
        place = self._view[offset : offset + data.nbytes]
        assert place.nbytes == data.nbytes
        to, source = _address_of(place), _address_of(data)
        for at in range(0, data.nbytes, _PIECE_BYTES):
            piece = place[at : at + _PIECE_BYTES]
            ctypes.memmove(to + at, source + at, piece.nbytes)
            digest.update(piece)

    def copy(self, offset: int, data: memoryview) -> None:
        """Copy `data`, which must be writable, to `offset`."""
        place = self._view[offset : offset + data.nbytes]
        assert place.nbytes == data.nbytes
        self._copier.copy(_address_of(place), _address_of(data), data.nbytes)

    def spots(self, digest: Any, offset: int, nbytes: int) -> Any:
        """Add the first KiB of each 64 KiB of a block to `digest`, which is much faster than adding all bytes."""
        return add_spots(digest, self._view[offset : offset + nbytes])

    def receive(self, block: teacher_pb2.Block, nbytes: int) -> Any:
        """A writable buffer with the bytes of a block of the peer.

        Raises:
            ProtocolError: if the block does not have that size, or is not in the peer's region.
        """
        raise NotImplementedError

    def done(self, block: teacher_pb2.Block) -> None:
        """Note that a block of the peer is not needed any more.

        The peer is told with the next message, or at once if the block is large or there are many. This may be called
        anywhere, also by the garbage collector, since it takes no lock.
        """
        self._done.append(block.offset)
        large = block.nbytes >= len(self._peers) // _LARGE_PARTS or len(self._done) >= _MANY_BLOCKS
        if large and (outbox := self._outbox) is not None:
            outbox.put(self._tell())

    def released(self) -> list[int]:
        """Take the offsets to release in the next message. After it the peer may reuse these blocks."""
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
            raise ProtocolError(f"a block of {size} bytes arrived where {nbytes} were declared")
        if start % PAGE_BYTES or start < self._peers.start or start + size > self._peers.stop or not size:
            raise ProtocolError(
                f"a block of {size} bytes at {start} arrived; expected it at a multiple of {PAGE_BYTES} within "
                f"{self._peers.start} to {self._peers.stop}"
            )


def add_spots(digest: Any, data: memoryview) -> Any:
    """Add the first KiB of each 64 KiB to `digest`."""
    for at in range(0, data.nbytes, _SPOTS_EVERY_BYTES):
        digest.update(data[at : at + _SPOT_BYTES])
    return digest


class _Copier:
    """Copies large data with a second thread, since one core moves about half as much as two.

    If no second thread can be started, it copies alone.
    """

    def __init__(self) -> None:
        self._halves: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy bytes from one address to another. Only one thread at a time may call this."""
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
    """The replica's side, which made the segment. It copies what it receives, so that the client cannot change it.

    What its budget counts are the bytes up to the end of the last block that was taken since memory was given back, and
    of the client's region the bytes up to the end of the last block that came from there.
    """

    def __init__(
        self,
        pages: mmap.mmap,
        offer: teacher_pb2.SharedMemory,
        outbox: _Outbox,
        *,
        checksums: bool,
        budget: Budget | None = None,
    ) -> None:
        self.sends_checksums = checksums
        self.withdraw = weakref.finalize(self, os.close, offer.fd)
        self.offer = offer
        self._proof = secrets.token_bytes(_PROOF_BYTES)
        marks = offer.nonce + self._proof
        pages[: len(marks)] = marks
        requests, replies = range(offer.requests_at, offer.replies_at), range(offer.replies_at, offer.nbytes)
        super().__init__(pages, teacher_pb2.ServerMessage, outbox, own=replies, peers=requests)
        self._budget = budget
        self._counting = threading.Lock()
        self._replies_to, self._requests_to = replies.start, requests.start  # how far the budget counts
        self._took = self._used = False  # since `give_back_if_idle` was called, and since it gave memory back

    def take(self, nbytes: int) -> int | None:
        """Take a block and return its offset; None if there is no room for it, or the budget is used up."""
        self._took = self._used = True
        if (offset := super().take(nbytes)) is None or self._budget is None:
            return offset
        with self._counting:
            more = self._blocks.end_of(offset) - self._replies_to
            if more <= 0 or self._budget.take(more):
                self._replies_to += max(more, 0)
                return offset
        self._blocks.free(offset)
        return None

    def free(self, offset: int) -> None:
        """Free a block; what lies beyond what is kept goes back to the system, and does not count any more."""
        super().free(offset)
        self._used = True
        self._count_to(max(self._own.start + _KEPT_BYTES, self._blocks.top()))

    def _count_to(self, end: int) -> None:
        with self._counting:
            if end < self._replies_to and self._budget is not None:
                self._budget.add(end - self._replies_to)
                self._replies_to = end

    def give_back_if_idle(self) -> None:
        """Give memory that no block takes back to the system, if no block was taken since the last call."""
        took, self._took = self._took, False
        if took or not self._used:
            return
        self._used = False
        for start, end in self._blocks.free_parts():
            if self._blocks.claim(start, end - start):  # so that nobody takes and fills it meanwhile
                _give_to_system(self._pages, start, end)
                self._blocks.free(start)
        self._count_to(self._blocks.top())

    def check_proof(self, proof: bytes) -> None:
        """Raise `ProtocolError` unless these are the bytes that only who has opened the segment can read."""
        if not hmac.compare_digest(proof, self._proof):
            raise ProtocolError("the client says that it has attached shared memory, and cannot tell what stands in it")

    def receive(self, block: teacher_pb2.Block, nbytes: int) -> Any:
        """A private copy of a block of the client."""
        self._check(block, nbytes)
        more = block.offset + whole_pages(nbytes) - self._requests_to
        if more > 0 and self._budget is not None:
            self._requests_to += more
            self._budget.add(more)
        buffer = memory.RECEIVE_BUFFERS.take(nbytes)
        place = self._view[block.offset : block.offset + nbytes]
        ctypes.memmove(_address_of(memoryview(buffer).cast("B")), _address_of(place), nbytes)
        return buffer


def create(replies_bytes: int, outbox: _Outbox, *, checksums: bool, budget: Budget | None = None) -> ReplicaSegment:
    """Make a segment for up to `replies_bytes` of replies at once, and a quarter as much for requests.

    `checksums` says whether the digests of replies are over all bytes or spot checks; those of requests are always over
    all bytes.

    The system provides the memory when it is first used, which `budget` counts. Others can open the segment until
    `withdraw()`.

    Raises:
        OSError: if the system has no memory or file descriptor for it.
    """
    import fcntl  # not at the top, since not every system has it

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
        return ReplicaSegment(mmap.mmap(fd, offer.nbytes), offer, outbox, checksums=checksums, budget=budget)
    except OSError:
        os.close(fd)
        raise


class ClientSegment(Segment):
    """The client's side. It does not copy what it receives: a block is the client's until no tensor views it."""

    def __init__(self, pages: mmap.mmap, offer: teacher_pb2.SharedMemory, outbox: _Outbox, *, checksums: bool) -> None:
        self.receives_checksums = checksums
        requests, replies = range(offer.requests_at, offer.replies_at), range(offer.replies_at, offer.nbytes)
        super().__init__(pages, teacher_pb2.ClientMessage, outbox, own=requests, peers=replies)
        self.proof = bytes(pages[len(offer.nonce) : len(offer.nonce) + _PROOF_BYTES])
        self._pid = os.getpid()
        self._lent = Blocks(replies.start, replies.stop)

    def close(self) -> None:
        """End the session: memory that no tensor views goes back to the system now, and the rest when it is freed."""
        self._outbox = None
        self.released()
        for start, end in [(self._own.start, self._own.stop), *self._lent.free_parts()]:
            if start < end:
                _give_to_system(self._pages, start, end)

    def refuse(self, block: teacher_pb2.Block) -> None:
        """Give back a block that no request waits for; a block that tensors view comes back by itself."""
        if not self._lent.end_of(block.offset):
            self.done(block)

    def receive(self, block: teacher_pb2.Block, nbytes: int) -> Any:
        """The block itself, as a buffer; it is given back when no tensor views it any more."""
        self._check(block, nbytes)
        if not self._lent.claim(block.offset, nbytes):
            raise ProtocolError(f"a block of {nbytes} bytes at {block.offset} arrived, a part of which is still in use")
        owner = (ctypes.c_char * nbytes).from_buffer(self._pages, block.offset)  # alive as long as a tensor views it
        weakref.finalize(owner, self._give_back, block).atexit = False
        return owner

    def released(self) -> list[int]:
        """Take the offsets to release in the next message, and note that they are not lent any more."""
        found = super().released()
        for offset in found:
            self._lent.free(offset)
        return found

    def _give_back(self, block: teacher_pb2.Block) -> None:
        if self._pid != os.getpid():
            return  # in a fork the block is still the parent's
        if self._outbox is None:
            _give_to_system(self._pages, block.offset, block.offset + block.nbytes)
        else:
            self.done(block)


def attach(offer: teacher_pb2.SharedMemory, outbox: _Outbox, *, checksums: bool) -> ClientSegment:
    """Map the segment that a replica offers; blocks are released through `outbox`.

    `checksums` must be what the session was opened with.

    Raises:
        OSError: if it cannot be opened, or is not the replica's segment; the message says why.
    """
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    if not stat.S_ISREG(os.stat(path).st_mode):  # before opening it, which has effects on some devices
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
    """Whether the file has room for the nonce, the proof and the regions of the offer, and its size is sealed."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size < offer.nbytes or len(offer.nonce) < _NONCE_BYTES // 2:
        return False
    marks = [len(offer.nonce) + _PROOF_BYTES, offer.requests_at, offer.replies_at, offer.nbytes]
    if marks != sorted(marks) or offer.requests_at % PAGE_BYTES or offer.replies_at % PAGE_BYTES:
        return False
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)  # OSError for a file that is not a memfd


def _address_of(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _give_to_system(pages: mmap.mmap, start: int, end: int) -> None:
    """Free the memory of a part of the segment, which then reads as zeros."""
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_REMOVE, start, whole_pages(end - start))
