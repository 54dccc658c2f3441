"""Runs one request in parts of its rows, if the device has no room for its forward at once."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from schoolhouse.taps import Tap
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.errors import TeacherMemoryError
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import map_tensors, tensors_of

from schoolhouse_server.device.device import Device, lacks_memory
from schoolhouse_server.engine.jobs import Job
from schoolhouse_server.merge import self_check
from schoolhouse_server.merge.batching import Form, Former, Layout, in_order
from schoolhouse_server.merge.merging import places_of
from schoolhouse_server.merge.splitting import Rules, UnmergeableError, learn

_MAX_KNOWN = 1024
_LESS = "send fewer rows at once, or shorter ones"
_log = logging.getLogger(__name__)
Features = dict[Tap, Any]
Forward = Callable[[Arguments, Wanted], Features]
Knows = Callable[[Job], dict[Tap, Rules] | None]


class RowParts:
    """Runs a request as several forwards of fewer rows, halved until they have room, and joins their features.

    That is done only if it makes no difference but rounding, which is checked on the request itself: the features of
    some of its rows must be those that the halves of these rows give. Rows that have room only one by one, which cannot
    be halved, are trusted if `knows` returns the rules learned from merging such requests. If nothing is merged
    (`knows` is None), features are promised to the bit, and no request is run in parts.
    """

    def __init__(self, teacher: LocalTeacher, device: Device, forward: Forward, knows: Knows | None) -> None:
        """`forward` returns features in host memory."""
        self._teacher, self._device, self._forward, self._knows = teacher, device, forward, knows
        self._former = Former(teacher.describe().parameters, None)
        self._room: OrderedDict[Hashable, int] = OrderedDict()  # how many rows had room, by form and taps

    def run(self, job: Job, whole: bool) -> Features:
        """The features of a job, in host memory; with `whole`, all rows are tried at once first.

        Raises:
            TeacherMemoryError: a single row has no room, or the rows cannot be run apart.
        """
        if whole and (values := self._fitting(job.inputs, job.wanted)) is not None:
            return values
        if self._knows is None:
            raise TeacherMemoryError(
                "the teacher's device has no room for this forward, and its rows are not run apart, since that may "
                f"round differently and merge='never' promises features to the bit; {_LESS}, or serve the teacher with "
                "merge='same-shape'"
            )
        inputs = in_order(job.inputs)
        form = self._former.form(inputs)
        if form is None or form.rows < 2:
            raise TeacherMemoryError(
                f"the teacher's device has no room for a forward on this input, which has no rows to split; {_LESS}"
            )
        return _Run(self, self._knows, job, inputs, form).features()

    def _fitting(self, inputs: Arguments, wanted: Wanted) -> Features | None:
        """The features of a forward; None if it has no room."""
        try:
            return self._forward(inputs, wanted)
        except BaseException as err:
            if not lacks_memory(err):
                raise
        self._device.free()  # outside of `except`, where nothing keeps the memory of the failed forward
        return None


class _Run:
    """One request that is run in parts."""

    def __init__(self, parts: RowParts, knows: Knows, job: Job, inputs: Arguments, form: Form) -> None:
        self._parts, self._knows, self._job, self._wanted, self._inputs = parts, knows, job, job.wanted, inputs
        self._rows, self._length = form.rows, (job.form or form).length
        self._rules: dict[Tap, Rules] = {}
        self._proven: set[int] = set()  # sizes, in rows, whose forwards are known to give what smaller ones give
        self._key = (form.key, *places_of(job.wanted))

    def features(self) -> Features:
        rows, room = self._rows, self._parts._room
        size = min(room.get(self._key, rows), -(-rows // 2))
        made: list[Features] = []
        done = 0
        while done < rows:
            size = min(size, rows - done)
            values = self._parts._fitting(self._some(done, size), self._wanted)
            if values is None:
                size = self._smaller(size)
                continue
            self._check(values, done, size)
            made.append(values)
            done += size
        _remember(room, self._key, max(self._proven, default=1))
        _log.warning("a request of %d rows had no room at once; it ran as %d forwards", rows, len(made))
        return self._joined(made)

    def _smaller(self, size: int) -> int:
        if size == 1:
            raise TeacherMemoryError(
                f"the teacher's device has no room for a forward on one row of this input; {_LESS}"
            )
        return -(-size // 2)

    def _some(self, start: int, size: int) -> Arguments:
        rows = self._rows
        part: Arguments = map_tensors(
            self._inputs, lambda t: t[start : start + size] if t.dim() and t.shape[0] == rows else t
        )
        return part

    def _check(self, values: Features, start: int, size: int) -> None:
        """Raise TeacherMemoryError unless a part's features are, as far as can be known, those of the whole forward."""
        why = ""
        try:
            if size not in self._proven:
                self._prove(values, start, size)
            for tap, rules in self._rules.items():
                rules.check(values[tap], Layout((size,), (self._length,)))
        except UnmergeableError as err:
            why = str(err)
        if why:
            raise TeacherMemoryError(
                f"the teacher's device has no room for this forward at once, and its rows cannot be run apart: {why}; "
                f"{_LESS}"
            )

    def _prove(self, values: Features, start: int, size: int) -> None:
        """Check that the forward of these rows gives what the forwards of their halves give."""
        if size == 1:
            self._trust()
            return
        sizes = (-(-size // 2), size // 2)
        before = self_check.traces(self._parts._teacher.module, self._parts._device)
        halves = [self._forward(start, sizes[0]), self._forward(start + sizes[0], sizes[1])]
        changes = [before.changes()]
        if why := self_check.why_not(changes, lambda: (self._forward(start, sizes[0]), before.changes())[1]):
            raise UnmergeableError(why)
        layout = Layout(sizes, (self._length,) * 2)
        for tap, value in values.items():
            rules = learn(value, [half[tap] for half in halves], layout)
            if self._rules.setdefault(tap, rules) != rules:
                raise UnmergeableError("a feature does not have the sizes, by rows, that it had before, or has changed")
        self._proven |= {size, *sizes}

    def _forward(self, start: int, size: int) -> Features:
        return self._parts._forward(self._some(start, size), self._wanted)

    def _trust(self) -> None:
        known = self._knows(self._job)
        if known is None:
            raise UnmergeableError("they have room only one by one, so nothing shows whether they are independent")
        self._rules.update(known)
        self._proven.add(1)

    def _joined(self, made: Sequence[Features]) -> Features:
        """The parts joined; a tensor that occurs twice in each of them is joined once, and occurs twice."""
        layout = Layout((self._rows,), (self._length,))
        joined: dict[tuple[int, ...], torch.Tensor] = {}

        def tensors(tap: Tap) -> Iterator[torch.Tensor]:
            leaves = zip(*(tensors_of(part[tap]) for part in made), strict=True)
            for rule, leaf in zip(self._rules[tap].leaves, leaves, strict=True):
                key = tuple(map(id, leaf))
                if key not in joined:
                    joined[key] = rule.joined(leaf)
                yield joined[key]

        features: Features = {}
        for tap in made[0]:
            features[tap] = _refilled(made[0][tap], tensors(tap))
            self._rules[tap].check(features[tap], layout)
        return features


def _refilled(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    return map_tensors(value, lambda _tensor: next(tensors))


def _remember(known: OrderedDict[Hashable, int], key: Hashable, value: int) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > _MAX_KNOWN:
        known.popitem(last=False)
