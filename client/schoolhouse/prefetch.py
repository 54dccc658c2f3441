"""Look-ahead over a data loader: the teacher works on the next batches while the student trains on this one."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from schoolhouse_wire.codec import Arguments

from schoolhouse.ahead import Ahead, Entry
from schoolhouse.batches import bound, call_of, taken_by
from schoolhouse.errors import ConfigError
from schoolhouse.step import Distillation

_END = object()


class Prefetch:
    """What `DistillationModel.prefetch` returns: each `iter()` begins a pass over the loader."""

    def __init__(
        self,
        state: Distillation,
        loader: Iterable[Any],
        *,
        depth: int,
        inputs: Callable[[Any], Any] | None,
        max_bytes: int,
        progress: Any,
    ) -> None:
        for name, value in (("depth", depth), ("max_bytes", max_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of 1 or above")
        if inputs is not None and not callable(inputs):
            raise ConfigError(f"inputs is a {type(inputs).__name__}; it must be a function of a batch, or None")
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise ConfigError(f"loader is a {type(loader).__name__}; it must be an iterable of batches")
        self._state = state
        self._loader = loader
        self._depth = depth
        self._max_bytes = max_bytes
        self._waits = _Waits(_shower(progress))
        self._call = functools.partial(_call, state, inputs)
        self._begun: _Pass | None = None  # which must not refer to this: in a cycle, it would outlive its last user

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self._waits.steps

    @property
    def waited_s(self) -> float:
        """Seconds that they waited for the teacher."""
        return self._waits.waited_s

    def __iter__(self) -> "_Pass":
        begun, self._begun = self._begun, None
        if begun is not None and not begun.over:
            return begun
        ahead = Ahead(self._state, self._depth, self._max_bytes, self._waits)
        return _Pass(ahead, self._state, iter(self._loader), self._call)

    def __next__(self) -> Any:
        if self._begun is None:
            self._begun = iter(self)
        return next(self._begun)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # whoever asks knows that it has a length


class _Waits:
    """Counts steps and how long they waited, and shows it."""

    def __init__(self, show: Callable[[float], Any]) -> None:
        self.steps = 0
        self.waited_s = 0.0
        self._show = show

    def __call__(self, waited_s: float) -> None:
        self.steps += 1
        self.waited_s += waited_s
        self._show(waited_s)


def _call(state: Distillation, inputs: Callable[[Any], Any] | None, batch: Any) -> Arguments:
    """What the forward is called with."""
    if inputs is None:
        return taken_by(state.signature, batch)
    try:
        return call_of(inputs(batch))
    except StopIteration as err:  # it would end the loop as if the loader were at its end
        raise RuntimeError("inputs raised StopIteration") from err


class _Pass(Iterator[Any]):
    """One pass over a loader. It ends with the loader, by `close()`, or when nobody holds it any more."""

    def __init__(self, ahead: Ahead, state: Distillation, batches: Iterator[Any], call: Callable[[Any], Any]) -> None:
        self._ahead = ahead
        self._state = state
        self._batches: Iterator[Any] | None = batches
        self._call = call
        self._numbers = itertools.count()
        self._error: Exception | None = None
        self.over = False
        state.ahead.append(ahead)

    def __next__(self) -> Any:
        if not self._ahead.closed:
            self._ahead.drop_used()
            self._look_ahead()
        if self._ahead.waiting:
            return self._ahead.take()
        if self._batches is not None:  # the model was exported: the loader's batches still come
            return next(self._batches)
        error = self._error
        self.close()
        if error is None:
            raise StopIteration
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    def _look_ahead(self) -> None:
        for late in self._ahead.waiting:
            if late.unanswered:
                late.inputs = bound(self._state.signature, late.call)  # as they are now
                self._ahead.ask(late)
        while self._batches is not None and self._ahead.has_room():
            try:
                batch = next(self._batches, _END)
                entry = None if batch is _END else self._entry(batch)
            except Exception as err:
                self._error, entry = err, None
            if entry is None:
                self._batches = None
            else:
                self._ahead.waiting.append(entry)
                self._ahead.ask(entry)

    def _entry(self, batch: Any) -> Entry:
        call = self._call(batch)
        inputs = bound(self._state.signature, call)
        if inputs.unknown is not None:
            raise ConfigError(
                f"the forward takes a {inputs.unknown.__name__} of the batch, and whether one was written into after "
                "the teacher was asked cannot be told: give prefetch inputs=, a function that makes of a batch tensors "
                "and plain values, or loop over the loader itself"
            )
        return Entry(next(self._numbers), batch, call, inputs)

    def close(self) -> None:
        """End the pass: what was asked for is dropped, and forwards ask the teacher themselves again."""
        self.over = True
        self._batches = self._error = None
        self._ahead.close()
        self._ahead.waiting = deque()

    def __enter__(self) -> "_Pass":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _shower(progress: Any) -> Callable[[float], Any]:
    """What shows how long a step waited."""
    if progress is None:
        return lambda _waited_s: None
    if hasattr(progress, "set_postfix"):
        return lambda waited_s: progress.set_postfix(teacher_wait_ms=f"{waited_s * 1e3:.1f}")
    if callable(progress):
        result: Callable[[float], Any] = progress
        return result
    raise ConfigError(
        f"progress is a {type(progress).__name__}; choices: a function of the seconds waited, a bar with set_postfix, "
        "None"
    )
