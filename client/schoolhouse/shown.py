"""What `print` shows of a loss or a balancer."""

from typing import Any, ClassVar

from torch import nn


class Shown(nn.Module):
    """A module whose settings `print` shows: its attributes of the names in `_SHOWN`, without their underscores."""

    _SHOWN: ClassVar[tuple[str, ...]] = ()

    def _shown(self) -> dict[str, Any]:
        return {name.removeprefix("_"): getattr(self, name) for name in self._SHOWN}

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
