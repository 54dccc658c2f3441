"""Messages between processes of one machine through two unnamed pipes, which cost a fraction of what a stream costs."""

import asyncio
import os
import stat
import struct
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from schoolhouse_wire.errors import ProtocolError
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.rpc.channel import MAX_MESSAGE_BYTES
from schoolhouse_wire.v1 import teacher_pb2

_LENGTH = struct.Struct("<I")  # the length before each message
_READ_BYTES = 64 << 10  # the usual capacity of a pipe
Later: TypeAlias = Coroutine[Any, Any, None] | None
_LAST_READS = 16  # reads after `end`: enough for what a pipe holds, and a bound for a peer that keeps writing


class Pipes:
    """The two ends that one process has. What is posted is sent, and `each` hears what arrives; all in the loop."""

    def __init__(self, loop: Loop, incoming: int, outgoing: int) -> None:
        """Own two file descriptors."""
        self._loop = loop.asyncio
        self._incoming, self._outgoing = incoming, outgoing
        self._ended = self._closed = False
        self._waiting: dict[int, asyncio.Future[Any]] = {}  # tasks that wait until they can use a file descriptor
        self._held = bytearray()  # read, and not returned yet
        self._unsent: list[memoryview] = []  # posted, and not written yet
        self._last_reads = _LAST_READS
        self._release = weakref.finalize(self, _close, incoming, outgoing)
        self._release.atexit = False
        for fd in (incoming, outgoing):
            os.set_blocking(fd, False)

    def end(self) -> None:
        """End sending, and end reading after what has arrived by now, since the other side will send no more."""
        self._ended = True
        self._wake()

    def close(self) -> None:
        """End sending and reading at once; may be called more than once."""
        self._closed = True
        self._wake()
        self._release()

    def _wake(self) -> None:
        for fd in list(self._waiting):
            self._ready(fd)

    def _ready(self, fd: int, result: Later = None) -> None:
        self._loop.remove_reader(fd) if fd == self._incoming else self._loop.remove_writer(fd)
        waiter = self._waiting.pop(fd)
        if not waiter.done():  # else its task was cancelled
            waiter.set_result(result)
        elif result is not None:
            result.close()

    def _write(self) -> bool:
        """Write what there is room for; False if more must wait for room."""
        parts = self._unsent
        while parts and not (self._ended or self._closed):
            try:
                written = os.writev(self._outgoing, parts)
            except BlockingIOError:
                return False
            except BrokenPipeError:
                self._ended = True  # the other side is gone, and sends no more either
                return True
            while parts and written >= parts[0].nbytes:
                written -= parts.pop(0).nbytes
            if written:
                parts[0] = parts[0][written:]
        return True

    @property
    def idle(self) -> bool:
        """Whether all that was posted is written, or will never be."""
        return not self._unsent or self._ended or self._closed

    def post(self, message: bytes, then: Callable[[], None]) -> None:
        """Write a message, when the pipe is `idle`; if there is no room, `then()` is called once it is again."""
        self._unsent = [memoryview(_LENGTH.pack(len(message))), memoryview(message)]
        if not self._write():
            waiter = self._waiting[self._outgoing] = self._loop.create_future()
            self._loop.add_writer(self._outgoing, self._write_more, waiter, then)

    def _write_more(self, waiter: "asyncio.Future[Any]", then: Callable[[], None]) -> None:
        if self._write() and not waiter.done():
            self._ready(self._outgoing)
            then()

    async def each(self, heard: Callable[[bytes], Later]) -> None:
        """Call `heard` with each message as it arrives; if it returns a coroutine, that is awaited before the next.

        It returns after `end` or `close`, or once the other side is gone.

        Raises:
            ProtocolError: if the next message is larger than the limit; and what `heard` raises.
        """
        while not self._closed and self._last_reads:
            while (message := self._message()) is not None:
                if (later := heard(message)) is not None:
                    await later
            self._last_reads -= self._ended
            data = self._read()
            if data:
                self._held += data
            elif data is not None or self._ended:
                return
            elif (later := await self._hearing(heard)) is not None:
                await later

    async def _hearing(self, heard: Callable[[bytes], Later]) -> Later:
        """Have messages heard until one needs a coroutine, which is returned, or until there is an end."""
        fd = self._incoming
        waiter = self._waiting[fd] = self._loop.create_future()
        self._loop.add_reader(fd, self._hear, heard, waiter)
        try:
            later: Later = await waiter
            return later
        finally:
            if self._waiting.get(fd) is waiter:
                self._ready(fd)

    def _hear(self, heard: Callable[[bytes], Later], waiter: "asyncio.Future[Any]") -> None:
        try:
            if not (data := self._read()):
                if data is not None:
                    self._ready(self._incoming)
                return
            self._held += data
            while not waiter.done() and (message := self._message()) is not None:
                if (later := heard(message)) is not None:
                    self._ready(self._incoming, later)
        except BaseException as err:
            if waiter.done():
                raise
            waiter.set_exception(err)

    def _read(self) -> bytes | None:
        """What can be read now: nothing if the other side is gone, and None if it has to be waited for."""
        try:
            return os.read(self._incoming, _READ_BYTES)
        except BlockingIOError:
            return None

    def _message(self) -> bytes | None:
        """Take a message from what was read, if one is whole."""
        if len(self._held) < _LENGTH.size:
            return None
        [size] = _LENGTH.unpack_from(self._held)
        if size > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {size} bytes arrived, over the limit of {MAX_MESSAGE_BYTES}")
        end = _LENGTH.size + size
        if end > len(self._held):
            return None
        with memoryview(self._held) as view:
            message = bytes(view[_LENGTH.size : end])
        del self._held[:end]
        return message


class Offered:
    """Two pipes of this process, whose other ends another process may open until `withdraw()`."""

    def __init__(self, loop: Loop) -> None:
        """Make the pipes, for use in `loop`; raises `OSError` if no file descriptors are left."""
        incoming, self.to_replica_fd = os.pipe2(os.O_CLOEXEC)
        try:
            self.to_client_fd, outgoing = os.pipe2(os.O_CLOEXEC)
        except OSError:
            _close(incoming, self.to_replica_fd)
            raise
        self.withdraw = weakref.finalize(self, _close, self.to_replica_fd, self.to_client_fd)
        self.withdraw.atexit = False
        self.pipes = Pipes(loop, incoming, outgoing)

    def describe_in(self, offer: teacher_pb2.SharedMemory) -> None:
        """Name the pipes in an offer."""
        offer.to_replica_fd, offer.to_client_fd = self.to_replica_fd, self.to_client_fd
        offer.to_replica_inode = os.fstat(self.to_replica_fd).st_ino
        offer.to_client_inode = os.fstat(self.to_client_fd).st_ino


def open_offered(loop: Loop, offer: teacher_pb2.SharedMemory) -> Pipes:
    """Open the client's ends of the pipes that a replica offers; raises as `open_ends` does."""
    return Pipes(loop, *open_ends(offer))


def open_ends(offer: teacher_pb2.SharedMemory) -> tuple[int, int]:
    """The file descriptors from which the client reads, and to which it writes.

    Raises:
        OSError: if they cannot be opened, or are not the replica's pipes.
    """
    incoming = _open(offer.pid, offer.to_client_fd, offer.to_client_inode, os.O_RDONLY)
    try:
        outgoing = _open(offer.pid, offer.to_replica_fd, offer.to_replica_inode, os.O_WRONLY)
    except OSError:
        os.close(incoming)
        raise
    return incoming, outgoing


def _open(pid: int, fd: int, inode: int, mode: int) -> int:
    path = f"/proc/{pid}/fd/{fd}"
    _check(path, os.stat(path), inode)  # before opening it, which has effects on some files
    opened = os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(path, os.fstat(opened), inode)
    except OSError:
        os.close(opened)
        raise
    return opened


def _check(path: str, found: os.stat_result, inode: int) -> None:
    if not stat.S_ISFIFO(found.st_mode) or found.st_ino != inode:
        raise OSError(f"{path} here is not the replica's pipe")


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
