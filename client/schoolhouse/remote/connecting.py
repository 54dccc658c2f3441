"""connect(): make a RemoteTeacher, and check that the teacher is there."""

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from schoolhouse.lm_head.disk_cache import default_cache_folder
from schoolhouse.remote.settings import Security, Sharing, Timeouts, Transport

if TYPE_CHECKING:
    from schoolhouse.remote.teacher import RemoteTeacher


def connect(
    url: str,
    *,
    job: str = "",
    sharing: Sharing = Sharing(),
    timeouts: Timeouts = Timeouts(),
    security: Security = Security(),
    transport: Transport = Transport(),
    zone: str = "",
    revision: str = "",
    follow_revisions: bool = False,
    head_folder: str | Path | None = default_cache_folder(),
    tracing: bool = False,
    **old: NoReturn,
) -> "RemoteTeacher":
    """Connect to the teacher at `grpcs://HOST:PORT/NAME`, or at `grpc://HOST:PORT/NAME` without TLS.

    HOST:PORT is that of a directory or of a replica. With `grpcs://` every server, also each replica that a directory
    lists, must have a certificate for HOST. With `grpc://` nothing is encrypted, and HOST must be a loopback address
    unless `insecure`. Pickling the teacher also pickles the token and the key.

    The process may fork at any time, as for the workers of a `DataLoader`, but the forks cannot ask the teacher: they
    get a `UsageError`, since gRPC does not work in a fork. Start processes that ask the teacher by spawn or forkserver.
    The first call imports gRPC with its own fork support turned off, since that aborts child processes. If something
    else imports gRPC earlier, set `GRPC_ENABLE_FORK_SUPPORT=0` in the environment.

    Args:
        url: where the teacher is.
        job: name of this job. Clients with the same name, such as the ranks of one training run, share the job's part
            of the teacher and its quota; a client without a name is a job by itself.
        sharing: the job's share of the teacher, and how many requests and replicas the client uses at once.
        timeouts: how long to wait for a server, for an answer, and for a teacher that is away.
        security: certificates, and the token.
        transport: how features travel, and how they are checked.
        zone: the zone of this client, to compare with the `zone` of replicas in the pool file. Replicas on the same
            machine, and then those in the same zone, are preferred unless they are clearly busier.
        revision: revision of the teacher, as `describe()` gives it; empty means the current one. All features are of
            this one revision.
        follow_revisions: do not keep to one revision: each request is for the revision that is current when it is
            submitted, or for the next one if that is gone before the answer; `Features.revision` says which it was.
        head_folder: folder in which teachers' heads are kept, by revision, for `encodings.hidden`; None keeps them only
            in memory.
        tracing: make an OpenTelemetry span for each request, within the current span; the replica's spans join the same
            trace, if tracing is on there too. Needs the extra `otel`, and a tracer provider that the program sets.

    Raises:
        ConfigError: for an invalid setting, for tracing without OpenTelemetry, or for `grpc://` to another machine
            without `insecure`.
        TypeError: for a setting that there is not; the message says in which group it is by now.
        AuthenticationError: if the server could not prove to be HOST, or requires a certificate or a token.
        TeacherUnavailableError: if no server answered there within `timeouts.connect_s`.
        UnknownTeacherError: if there is no teacher of that name; lists those there are.
        RevisionChangedError: if there is no replica of `revision`; lists those there are.
    """
    from schoolhouse.remote.teacher import RemoteTeacher  # late, since it imports gRPC

    teacher = RemoteTeacher(
        url,
        job=job,
        sharing=sharing,
        timeouts=timeouts,
        security=security,
        transport=transport,
        zone=zone,
        revision=revision,
        follow_revisions=follow_revisions,
        head_folder=head_folder,
        tracing=tracing,
        **old,
    )
    teacher.facts()
    return teacher
