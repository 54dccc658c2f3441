"""Which keyword arguments of `compute_kd_loss` each loss takes, as the signatures of their forwards say."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from schoolhouse_wire.torch_private import original_of
from torch import nn

from schoolhouse.errors import UsageError

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_OUTPUTS = 2  # the student's and the teacher's, which a loss takes first


class LossArguments:
    """The keyword arguments that each loss takes, found once; a loss whose forward has `**kwargs` takes all."""

    def __init__(self, losses: Iterable[nn.Module]) -> None:
        self._takes = [(type(loss).__name__, _names(loss)) for loss in losses]
        self._none: Sequence[Mapping[str, Any]] = [{} for _ in self._takes]

    def of_each(self, given: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The part of `given` that each loss takes, in the order of the losses.

        Raises:
            UsageError: for a name that no loss takes.
        """
        if not given:
            return self._none
        unknown = [name for name in given if not any(takes is None or name in takes for _, takes in self._takes)]
        if unknown:
            each = "; ".join(f"{loss} takes {', '.join(takes or ()) or 'none'}" for loss, takes in self._takes)
            raise UsageError(f"compute_kd_loss got the keyword arguments {unknown}, which no loss takes: {each}")
        return [
            given if takes is None else {name: given[name] for name in given if name in takes}
            for _, takes in self._takes
        ]


def _names(loss: nn.Module) -> tuple[str, ...] | None:
    """The keyword arguments that a loss takes beside the two outputs; None if it takes any."""
    try:
        parameters = [*inspect.signature(original_of(loss).forward).parameters.values()]
    except (TypeError, ValueError):  # a forward that is not written in Python may have no signature
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    first = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY][:_OUTPUTS]
    return tuple(p.name for p in parameters if p.kind in _NAMED and p.name not in first)
