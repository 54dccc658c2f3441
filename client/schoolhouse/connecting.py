"""connect(): a teacher behind gRPC that was seen to be there."""

from pathlib import Path

from schoolhouse.heads_cache import default_cache_folder
from schoolhouse.remote import RemoteTeacher


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
    head_folder: str | Path | None = default_cache_folder(),
) -> RemoteTeacher:
    """Connect to the teacher at `grpc://HOST:PORT/NAME`, a directory or a replica.

    The C allocator of this process is told to keep up to 512 MiB of freed memory (`schoolhouse_wire.memory`): without
    that, receiving features costs about half as much again.

    Args:
        url: where the teacher is.
        job: name of the job that asks. Clients of one name, as the ranks of one training run, share its part of the
            teacher, and its quota; a client without a name is a job of its own.
        weight: the job's share of a busy teacher beside other jobs, from 0.01 to 100. The last client's is the job's.
        timeout_s: deadline of each request, in seconds.
        connect_timeout_s: how long to wait for a server, in seconds.
        max_pending: how many requests may be without an answer before `submit` raises `TeacherBusyError`.
        shared_memory: take features from replicas of this machine and user through shared memory; `describe()` says
            whether it is so. A process that is forked from this one must clone those that it keeps.
        checksums: check every byte that comes through shared memory too, as those of the stream always are, which
            is slower; otherwise the first KiB of each 64 KiB.
        head_folder: where teachers' heads are kept, by revision, for `encodings.hidden`; None: in memory alone.

    Raises:
        TeacherUnavailableError: no server there within `connect_timeout_s`.
        UnknownTeacherError: no teacher of that name; lists those there are.
    """
    teacher = RemoteTeacher(
        url,
        job=job,
        weight=weight,
        timeout_s=timeout_s,
        connect_timeout_s=connect_timeout_s,
        max_pending=max_pending,
        shared_memory=shared_memory,
        checksums=checksums,
        head_folder=head_folder,
    )
    teacher.facts()
    return teacher
