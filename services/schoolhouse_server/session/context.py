"""What a session knows of its replica."""

from collections.abc import Mapping

from schoolhouse.tracing import tracer
from schoolhouse_wire.errors import UnknownTeacherError
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.loop import Loop

from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.security.auth import EVERYBODY, Gate, check_teacher
from schoolhouse_server.security.tokens import Grant
from schoolhouse_server.session.admission import Admission
from schoolhouse_server.session.draining import Drain
from schoolhouse_server.session.quotas import MAX_REQUEST_TOKENS, Sharing
from schoolhouse_server.session.relief import Relief, Session
from schoolhouse_server.session.shared_bytes import SharedBytes
from schoolhouse_server.session.tappable import Tappable, TeacherTaps
from schoolhouse_server.session.tidying import Tidying


class ReplicaContext:
    """The engines of one replica, and what all its sessions share."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        limits: Limits,
        *,
        shared_memory_bytes: int,
        sharing: Sharing,
        loop: Loop,
        gate: Gate,
        allow_head: bool,
        taps: Mapping[str, TeacherTaps],
        tidies_allocator: bool = False,
        tracing: bool = False,
    ) -> None:
        self.limits = limits
        self.shared_memory_bytes = shared_memory_bytes
        self.shared_bytes = SharedBytes(sharing.max_unsent_bytes, sharing.max_job_unsent_bytes)
        self.sharing = sharing
        # Whether a job may get what was computed for another one, by which it can tell that the other asked for it.
        self.jobs_share_results = sharing.cache_scope == "teacher" or (
            sharing.cache_scope == "auto" and gate.tokens is None
        )
        self.max_request_tokens = sharing.max_request_tokens or (
            MAX_REQUEST_TOKENS if gate.tokens is not None else None
        )
        self.loop = loop
        self.gate = gate
        self.allow_head = allow_head
        self.admissions = {name: Admission(sharing, loop) for name in engines}
        self.tracer = tracer(tracing)
        self.drain = Drain()
        self._engines = engines
        self._taps = taps
        self.tidying = Tidying(loop, self._work, allocator=tidies_allocator)
        self.sessions: set[Session] = set()
        self.relief = Relief(loop, lambda: any(engine.starves for engine in engines.values()), self.sessions)

    def _work(self) -> object:
        """How much has been answered so far; None while there is something to answer or to send."""
        if any(engine.running or engine.queued or engine.shares.nbytes for engine in self._engines.values()):
            return None
        return sum(engine.served for engine in self._engines.values())

    def find(self, name: str, grant: Grant = EVERYBODY) -> Engine:
        """The engine of a teacher, for a client with this grant.

        Raises:
            PermissionDeniedError: the grant does not allow this teacher.
            UnknownTeacherError: there is no such teacher; the message names those that the grant may see.
            TeacherUnavailableError: the teacher has failed or is closed.
        """
        check_teacher(name, grant)
        if name not in self._engines:
            names = sorted(filter(grant.sees, self._engines))
            raise UnknownTeacherError(f"no teacher {name!r} here; there are: {', '.join(names)}", choices=names)
        self._engines[name].check()
        return self._engines[name]

    def tappable(self, name: str, grant: Grant) -> Tappable:
        """What a client with this grant may tap of a teacher that there is."""
        return self._taps[name].within(grant.taps)
