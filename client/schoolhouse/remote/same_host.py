"""What a session shares with a replica on the same host: a memory segment for payloads, and pipes for messages."""

import contextlib
import sys
from collections.abc import Iterable

from google.protobuf.message import Message
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.outbox import Outbox
from schoolhouse_wire.same_host import pipes, shared_memory
from schoolhouse_wire.same_host.shared_memory import ClientSegment
from schoolhouse_wire.v1 import teacher_pb2


class SameHost:
    """The segment and the pipes: None until the replica has offered them and they are attached."""

    def __init__(self, loop: Loop, *, wanted: bool, checksums: bool) -> None:
        self._loop = loop
        lacks = shared_memory.lacks()
        self.wanted = wanted and not lacks
        self.segment: ClientSegment | None = None
        self.pipes: pipes.Pipes | None = None
        self._checksums = checksums
        self._overflowed = 0  # replies that found no room in the segment
        self._transport = (  # until the replica has answered `Opened`
            f"stream: shared memory needs {lacks}, which this system ({sys.platform}) does not have"
            if wanted and lacks
            else "stream: shared memory is switched off here"
        )

    @property
    def transport(self) -> str:
        """How features travel, and the reason if it is the stream."""
        if not self._overflowed:
            return self._transport
        return f"{self._transport}, and the stream for {self._overflowed} replies that found no room there"

    def attach(self, opened: teacher_pb2.Opened, outbox: Outbox[Message | bytes]) -> teacher_pb2.Attached | None:
        """Attach what the replica offers; returns what to tell it, or None if it offers nothing."""
        if not self.wanted:
            return None
        if not opened.HasField("shared_memory"):
            self._transport = "stream: the replica offers no shared memory"
            return None
        try:
            self.segment = shared_memory.attach(opened.shared_memory, outbox, checksums=self._checksums)
            self._transport = "shared memory"
        except OSError as err:
            reason = err.strerror or err
            self._transport = f"stream: the replica is on another machine or its memory cannot be opened: {reason}"
        if self.segment is not None:
            with contextlib.suppress(OSError):
                self.pipes = pipes.open_offered(self._loop, opened.shared_memory)
        if self.segment is None:
            return teacher_pb2.Attached(attached=False)
        return teacher_pb2.Attached(attached=True, pipes=self.pipes is not None, proof=self.segment.proof)

    def free(self, offsets: Iterable[int]) -> None:
        """Free blocks of requests that the replica has released."""
        if self.segment is not None:
            for offset in offsets:
                self.segment.free(offset)

    def refuse(self, payload: teacher_pb2.Payload) -> None:
        """Release the block of a reply that nobody reads."""
        if self.segment is not None and payload.HasField("shared"):
            self.segment.refuse(payload.shared)

    def overflowed(self) -> None:
        """Count a reply that came in frames."""
        self._overflowed += self.segment is not None

    def close(self) -> None:
        """Close the pipes; may be called more than once."""
        if self.pipes is not None:
            self.pipes.close()

    def clear(self) -> None:
        """Let go of the memory."""
        segment, self.segment = self.segment, None
        if segment is not None:
            segment.close()
