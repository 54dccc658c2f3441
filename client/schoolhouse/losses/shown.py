"""Modules whose settings `print` shows: the base of losses and balancers."""

from typing import Any, ClassVar

from torch import nn


class Shown(nn.Module):
    """A module whose settings `print` shows: the attributes named in `_SETTINGS`, without their underscores."""

    _SETTINGS: ClassVar[tuple[str, ...]] = ()

    def _settings(self) -> dict[str, Any]:
        return {name.removeprefix("_"): getattr(self, name) for name in self._SETTINGS}

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
