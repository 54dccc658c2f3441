"""The quantities that people watch: each with its title, unit and expression, once for every place that shows it.

The web page and `schoolhouse top` read an expression's value from reports of replicas (`watched.py`); Grafana reads it
as PromQL, from the metrics of the same names (`deploy/grafana/generate.py`).
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schoolhouse_wire.v1.directory_pb2 import JobLoad, Load, Replica

from schoolhouse_server.observe import metrics

_REPLICA, _TEACHER, _JOB = ("teacher", "replica"), ("teacher",), ("job_name",)


@dataclass(frozen=True)
class Reading:
    """A report of a replica, or of a job on it, and an earlier one, `seconds` before by the replica's own clock."""

    replica: Replica
    after: Load | JobLoad
    before: Load | JobLoad | None = None  # None: nothing is known of rates
    seconds: float = 0.0


Readings = Sequence[Reading]
_Value = Callable[[Readings, Readings], float | None]


@dataclass(frozen=True)
class Expression:
    """What is read: in PromQL, by labels; and of readings taken together, among those of all jobs."""

    promql: Callable[[tuple[str, ...]], str]
    value: _Value | None = None  # None: only PromQL computes it


def now(name: str, how: Callable[[list[float]], float] = sum) -> Expression:
    """A metric as it is; several are taken together by `sum` or `max`."""
    return Expression(
        lambda by: f"{how.__name__}{_by(by)}({_chosen(name)})",
        lambda own, _: how([metrics.read(name, one.after) for one in own] or [0.0]),
    )


def rate(name: str, **label: str) -> Expression:
    """What a counter grows by in a second, summed; with a label, only that of one value."""

    def value(own: Readings, _among: Readings) -> float | None:
        def read(of: Load | JobLoad) -> float:
            return metrics.read(name, of, *label.values())

        known = [max(read(one.after) - read(one.before), 0.0) / one.seconds for one in own if one.before is not None]
        return sum(known) if known else None

    return Expression(lambda by: f"sum{_by(by)}(rate({_chosen(name, **label)}[$__rate_interval]))", value)


def plus(one: Expression, other: Expression) -> Expression:
    """The sum of two."""
    return Expression(lambda by: f"({one.promql(by)} + {other.promql(by)})", _each(one, other, operator.add))


def ratio(part: Expression, whole: Expression) -> Expression:
    """None where there is nothing to divide by."""
    value = _each(part, whole, lambda top, bottom: top / bottom if bottom else None)
    return Expression(lambda by: f"{part.promql(by)} / {whole.promql(by)}", value)


def share(of: Expression) -> Expression:
    """A job's part of what all jobs have."""
    whole = Expression(lambda _by: of.promql(()), lambda _own, among: of.value(among, among) if of.value else None)
    return Expression(
        lambda by: f"{of.promql(by)} / ignoring({', '.join(by)}) group_left {whole.promql(by)}", ratio(of, whole).value
    )


def delay_quantile(quantile: float) -> Expression:
    """A quantile of the waits for the device."""
    waits = rate("queue_delay_seconds_bucket")
    return Expression(lambda by: f"histogram_quantile({quantile}, {waits.promql((*by, 'le'))})")


def _each(one: Expression, other: Expression, result: Callable[[float, float], float | None]) -> _Value:
    def value(own: Readings, among: Readings) -> float | None:
        a, b = (part.value(own, among) if part.value else None for part in (one, other))
        return result(a, b) if a is not None and b is not None else None

    return value


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def _chosen(name: str, **label: str) -> str:
    """The metric of those teachers, replicas and jobs that are chosen in the dashboard."""
    chosen = ['teacher=~"$teacher"', 'replica=~"$replica"', *(f'{key}="{value}"' for key, value in label.items())]
    chosen += ['job_name=~"$job"'] if name.startswith("job_") else []
    return f"schoolhouse_{name}{{{','.join(chosen)}}}"


@dataclass(frozen=True)
class Unit:
    """How a value is shown: times `scale` and with a word, and by Grafana's own name of the unit."""

    word: str
    grafana: str
    scale: float = 1.0
    most: float | None = None  # the largest value, scaled


ROWS_PER_S = Unit("rows/s", "suffix: rows/s")
PER_S = Unit("per second", "reqps")
MS = Unit("ms", "s", 1e3)
SHARE = Unit("%", "percentunit", 100.0, 100.0)
REQUESTS = Unit("requests", "short")
BYTES_PER_S = Unit("bytes/s", "Bps")


def shown(value: float | None, unit: Unit) -> str:
    """A value in a few characters, such as "160", "12.2 k" and "75%"."""
    if value is None:
        return "-"
    if unit is SHARE:
        return f"{value:.0%}"
    value *= unit.scale
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


@dataclass(frozen=True)
class Panel:
    """A quantity of replicas or jobs; Grafana alone shows one without a value or a column."""

    title: str
    unit: Unit
    value: Expression | None = None
    help: str = ""
    by: tuple[str, ...] = _REPLICA  # the labels that tell Grafana's lines apart
    queries: tuple[tuple[str, Expression], ...] = ()  # Grafana's lines instead of `value`, by the end of their legends
    limit: Expression | None = None  # what the value cannot exceed; 0: no limit
    mean: bool = False  # a line for several replicas is their mean, not their sum
    stacked: bool = False
    column: str = ""  # its title as a column of a table
    rank: int = 1  # where there is little room, columns of the highest rank are left out first
    cell: Expression | None = None  # what a table shows instead of `value`
    zero: str = ""  # what a table shows instead of 0

    def read(self, own: Readings, *, scaled: bool = False) -> float | None:
        """The value of replicas or of a job, in the panel's unit if it is scaled; None if it is not known."""
        value = _read(self.value, own, ())
        return value * self.unit.scale if value is not None and scaled else value

    def lines(self) -> list[tuple[str, Expression]]:
        """What Grafana draws, each with the end of its legend."""
        value = [("", self.value)] if self.value is not None else []
        return [*(self.queries or value), *([("limit", self.limit)] if self.limit is not None else [])]

    def text(self, own: Readings, among: Readings = ()) -> str:
        """The text of a table's cell."""
        value, limit = (_read(one, own, among) for one in (self.cell or self.value, self.limit))
        text = self.zero if value == 0 and self.zero else shown(value, self.unit)
        return f"{text} of {shown(limit, self.unit)}" if limit and value is not None else text


def _read(expression: Expression | None, own: Readings, among: Readings) -> float | None:
    value = expression.value(own, among) if expression is not None and expression.value is not None else None
    return value if value is not None and math.isfinite(value) else None


_PRESENT_DELAY = now("present_queue_delay_seconds", max)
_ROWS, _JOB_ROWS, _JOB_COST = rate("rows_total"), rate("job_rows_total"), rate("job_cost_total")
_JOB_DEVICE = rate("job_device_seconds_total")
_IN_FLIGHT, _QUEUED = now("in_flight_requests"), now("queued_requests")
_HITS, _MISSES = "cache_hits_total", "cache_misses_total"
_ROW_LIMIT = Expression(
    lambda by: f"max{_by(by)}({_chosen('batch_limit_rows')} > 0)", now("batch_limit_rows", max).value
)
_SERVING = Expression(
    lambda _by: f"count({_chosen('replica_info', state='serving')})",
    lambda own, _: sum(one.replica.state == Replica.SERVING for one in own),
)
_WANTED = Expression(lambda _by: 'sum(schoolhouse_wanted_replicas{teacher=~"$teacher"})')

# fmt: off
THROUGHPUT = Panel("Throughput", ROWS_PER_S, _ROWS, column="rows/s")
ANSWERED = Panel("Requests", PER_S, rate("requests_total"))
SERVING = Panel("Replicas serving", Unit("of wanted", "short"), _SERVING,
                queries=(("serving", _SERVING), ("wanted", _WANTED)))
SESSIONS = Panel("Sessions", Unit("open", "short"), now("sessions"), column="sessions", rank=3)
DELAY = Panel("Queueing delay", MS, _PRESENT_DELAY, by=_TEACHER, mean=True, column="delay ms", rank=2,
              queries=(("p50", delay_quantile(0.5)), ("p99", delay_quantile(0.99)), ("at present", _PRESENT_DELAY)))
BUSY = Panel("Device busy", SHARE, rate("stage_seconds_total", stage="forward"), "Share of time in forwards.",
             mean=True, column="busy")
OCCUPANCY = Panel("Batch occupancy", Unit("rows per forward", "short"), ratio(_ROWS, rate("forwards_total")),
                  by=_TEACHER, mean=True, limit=_ROW_LIMIT, column="rows/forward", rank=5)
WAITING = Panel("In flight and queued", REQUESTS, plus(_IN_FLIGHT, _QUEUED),
                queries=(("in flight", _IN_FLIGHT), ("queued", _QUEUED)))
ERRORS = Panel("Errors", PER_S, rate("errors_total"), by=("error",), column="errors", rank=2, cell=now("errors_total"))
CACHE_HITS = Panel("Answered without a forward", SHARE, by=_TEACHER, column="cache", rank=5,
                   cell=ratio(now(_HITS), plus(now(_HITS), now(_MISSES))),
                   queries=(("cache hits", ratio(rate(_HITS), plus(rate(_HITS), rate(_MISSES)))),
                            ("with an identical one", ratio(rate("joined_requests_total"), rate("requests_total")))))
JOB_THROUGHPUT = Panel("Throughput", ROWS_PER_S, _JOB_ROWS, by=_JOB, stacked=True, column="rows/s")
JOB_SESSIONS = Panel("Sessions", Unit("open", "short"), now("job_sessions"), by=_JOB, column="sessions", rank=4,
                     zero="ended")
JOB_WEIGHT = Panel("Weight", Unit("", "short"), now("job_weight", max), by=_JOB, column="weight", rank=4)
JOB_WAITING = Panel("In flight and queued", REQUESTS, now("job_in_flight_requests"), by=_JOB, column="in flight",
                    rank=3, queries=(("in flight", now("job_in_flight_requests")),
                                     ("queued", now("job_queued_requests"))))
JOB_WAITS = Panel("Told to wait", Unit("per second", "ops"), rate("job_waits_total"), by=_JOB, column="waits", rank=3,
                  cell=now("job_waits_total"))
JOB_ERRORS = Panel("Errors", PER_S, rate("job_errors_total"), by=_JOB, column="errors", rank=2,
                   cell=now("job_errors_total"))
JOB_SHARE = Panel("Share of rows", SHARE, share(_JOB_ROWS), by=_JOB, column="share")

TILES = (
    THROUGHPUT,
    ANSWERED,
    SERVING,
    SESSIONS,
    WAITING,
    ERRORS,
    Panel("Queueing delay, p99", MS, queries=(("", delay_quantile(0.99)),)),
)
REPLICA_CHARTS = (
    THROUGHPUT, DELAY, BUSY, OCCUPANCY, WAITING, ERRORS,
    Panel("Time by stage", Unit("%", "percentunit", 100.0), by=("stage",),
          help="Seconds a second, summed over requests: stages overlap.", queries=(("", rate("stage_seconds_total")),)),
    Panel("Features sent", BYTES_PER_S, by=("encoding",), stacked=True, queries=(("", rate("feature_bytes_total")),)),
    CACHE_HITS,
    Panel("Cache", Unit("bytes", "bytes"), queries=(("", now("cache_bytes")),)),
)
JOB_CHARTS = (
    JOB_THROUGHPUT, JOB_SHARE,
    Panel("Share of device", SHARE, help="Of the device time that the fair queue charged.", by=_JOB,
          queries=(("", share(_JOB_DEVICE)),)),
    Panel("Share of cost", SHARE, help="In rows or tokens, as `cost` of the teacher says.", by=_JOB,
          queries=(("", share(_JOB_COST)),)),
    Panel("Queueing delay, mean", MS, by=_JOB,
          queries=(("", ratio(rate("job_queue_seconds_total"), rate("job_requests_total"))),)),
    JOB_WAITING, JOB_WAITS, JOB_ERRORS,
    Panel("Bytes", BYTES_PER_S, by=_JOB, queries=(("features", rate("job_sent_bytes_total")),
                                                  ("inputs", rate("job_received_bytes_total")))),
    JOB_SESSIONS, JOB_WEIGHT,
)
REPLICAS = (
    THROUGHPUT, BUSY, DELAY, OCCUPANCY,
    Panel("In flight", REQUESTS, _IN_FLIGHT, column="in flight", rank=4),
    Panel("Queued", REQUESTS, _QUEUED, column="queued", rank=3),
    SESSIONS, CACHE_HITS, ERRORS,
)
JOBS = (
    JOB_WEIGHT, JOB_SESSIONS, JOB_WAITING, JOB_THROUGHPUT, JOB_SHARE,
    Panel("Rows", Unit("rows", "short"), now("job_rows_total"), by=_JOB, column="rows", rank=2),
    JOB_WAITS, JOB_ERRORS,
)
# fmt: on
