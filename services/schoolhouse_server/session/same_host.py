"""What a session shares with a client on the same host: a memory segment for payloads, and pipes for messages."""

import contextlib
import logging
from collections.abc import Iterable

from google.protobuf.message import Message
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.outbox import Outbox
from schoolhouse_wire.same_host import pipes, shared_memory
from schoolhouse_wire.same_host.shared_memory import ReplicaSegment
from schoolhouse_wire.v1 import teacher_pb2

from schoolhouse_server.session.shared_bytes import Account

_log = logging.getLogger(__name__)


class SameHost:
    """The segment and the pipes: offered with Opened, and used once the client has attached them."""

    def __init__(self, loop: Loop, replies_bytes: int) -> None:
        """Offer `replies_bytes` of memory for replies; with 0, offer nothing."""
        self._loop = loop
        self.segment: ReplicaSegment | None = None
        self.pipes: pipes.Pipes | None = None
        self._replies_bytes = replies_bytes
        self._offered: tuple[ReplicaSegment, pipes.Offered] | None = None
        self._account: Account | None = None
        self._closed = False

    def offer(
        self, opened: teacher_pb2.Opened, outbox: Outbox[Message | bytes], account: Account, *, checksums: bool
    ) -> None:
        """Write the offer into Opened, if this system supports shared memory and `account` has room for any."""
        if not self._replies_bytes or shared_memory.lacks():
            return
        if account.is_full:
            _log.info("a session is offered no shared memory, as its job or all jobs have what they may")
            return
        self._account = account
        with contextlib.suppress(OSError):  # without memory for it, all goes over the stream
            offered_pipes = pipes.Offered(self._loop)
            offered = shared_memory.create(self._replies_bytes, outbox, checksums=checksums, budget=account)
            opened.shared_memory.CopyFrom(offered.offer)
            offered_pipes.describe_in(opened.shared_memory)
            self._offered = offered, offered_pipes

    def attached(self, message: teacher_pb2.Attached) -> None:
        """Take the client's message that it has attached what was offered, or could not.

        Raises:
            ProtocolError: the client says so, but has not opened the segment.
        """
        offered, self._offered = self._offered, None
        if offered is None:
            return
        segment, offered_pipes = offered
        segment.withdraw()
        offered_pipes.withdraw()
        if message.attached:
            segment.check_proof(message.proof)
            self.segment = segment
            self.pipes = offered_pipes.pipes if message.pipes else None
        if self._closed and self.pipes is not None:
            self.pipes.close()

    def free(self, offsets: Iterable[int]) -> None:
        """Free blocks of replies that the client has released."""
        if self.segment is not None:
            for offset in offsets:
                self.segment.free(offset)

    def close(self) -> None:
        """Close the pipes; may be called more than once."""
        self._closed = True
        if self.pipes is not None:
            self.pipes.close()

    def clear(self) -> None:
        """Let go of the memory."""
        self._offered = self.segment = None
        if self._account is not None:
            self._account.close()
