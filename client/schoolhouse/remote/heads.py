"""The heads of a remote teacher, fetched once and kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from schoolhouse_wire.encodings import Hidden
from schoolhouse_wire.values.codec import Arguments

from schoolhouse.lm_head.disk_cache import HeadCache
from schoolhouse.lm_head.head import Head
from schoolhouse.taps import HEAD, Tap
from schoolhouse.teachers.query import Wanted

_MAX_KEPT = 8


class FetchedHeads:
    """The heads of one teacher that were asked for last, all of one revision; a new revision drops the old ones.

    Requests hold their own heads as long as they need them. `ask(revision, inputs, wanted)` returns the teacher's
    answer, by tap.
    """

    def __init__(self, folder: str | Path | None, ask: Callable[[str, Arguments, Wanted], Any]) -> None:
        self._cache = HeadCache(folder)
        self._ask = ask
        self._known: dict[tuple[str, str, str], Head] = {}

    def known(self, revision: str, wanted: Wanted) -> dict[Tap, Head] | None:
        """The heads that `wanted` needs; None if one of them must be asked for."""
        names = wanted.heads().items()
        found = {tap: head for tap, name in names if (head := self._known.get((revision, name, tap.module)))}
        return found if len(found) == len(names) else None

    def get(self, revision: str, name: str, tap_module: str) -> Head:
        """The head that computes the logits that `tap_module` returns from what the submodule `name` receives.

        The teacher is first asked for the head's digest, which tells whether a head on disk is the same.
        """
        found = self._known.get((revision, name, tap_module))
        if found is None:
            tap = Tap(tap_module, HEAD)
            wanted = Wanted((tap,), (Hidden(head=name),))
            digest = self._ask(revision, Arguments((), {"digest_only": True}), wanted)[tap]
            found = self._cache.fetch(
                revision,
                name,
                tap_module,
                lambda: Head.from_value(self._ask(revision, Arguments(), wanted)[tap]),
                digest=str(digest),
            )
            kept = [(key, head) for key, head in self._known.items() if key[0] == revision]
            self._known = dict([*kept, ((revision, name, tap_module), found)][-_MAX_KEPT:])
        return found
