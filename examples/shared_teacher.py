"""A shared teacher: two jobs with batches of different sizes use one server; prints what each job got of it."""

import argparse
import threading
import time
from collections import deque
from collections.abc import Iterator

import schoolhouse as sh
import torch
from common import Digits
from schoolhouse_server import serve

JOBS = {"small batches": 8, "large batches": 64}
AHEAD = 4  # requests that each job keeps in flight, as `prefetch(depth=4)` does


def answers(url: str, job: str, rows: int) -> Iterator[int]:
    """Yield the size of each batch of this job when the teacher has answered it."""
    images = torch.randn(rows, 1, 8, 8)
    with sh.connect(url, job=job) as teacher:
        pending = deque(teacher.submit((images,), {}, ["fc"]) for _ in range(AHEAD))
        while True:
            yield len(pending.popleft().result()["fc"])
            pending.append(teacher.submit((images,), {}, ["fc"]))


def ask(url: str, job: str, seconds: float, served: dict[str, int]) -> None:
    """Ask as one job, for `seconds` from its first answer on, and count its rows in `served`."""
    until = None
    for rows in answers(url, job, JOBS[job]):
        now = time.monotonic()
        until = now + seconds if until is None else until
        if now > until:
            return
        served[job] += rows


def main() -> None:
    """Serve a teacher, let the jobs ask it together, and print their rows/s and shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    served = dict.fromkeys(JOBS, 0)
    with serve(Digits(width=64)) as server:
        threads = [threading.Thread(target=ask, args=(server.url, job, seconds, served)) for job in JOBS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    total = sum(served.values())
    for job, rows in served.items():
        print(f"{job} of {JOBS[job]}: {rows / seconds:.0f} rows/s, {rows / total:.0%} of all")
    print(f"together: {total / seconds:.0f} rows/s")


if __name__ == "__main__":
    main()
