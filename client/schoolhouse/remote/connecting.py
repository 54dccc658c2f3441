"""connect(): a teacher behind gRPC that was seen to be there."""

from pathlib import Path
from typing import TYPE_CHECKING

from schoolhouse_wire.rpc.security import ClientSecurity

from schoolhouse.lm_head.disk_cache import default_cache_folder

if TYPE_CHECKING:
    from schoolhouse.remote.teacher import RemoteTeacher


def connect(
    url: str,
    *,
    job: str = "",
    weight: float = 1.0,
    timeout_s: float = 60.0,
    connect_timeout_s: float = 10.0,
    max_pending: int = 1024,
    shared_memory: bool = True,
    checksums: bool = False,
    tune_allocator: bool = True,
    head_folder: str | Path | None = default_cache_folder(),
    teacher_timeout_s: float | None = None,
    attempt_timeout_s: float | None = None,
    zone: str = "",
    revision: str = "",
    follow_revisions: bool = False,
    tracing: bool = False,
    verify_every: int = 0,
    verify_tolerance: float = 0.0,
    ca: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    token: str | None = None,
    insecure: bool = False,
) -> "RemoteTeacher":
    """Connect to the teacher at `grpcs://HOST:PORT/NAME`, a directory or a replica, or at `grpc://` without TLS.

    With `grpcs://` every server, also each replica that a directory lists, must have a certificate for HOST. With
    `grpc://` nothing is encrypted, and HOST must be a loopback address. A teacher that is pickled holds the token and
    the key.

    A process may fork at any time, as for a `DataLoader`'s workers, but its forks cannot ask the teacher: that raises
    `UsageError`, since gRPC does not work in a fork. Start processes that ask by spawn or forkserver. The first call
    imports gRPC with its own support of forks, which aborts children, turned off. Where something else has imported it
    before, set `GRPC_ENABLE_FORK_SUPPORT=0` in the environment.

    Args:
        url: where the teacher is.
        job: name of the job that asks. Clients of one name, as the ranks of one training run, share its part of the
            teacher, and its quota; a client without a name is a job of its own.
        weight: the job's share of a busy teacher beside other jobs, from 0.01 to 100. The last client's is the job's.
        timeout_s: deadline of each request, in seconds, however often it is sent again meanwhile. Time in which no
            replica can take it does not count.
        connect_timeout_s: how long to wait for a server, in seconds.
        max_pending: how many requests may be without an answer before `submit` raises `TeacherBusyError`.
        shared_memory: take features from replicas of this machine and user through shared memory, where the system is
            Linux; `describe()` says whether it is so, or why not. A process that is forked from this one must clone
            those that it keeps.
        checksums: check every byte that comes through shared memory too, as those of the stream always are, which
            is slower; otherwise the first KiB of each 64 KiB.
        tune_allocator: tell the C allocator of this process, where it is glibc's, to keep up to 512 MiB of freed memory
            (`mallopt`), as the first session opens. Without that, receiving features costs about half as much again.
        head_folder: where teachers' heads are kept, by revision, for `encodings.hidden`; None: in memory alone.
        teacher_timeout_s: how long a request waits, in seconds and all its waits together, while no replica of the
            teacher can take it; its own time stands still meanwhile, and the log says that the student waits. Then it
            fails with `TeacherUnavailableError`, and the batch may be forwarded again. None: as long as `timeout_s`.
        attempt_timeout_s: a replica that has requests and has said nothing for so long, in seconds, and for twice as
            long as the slowest answer took, is left, if there is another; a request is moved so once. None: a third of
            `timeout_s`.
        zone: where this client is, as replicas say it of themselves (`zone` in the pool file). Those of the same
            machine, and then those of the same zone, are preferred unless they are clearly busier.
        revision: of the teacher, as `describe()` says it; empty: the present one. Features are of this revision alone.
        follow_revisions: ask each request of the revision that is present when it is submitted, or of the next one if
            that is gone before the answer, in place of keeping to the first; `Features.revision` says which it was.
        tracing: make an OpenTelemetry span of each request, within the current one; the replica's are in the same
            trace, if it traces too. It needs the extra `otel`, and a tracer provider that the program sets.
        verify_every: compute one request in so many a second time, at another replica, or at the same if there is no
            other, and compare the features before they are used; 0: none. Such a request takes the time of two. Both
            run unmerged and anew, so that they are the same to the bit; where they are not, an ERROR is logged, the
            step raises `FeatureMismatchError`, and every request is verified from then on. `verification()` counts.
        verify_tolerance: how far numbers may be apart, of the largest in their tensor, where replicas have unlike
            devices, which round differently. Classes that `topk` and `sampled` name must be the same all the same.
        ca: PEM file of the authorities that the servers' certificates must come from; None: those that gRPC knows, of
            the public web.
        cert: PEM file of this client's own certificate, and those between it and its authority, for servers that want
            one.
        key: PEM file of its private key, without a password.
        token: what the pool's operator gave to this job; it is in each RPC, but not in the features' frames.
        insecure: allow `grpc://` to other machines, where anyone on the way can read and change everything, and take
            the token.

    Raises:
        ConfigError: for a setting that is none, or tracing without OpenTelemetry; for `grpc://` to another machine.
        AuthenticationError: the server could not prove to be HOST, or wants a certificate or a token of this client's.
        TeacherUnavailableError: no server there within `connect_timeout_s`.
        UnknownTeacherError: no teacher of that name; lists those there are.
        RevisionChangedError: no replica of `revision`; lists those there are.
    """
    from schoolhouse.remote.teacher import RemoteTeacher  # which imports gRPC

    teacher = RemoteTeacher(
        url,
        job=job,
        weight=weight,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        max_pending=max_pending,
        shared_memory=shared_memory,
        checksums=checksums,
        tune_allocator=tune_allocator,
        head_folder=head_folder,
        teacher_timeout_s=teacher_timeout_s,
        attempt_timeout_s=attempt_timeout_s,
        zone=zone,
        revision=revision,
        follow_revisions=follow_revisions,
        tracing=tracing,
        verify_every=verify_every,
        verify_tolerance=verify_tolerance,
        security=ClientSecurity.read(ca=ca, cert=cert, key=key, token=token, insecure=insecure),
    )
    teacher.facts()
    return teacher
