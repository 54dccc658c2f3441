"""`serve()`: one or several modules as teachers, from this process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schoolhouse_wire.rpc.security import is_loopback
from torch import nn

from schoolhouse_server.device.watchdog import FORWARD_TIMEOUT_S
from schoolhouse_server.merge.settings import MergeSettings, Padding
from schoolhouse_server.replica.replica import Example, Patterns, Replica
from schoolhouse_server.security.tls import ServerTls
from schoolhouse_server.session.quotas import (
    LEASE_S,
    MAX_IN_FLIGHT,
    MAX_JOB_BYTES,
    MAX_JOB_UNSENT_BYTES,
    MAX_QUEUED,
    MAX_SESSIONS,
    MAX_UNSENT_BYTES,
)


def serve(
    module: nn.Module | Mapping[str, nn.Module],
    *,
    name: str = "teacher",
    host: str = "127.0.0.1",
    port: int = 0,
    merge: str = "never",
    max_batch_rows: int = 256,
    max_batch_tokens: int = 65_536,
    max_wait_ms: float = 2.0,
    pad: Mapping[str, Any] | Padding | None = None,
    example: Example = None,
    early_stop: bool = False,
    max_request_bytes: int = 2 << 30,
    cache_bytes: int = 0,
    shared_memory_bytes: int = 1 << 30,
    tune_allocator: bool = True,
    cost: str = "rows",
    max_in_flight: int = MAX_IN_FLIGHT,
    max_job_bytes: int = MAX_JOB_BYTES,
    max_queued: int = MAX_QUEUED,
    max_unsent_bytes: int = MAX_UNSENT_BYTES,
    max_job_unsent_bytes: int = MAX_JOB_UNSENT_BYTES,
    lease_s: float = LEASE_S,
    max_sessions: int = MAX_SESSIONS,
    cache_scope: str = "auto",
    max_request_tokens: int | None = None,
    http_port: int | None = None,
    tracing: bool = False,
    tls: ServerTls | None = None,
    insecure: bool = False,
    tokens: str | Path | None = None,
    allow_head: bool | None = None,
    taps: Patterns = None,
    forward_timeout_s: float = FORWARD_TIMEOUT_S,
) -> Replica:
    """Serve a module, or several by name, from this process; returns when clients can connect.

    Use the result in a `with` statement, or call its `close()`. It listens on `host` only, which is an address of this
    machine or a name that resolves to one; 0.0.0.0 and :: mean all interfaces. `early_stop` is that of
    `schoolhouse.LocalTeacher`; a merged forward stops after the last tap that any of its requests wants. A cache of
    `cache_bytes` of host memory keeps the features of each teacher, so that inputs that come again, in the next epoch
    or from another job, are not computed again. It holds features as they were computed, in a merged forward or alone.
    With `cache_scope="job"` each job gets only what was computed for itself, from the cache as well as where equal
    requests are in flight at the same time: otherwise it can tell by the time whether another job asked for the same.
    With "teacher" all jobs share, and with "auto" they do unless there are `tokens`.

    Clients of the same machine and user get features through shared memory: each up to `shared_memory_bytes` at once,
    including features that it has not released yet, and the rest over the stream; 0 switches shared memory off. Inputs
    may take another quarter of that size. The memory counts as this process's once it has been used. All sessions of a
    job together use up to `max_job_unsent_bytes` of it, and all of this server up to `max_unsent_bytes`; beyond that
    replies come over the stream, and new sessions are offered none. What a session has not used for ten seconds goes
    back to the system. Unless `tune_allocator` is False, the C allocator of this process is told to keep up to 512 MiB
    of freed memory, which it gives back when the server has had nothing to do for ten seconds.

    Jobs share each teacher's device time fairly, by the weights that they connect with. What a request takes is
    estimated from those before it with the same taps, encodings and dimensions, and corrected once it is measured;
    parsing and encoding count, too. In the metrics, a job's cost counts rows (the first size that most tensors of a
    request have) with `cost="rows"`, or tokens (rows times length) with `cost="tokens"`. A job may have
    `max_in_flight` requests and `max_job_bytes` of inputs in flight over all its sessions, and all jobs together
    `max_queued` requests; when there is no room, clients wait. Features that are being computed, or are computed
    and not sent yet, take up to `max_job_unsent_bytes` of host memory for each job, and up to `max_unsent_bytes`
    for all jobs and teachers of this server. Beyond that, requests wait in the queue before their forward, so that
    a client that does not read its replies cannot fill the memory or hold up others. The size of a request's
    features is predicted from the last request with the same taps and encodings, as features grow with the inputs.
    The first of a kind counts once its features are computed, so each job may exceed the bounds by one such
    request. A request whose features are larger than one of the bounds fails with `MessageTooLargeError` once their
    size is known. One request may have `max_request_tokens` (rows times length, or rows where inputs have no
    length): any number, or 262,144 where there are `tokens`; and 2**28 draws of `sampled`. A client that is silent
    for `lease_s` loses its session; with 0 it may be silent for ever. Up to `max_sessions` sessions are open at
    once; further clients wait, up to their `Timeouts.teacher_s`.

    `merge` says which requests may run as one forward, each getting its own rows and taps:

    - `"never"`: each request is a forward of its own, so that remote features are bit-identical to those of the same
      module on the same device in the student's process.
    - `"same-shape"`: requests whose inputs differ only in their rows. Kernels for another batch size sum in another
      order, so features are equal up to rounding. Requests are no longer merged where a number differs from that of a
      single forward by more than 6e-4 (float32; 3e-2 with TF32), 3e-2 (float16), 0.12 (bfloat16) or 6e-9 (float64),
      relative to itself and to the usual size of numbers in its row, in its channel and in the whole feature. So the
      few massive activations of an LLM cannot hide an error in the other numbers.
    - `"pad"`: also requests of different lengths. `pad={"values": {"input_ids": 0}, "mask": "attention_mask"}` names
      the arguments to pad on the right, the value to pad each with, and the mask, which is made of ones where a request
      has none. Features are cut back to each request's own length, and the same tolerances hold.

    A batch has at most `max_batch_rows` rows and `max_batch_tokens` tokens, padding included; a larger request runs
    alone. An idle device waits for more requests, for at most `max_wait_ms` and at most half of a forward's time, and
    not at all while only one session is active.

    Merged forwards are compared with single ones. At the start that is done with `example`, a callable that returns
    what forward takes: at least 2 rows that differ, better 5 (models of transformers bring their own). In traffic it is
    done at the 1st, 2nd, 4th, 8th, ... and every 1024th merged forward of each form of inputs: 16 of its requests, or
    all if those differ in kind from the rest, run singly too, and get the features of these single forwards. Features
    whose size may equal the number of rows by chance, such as the tokens routed to an expert, are compared with 16
    single forwards before they are split. Where features differ, such requests are not merged any more, and the log
    says why. This finds modules that mix rows, draw random numbers, write into buffers, or use the features of padded
    positions. It can miss what happens only for some values, between two checks: experts of limited capacity that a
    larger batch fills up, or that got equally many tokens in all checks; a length that is cut to the longest in the
    batch; state that has changed no feature so far. Such teachers need `"never"`.

    A forward that takes longer than `forward_timeout_s`, compiling included, counts as one that never returns (0: any
    time is allowed). After that, or when the device is broken, the teacher has failed for good: health says
    NOT_SERVING, its requests fail with `TeacherUnavailableError`, so that clients ask another replica, and
    `server.trouble` says why.

    A merged forward that does not fit into the device's memory is run in halves. A single request that does not fit is
    tried again when the device is otherwise idle, and then, unless `merge="never"`, in parts of its rows, provided that
    the features of some rows are those that their halves give up to rounding. If they are not, or if a single row does
    not fit, that request fails with `TeacherMemoryError`, and the others go on. Features computed in parts are encoded
    on the host.

    Requests whose inputs are not all finite run alone, and so do the requests of a session once three of them gave NaN.
    Merged features with NaN, and now and then those with infinities, are compared with single forwards before anybody
    gets them. So a value that is not finite stays within its own request.

    With an `http_port` (0: any free one) the server can be watched: a page with charts at `server.web.url`, Prometheus
    metrics at `/metrics`, and the same as JSON at `/api/state`. Whoever reaches that port can read the names and loads
    of jobs; where there are `tokens`, it wants an admin's. `tracing` makes OpenTelemetry
    spans of the stages of each request, in the client's trace if the client traces too; it needs the extra `otel`, and
    a tracer provider set by the program.

    With `tls=ServerTls(cert=..., key=...)` all ports speak TLS, and clients connect to `grpcs://`; with its `client_ca`
    only clients with a certificate of that authority are answered. Without `tls`, a `host` beyond loopback needs
    `insecure=True`, as all traffic is plaintext then.

    With `tokens`, a file whose lines `schoolhouse token` makes, only clients with one of its tokens are answered. The
    file says what each token allows: which teachers, which job, what quota; see
    `schoolhouse_server.security.tokens.Grant`. It is read again when it changes, and the sessions of a removed token
    are ended. Without it, everybody is answered. `allow_head` lets clients fetch the weights of a teacher's head, which
    `encodings.hidden` needs; None allows it where the server listens on loopback and has no tokens.

    `taps` says what may be tapped: patterns of modules' names, in which `*` stands for anything, dots too, each with
    `:input` or `:output` for one side only, as in `["", "model.layers.*:output"]`; `""` is the whole model. With
    several teachers it is a dict of such lists by the teachers' names. A token's own `taps` narrow that. None allows
    everything or, where there are tokens, everything but embeddings, and modules that share weights with them or with a
    head that is not given out; see `schoolhouse_server.security.lookups.lookups`. That keeps nobody from computing
    weights from features: those of enough inputs give a linear layer.

    Raises:
        ConfigError: for an invalid setting, or a module that cannot be merged as `merge` says.
    """
    if allow_head is None:
        allow_head = tokens is None and is_loopback(host)
    modules = {name: module} if isinstance(module, nn.Module) else module
    return Replica(
        modules,
        host=host,
        port=port,
        merging=MergeSettings(
            mode=merge,
            max_batch_rows=max_batch_rows,
            max_batch_tokens=max_batch_tokens,
            max_wait_ms=max_wait_ms,
            pad=Padding.of(pad) if pad is not None else None,
        ),
        example=example,
        early_stop=early_stop,
        max_request_bytes=max_request_bytes,
        cache_bytes=cache_bytes,
        shared_memory_bytes=shared_memory_bytes,
        tune_allocator=tune_allocator,
        cost=cost,
        max_in_flight=max_in_flight,
        max_job_bytes=max_job_bytes,
        max_queued=max_queued,
        max_unsent_bytes=max_unsent_bytes,
        max_job_unsent_bytes=max_job_unsent_bytes,
        lease_s=lease_s,
        cache_scope=cache_scope,
        max_request_tokens=max_request_tokens,
        max_sessions=max_sessions,
        http_port=http_port,
        tracing=tracing,
        tls=tls,
        insecure=insecure,
        tokens=tokens,
        allow_head=allow_head,
        taps=taps,
        forward_timeout_s=forward_timeout_s,
    ).start()
