"""Replica sets as a pool would publish them, and clocks and counters that go on: what the watching side is shown."""

import threading
import urllib.error
import urllib.request

from schoolhouse_wire.v1.directory_pb2 import JobLoad, Load, Replica, ReplicaSet


def load(**fields):
    """A load of a busy replica; `fields` replace its own."""
    plain = {
        "queued": 3,
        "in_flight": 2,
        "served": 700,
        "sessions": 4,
        "joined": 5,
        "cached": 60,
        "missed": 140,
        "cache_bytes": 1 << 20,
        "stage_s": {"queue": 12.5, "forward": 40.0, "send": 3.0},
        "queue_delay_s": 0.02,
        "queue_delay_counts": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
        "forwards": 500,
        "rows": 16_000,
        "batch_limit_rows": 64.0,
        "errors": {"TeacherBusyError": 2, "TeacherForwardError": 1},
        "feature_bytes": {"bf16": 4096, "none": 1 << 30},
        "uptime_s": 100.0,
        "jobs": [
            JobLoad(job="exp-42", weight=2.0, sessions=1, queued=2, in_flight=3, requests=400, rows=12_000,
                    cost=12_000.0, queue_s=8.0, errors=1, waits=7, received_bytes=1000, sent_bytes=2000),
            JobLoad(job="sweep", weight=1.0, sessions=3, queued=1, in_flight=1, requests=300, rows=4_000,
                    cost=4_000.0, queue_s=4.5, errors=2, waits=0, received_bytes=300, sent_bytes=600),
        ],
    }  # fmt: skip
    return Load(**(plain | fields))


def sets(**fields):
    """Two teachers: one with a replica that serves and one that drains, one with none yet."""
    first = Replica(id="a1", address="10.0.0.1:7100", revision="rev-1", host="gpu-1", zone="west", load=load(**fields))
    second = Replica(id="b2", address="10.0.0.2:7100", revision="rev-0", state=Replica.DRAINING, load=Load(uptime_s=9))
    resnet = ReplicaSet(teacher="resnet", replicas=[first, second], wanted=2, revision="rev-1")
    return [resnet, ReplicaSet(teacher="llama", wanted=1)]


class Running:
    """A source whose first replica works at 160 rows/s by its own clock, one second further at each look."""

    def __init__(self, hostile="", idle=False):
        self.hostile, self.idle = hostile, idle
        self.seconds = 0
        self._lock = threading.Lock()

    def __call__(self):
        with self._lock:
            self.seconds += 1
            n = self.seconds
        work = 0 if self.idle else n
        found = sets(
            uptime_s=100.0 + n,
            rows=16_000 + 160 * work,
            forwards=500 + 5 * work,
            served=700 + 7 * work,
            stage_s={"queue": 12.5 + 0.7 * work, "forward": 40.0 + 0.75 * work},
        )
        jobs = found[0].replicas[0].load.jobs
        for job, share in zip(jobs, (120, 40), strict=True):
            job.rows += share * work
        if self.hostile:
            jobs[1].job = self.hostile
        return found


def fetch(url, method="GET", headers=None, context=None):
    """Status, headers and body; errors are answers too."""
    request = urllib.request.Request(url, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as err:
        return err.code, err.headers, err.read()
