"""Keyword arguments that a teacher's forward takes as some of its `**kwargs` alone, where a misspelt one is ignored."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from schoolhouse.callers import to_caller

_TRANSFORMERS = {"output_attentions", "output_hidden_states", "return_dict"}  # its decorators of forwards take them


class Unseen:
    """Warns of such arguments, once of each name.

    It cannot be an error: forwards hand their `**kwargs` on, so that what looks unknown may be read further inside.
    Names that the `**kwargs` are typed with are known, such as transformers' `num_items_in_batch`, and those that its
    decorators take; nothing is told of a forward without any name, which hands all on.
    """

    def __init__(self, parameters: Iterable[str]) -> None:
        """`parameters` are those of the teacher's description."""
        names = {*parameters}
        checked = any(name.startswith("**") for name in names) and any(not name.startswith("*") for name in names)
        self._known = names | _TRANSFORMERS if checked else None

    def tell(self, kwargs: Mapping[str, Any]) -> None:
        """Warn of those that the teacher is asked with."""
        if self._known is None or kwargs.keys() <= self._known:
            return
        for name in sorted(kwargs.keys() - self._known):
            self._known.add(name)
            warnings.warn(
                f"the teacher's forward has no parameter {name!r}: it takes it as one of its **kwargs, where it may be "
                "ignored. Is it spelt as the teacher spells it, and does the teacher need it?",
                stacklevel=to_caller(),
            )
