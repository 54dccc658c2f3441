"""Patterns of taps, as a pool file, a tokens file and `serve` have them; it imports no torch."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from schoolhouse_wire.limits import MAX_MODULE_NAME

SIDES = ("input", "output")
_MAX_PATTERNS = 256
_FORM = "choices: NAME, NAME:input, NAME:output, where * in a name stands for anything, dots too"


def check_patterns(patterns: Sequence[str] | None) -> None:
    """Raises `ValueError`, which quotes no pattern, as a tokens file is quoted by nobody; None is no patterns."""
    if patterns is None:
        return
    if not isinstance(patterns, list | tuple) or not 0 < len(patterns) <= _MAX_PATTERNS:
        raise ValueError(f"taps must be a list of 1 to {_MAX_PATTERNS} patterns; {_FORM}")
    for number, pattern in enumerate(patterns):
        if not isinstance(pattern, str) or len(pattern) > MAX_MODULE_NAME:
            raise ValueError(f"taps.{number} is no text of at most {MAX_MODULE_NAME} characters; {_FORM}")
        _, colon, side = pattern.rpartition(":")
        if colon and side not in SIDES:
            raise ValueError(f"taps.{number} has something else than a side after its colon; {_FORM}")


def matching(pattern: str, names: Iterable[str]) -> set[tuple[str, str]]:
    """The taps, each a module's name and a side, that a pattern allows of modules with these names."""
    name, colon, side = pattern.rpartition(":")
    matches = re.compile(fnmatch.translate(name if colon else pattern)).match
    return {(found, one) for found in names if matches(found) for one in ((side,) if colon else SIDES)}
