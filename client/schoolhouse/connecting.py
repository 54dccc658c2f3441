"""connect(): a teacher behind gRPC that was seen to be there."""

from pathlib import Path

from schoolhouse.heads_cache import default_cache_folder
from schoolhouse.remote import RemoteTeacher


def connect(
    url: str,
    *,
    job: str = "",
    timeout_s: float = 60.0,
    connect_timeout_s: float = 10.0,
    max_pending: int = 1024,
    shared_memory: bool = True,
    checksums: bool = False,
    head_folder: str | Path | None = default_cache_folder(),
    tracing: bool = False,
) -> RemoteTeacher:
    """Connect to the teacher at `grpc://HOST:PORT/NAME`, a directory or a replica.

    The C allocator of this process is told to keep up to 512 MiB of freed memory (`schoolhouse_wire.memory`): without
    that, receiving features costs about half as much again.

    Args:
        url: where the teacher is.
        job: name of the job that asks, for the operator's eyes.
        timeout_s: deadline of each request, in seconds.
        connect_timeout_s: how long to wait for a server, in seconds.
        max_pending: how many requests may be without an answer before `submit` raises `TeacherBusyError`.
        shared_memory: take features from replicas of this machine and user through shared memory; `describe()` says
            whether it is so. A process that is forked from this one must clone those that it keeps.
        checksums: check every byte that comes through shared memory too, as those of the stream always are, which
            is slower; otherwise the first KiB of each 64 KiB.
        head_folder: where teachers' heads are kept, by revision, for `encodings.hidden`; None: in memory alone.
        tracing: make an OpenTelemetry span of each request, within the current one; the replica's are in the same
            trace, if it traces too. It needs the extra `otel`, and a tracer provider that the program sets.

    Raises:
        ConfigError: for a setting that is none, or tracing without OpenTelemetry.
        TeacherUnavailableError: no server there within `connect_timeout_s`.
        UnknownTeacherError: no teacher of that name; lists those there are.
    """
    teacher = RemoteTeacher(
        url,
        job=job,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        max_pending=max_pending,
        shared_memory=shared_memory,
        checksums=checksums,
        head_folder=head_folder,
        tracing=tracing,
    )
    teacher.facts()
    return teacher
