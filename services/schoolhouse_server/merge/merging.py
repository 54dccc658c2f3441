"""Which requests run together, how long to wait for more, and what has been learned about merging them."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from schoolhouse.taps import Tap
from schoolhouse.teachers.protocol import TeacherDescription
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.encodings import Hidden
from schoolhouse_wire.values.codec import Arguments

from schoolhouse_server.device import nonfinite
from schoolhouse_server.merge.batching import Batch, Form, Former, in_order
from schoolhouse_server.merge.settings import MergeSettings
from schoolhouse_server.merge.splitting import Rules, UnmergeableError, VaryingError, learn

_MAX_KNOWN = 4096  # entries in each table of what is remembered
_MAX_PADDED = 2.0  # tokens of a merged batch, padding included, for each token without padding
_MAX_DOUBTS = 3
_CHECK_AT_LEAST_EVERY = 1024
_MAX_CHECKED = 16
_MIN_SINGLES = 16  # single forwards to compare with if a size may equal the number of rows by chance
_MAX_WARNINGS = 20
_MAX_SPOILT = 3  # requests of a session that may give NaN before all its requests run alone
_WINDOW_FORWARDS, _WINDOW_S = 10, 0.1  # how long a session is active after a request, whichever is longer
_LEAST_PATIENCE, _PROBE_EVERY = 1 / 16, 32
_log = logging.getLogger(__name__)


class Request(Protocol):
    """What merging reads of a request."""

    inputs: Arguments
    wanted: Wanted
    form: Form | None
    source: Hashable

    @property
    def deadline(self) -> float:
        """The first deadline of those who wait for it, on time.monotonic's clock."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""


R = TypeVar("R", bound=Request)
Place = tuple[Tap, str | None]  # a tap, and the head whose input is sent in place of it, if any


def places_of(wanted: Wanted) -> list[Place]:
    """The taps that a forward is asked for, each with the head whose input is sent in place of it."""
    heads = wanted.heads()
    return [(tap, heads.get(tap)) for tap in wanted.taps]


@dataclass(eq=False)
class Joint(Generic[R]):
    """Requests that run as one forward; `wanted` is the union of their taps."""

    jobs: Sequence[R]
    batch: Batch
    places: list[Place]
    wanted: Wanted = field(init=False)

    def __post_init__(self) -> None:
        encodings = tuple(Hidden(head=head) if head is not None else None for _, head in self.places)
        self.wanted = Wanted(tuple(tap for tap, _ in self.places), encodings)

    @property
    def like(self) -> tuple[Hashable, Hashable]:
        """Equal for batches that a forward treats alike."""
        return self.batch.key, self.batch.variant


@dataclass
class _Record:
    """What has been learned of one tap in batches that are alike."""

    rules: Rules | None = None
    runs: int = 0
    singles: int = 0  # single forwards that it was compared with

    @property
    def due(self) -> bool:
        """Whether the next run is to be compared with single forwards: the 1st, 2nd, 4th, 8th, ..., and each 1024th.

        If a size may equal the number of rows by chance, all runs until it was compared with 16 single forwards.
        """
        if self.rules is None or (self.rules.doubtful and self.singles < _MIN_SINGLES):
            return True
        return self.runs & (self.runs + 1) == 0 or self.runs % _CHECK_AT_LEAST_EVERY == 0


class Merger(Generic[R]):
    """The policy of merging for one teacher.

    `prepare` and `is_doubtful` may be called from any thread, the other methods only from the one that takes requests.
    """

    def __init__(
        self, settings: MergeSettings, description: TeacherDescription, forward_s: Callable[[], float]
    ) -> None:
        self.settings = settings
        self.former = Former(description.parameters, settings.pad)
        self.refusals = 0  # how many pairs of a form of inputs and a tap are not merged any more
        self._name = description.name
        self._modules = frozenset(description.modules)
        self._records: OrderedDict[tuple[tuple[Hashable, Hashable], Place], _Record] = OrderedDict()
        self._refused: OrderedDict[tuple[Hashable, Place], str] = OrderedDict()
        self._doubts: OrderedDict[tuple[Hashable, Place], int] = OrderedDict()
        self._max_rows: OrderedDict[Hashable, int] = OrderedDict()
        self._infinite: OrderedDict[Hashable, int] = OrderedDict()  # how many forwards gave infinities, by form
        self._spoilt: OrderedDict[Hashable, int] = OrderedDict()  # how many requests gave NaN, by session
        self._lock = threading.Lock()  # guards `_infinite` and `_spoilt`
        self.waiting = Waiting(settings.max_wait_ms / 1e3, forward_s)

    def prepare(self, job: R) -> None:
        """Set the form of a request, and note that its session is active."""
        job.inputs = in_order(job.inputs)
        asked = {name for tap, head in places_of(job.wanted) for name in (tap.module, head)} - {None}
        alone = not asked <= self._modules or self._spoilt.get(job.source, 0) >= _MAX_SPOILT
        job.form = None if alone or not nonfinite.is_finite(job.inputs) else self.former.form(job.inputs)
        self.waiting.seen(job.source)

    def fits(self, taken: list[R], other: R) -> bool:
        """Whether `other` may run together with the requests in `taken`."""
        first, now = taken[0], time.monotonic()
        if first.form is None or other.form is None or first.form.key != other.form.key:
            return False
        forms = [form for job in (*taken, other) if (form := job.form) is not None]
        if not self._has_room(forms):
            return False
        if any(job.cancelled or now > job.deadline or self._is_refused(job) for job in (first, other)):
            return False
        return self._agree([*taken, other])

    def is_full(self, taken: list[R]) -> bool:
        """Whether not even one more row fits."""
        forms = [form for job in taken if (form := job.form) is not None]
        return len(forms) < len(taken) or not self._has_room([*forms, Form(forms[0].key, 1, 1)])

    def linger(self, taken: list[R]) -> float:
        """How many more seconds to wait for other requests that fit."""
        if taken[0].form is None or self._is_refused(taken[0]) or self.is_full(taken):
            return 0.0
        return self.waiting.pause_s(taken)

    def join(self, jobs: Sequence[R]) -> Joint[R]:
        """Join requests that fit into one batch."""
        forms = [form for job in jobs if (form := job.form) is not None]
        places = dict.fromkeys(place for job in jobs for place in places_of(job.wanted))
        batch = Batch(self.former, [job.inputs for job in jobs], forms)
        return Joint(jobs, batch, sorted(places, key=str))

    def fit(self, jobs: Sequence[R]) -> bool:
        """Whether jobs that were taken together may still be merged."""
        return len(jobs) > 1 and not any(self._is_refused(job) for job in jobs)

    def plan(self, jobs: Sequence[R]) -> tuple[Joint[R], Joint[R] | None] | None:
        """Requests that were taken together, as one batch, and those to check first; None if they must run singly."""
        if not self.fit(jobs):
            return None
        joint = self.join(jobs)
        return joint, self.to_check(joint)

    def to_check(self, joint: Joint[R]) -> Joint[R] | None:
        """The requests of a batch that must be compared with single forwards; None if no check is due.

        The first 16 of them are enough if they make a batch alike to the whole one: many small requests would take long
        one by one.
        """
        if not any(self._record(joint, place).due for place in joint.places):
            return None
        some = self.join(joint.jobs[:_MAX_CHECKED])
        return some if some.like == joint.like and some.places == joint.places else joint

    def learn(self, joint: Joint[R], merged: dict[Tap, Any], singles: Sequence[dict[Tap, Any]]) -> None:
        """Compare a merged forward with single ones; taps in which they differ are not merged any more."""
        for place in joint.places:
            record, tap = self._record(joint, place), place[0]
            try:
                rules = learn(merged[tap], [single[tap] for single in singles], joint.batch.layout)
                if record.rules is not None:
                    rules.agree(record.rules)
                record.rules = rules
                record.runs += 1
                record.singles += len(singles)
            except UnmergeableError as err:
                self._refuse(joint, place, str(err))

    def is_doubtful(self, joint: Joint[R], kinds: Sequence[nonfinite.Kind]) -> bool:
        """Whether merged features must be compared with single ones before anybody gets them.

        `kinds` has the kind of each request's numbers. Always if there is a NaN, which may have come from another
        request. If there are infinities, which logits may have, the 1st, 2nd, 4th, 8th, ..., and each 1024th time.
        """
        with self._lock:
            for job, kind in zip(joint.jobs, kinds, strict=True):
                if kind == "nan" and job.source is not None:
                    _remember(self._spoilt, job.source, self._spoilt.get(job.source, 0) + 1)
            if "nan" in kinds or "infinite" not in kinds:
                return "nan" in kinds
            before = self._infinite.get(joint.batch.key, 0)
            _remember(self._infinite, joint.batch.key, before + 1)
        return before & (before + 1) == 0 or before % _CHECK_AT_LEAST_EVERY == 0

    def knows(self, job: R) -> dict[Tap, Rules] | None:
        """How the features of such a request are split by rows; None if not known."""
        if job.form is None or self._is_refused(job):
            return None
        found: dict[Place, Rules] = {}
        for (like, place), record in self._records.items():
            if record.rules is not None and not record.rules.doubtful and like[0] == job.form.key:
                found[place] = record.rules
        places = places_of(job.wanted)
        return {place[0]: found[place] for place in places} if found.keys() >= {*places} else None

    def refuse(self, joint: Joint[R], why: str) -> None:
        """Never merge such requests again."""
        for place in joint.places:
            self._refuse(joint, place, why)

    def split(self, joint: Joint[R], values: dict[Tap, Any]) -> list[dict[Tap, Any]]:
        """The features of each request, as views of the features of the batch.

        Raises:
            UnmergeableError: if a feature differs in kind from what was learned.
        """
        rules: dict[Tap, Rules] = {}
        for place in joint.places:
            record = self._record(joint, place)
            assert record.rules is not None
            rules[place[0]] = record.rules
            self._hold(joint, place, record, values[place[0]])
        layout = joint.batch.layout
        parts: list[dict[Tap, Any]] = []
        for i, job in enumerate(joint.jobs):
            seen: dict[int, torch.Tensor] = {}
            parts.append({tap: rules[tap].part(values[tap], layout, i, seen) for tap in job.wanted.taps})
        return parts

    def too_large(self, joint: Joint[R]) -> None:
        """Halve the largest size of such batches, as this one had no room, or failed where single forwards did not."""
        rows = joint.batch.layout.total
        _log.warning("teacher %r: a merged forward of %d rows failed; later ones are smaller", self._name, rows)
        _remember(self._max_rows, joint.batch.key, rows // 2)

    def _hold(self, joint: Joint[R], place: Place, record: _Record, value: Any) -> None:
        """Raise if a value is not as learned; it is learned anew, but refused the third time, or if its sizes vary."""
        try:
            assert record.rules is not None
            record.rules.check(value, joint.batch.layout)
            record.runs += 1
        except UnmergeableError as err:
            key = (joint.batch.key, place)
            _remember(self._doubts, key, self._doubts.get(key, 0) + 1)
            record.rules = None
            if self._doubts[key] >= _MAX_DOUBTS or isinstance(err, VaryingError):
                self._refuse(joint, place, str(err))
            raise

    def _refuse(self, joint: Joint[R], place: Place, why: str) -> None:
        self.refusals += 1
        if self.refusals <= _MAX_WARNINGS:
            tap = place[0]
            _log.warning("teacher %r: requests for %r are not merged: %s", self._name, tuple(tap), why)
        self._records.pop((joint.like, place), None)
        _remember(self._refused, (joint.batch.key, place), why)

    def _record(self, joint: Joint[R], place: Place) -> _Record:
        key = (joint.like, place)
        record = self._records.get(key) or _Record()
        _remember(self._records, key, record)
        return record

    def _is_refused(self, job: R) -> bool:
        assert job.form is not None
        return any((job.form.key, place) in self._refused for place in places_of(job.wanted))

    def _has_room(self, forms: Sequence[Form]) -> bool:
        rows, length = sum(form.rows for form in forms), max(form.length for form in forms)
        asked = sum(form.tokens for form in forms)
        most = min(self.settings.max_batch_rows, self._max_rows.get(forms[0].key, self.settings.max_batch_rows))
        return rows <= most and rows * length <= min(self.settings.max_batch_tokens, _MAX_PADDED * asked)

    @staticmethod
    def _agree(jobs: Sequence[R]) -> bool:
        """Whether each tap is wanted in one way only, as it is or by a head, and all given masks have one dtype."""
        places = {place for job in jobs for place in places_of(job.wanted)}
        masks = {job.form.mask for job in jobs if job.form is not None} - {None}
        return len({tap for tap, _ in places}) == len(places) and len(masks) <= 1


def _remember(known: "OrderedDict[Any, Any]", key: Hashable, value: Any) -> None:
    """Add or renew an entry, and drop the oldest one beyond the limit."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > _MAX_KNOWN:
        known.popitem(last=False)


class Waiting:
    """How long an idle device waits for more requests that would fit.

    Not at all while only one session is active, or once each active session has a request in the batch; otherwise for
    at most `max_s`, and half the time of a forward. That is halved each time that waiting gained nothing, down to a
    try now and then.
    """

    def __init__(self, max_s: float, forward_s: Callable[[], float]) -> None:
        self._max_s = max_s
        self._forward_s = forward_s
        self._seen: dict[Hashable, float] = {}
        self._patience = 1.0
        self._skipped = 0
        self._until = 0.0
        self._first = 0  # how many requests were there when the present wait began; 0 if there is no wait
        self._paused = False

    def seen(self, source: Hashable) -> None:
        """Note that a session sent a request."""
        self._seen[source] = time.monotonic()

    def pause_s(self, taken: Sequence[Request]) -> float:
        """How many more seconds to wait; 0 when the wait is over, or not worth it."""
        now = time.monotonic()
        if not self._first:
            self._first, self._until = len(taken), now + self._budget_s(taken, now)
        missing = self._active(now) - {job.source for job in taken}
        pause_s = max(min(self._until - now, self._spare_s(taken, now)), 0.0) if missing else 0.0
        self._paused |= pause_s > 0
        return pause_s

    def ended(self, taken: Sequence[Request]) -> None:
        """Learn whether the wait for a batch, which is now complete, was worth it."""
        if self._paused:
            gained = len(taken) > self._first
            self._patience = min(1.0, 2 * self._patience) if gained else max(_LEAST_PATIENCE, self._patience / 2)
        self._first, self._paused = 0, False

    def _budget_s(self, taken: Sequence[Request], now: float) -> float:
        if self._patience <= _LEAST_PATIENCE:
            self._skipped += 1
            if self._skipped % _PROBE_EVERY:
                return 0.0
        return max(min(self._max_s, self._forward_s() / 2, self._spare_s(taken, now)) * self._patience, 0.0)

    def _spare_s(self, taken: Sequence[Request], now: float) -> float:
        """How long all requests taken can still wait so that the forward ends before their deadlines."""
        return min(job.deadline for job in taken) - now - self._forward_s()

    def _active(self, now: float) -> set[Hashable]:
        """The sessions that have sent requests lately."""
        since = now - max(_WINDOW_FORWARDS * self._forward_s(), _WINDOW_S)
        for source, at in list(self._seen.items()):
            if at < since:
                self._seen.pop(source, None)
        return set(self._seen)
