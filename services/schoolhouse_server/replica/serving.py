"""serve(): a module, or several, from this process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schoolhouse_wire.rpc.security import is_loopback
from torch import nn

from schoolhouse_server.device.watchdog import FORWARD_TIMEOUT_S
from schoolhouse_server.merge.batching import MergeSettings, Padding
from schoolhouse_server.replica.replica import Example, Replica
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
    http_port: int | None = None,
    tracing: bool = False,
    tls: ServerTls | None = None,
    insecure: bool = False,
    tokens: str | Path | None = None,
    allow_head: bool | None = None,
    forward_timeout_s: float = FORWARD_TIMEOUT_S,
) -> Replica:
    """Serve a module, or several by name, from this process; returns when clients can connect.

    Use it in a `with`, or call `close()`. It listens on `host` alone, an address of this machine or a name of one;
    0.0.0.0 and :: are all interfaces. `early_stop` is that of `schoolhouse.LocalTeacher`; in a merged forward the
    last tap is that of all requests in it. `cache_bytes` of host
    memory keep the features of each teacher, so that inputs that come again, in the next epoch or in another job, are
    not computed again; they are kept as they were computed, merged or not.

    Features go to clients of the same machine and user through shared memory: up to `shared_memory_bytes` for each of
    them at once, features that it still holds included, and beyond that over the stream; 0 switches it off. The inputs
    that come have a quarter of it beside that. It counts as memory of this process as it is first used. The C allocator
    of this process is told to keep up to 512 MiB of freed memory, unless `tune_allocator` is False.

    Jobs share each teacher fairly, by the weights that they connect with: each is charged the `cost` of its requests in
    "rows", the first dimension of the first tensor, or in "tokens", batch times length. A job, over all its sessions,
    has up to `max_in_flight` requests and `max_job_bytes` of inputs in flight, and all jobs together `max_queued`
    requests; its clients wait when there is no room. Features of a job that are being made, or are made and not sent
    yet, take up to `max_job_unsent_bytes` of host memory, and those of all jobs and teachers here `max_unsent_bytes`:
    beyond that requests wait in the queue, before their forward, so that a client that does not read gets few features
    made and others are served. How many bytes a request will take is known from the last one with the same taps and
    encodings, as features grow with the inputs. The first of a kind counts once its features are made, so that each job
    may exceed the bounds by one such request. What is larger than one of the bounds fails with `MessageTooLargeError`
    once its size is known. A client that says nothing for `lease_s` loses its session; 0: it may be silent for ever. Up
    to `max_sessions` clients have one at once; more wait, up to their `teacher_timeout_s`.

    `merge` says which requests may run as one forward, each getting its own rows and taps:

    - `"never"`: each is a forward of its own, so that remote features are bit-identical to those of the same module on
      the same device in the student's process.
    - `"same-shape"`: those whose inputs differ in nothing but their rows. Kernels for other shapes add in another
      order, so features are equal up to rounding: where a number differs from a single forward's by more than 6e-4
      (float32; 3e-2 with TF32), 3e-2 (float16), 0.12 (bfloat16) or 6e-9 (float64) of itself and of what is usual in its
      row, in its channel and in all of the feature, such requests are not merged. The few massive numbers of LLMs hide
      no error among the others.
    - `"pad"`: also those of other lengths. `pad={"values": {"input_ids": 0}, "mask": "attention_mask"}` names the
      arguments to pad on the right and with what, and the mask, which is made of ones where a request has none. The
      features are cut back to each request's own length, and the same holds of their numbers.

    A batch has at most `max_batch_rows` rows and `max_batch_tokens` tokens with padding; a request beyond that runs
    alone. A device that has nothing else to do waits for more requests, up to `max_wait_ms` and half of a forward, and
    not at all while one session alone is active.

    Merged forwards are held against single ones: at the start where `example` returns what forward takes (at least 2
    rows that differ, better 5; transformers' models bring their own), and in traffic at the 1st, 2nd, 4th, 8th, ... and
    each 1024th merged forward of each form of inputs, of which 16 requests, or all if those differ in kind from the
    rest, then get what single forwards gave. Features that may have as many rows by chance, as the tokens that an
    expert gets, are held against 16 single forwards before they are split. Where they differ, such requests are not
    merged any more, and the log says why. That finds modules that mix rows, draw random numbers, write into buffers, or
    use features of padded places. It can miss what happens to some values only, between two checks: experts of a
    limited capacity that a larger batch fills up, or whose tokens were as many in all that was checked, a length that
    is cut to the longest in the batch, or state that changes no feature so far. Such teachers need `"never"`.

    A forward that takes longer than `forward_timeout_s` (0: any time is right), compiling included, counts as one that
    never returns. Then, and when the device is broken, the teacher is at its end: health says NOT_SERVING, its requests
    fail with `TeacherUnavailableError`, so that clients ask another replica, and `server.trouble` says why.

    A device that has no room for a merged forward runs it in halves. One that has none for a request by itself runs it
    once more when it has nothing else to do, and then in parts of its rows, if what some rows give is what the halves
    of those give: to the bit with `merge="never"`, up to rounding otherwise. If not, or if a row alone has no room,
    that request fails with `TeacherMemoryError`, and the others go on. Such features are encoded on the host.

    Requests whose inputs are not all finite run alone, as do those of a session of which three gave NaN. Merged
    features with NaN, and now and then those with infinities, are held against single forwards before anybody gets
    them. So what is not finite stays with its own request.

    With an `http_port` (0: any free one) it can be watched: a page with charts at `server.web.url`, Prometheus metrics
    at `/metrics`, and the same as JSON at `/api/state`. Who reaches that port can read the names and loads of jobs;
    where it is not on loopback and there are `tokens`, only with an admin's one.
    `tracing` makes OpenTelemetry spans of each request's stages, in the client's trace if that traces too; it needs the
    extra `otel`, and a tracer provider that the program sets.

    `tls=ServerTls(cert=..., key=...)` has all ports speak TLS, so that clients connect to `grpcs://`; with `client_ca`,
    only those that have a certificate are answered. Without it, a `host` beyond loopback needs `insecure=True`: all
    that goes to and fro there is plaintext.

    With `tokens`, a file that `schoolhouse token` makes lines for, only who has one of its tokens is answered, as it
    says: which teachers, which job, what quota; see `schoolhouse_server.security.tokens.Grant`. The file is read
    again as it changes; sessions of a token that is gone are ended then. Without it nobody is asked. `allow_head`
    gives the weights of a teacher's head to who asks, as `encodings.hidden` does; None: where it listens on loopback
    and has no tokens.

    Raises:
        ConfigError: for a setting that cannot be, or a module that cannot be merged as it says.
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
        max_sessions=max_sessions,
        http_port=http_port,
        tracing=tracing,
        tls=tls,
        insecure=insecure,
        tokens=tokens,
        allow_head=allow_head,
        forward_timeout_s=forward_timeout_s,
    ).start()
