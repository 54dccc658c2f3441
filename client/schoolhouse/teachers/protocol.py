"""What a teacher is, wherever it lives: its description, its features, and how it is asked."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from schoolhouse.taps import Tap, TapLike, as_tap
from schoolhouse.teachers.module_tree import module_tree

_SHOWN_PARAMETERS = 6


@dataclass(frozen=True, kw_only=True, repr=False)
class TeacherDescription:
    """Static facts of a teacher. `modules` are the names that may be tapped; "" is the model. `module_classes` are what
    they are, or empty where the server does not say it.

    `parameters` are the names that its forward takes, those of `*args` and `**kwargs` with their stars, and at the end
    the names that the latter are typed with (`Unpack` of a TypedDict).

    `transport` says how its features come: "in process", "shared memory", or "stream: " and why it is that. Where some
    found no room in shared memory, it says of how many so far.
    """

    name: str
    revision: str
    class_name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    dtype: str
    device: str
    merge: str = "never"
    transport: str = "in process"
    module_classes: tuple[str, ...] = ()

    def tree(self) -> str:
        """The modules as `print(module)` shows them, with layers that are alike as one."""
        return module_tree(self.class_name.rpartition(".")[2], self.modules, self.module_classes)

    def __repr__(self) -> str:
        more = len(self.parameters) - _SHOWN_PARAMETERS
        taken = ", ".join(self.parameters[:_SHOWN_PARAMETERS]) + (f" and {more} more" if more > 0 else "")
        return (
            f"TeacherDescription(name={self.name!r}, revision={self.revision!r},\n"
            f"  class_name={self.class_name!r},\n"
            f"  dtype={self.dtype!r}, device={self.device!r}, merge={self.merge!r}, transport={self.transport!r},\n"
            f"  parameters: {taken or 'none'},\n"
            f"  modules: {len(self.modules)}, whose names are in .modules, and .tree() shows them)"
        )


class Features(dict[Tap, Any]):
    """What a teacher returned for one batch, by tap; `features["fc"]` is short for `features["fc", "output"]`."""

    def __init__(self, values: Mapping[Tap, Any], *, revision: str, input_digest: bytes = b"") -> None:
        super().__init__(values)
        self.revision = revision
        self.input_digest = input_digest

    def __missing__(self, key: TapLike) -> Any:
        tap = as_tap(key)
        if tap not in self:
            raise KeyError(tap)
        return self[tap]


@runtime_checkable
class Teacher(Protocol):
    """A maker of features: in this process or behind gRPC."""

    def describe(self) -> TeacherDescription:
        """Static facts, among them what may be tapped."""

    def submit(
        self, args: Sequence[Any], kwargs: Mapping[str, Any] | None, taps: Iterable[TapLike]
    ) -> "Future[Features]":
        """Ask for the features of one batch; the future holds them, or the error.

        A teacher that can encode also takes `encodings`, by tap, and the mask `positions`.
        """

    def close(self) -> None:
        """Free what the teacher holds."""
