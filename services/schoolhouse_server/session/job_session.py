"""One session's part in its job: its requests in flight, its lease, and its counters."""

import re
from collections.abc import Callable, Iterable

from google.protobuf.message import Message
from schoolhouse.taps import HEAD
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.encodings import name_of
from schoolhouse_wire.errors import ProtocolError
from schoolhouse_wire.limits import MAX_JOB_NAME
from schoolhouse_wire.loop import Loop
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Declared

from schoolhouse_server.engine.unsent import Share
from schoolhouse_server.observe.counters import ENDED, Counters
from schoolhouse_server.session.admission import Admission, Place
from schoolhouse_server.session.lease import Lease
from schoolhouse_server.session.quotas import Sharing

_WEIGHTS = (0.01, 100.0)
_RESERVED = re.compile(rf"anonymous-\d+|{re.escape(ENDED)}")


class Member:
    """A session as a member of its job, from its Open until `leave`."""

    def __init__(
        self,
        opened: teacher_pb2.Open,
        counters: Counters,
        admission: Admission,
        sharing: Sharing,
        tell: Callable[[Message], None],
        payer: str = "",
    ) -> None:
        """`tell` sends a message to the client; `payer` is whose quota it has, if that is not its job's.

        Raises:
            ProtocolError: for an invalid weight, or too long a name.
        """
        if len(opened.job) > MAX_JOB_NAME:
            raise ProtocolError(f"Open has a job's name of {len(opened.job)} characters; {MAX_JOB_NAME} are allowed")
        if _RESERVED.fullmatch(opened.job):
            raise ProtocolError(f"Open has the job's name {opened.job!r}, which the replica keeps for itself")
        weight = opened.weight or 1.0
        if not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
            raise ProtocolError(f"Open has the weight {weight}; it must be from {_WEIGHTS[0]} to {_WEIGHTS[1]}")
        self.account = counters.enter(opened.job, weight)
        self._counters = counters
        self._admission = admission
        self._tell = tell
        self._place = Place(self.account.job, sharing, self._tell_wait, self._tell_resume, payer)
        self._lease: Lease | None = None
        self.teacher = opened.teacher
        self.calls = 0  # how many requests have come so far
        admission.enter(self._place)

    def start_lease(self, loop: Loop, lease_s: float, expire: Callable[[], None]) -> None:
        """Call `expire` once the client has been silent for `lease_s`."""
        self._lease = Lease(loop, lease_s, expire)
        self._lease.start()

    def hear(self, *, listening: bool) -> None:
        """Note that a message came; see `Lease.hear`."""
        if self._lease is not None:
            self._lease.hear(listening)

    def leave(self) -> None:
        """Leave the job as the session ends; to be called once."""
        if self._lease is not None:
            self._lease.end()
        self._admission.leave(self._place)
        self._counters.leave(self.account)

    @property
    def payer(self) -> str:
        """Whose quota and whose turns in the queue it has: its job's, or those of what stands for several."""
        return self._place.payer

    @property
    def outstanding(self) -> int:
        """How many requests have no answer sent yet."""
        return len(self._place.admitted) + len(self._place.replying)

    @property
    def replying(self) -> bool:
        """Whether replies are being sent."""
        return bool(self._place.replying)

    @property
    def unsent(self) -> int:
        """How many replies are not sent yet."""
        return len(self._place.replying)

    def tell_draining(self) -> None:
        """Tell the client to send new requests elsewhere."""
        self._tell(teacher_pb2.ServerMessage(draining=teacher_pb2.Draining()))

    def has(self, request_id: int) -> bool:
        """Whether a request is in flight, or its reply is being sent."""
        return request_id in self._place.admitted or request_id in self._place.replying

    def wants(self, request_id: int) -> bool:
        """Whether a reply is being sent and the client has not cancelled it."""
        reply = self._place.replying.get(request_id)
        return reply is not None and reply.wanted

    def admit(self, request_id: int, nbytes: int) -> bool:
        """Let a request in, or tell the client to wait and return False; raises as `Admission.admit` does."""
        self.calls += 1
        if not self._admission.admit(self._place, request_id, nbytes):
            return False
        self._counters.received(self.account, nbytes)
        return True

    def answered(
        self, request_id: int, rows: int, wanted: Wanted, features: Declared, share: Share | None = None
    ) -> None:
        """Count a request whose features are about to be sent; its share ends once they are."""
        sent = _by_encoding(wanted, features)
        self._counters.answered(self.account, rows=rows, header_bytes=len(features.header), by_encoding=sent)
        self._admission.reply(self._place, request_id, share)

    def failed(self, request_id: int, error: BaseException) -> None:
        """Count a request that is answered with an error."""
        self._counters.failed(self.account, error)
        self._admission.end(self._place, request_id)

    def cancelled(self, request_id: int) -> None:
        """Forget a request that the client has cancelled."""
        self._admission.cancelled(self._place, request_id)

    def sent(self, request_id: int) -> None:
        """Note that a reply is sent."""
        self._admission.sent(self._place, request_id)

    def _tell_wait(self, request_id: int) -> None:
        self._counters.waits(self.account)
        self._tell(teacher_pb2.ServerMessage(wait=teacher_pb2.Wait(request_id=request_id)))

    def _tell_resume(self) -> None:
        self._tell(teacher_pb2.ServerMessage(resume=teacher_pb2.Resume()))


def _by_encoding(wanted: Wanted, features: Declared) -> Iterable[tuple[str, int]]:
    """The bytes of each tap's feature, with its encoding; all under the first encoding if not counted one by one."""
    pairs = zip(wanted.taps, wanted.encodings, strict=True)
    names = ["head" if tap.side == HEAD else name_of(encoding) for tap, encoding in pairs]
    return zip(names, features.item_bytes or (features.nbytes,), strict=False)
