"""The Teacher protocol, for a teacher anywhere: its description, its features, and how it is asked."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from schoolhouse.taps import Tap, TapLike, as_tap
from schoolhouse.teachers.module_tree import module_tree

_SHOWN_PARAMETERS = 6


@dataclass(frozen=True, kw_only=True, repr=False)
class TeacherDescription:
    """The description of a teacher.

    `modules` are the names that may be tapped; "" is the model. `module_classes` are their classes, in the same order,
    or empty if the server does not give them.

    `parameters` are the names of the parameters of its forward. `*args` and `**kwargs` have their stars; the names with
    which `**kwargs` is typed (`Unpack` of a TypedDict) come last.

    `transport` says how its features travel: "in process", "shared memory", or "stream: " with the reason. If replies
    found no room in shared memory, it says how many so far.
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
        """The modules as `print(module)` shows them, with runs of equal layers shown once."""
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
    """The features of one batch, by tap; `features["fc"]` is short for `features["fc", "output"]`."""

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
    """What computes features: a module in this process, or a service behind gRPC."""

    def describe(self) -> TeacherDescription:
        """Describe the teacher, including which modules may be tapped."""

    def submit(
        self, args: Sequence[Any], kwargs: Mapping[str, Any] | None, taps: Iterable[TapLike]
    ) -> "Future[Features]":
        """Ask for the features of one batch; the future gets them, or the error.

        A teacher that supports encodings also takes `encodings`, by tap, and the mask `positions`.
        """

    def close(self) -> None:
        """Free what the teacher holds."""
