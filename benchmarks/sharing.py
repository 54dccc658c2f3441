"""How jobs share one replica: 1, 4 and 16 equal jobs of unequal batch sizes, and a light job beside a heavy one.

The device is emulated, as there may be no accelerator: a forward sleeps in proportion to its rows. The peer is Ray
Serve with `@serve.batch`, used by the same clients, each a separate process. `python benchmarks/sharing.py --json`

`total_vs_single` is the rows/s of all jobs, relative to one job that saturates the device alone. `jain` is Jain's
fairness index of the rows that equal jobs were served. Both are for the largest number of jobs. `light_p99_ms` is the
latency of a light job, which asks for one small batch at a time, beside a heavy one; `forward_ms` is the time of a
forward of the heavy job.

`small_batches` is the rows/s of 16 jobs with small batches, relative to one job with large batches, on a device whose
forward also takes a fixed time, so that merging helps. The peer merges only what comes while a batch is open, so it is
measured with several such times, and the one with the most rows/s counts. In the other measurements, where merging
gains nothing, the peer's batches are not kept open.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import Any

import grpc
import processes
import schoolhouse as sh
import torch
from emulated import RowsTeacher, start
from google.protobuf.wrappers_pb2 import BytesValue
from ray_serve_peer import TEACHER_METHOD, ray_serve_teacher

S_PER_ROW = 0.5e-3
ROWS = (16, 32, 48, 64)  # rows of the batches of one job after another
SINGLE_ROWS, HEAVY_ROWS, LIGHT_ROWS = 32, 64, 16
DEPTH, HEAVY_DEPTH = 4, 16
WIDTH, FEATURES = 8, 64  # floats in a row of inputs, and of features
SMALL, LARGE_ROWS, FORWARD_S = (8, 2), 64, 8e-3  # small jobs' rows and depth; large rows; a forward's fixed time
PEER_WAITS_MS = (0.0, 10.0, 20.0)  # 10 ms is Ray Serve's default
SETTLE_S = 1.0  # at most, before counting begins
DEVICE = f"emulated: a forward sleeps {S_PER_ROW * 1e3} ms a row, and {FORWARD_S * 1e3} ms of its own for small batches"


def schoolhouse_asks(url: str, job: str) -> Callable[[int], Any]:
    """Returns a function that sends a batch of so many rows to Schoolhouse, and returns a future."""
    teacher = sh.connect(url, job=job)
    return lambda rows: teacher.submit((torch.randn(rows, WIDTH),), {}, [""])


def peer_asks(address: str, _job: str) -> Callable[[int], Any]:
    """Returns a function that does the same with Ray Serve's ingress."""
    call = grpc.insecure_channel(address).unary_unary(
        TEACHER_METHOD, request_serializer=BytesValue.SerializeToString, response_deserializer=BytesValue.FromString
    )
    metadata = (("application", "features"),)

    def ask(rows: int) -> Any:
        data = torch.randn(rows, WIDTH).numpy().tobytes()
        return call.future(BytesValue(value=data), metadata=metadata, timeout=60)

    return ask


ASKS = {"schoolhouse": schoolhouse_asks, "ray_serve": peer_asks}


class Job:
    """A job in this process, with `depth` batches in flight at all times."""

    def __init__(self, ask: Callable[[int], Any], rows: int, depth: int) -> None:
        self._ask, self._rows, self._depth = ask, rows, depth

    def run(self, seconds: float) -> tuple[int, list[float]]:
        """Run for `seconds`, after some time to settle; returns the rows served, and how long each batch took."""
        free, ended, latencies = threading.Semaphore(self._depth), [], []
        begin = time.monotonic() + min(SETTLE_S, seconds)
        end = begin + seconds
        while (now := time.monotonic()) < end:
            if not free.acquire(timeout=end - now):
                break
            asked = time.monotonic()
            future = self._ask(self._rows)

            def done(answer: Any, asked: float = asked) -> None:
                answer.result()
                now = time.monotonic()
                if begin <= now < end:
                    ended.append(now)
                    latencies.append(now - asked)
                free.release()

            future.add_done_callback(done)
        for _ in range(self._depth):  # wait for what is in flight
            free.acquire(timeout=30)
        return self._rows * len(ended), latencies


def work(commands: Connection, kind: str, url: str, job: str) -> None:
    """Run one job, with the rows and depth of each command, until the parent closes the connection."""
    torch.set_num_threads(1)
    ask = ASKS[kind](url, job)
    ask(1).result()
    commands.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            rows, depth, seconds = commands.recv()
            commands.send(Job(ask, rows, depth).run(seconds))


@contextlib.contextmanager
def jobs(kind: str, url: str, count: int) -> Iterator[list[Connection]]:
    """Jobs in their own processes, once each is ready."""
    made = [processes.start(work, kind, url, f"job-{i}") for i in range(count)]
    try:
        for connection, _ in made:
            connection.recv()
        yield [connection for connection, _ in made]
    finally:
        for connection, _ in made:
            connection.close()
        for _, process in made:
            process.join(20)


def run(workers: list[Connection], settings: list[tuple[int, int]], seconds: float) -> list[tuple[int, list[float]]]:
    """Run one job for each of the settings (rows and depth), all at the same time."""
    for worker, (rows, depth) in zip(workers, settings, strict=False):
        worker.send((rows, depth, seconds))
    return [worker.recv() for worker, _ in zip(workers, settings, strict=False)]


def jain(values: list[int]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one of n has it all (Jain, Chiu & Hawe 1984)."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values)) if any(values) else 0.0


def percentiles_ms(latencies: list[float]) -> tuple[float, float]:
    """The p50 and p99 of latencies, in milliseconds."""
    cuts = quantiles(latencies, n=100, method="inclusive") if len(latencies) > 1 else [0.0] * 99
    return round(cuts[49] * 1e3, 1), round(cuts[98] * 1e3, 1)


def measure(kind: str, url: str, counts: list[int], seconds: float) -> dict[str, Any]:
    """All results of one system."""
    with jobs(kind, url, max(2, *counts)) as workers:
        return measure_equal(workers, counts, seconds) | measure_light(workers, seconds)


def measure_equal(workers: list[Connection], counts: list[int], seconds: float) -> dict[str, Any]:
    """The results of jobs with unequal batches, by the number of jobs; those of the largest number also at the top."""
    [(alone, _)] = run(workers, [(SINGLE_ROWS, DEPTH)], seconds)
    found: dict[str, Any] = {"single_rows_per_s": round(alone / seconds, 1)}
    for count in sorted(counts):
        settings = [(rows, DEPTH) for rows in itertools.islice(itertools.cycle(ROWS), count)]
        served = [rows for rows, _ in run(workers, settings, seconds)]
        total = sum(served) / alone if alone else 0.0
        figures = {"total_vs_single": round(total, 3), "jain": round(jain(served), 4)}
        found[str(count)] = figures | {"rows_per_s": round(sum(served) / seconds, 1)}
        found |= figures
    return found


def measure_light(workers: list[Connection], seconds: float) -> dict[str, Any]:
    """The latencies of a light job, alone and beside a heavy one."""
    light, heavy = (LIGHT_ROWS, 1), (HEAVY_ROWS, HEAVY_DEPTH)
    found: dict[str, Any] = {"forward_ms": HEAVY_ROWS * S_PER_ROW * 1e3}
    for name, settings in {"light_alone": [light], "light": [light, heavy]}.items():
        _, latencies = run(workers, settings, seconds)[0]
        found[f"{name}_p50_ms"], found[f"{name}_p99_ms"] = percentiles_ms(latencies)
    return found


def measure_small(kind: str, url: str, count: int, seconds: float) -> tuple[float, float]:
    """The rows/s of many jobs with small batches, and the same relative to one job with large batches."""
    with jobs(kind, url, count) as workers:
        [(alone, _)] = run(workers, [(LARGE_ROWS, DEPTH)], seconds)
        total = sum(rows for rows, _ in run(workers, [SMALL] * count, seconds))
        return round(total / seconds, 1), round(total / alone, 3) if alone else 0.0


def ray_serve(forward_s: float, wait_s: float) -> contextlib.AbstractContextManager[str]:
    """The peer: a teacher behind Ray Serve."""
    return ray_serve_teacher(forward_s, S_PER_ROW, 4 * WIDTH, 4 * FEATURES, wait_s)


def measure_small_peer(waits_ms: list[float], count: int, seconds: float) -> dict[str, Any]:
    """The peer's best result, and all its results by how long a batch is open."""
    found = {}
    for wait_ms in waits_ms:
        with ray_serve(FORWARD_S, wait_ms / 1e3) as address:
            found[wait_ms] = measure_small("ray_serve", address, count, seconds)
    rows_per_s, relative = max(found.values())
    by_wait = {f"{wait_ms:.0f} ms": figures for wait_ms, figures in found.items()}
    return {"small_batches": relative, "small_batches_rows_per_s": rows_per_s, "small_batches_by_wait": by_wait}


def measure_ours(counts: list[int], small: int, seconds: float) -> dict[str, Any]:
    """Measure Schoolhouse."""
    url, keep = start(RowsTeacher, 0.0, S_PER_ROW, FEATURES)
    figures = measure("schoolhouse", url, counts, seconds)
    keep.close()
    for name, merge in (("small_batches", "same-shape"), ("small_batches_unmerged", "never")):
        url, keep = start(RowsTeacher, FORWARD_S, S_PER_ROW, FEATURES, merge=merge, max_batch_rows=LARGE_ROWS)
        rows_per_s, relative = measure_small("schoolhouse", url, small, seconds)
        figures |= {name: relative, f"{name}_rows_per_s": rows_per_s}
        keep.close()
    return figures


def measure_peer(counts: list[int], small: int, waits_ms: list[float], seconds: float) -> dict[str, Any]:
    """Measure the peer."""
    # So that Ray Serve's proxy can import the peer's service.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with ray_serve(0.0, 0.0) as address:
        figures = measure("ray_serve", address, counts, seconds)
    return figures | (measure_small_peer(waits_ms, small, seconds) if waits_ms else {})


def main() -> None:
    """Measure both, one after the other, and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each measurement")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 4, 16], help="numbers of equal jobs to measure")
    parser.add_argument("--small-jobs", type=int, default=16, help="how many jobs with small batches")
    parser.add_argument("--peer-waits-ms", type=float, nargs="*", default=PEER_WAITS_MS, help="open times of batches")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # Ray's own messages
        figures = {"schoolhouse": measure_ours(options.jobs, options.small_jobs, options.seconds)}
        if not options.alone:
            waits_ms = options.peer_waits_ms
            figures["ray_serve"] = measure_peer(options.jobs, options.small_jobs, waits_ms, options.seconds)
    if options.json:
        sys.stdout.write(json.dumps({**figures, "device": DEVICE}) + "\n")
        return
    sys.stdout.write(f"the device is {DEVICE}\n")
    light = ("light_p50_ms", "light_p99_ms", "light_alone_p99_ms", "forward_ms")
    for name in ("total_vs_single", "jain", *light, "small_batches", "small_batches_rows_per_s"):
        row = "  ".join(f"{kind}: {found[name]:.3f}" for kind, found in figures.items() if name in found)
        sys.stdout.write(f"{name:20} {row}\n")


if __name__ == "__main__":
    main()
