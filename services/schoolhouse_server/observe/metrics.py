"""Replica sets as Prometheus metrics.

Counters are sums since a replica's start; PromQL computes rates.

The number of label values is bounded: teachers and replicas are the pool's own; stages, encodings and errors have fixed
names; and a replica keeps a bounded number of jobs. Nothing of a request is a label. A job has the label `job_name`, as
`job` is Prometheus's own.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from schoolhouse_wire.v1.directory_pb2 import JobLoad, Load, Replica, ReplicaSet

from schoolhouse_server.common.logs import printable
from schoolhouse_server.observe.counters import QUEUE_DELAY_BUCKETS_S

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "schoolhouse_"
_MAX_LABEL = 128  # characters of a label's value, as clients choose the names of jobs
_REPLICA = ("teacher", "replica")
_JOB = (*_REPLICA, "job_name")


@dataclass(frozen=True)
class _Of:
    """A metric with one value for each replica, or for each job of it; a counter if its name ends in _total."""

    name: str
    help: str
    value: Callable[..., float]


@dataclass(frozen=True)
class _Each:
    """A counter with one more label, whose values are the keys of a map."""

    name: str
    help: str
    label: str
    values: Callable[[Load], Iterable[tuple[str, float]]]


_REPLICAS = (
    _Of("uptime_seconds", "Time since the replica started to serve.", lambda load: load.uptime_s),
    _Of("requests_total", "Requests that were answered, with features or an error.", lambda load: load.served),
    _Of("joined_requests_total", "Requests answered by an identical one in flight.", lambda load: load.joined),
    _Of("rows_total", "Rows that went through forwards.", lambda load: load.rows),
    _Of(
        "forwards_total", "Forwards of the teacher; rows per forward is how full they are.", lambda load: load.forwards
    ),
    _Of("batch_limit_rows", "Rows that a merged forward may hold; 0: no merging.", lambda load: load.batch_limit_rows),
    _Of("cache_hits_total", "Requests that were answered from the cache.", lambda load: load.cached),
    _Of("cache_misses_total", "Requests that were not in the cache.", lambda load: load.missed),
    _Of("cache_bytes", "Host memory that the cache of features takes.", lambda load: load.cache_bytes),
    _Of("queued_requests", "Requests that wait for the device.", lambda load: load.queued),
    _Of("in_flight_requests", "Requests that have left the queue and are not answered.", lambda load: load.in_flight),
    _Of("sessions", "Open sessions of clients.", lambda load: load.sessions),
    _Of("present_queue_delay_seconds", "Present wait of requests for the device.", lambda load: load.queue_delay_s),
)
_BY_KEY = (
    _Each(
        "stage_seconds_total",
        "Time spent, by stage; forward is the time that the device ran forwards.",
        "stage",
        lambda load: load.stage_s.items(),
    ),
    _Each("feature_bytes_total", "Features sent, in bytes.", "encoding", lambda load: load.feature_bytes.items()),
    _Each("errors_total", "Failed requests, by the name of the error.", "error", lambda load: load.errors.items()),
)
_JOBS = (
    _Of("job_weight", "The job's weight in sharing the teacher.", lambda job: job.weight),
    _Of("job_sessions", "Open sessions of the job; 0: it has ended.", lambda job: job.sessions),
    _Of("job_queued_requests", "Requests of the job that wait for the device.", lambda job: job.queued),
    _Of("job_in_flight_requests", "Requests without an answer, queued ones included.", lambda job: job.in_flight),
    _Of("job_requests_total", "Requests of the job that were answered.", lambda job: job.requests),
    _Of("job_rows_total", "Rows of the job that went through forwards.", lambda job: job.rows),
    _Of("job_cost_total", "Rows or tokens that the job was charged for, as `cost` says.", lambda job: job.cost),
    _Of("job_device_seconds_total", "Device time that the fair queue charged the job.", lambda job: job.device_s),
    _Of("job_queue_seconds_total", "Time that requests of the job waited for the device.", lambda job: job.queue_s),
    _Of("job_errors_total", "Requests of the job that failed.", lambda job: job.errors),
    _Of("job_waits_total", "Times that the job was told to wait.", lambda job: job.waits),
    _Of("job_received_bytes_total", "Bytes of inputs that came from the job.", lambda job: job.received_bytes),
    _Of("job_sent_bytes_total", "Bytes of features that went to the job.", lambda job: job.sent_bytes),
)
_VALUES = {spec.name: spec for spec in (*_REPLICAS, *_BY_KEY, *_JOBS)}


def read(name: str, of: Load | JobLoad, key: str | None = None) -> float:
    """The value of a metric for a replica or a job; where it has a label, that of `key`, or the sum of all."""
    spec = _VALUES[name]
    if isinstance(spec, _Of):
        return spec.value(of)
    assert isinstance(of, Load)
    return sum(value for found, value in spec.values(of) if key is None or found == key)


class ReplicaCollector(Collector):
    """The metrics of the replica sets that `source()` returns at each scrape."""

    def __init__(self, source: Callable[[], Iterable[ReplicaSet]]) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        """All metric families, each with a sample for each replica or job."""
        sets = list(self._source())
        replicas = [((found.teacher, replica.id), replica) for found in sets for replica in found.replicas]
        loads = [(labels, replica.load) for labels, replica in replicas]
        jobs = [((*labels, _bounded(job.job)), job) for labels, load in loads for job in _by_name(load.jobs)]
        yield from _of_pool(sets, replicas)
        yield from (_family(spec, _REPLICA, loads) for spec in _REPLICAS)
        yield from (_keyed(spec, loads) for spec in _BY_KEY)
        yield _queue_delay(loads)
        yield from (_family(spec, _JOB, jobs) for spec in _JOBS)


def exposition(source: Callable[[], Iterable[ReplicaSet]]) -> bytes:
    """The metrics in Prometheus's text format, which has the content type `CONTENT_TYPE`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ReplicaCollector(source))
    return generate_latest(registry)


def _of_pool(sets: list[ReplicaSet], replicas: list[tuple[tuple[str, str], Replica]]) -> Iterator[Metric]:
    wanted = GaugeMetricFamily(f"{_PREFIX}wanted_replicas", "Replicas that the pool keeps alive.", labels=("teacher",))
    for found in sets:
        wanted.add_metric((found.teacher,), found.wanted)
    names = (*_REPLICA, "revision", "address", "host", "zone", "state")
    info = GaugeMetricFamily(f"{_PREFIX}replica_info", "1 for each replica, with what it is.", labels=names)
    for labels, replica in replicas:
        state = Replica.State.Name(replica.state).lower()
        info.add_metric((*labels, replica.revision, replica.address, replica.host, replica.zone, state), 1)
    yield wanted
    yield info


def _family(spec: _Of, labels: tuple[str, ...], items: Iterable[tuple[tuple[str, ...], Load | JobLoad]]) -> Metric:
    kind = CounterMetricFamily if spec.name.endswith("_total") else GaugeMetricFamily
    family = kind(_PREFIX + spec.name, spec.help, labels=labels)
    for values, item in items:
        family.add_metric(values, spec.value(item))
    return family


def _keyed(spec: _Each, loads: Iterable[tuple[tuple[str, str], Load]]) -> Metric:
    family = CounterMetricFamily(_PREFIX + spec.name, spec.help, labels=(*_REPLICA, spec.label))
    for labels, load in loads:
        for key, value in sorted(spec.values(load)):
            family.add_metric((*labels, key), value)
    return family


def _queue_delay(loads: Iterable[tuple[tuple[str, str], Load]]) -> Metric:
    """The histogram of waits; in Prometheus each bucket also counts all smaller values."""
    text = "Time that requests waited for the device."
    family = HistogramMetricFamily(f"{_PREFIX}queue_delay_seconds", text, labels=_REPLICA)
    bounds = (*map(str, QUEUE_DELAY_BUCKETS_S), "+Inf")
    for labels, load in loads:
        if len(load.queue_delay_counts) != len(bounds):
            continue  # a replica that has reported no load yet
        counts = [float(sum(load.queue_delay_counts[: i + 1])) for i in range(len(bounds))]
        family.add_metric(labels, list(zip(bounds, counts, strict=True)), sum_value=load.stage_s.get("queue", 0.0))
    return family


def _by_name(jobs: Iterable[JobLoad]) -> Iterable[JobLoad]:
    """One job for each label: long names may be equal once they are cut, and a label may have only one sample."""
    return {_bounded(job.job): job for job in jobs}.values()


def _bounded(name: str) -> str:
    """A name that a client chose, as a label: not too long, and with control characters escaped."""
    text = printable(name)
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"
