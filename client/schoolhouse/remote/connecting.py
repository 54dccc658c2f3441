"""connect(): make a RemoteTeacher, and check that the teacher is there."""

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
        weight: the job's share of a busy teacher relative to other jobs, from 0.01 to 100. If clients of one job give
            different weights, the last one counts.
        timeout_s: deadline of each request, in seconds, including all retries. Time in which no replica can take the
            request does not count.
        connect_timeout_s: how long to wait for a server, in seconds.
        max_pending: how many requests may be without an answer before `submit` raises `TeacherBusyError`.
        shared_memory: receive features from replicas of the same machine and user through shared memory, on Linux;
            `describe()` says whether it is used, or why not. A process that is forked from this one must clone the
            features that it keeps.
        checksums: check every byte that arrives through shared memory, which is slower; otherwise the first KiB of each
            64 KiB is checked. Bytes that arrive over the stream are always checked.
        tune_allocator: make glibc's allocator in this process keep up to 512 MiB of freed memory (`mallopt`), from the
            first session on. Without that, receiving features costs about half as much again.
        head_folder: folder in which teachers' heads are kept, by revision, for `encodings.hidden`; None keeps them only
            in memory.
        teacher_timeout_s: how long a request may wait in total, in seconds, while no replica of the teacher can take
            it. Its `timeout_s` stands still meanwhile, and the log says that the student waits. After that it fails
            with `TeacherUnavailableError`, and the batch may be forwarded again. None means as long as `timeout_s`.
        attempt_timeout_s: leave a replica that has requests but has sent nothing for this many seconds, and for twice
            as long as the slowest answer took, if there is another replica; each request is moved at most once in this
            way. None means a third of `timeout_s`.
        zone: the zone of this client, to compare with the `zone` of replicas in the pool file. Replicas on the same
            machine, and then those in the same zone, are preferred unless they are clearly busier.
        revision: revision of the teacher, as `describe()` gives it; empty means the current one. All features are of
            this one revision.
        follow_revisions: do not keep to one revision: each request is for the revision that is current when it is
            submitted, or for the next one if that is gone before the answer; `Features.revision` says which it was.
        tracing: make an OpenTelemetry span for each request, within the current span; the replica's spans join the same
            trace, if tracing is on there too. Needs the extra `otel`, and a tracer provider that the program sets.
        verify_every: compute one request in this many a second time, on another replica, or on the same one if there is
            no other, and compare the features before they are used; 0 for none. Such a request takes twice as long.
            Both run unmerged and are computed anew, so that the results are the same to the bit. If they differ, an
            ERROR is logged, the step raises `FeatureMismatchError`, and every later request is verified.
            `verification()` returns the counts.
        verify_tolerance: by how much numbers may differ, as a fraction of the largest in their tensor, for replicas on
            unlike devices, which round differently. Class indices of `topk` and `sampled` must be equal in any case.
        ca: PEM file of the certificate authorities to trust for the servers' certificates; None means those of the
            public web that gRPC knows.
        cert: PEM file of this client's own certificate, with the intermediate ones, for servers that require one.
        key: PEM file of the private key of `cert`, without a password.
        token: the token that the pool's operator gave to this job. It is sent with each RPC.
        insecure: allow `grpc://` to other machines, although anyone on the network path can then read and change
            everything, and steal the token.

    Raises:
        ConfigError: for an invalid setting, for tracing without OpenTelemetry, or for `grpc://` to another machine
            without `insecure`.
        AuthenticationError: if the server could not prove to be HOST, or requires a certificate or a token.
        TeacherUnavailableError: if no server answered there within `connect_timeout_s`.
        UnknownTeacherError: if there is no teacher of that name; lists those there are.
        RevisionChangedError: if there is no replica of `revision`; lists those there are.
    """
    from schoolhouse.remote.teacher import RemoteTeacher  # late, since it imports gRPC

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
