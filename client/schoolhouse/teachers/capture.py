"""Capture what named submodules receive and return during one forward, and end it early if that is asked for."""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from schoolhouse_wire.torch_private import is_unshared, storage_of, version_of
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import is_plain, map_tensors, tensors_of
from torch import nn

from schoolhouse.errors import TeacherForwardError, UnknownTapError
from schoolhouse.taps import STATE, Tap

_log = logging.getLogger(__name__)
_WHOLE = Tap("", "output")
_UNSETTLED = (
    "the teacher's module %r ran again, or its feature was written into, for the first time; earlier forwards that "
    "ended before that could happen gave other features than whole forwards. From now on those with this tap run whole"
)


class _Stopped(BaseException):
    """Ends a forward from within a hook; not an Exception, so that a model's `except Exception` does not catch it."""


class _Recorder:
    """Keeps the last value of each tap."""

    def __init__(self) -> None:
        self.features: dict[Tap, Any] = {}

    def record(self, tap: Tap, value: Any) -> None:
        self.features[tap] = value


class _Watching(_Recorder):
    """Also notes whether a tap's first value was its last, unchanged; with `ends`, ends a forward that has all values.

    Values of the side STATE are copied when they are recorded.
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
        """Whether, in a whole forward, the tap had one value and nothing changed it later."""
        return self._calls[tap] == 1 and not any(
            tensor.is_inference() or version_of(tensor) != version for tensor, version in self._versions.get(tap, ())
        )


class EarlyStop:
    """Decides whether a forward may end as soon as each of its taps has a value.

    It may if a whole forward has shown for each tap that the rest makes no difference: its module did not run again,
    and no later module wrote into its value. Other inputs might behave otherwise, so the user must state that they do
    not, by `allowed`. For a head, the user states it by asking for hidden states instead of logits.
    """

    def __init__(self, *, allowed: bool) -> None:
        self.allowed = allowed
        self._settled: dict[Tap, bool] = {}

    def recorder(self, taps: Sequence[Tap]) -> _Recorder:
        """A recorder for the values of these taps, which may end the forward."""
        if not self.allowed and all(tap.side != STATE for tap in taps):
            return _Recorder()
        ends = _WHOLE not in taps and all(self._settled.get(tap, False) for tap in taps)
        return _Watching(taps, ends=ends, allowed=self.allowed)

    def learn(self, recorder: _Recorder) -> None:
        """Learn from a whole forward which taps are settled."""
        if not isinstance(recorder, _Watching):
            return
        for tap in recorder.features:
            if self.allowed or tap.side == STATE:
                before, now = self._settled.get(tap), recorder.settled(tap)
                self._settled[tap] = now and before is not False
                if before and not now:
                    _log.warning(_UNSETTLED, tap.module)


def run_with_taps(model: nn.Module, inputs: Arguments, taps: tuple[Tap, ...], early: EarlyStop) -> dict[Tap, Any]:
    """Run `model` and capture `taps` as plain hooks would: the values of each module's last call, as they end up.

    They come in the order of `taps`. If `early` allows it, the forward ends as soon as each tap has a value.

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
    """The one item of `values`, removed from it, with all tensors in memory to which nothing else refers.

    A tensor is copied if something else may still refer to its memory, such as the module or the owner of the batch.
    So nothing can write into it while it is read, which could go unnoticed: torch counts a change only when it is done.
    To copy always would need no counts of references, and takes no longer where features are small. But the logits of a
    language model, the largest thing in its forward, would stand on the device twice, and where the head is most of the
    work it takes a tenth longer.
    """
    aliases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the originals, so that their ids stay unique
    value = map_tensors(values.pop(), lambda tensor: _alias(tensor, aliases))
    mine = [alias for _, alias in aliases.values()]
    aliases.clear()
    storages = [storage_of(alias) for alias in mine]
    shared = [not is_unshared(alias, storages.count(at)) for alias, at in zip(mine, storages, strict=True)]
    copies = {id(alias): alias.clone() for alias in itertools.compress(mine, shared)}
    return map_tensors(value, lambda tensor: copies.get(id(tensor), tensor)) if copies else value


def _alias(tensor: torch.Tensor, aliases: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    if not is_plain(tensor) or tensor.layout is not torch.strided:
        return tensor.detach().clone()
    return aliases.setdefault(id(tensor), (tensor, tensor.detach()))[1]
