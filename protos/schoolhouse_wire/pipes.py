"""Messages between processes of one machine, through two pipes without names: a stream's way takes four times as many
wake-ups of threads.
"""

import contextlib
import os
import select
import stat
import struct
import threading
import weakref
from collections.abc import Iterator

from schoolhouse_wire.channel import MAX_MESSAGE_BYTES
from schoolhouse_wire.errors import ProtocolError
from schoolhouse_wire.v1 import teacher_pb2

_LENGTH = struct.Struct("<I")  # before each message
_READ_BYTES = 64 << 10  # what a pipe holds


class Pipes:
    """The two ends that one process has: of one thread that sends, and of one that iterates over what arrives."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        """Own two file descriptors."""
        self._incoming, self._outgoing = incoming, outgoing
        self._closed = False
        self._users = 0  # threads that send or iterate
        self._lock = threading.RLock()  # the garbage collector may close it wherever it runs
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable from `close` on
        # When nobody is in a call any more: another file may get the number.
        self._release = weakref.finalize(self, _close, incoming, outgoing, self._wake)
        self._release.atexit = False
        self._readable, self._writable = select.poll(), select.poll()
        for fd, poll, event in (incoming, self._readable, select.POLLIN), (outgoing, self._writable, select.POLLOUT):
            os.set_blocking(fd, False)
            poll.register(fd, event)
            poll.register(self._wake, select.POLLIN)

    def close(self) -> None:
        """End sending and iterating, in whatever thread they are."""
        with self._lock:
            self._closed = True
            if self._users:
                os.eventfd_write(self._wake, 1)
            else:
                self._release()

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._closed and not self._users:
                    self._release()

    def send(self, message: bytes) -> bool:
        """Write a message, as soon as the other side has read enough; False if it is gone, or after `close`."""
        parts = [memoryview(_LENGTH.pack(len(message))), memoryview(message)]
        with self._used():
            while parts and not self._closed:
                try:
                    written = os.writev(self._outgoing, parts)
                except BlockingIOError:
                    self._writable.poll()
                    continue
                except BrokenPipeError:
                    return False
                while parts and written >= parts[0].nbytes:
                    written -= parts.pop(0).nbytes
                if written:
                    parts[0] = parts[0][written:]
        return not parts

    def __iter__(self) -> Iterator[bytes]:
        """The messages that arrive, until `close`, or until the other side is gone.

        Raises:
            ProtocolError: the next message would be larger than any.
        """
        with self._used():
            yield from self._messages()

    def _messages(self) -> Iterator[bytes]:
        held = bytearray()
        while not self._closed:
            try:
                data = os.read(self._incoming, _READ_BYTES)
            except BlockingIOError:
                self._readable.poll()
                continue
            if not data:
                return
            held += data
            at = 0
            while len(held) - at >= _LENGTH.size:
                [size] = _LENGTH.unpack_from(held, at)
                if size > MAX_MESSAGE_BYTES:
                    raise ProtocolError(f"a message of {size} bytes came, over the limit of {MAX_MESSAGE_BYTES}")
                end = at + _LENGTH.size + size
                if end > len(held):
                    break
                with memoryview(held) as view:
                    message = bytes(view[at + _LENGTH.size : end])
                at = end
                yield message
            del held[:at]


class Offered:
    """Two pipes of this process, of which another one may open its ends until `withdraw()`."""

    def __init__(self) -> None:
        """Raises `OSError` where there are none left."""
        (incoming, to_replica), (to_client, outgoing) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        self.to_replica_fd, self.to_client_fd = to_replica, to_client
        self.withdraw = weakref.finalize(self, _close, to_replica, to_client)
        self.withdraw.atexit = False
        self.pipes = Pipes(incoming, outgoing)


def open_offered(offer: teacher_pb2.SharedMemory) -> Pipes:
    """The client's ends of the pipes that a replica offers.

    Raises:
        OSError: they cannot be opened.
    """
    incoming = _open(offer.pid, offer.to_client_fd, os.O_RDONLY)
    try:
        return Pipes(incoming, _open(offer.pid, offer.to_replica_fd, os.O_WRONLY))
    except OSError:
        os.close(incoming)
        raise


def _open(pid: int, fd: int, mode: int) -> int:
    path = f"/proc/{pid}/fd/{fd}"
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        raise OSError(f"{path} here is not the replica's pipe")
    return os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
