"""Capture what named submodules receive and return during one forward, and stop it early where that is asked for."""

import itertools
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from schoolhouse_wire.memory import version_of
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import is_plain, map_tensors, tensors_of
from torch import nn

from schoolhouse.errors import TeacherForwardError, UnknownTapError
from schoolhouse.taps import STATE, Tap

_log = logging.getLogger(__name__)
_WHOLE = Tap("", "output")
_UNSETTLED = (
    "the teacher's module %r ran again, or its feature was written into, for the first time; forwards that ended "
    "before that could happen gave other features than whole ones. From now on those with this tap run whole"
)


class _Stopped(BaseException):
    """Ends a forward from within a hook; not an Exception, so that no model's `except Exception` swallows it."""


class _Recorder:
    """The last value of each tap."""

    def __init__(self) -> None:
        self.features: dict[Tap, Any] = {}

    def record(self, tap: Tap, value: Any) -> None:
        self.features[tap] = value


class _Watching(_Recorder):
    """It also tells whether a value is the first one and stays what it is; with `ends`, it ends a forward that has all.

    A value of the side STATE is kept as it is then.
    """

    def __init__(self, taps: Sequence[Tap], *, ends: bool, allowed: bool) -> None:
        super().__init__()
        self._calls = dict.fromkeys(taps, 0)
        self._versions: dict[Tap, list[tuple[torch.Tensor, int]]] = {}
        self._ends, self._allowed = ends, allowed

    def record(self, tap: Tap, value: Any) -> None:
        self._calls[tap] += 1
        super().record(tap, map_tensors(value, torch.clone) if tap.side == STATE else value)
        if self._ends and len(self.features) == len(self._calls):
            raise _Stopped
        if self._allowed:
            self._versions[tap] = [(tensor, version_of(tensor)) for tensor in tensors_of(self.features[tap])]

    def settled(self, tap: Tap) -> bool:
        """After a whole forward: the tap's last value was its first, and nothing changed it later."""
        return self._calls[tap] == 1 and not any(
            tensor.is_inference() or version_of(tensor) != version for tensor, version in self._versions.get(tap, ())
        )


class EarlyStop:
    """When a forward may end right after the first value of its last tap.

    That is for taps of which a whole forward has shown that the rest of it makes no difference to them: their module
    did not run again, and no later one wrote into their value. What one forward shows need not hold for the next one,
    whose inputs have other values, so it takes a user who says that it does, and so has `allowed` it. Asking for the
    hidden states of a head, in place of its logits, says it of the head.
    """

    def __init__(self, *, allowed: bool) -> None:
        self.allowed = allowed
        self._settled: dict[Tap, bool] = {}

    def recorder(self, taps: Sequence[Tap]) -> _Recorder:
        """What takes these taps' values, and may end the forward."""
        if not self.allowed and all(tap.side != STATE for tap in taps):
            return _Recorder()
        ends = _WHOLE not in taps and all(self._settled.get(tap, False) for tap in taps)
        return _Watching(taps, ends=ends, allowed=self.allowed)

    def learn(self, recorder: _Recorder) -> None:
        """See what a whole forward shows."""
        if not isinstance(recorder, _Watching):
            return
        for tap in recorder.features:
            if self.allowed or tap.side == STATE:
                before, now = self._settled.get(tap), recorder.settled(tap)
                self._settled[tap] = now and before is not False
                if before and not now:
                    _log.warning(_UNSETTLED, tap.module)


def run_with_taps(model: nn.Module, inputs: Arguments, taps: tuple[Tap, ...], early: EarlyStop) -> dict[Tap, Any]:
    """Run `model` and capture `taps` as plain hooks would: the last call of each module, as it stands in the end.

    They come in the order of `taps`. Where `early` lets it, the forward ends as soon as each tap has a value.

    Raises:
        UnknownTapError: for a submodule that did not run.
        TeacherForwardError: if the forward fails after its last tap, unless it may end there.
    """
    recorder = early.recorder(taps)
    handles: list[Any] = []
    try:
        for tap in taps:
            if tap.module != "":
                handles.append(_hook(model.get_submodule(tap.module), tap, recorder))
            elif tap.side != "output":
                recorder.record(tap, inputs)
        output = model(*inputs, **inputs.kwargs)
        if _WHOLE in taps:
            recorder.record(_WHOLE, output)
    except _Stopped:
        pass
    except Exception as err:
        if len(recorder.features) < len(taps):
            raise
        if not early.allowed:
            raise TeacherForwardError(
                f"the teacher's forward raised {type(err).__name__} after its last tap: {err}. With "
                "early_stop=True it would end there"
            ) from err
    else:
        early.learn(recorder)
    finally:
        for handle in handles:
            handle.remove()
    if len(recorder.features) < len(taps):
        missing = [tap.module for tap in taps if tap not in recorder.features]
        raise UnknownTapError(f"the submodules {missing} did not run in this forward, so they have no features")
    return {tap: recorder.features[tap] for tap in taps}


def _hook(module: nn.Module, tap: Tap, recorder: _Recorder) -> Any:
    if tap.side == "output":
        return module.register_forward_hook(lambda _module, _args, output: recorder.record(tap, output))
    return module.register_forward_pre_hook(
        lambda _module, args, kwargs: recorder.record(tap, Arguments(args, kwargs)), with_kwargs=True
    )


def owned(values: list[Any]) -> Any:
    """The one item of `values`, taken out, with tensors that stand in memory which nothing else refers to.

    What somebody still holds, such as the module or whoever has the batch, is copied, and so is any tensor of which
    that cannot be told. So nobody writes into it beside one who reads: that would be unseen, since torch counts a
    change only once it is done.
    """
    aliases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # and the originals, so that their ids stay theirs
    value = map_tensors(values.pop(), lambda tensor: _alias(tensor, aliases))
    mine = [alias for _, alias in aliases.values()]
    aliases.clear()
    storages = [alias.untyped_storage()._cdata for alias in mine]
    shared = [not _is_free(alias, storages.count(at)) for alias, at in zip(mine, storages, strict=True)]
    copies = {id(alias): alias.clone() for alias in itertools.compress(mine, shared)}
    return map_tensors(value, lambda tensor: copies.get(id(tensor), tensor)) if copies else value


def _alias(tensor: torch.Tensor, aliases: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    if not is_plain(tensor) or tensor.layout is not torch.strided:
        return tensor.detach().clone()
    return aliases.setdefault(id(tensor), (tensor, tensor.detach()))[1]


def _is_free(alias: torch.Tensor, aliases: int) -> bool:
    """Whether only so many of our aliases hold the storage of one, and torch itself has made it."""
    storage = alias.untyped_storage()  # python's own object, of which the storage itself counts one holder at most
    alone = torch._C._storage_Use_Count(storage._cdata) <= aliases + 1
    return alone and storage.resizable() and sys.getrefcount(storage) == _REFERENCES


def _references() -> int:
    """What python counts for the storage of a tensor that nobody has asked for it."""
    tensor = torch.empty(1)
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


_REFERENCES = _references()
