"""One session's part in its job: the places that it has, how long it may be silent, and what is counted of it."""

from collections.abc import Callable, Iterable

from google.protobuf.message import Message
from schoolhouse.errors import ProtocolError
from schoolhouse.taps import HEAD
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.encodings import name_of
from schoolhouse_wire.limits import MAX_JOB_NAME
from schoolhouse_wire.v1 import teacher_pb2
from schoolhouse_wire.values.codec import Declared

from schoolhouse_server.common.timer import Timer
from schoolhouse_server.engine.unsent import Share
from schoolhouse_server.observe.counters import Counters
from schoolhouse_server.session.admission import Admission, Place
from schoolhouse_server.session.lease import Lease
from schoolhouse_server.session.quotas import Sharing

_WEIGHTS = (0.01, 100.0)


class Member:
    """It begins with the session's Open, and ends with `leave`."""

    def __init__(
        self,
        opened: teacher_pb2.Open,
        counters: Counters,
        admission: Admission,
        sharing: Sharing,
        tell: Callable[[Message], None],
    ) -> None:
        """`tell` has a message sent. Raises `ProtocolError` for a weight that there is not, or a name too long."""
        if len(opened.job) > MAX_JOB_NAME:
            raise ProtocolError(
                f"Open came with a job's name of {len(opened.job)} characters; {MAX_JOB_NAME} are allowed"
            )
        weight = opened.weight or 1.0
        if not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
            raise ProtocolError(f"Open came with the weight {weight}; it must be from {_WEIGHTS[0]} to {_WEIGHTS[1]}")
        self.account = counters.enter(opened.job, weight)
        self._counters = counters
        self._admission = admission
        self._tell = tell
        self._place = Place(self.account.job, sharing, self._tell_wait, self._tell_resume)
        self._lease: Lease | None = None
        self.teacher = opened.teacher
        self.calls = 0  # that came so far
        admission.enter(self._place)

    def start_lease(self, timer: Timer, lease_s: float, expire: Callable[[], None]) -> None:
        """Call `expire` when the client is silent for that long."""
        self._lease = Lease(timer, lease_s, expire)
        self._lease.start()

    def hear(self, *, listening: bool) -> None:
        """A message came; see `Lease.hear`."""
        if self._lease is not None:
            self._lease.hear(listening)

    def leave(self) -> None:
        """The session ends; called once."""
        if self._lease is not None:
            self._lease.end()
        self._admission.leave(self._place)
        self._counters.leave(self.account)

    @property
    def outstanding(self) -> int:
        """Requests whose answers are not sent yet."""
        return len(self._place.admitted) + len(self._place.replying)

    def tell_draining(self) -> None:
        """Tell the client to take new requests elsewhere."""
        self._tell(teacher_pb2.ServerMessage(draining=teacher_pb2.Draining()))

    def has(self, request_id: int) -> bool:
        """Whether a request is in flight, or its reply is on the way."""
        return request_id in self._place.admitted or request_id in self._place.replying

    def wants(self, request_id: int) -> bool:
        """Whether a reply that is on its way was not cancelled."""
        reply = self._place.replying.get(request_id)
        return reply is not None and reply.wanted

    def admit(self, request_id: int, nbytes: int) -> bool:
        """Whether there is a place for a request; else the client was told to wait. Errors: see `Admission.admit`."""
        self.calls += 1
        if not self._admission.admit(self._place, request_id, nbytes):
            return False
        self._counters.received(self.account, nbytes)
        return True

    def answered(
        self, request_id: int, rows: int, wanted: Wanted, features: Declared, share: Share | None = None
    ) -> None:
        """A request's features are to be sent; then its share ends."""
        self._counters.answered(self.account, rows=rows)
        self._counters.sent(self.account, len(features.header), _by_encoding(wanted, features))
        self._admission.reply(self._place, request_id, share)

    def failed(self, request_id: int, error: BaseException) -> None:
        """A request is answered with an error."""
        self._counters.failed(self.account, error)
        self._admission.end(self._place, request_id)

    def cancelled(self, request_id: int) -> None:
        """The client wants a request no more."""
        self._admission.cancelled(self._place, request_id)

    def sent(self, request_id: int) -> None:
        """A reply is sent."""
        self._admission.sent(self._place, request_id)

    def _tell_wait(self, request_id: int) -> None:
        self._counters.waits(self.account)
        self._tell(teacher_pb2.ServerMessage(wait=teacher_pb2.Wait(request_id=request_id)))

    def _tell_resume(self) -> None:
        self._tell(teacher_pb2.ServerMessage(resume=teacher_pb2.Resume()))


def _by_encoding(wanted: Wanted, features: Declared) -> Iterable[tuple[str, int]]:
    """Bytes of each tap's feature; of all under the first one's, if nobody counted them one by one."""
    pairs = zip(wanted.taps, wanted.encodings, strict=True)
    names = ["head" if tap.side == HEAD else name_of(encoding) for tap, encoding in pairs]
    return zip(names, features.item_bytes or (features.nbytes,), strict=False)
