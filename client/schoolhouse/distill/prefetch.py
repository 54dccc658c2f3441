"""Look-ahead over a data loader: the teacher works on the next batches while the student trains on this one."""

import functools
import itertools
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from schoolhouse_wire.values.codec import Arguments
from torch.utils import data

from schoolhouse.distill.batch_identity import bound, call_of, taken_by
from schoolhouse.distill.look_ahead import Ahead, Entry
from schoolhouse.distill.question import without_labels
from schoolhouse.distill.step import Distillation
from schoolhouse.errors import ConfigError

_END = object()
_PLAIN_SAMPLERS = (
    data.BatchSampler,
    data.RandomSampler,
    data.SequentialSampler,
    data.SubsetRandomSampler,
    data.WeightedRandomSampler,
)


class Prefetch:
    """The loader that `DistillationModel.prefetch` returns: each `iter()` of it begins a pass that looks ahead.

    For a DataLoader it is an instance of a subclass of the loader's class and shares its attributes, so that trainers
    treat it as a DataLoader. If they build another loader of its class, as to set a sampler, that one looks ahead too.
    """

    __slots__ = ("_begun", "_looks")
    steps: int  # taken so far; if the DataLoader has a `steps` or `waited_s` of its own, that is what you get
    waited_s: float  # seconds that these steps waited for the teacher
    _looks: "_Looks"
    _begun: "_Pass | None"  # must not refer back: in a reference cycle a pass would outlive its last user
    _made: "weakref.ref[_Looks]"

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        self = super().__new__(cls)
        looks = cls._made()
        assert looks is not None, "the loader from which this one is made keeps them alive"
        self._looks, self._begun = looks, None
        return self

    def __iter__(self) -> Any:
        begun, self._begun = self._begun, None
        if begun is not None and not begun.over:
            return begun
        _say_if_nothing_shards(self)
        loaders = type(self).__bases__[1]
        return self._looks.begin(iter(_sharing(vars(self), object.__new__(loaders))))

    def __next__(self) -> Any:
        if self._begun is None:
            self._begun = iter(self)
        return next(self._begun)


class _Count:
    """Descriptor of a number of the look-ahead; an attribute of the DataLoader by the same name takes precedence."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, prefetch: Prefetch, _kind: Any) -> Any:
        return getattr(prefetch._looks, self._name)


class _Counts:
    __slots__ = ()
    steps, waited_s = _Count("steps"), _Count("waited_s")


class _Wraps:
    """Wraps an iterable that is not a DataLoader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


class _Looks:
    """Settings of the passes of one loader, and how long their steps have waited."""

    def __init__(
        self,
        state: Distillation,
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
        self.steps = 0
        self.waited_s = 0.0
        self._state = state
        self._depth = depth
        self._inputs = inputs
        self._max_bytes = max_bytes
        self._show = _shower(progress)

    def __call__(self, waited_s: float) -> None:
        self.steps += 1
        self.waited_s += waited_s
        self._show(waited_s)

    def begin(self, batches: Iterator[Any]) -> "_Pass":
        """Begin a pass over `batches`."""
        ahead = Ahead(
            self._state.loops,
            self._state.request,
            self._question,
            lambda asked: bound(self._state.signature, asked),
            depth=self._depth,
            max_bytes=self._max_bytes,
            progress=self,
        )
        return _Pass(ahead, batches, functools.partial(_call, self._state, self._inputs))

    def _question(self, call: Arguments) -> Arguments:
        return call if self._inputs is not None else without_labels(self._state.signature, call)


def prefetch(state: Distillation, loader: Iterable[Any], **settings: Any) -> Prefetch:
    """See `DistillationModel.prefetch`."""
    looks = _Looks(state, **settings)
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ConfigError(f"loader is a {type(loader).__name__}; it must be an iterable of batches")
    acts = isinstance(loader, data.DataLoader) and not isinstance(loader, Prefetch)
    source: Any = loader if acts else _Wraps(loader)
    kind: Any = type("Prefetch", (Prefetch, type(source), _Counts), {"__slots__": (), "_made": weakref.ref(looks)})
    return _sharing(vars(source), kind.__new__(kind))  # type: ignore[no-any-return]


def _sharing(attributes: dict[str, Any], made: Any) -> Any:
    """Give an object, made without calling its class, the attribute dict of another one; both then share it."""
    object.__setattr__(made, "__dict__", attributes)  # not setattr, which Lightning records to repeat it on its copies
    return made


def _say_if_nothing_shards(loader: Any) -> None:
    """Warn if there are several ranks and each of them would train on all data."""
    distributed = torch.distributed
    if not isinstance(loader, data.DataLoader) or not (distributed.is_available() and distributed.is_initialized()):
        return
    ranks = distributed.get_world_size()
    known = isinstance(loader.dataset, data.IterableDataset) or getattr(loader, "_is_accelerate_prepared", False)
    if ranks == 1 or known or any(type(sampler) not in _PLAIN_SAMPLERS for sampler in _samplers(loader)):
        return
    warnings.warn(
        f"there are {ranks} ranks, and nothing shards the DataLoader that prefetch got (its sampler is a "
        f"{type(loader.sampler).__name__}), so each rank trains on all of its data: give the DataLoader a "
        "torch.utils.data.DistributedSampler, prefetch what accelerator.prepare returns, or give Lightning what "
        "prefetch returns; ignore this if the dataset is already this rank's part of the data",
        stacklevel=3,
    )


def _samplers(of: Any) -> Iterator[Any]:
    """The samplers of a DataLoader, and the samplers within these."""
    for name in ("sampler", "batch_sampler"):
        if (sampler := getattr(of, name, None)) is not None:
            yield sampler
            if isinstance(sampler, data.Sampler):
                yield from _samplers(sampler)


def _call(state: Distillation, inputs: Callable[[Any], Any] | None, batch: Any) -> Arguments:
    """The arguments with which the forward will be called on a batch."""
    if inputs is None:
        return taken_by(state.signature, batch)
    try:
        return call_of(inputs(batch))
    except StopIteration as err:  # passed on, it would look like the end of the loader
        raise RuntimeError("inputs raised StopIteration") from err


class _Pass(Iterator[Any]):
    """One pass over a loader. It ends with the loader, by `close()`, or when nothing refers to it any more."""

    def __init__(self, ahead: Ahead, batches: Iterator[Any], call: Callable[[Any], Any]) -> None:
        self._ahead = ahead
        self._batches: Iterator[Any] | None = batches
        self._call = call
        self._numbers = itertools.count()
        self._error: Exception | None = None
        self.over = False

    def __next__(self) -> Any:
        if not self._ahead.closed:
            try:
                self._ahead.go_on()
                self._ahead.drop_used()
                self._look_ahead()
            except BaseException:  # such as Ctrl-C: its traceback keeps this frame alive, and so the pass
                self._ahead.rest()
                raise
        if self._ahead.waiting:
            return self._ahead.take()
        if self._batches is not None:  # the look-ahead was closed by an export: go on without it
            return next(self._batches)
        error = self._error
        self.close()
        if error is None:
            raise StopIteration
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def _look_ahead(self) -> None:
        for late in self._ahead.waiting:
            if late.unanswered:
                late.inputs = self._ahead.bound(late.asked)  # the values may have changed since the first try
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
        asked = self._ahead.question(call)
        inputs = self._ahead.bound(asked)
        if inputs.unknown is not None:
            raise ConfigError(
                f"the forward takes a {inputs.unknown.__name__} of the batch, and whether it was written into after "
                "the teacher was asked cannot be told: give prefetch inputs=, a function from a batch to tensors and "
                "plain values, or loop over the loader itself"
            )
        return Entry(next(self._numbers), batch, call, asked, inputs)

    def close(self) -> None:
        """End the pass: cancel what was asked for; forwards ask the teacher themselves again."""
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
    """A function that shows how many seconds a step waited."""
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
