"""Warnings of keyword arguments that a teacher's forward takes only through `**kwargs`: it ignores misspelt ones."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from schoolhouse.callers import to_caller

_TRANSFORMERS = {"output_attentions", "output_hidden_states", "return_dict"}  # taken by its decorators of forwards


class Unseen:
    """Warns of such arguments, once for each name.

    It is no error, since a forward may pass its `**kwargs` on, and a name that looks unknown may be read further
    inside. Known are also the names with which `**kwargs` is typed, such as transformers' `num_items_in_batch`, and
    those that the decorators of transformers take. A forward without any named parameter, which passes everything on,
    gives no warning.
    """

    def __init__(self, parameters: Iterable[str]) -> None:
        """`parameters` are those in the teacher's description."""
        names = {*parameters}
        checked = any(name.startswith("**") for name in names) and any(not name.startswith("*") for name in names)
        self._known = names | _TRANSFORMERS if checked else None

    def tell(self, kwargs: Mapping[str, Any]) -> None:
        """Warn of the unknown names among the keyword arguments of a request."""
        if self._known is None or kwargs.keys() <= self._known:
            return
        for name in sorted(kwargs.keys() - self._known):
            self._known.add(name)
            warnings.warn(
                f"the teacher's forward has no parameter {name!r}: it takes it through its **kwargs, where it may be "
                "ignored. Is it spelt as the teacher spells it, and does the teacher need it?",
                stacklevel=to_caller(),
            )
