"""The heads of a module in this process: described when asked for, and compared with the module's own logits."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from schoolhouse_wire.torch_private import version_of
from schoolhouse_wire.values.tree import is_plain
from torch import nn

from schoolhouse.lm_head.describe import head_of
from schoolhouse.lm_head.head import Head

_MAX_COUNTED = 4096


class OwnHeads:
    """Heads of one module. A head is described anew after weights of its submodule were changed, replaced or moved.

    A copy of this object starts empty, since the copied module has other weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: dict[tuple[str, str], tuple[Hashable, Head]] = {}
        self._runs: OrderedDict[Hashable, int] = OrderedDict()

    def get(self, name: str, tap_module: str) -> Head:
        """The head from what submodule `name` receives to the logits that `tap_module` returns; raises as `head_of`."""
        state = self.state(name)
        found = self._known.get((name, tap_module))
        if found is None or found[0] != state:
            found = self._known[name, tap_module] = (state, head_of(self._module, name, tap_module))
        return found[1]

    def state(self, name: str) -> Hashable:
        """A value that changes whenever weights of the submodule are changed, replaced or moved."""
        module = self._module.get_submodule(name)
        return tuple((_place(weight), version_of(weight)) for weight in (*module.parameters(), *module.buffers()))

    def is_due(self, inputs: Hashable) -> bool:
        """Whether the heads must be compared in this run: in the 1st, 2nd, 4th, 8th, ... run on inputs of this kind.

        The first run alone is not enough: the model may change only some numbers, or a hook may be added later.
        """
        before = self._runs.get(inputs, 0)
        return before & (before + 1) == 0

    def ran(self, inputs: Hashable) -> None:
        """Count a run that found no difference."""
        self._runs[inputs] = self._runs.get(inputs, 0) + 1
        if len(self._runs) > _MAX_COUNTED:
            self._runs.popitem(last=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (OwnHeads, (self._module,))


def _place(weight: torch.Tensor) -> int:
    return weight.data_ptr() if is_plain(weight) and weight.layout is torch.strided else id(weight)
