"""LocalTeacher: a frozen module in this process."""

import inspect
import threading
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from schoolhouse_wire.encodings import Encoding
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import map_tensors, signature_of
from torch import nn

from schoolhouse.errors import SchoolhouseError, TeacherForwardError, UnknownTapError
from schoolhouse.lm_head.describe import check_head
from schoolhouse.lm_head.head import Head
from schoolhouse.lm_head.local import OwnHeads
from schoolhouse.sparse import decoded
from schoolhouse.taps import STATE, Tap, TapLike, check_modules, without_compiler
from schoolhouse.teachers.capture import EarlyStop, owned, run_with_taps
from schoolhouse.teachers.encoder import encode, hidden_states, logits_of
from schoolhouse.teachers.fingerprint import revision_of
from schoolhouse.teachers.protocol import Features, TeacherDescription
from schoolhouse.teachers.query import Wanted

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class LocalTeacher:
    """A module in this process: frozen, in eval mode, without gradients. `submit` computes before it returns.

    Args:
        module: the teacher. One that `torch.compile` made runs compiled where its whole output is all that is asked
            for, and otherwise as the plain module, since compiled code keeps its inner values to itself.
        name: for messages.
        early_stop: end a forward as soon as each tap has a value, which saves what comes after the last one. Ask for it
            where you know that values and shapes of inputs do not decide whether a tapped module runs again, or whether
            what it returned is written into: the first forward with each tap runs whole, and where that shows either,
            all forwards with that tap do. Without it, every forward runs whole, so that each feature is what a plain
            hook has in the end. Either way, one that is for hidden states of heads alone ends where the last head
            begins.
    """

    def __init__(self, module: nn.Module, name: str = "teacher", *, early_stop: bool = False) -> None:
        self.module = module.requires_grad_(False).eval()
        self._plain = without_compiler(module)
        self._compiled = any(map(_is_compiled, module.modules()))
        self._name = name
        self._early = EarlyStop(allowed=early_stop)
        named = self._plain.named_modules(remove_duplicate=False)
        self._modules = {name: type(inner).__name__ for name, inner in named}
        self._revision = ""
        self._heads = OwnHeads(self._plain)
        self._lock = threading.Lock()  # hooks are on the module, so one forward at a time

    @property
    def parameters(self) -> tuple[str, ...]:
        """What the module's forward takes, as in its description."""
        found = inspect.signature(self._plain.forward).parameters.values()
        typed = [kind for p in found if p.kind is p.VAR_KEYWORD for kind in typing.get_args(p.annotation)]
        names = [name for kind in typed if typing.is_typeddict(kind) for name in kind.__annotations__]
        return tuple(dict.fromkeys([*(_STARS.get(p.kind, "") + p.name for p in found), *names]))

    def describe(self) -> TeacherDescription:
        """Static facts. The revision is computed at the first call: it reads every weight once."""
        if not self._revision:
            self._revision = revision_of(self._plain)
        parameter = next(self.module.parameters(), None)
        floating = next((p.dtype for p in self.module.parameters() if p.dtype.is_floating_point), None)
        return TeacherDescription(
            name=self._name,
            revision=self._revision,
            class_name=_qualified_name(self._plain),
            modules=tuple(self._modules),
            module_classes=tuple(self._modules.values()),
            parameters=self.parameters,
            dtype=str(floating).removeprefix("torch.") if floating else "",
            device=str(parameter.device) if parameter is not None else "cpu",
        )

    def submit(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        taps: Iterable[TapLike],
        *,
        encodings: Mapping[TapLike, Encoding | None] | None = None,
        positions: torch.Tensor | None = None,
    ) -> "Future[Features]":
        """Run the module now; the future is done when this returns.

        With `encodings` by tap, and the mask `positions` `[batch, length]` for those that need it, the features are
        what would have arrived from elsewhere.
        """
        future: Future[Features] = Future()
        try:
            wanted = Wanted.of(taps, encodings, positions)
            future.set_result(self.compute(Arguments(args, kwargs), wanted.with_seeds()))
        except Exception as err:
            future.set_exception(err)
        return future

    def compute(self, inputs: Arguments, wanted: Wanted) -> Features:
        """Features as they arrive; raises as `forward` and `encode` do."""
        values = self.forward(inputs, wanted)
        if not wanted.as_computed:
            heads = {tap: self.head(name, tap.module) for tap, name in wanted.heads().items()}
            values = decoded(self.encode(values, wanted), heads)
        return Features(values, revision=self._revision)

    def head(self, name: str, tap_module: str) -> Head:
        """What makes the logits that the module `tap_module` returns, of what submodule `name` receives.

        Raises:
            UnknownTapError: if there is no such submodule.
            UnsupportedValueError: if it is not made of known operations.
        """
        check_modules((name, tap_module), self._modules, f"teacher {self._name!r}")
        with self._lock, torch.no_grad():  # it runs, and hooks are on the modules
            return self._heads.get(name, tap_module)

    def encode(self, values: dict[Tap, Any], wanted: Wanted) -> dict[Tap, Any]:
        """What was wanted, of what `forward` returned, as it travels.

        Raises:
            UnsupportedValueError: for features that an encoding cannot hold.
        """
        encodings = dict(zip(wanted.taps, wanted.encodings, strict=True))
        return {tap: encode(value, encodings[tap], wanted.mask) for tap, value in values.items()}

    def forward(self, inputs: Arguments, wanted: Wanted, like: Hashable = None) -> dict[Tap, Any]:
        """Features as plain forward hooks would see them in the end. The inputs stay as they were.

        Inputs that were put together of several batches come with `like`, equal for those that a forward treats alike
        though each has other shapes. They are nobody else's, so the forward may write into them.

        Of logits that travel as hidden states, it is what the head is called with, as it is then. For the first inputs
        of each signature, and ever more rarely for later ones, the head is held against the logits that the module
        itself returns. Other forwards for nothing else end where the head begins, unless it ran twice in one of those.

        No feature stands in memory of the inputs, or that the module keeps, so that neither the next batch nor the
        student can write into it.

        Raises:
            UnknownTapError: for a submodule that there is not, or that did not run.
            TeacherForwardError: if the module's forward raises; its own error is the cause.
            UnsupportedValueError: if a head does not make these logits.
        """
        heads = wanted.heads()
        if not heads:
            return self._captured(inputs, wanted.taps, own=like is not None)
        places = {tap: Tap(heads[tap], STATE) if tap in heads else tap for tap in wanted.taps}
        check_modules(heads.values(), self._modules, f"teacher {self._name!r}")
        states = tuple((tap, name, self._heads.state(name)) for tap, name in heads.items())
        signature = (wanted.taps, states, _autocast(), signature_of(inputs) if like is None else like)
        unchecked = [*heads] if self._heads.is_due(signature) else []
        values = self._captured(inputs, tuple(dict.fromkeys((*places.values(), *unchecked))), own=like is not None)
        for tap in unchecked:
            check_head(
                self.head(heads[tap], tap.module),
                hidden_states(values[places[tap]], heads[tap]),
                logits_of(values[tap]),
            )
        self._heads.ran(signature)
        return {tap: values[place] for tap, place in places.items()}

    def _captured(self, inputs: Arguments, taps: tuple[Tap, ...], *, own: bool) -> dict[Tap, Any]:
        if not self._modules.keys() >= {tap.module for tap in taps}:
            check_modules((tap.module for tap in taps), self._modules, f"teacher {self._name!r}")
        try:
            with self._lock, torch.no_grad():
                if self.module.training:  # train() on a model that holds this one reaches it too
                    self.module.eval()
                given = [self._run(inputs if own else _copied(inputs), taps)]
                return owned(given)  # type: ignore[no-any-return]  # nothing here holds what the forward returned
        except SchoolhouseError:
            raise
        except Exception as err:
            raise TeacherForwardError(f"the teacher's forward raised {type(err).__name__}: {err}") from err

    def _run(self, inputs: Arguments, taps: tuple[Tap, ...]) -> dict[Tap, Any]:
        if taps == (Tap(""),):
            output = self.module(*inputs, **inputs.kwargs)
            return {taps[0]: map_tensors(output, _out_of_graph) if self._compiled else output}
        try:
            return self._run_plain(inputs, taps)
        except UnknownTapError:
            if self._compiled or not any(map(_is_compiled, self.module.modules())):
                raise
        self._compiled = True  # it was compiled after it was given
        return self._run_plain(inputs, taps)

    def _run_plain(self, inputs: Arguments, taps: tuple[Tap, ...]) -> dict[Tap, Any]:
        if not self._compiled:
            return run_with_taps(self._plain, inputs, taps, self._early)
        with torch.compiler.set_stance("force_eager"):
            return run_with_taps(self._plain, inputs, taps, self._early)

    def close(self) -> None:
        """Nothing to free: the module is the caller's."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def _is_compiled(module: nn.Module) -> bool:
    return without_compiler(module) is not module or module._compiled_call_impl is not None


def _out_of_graph(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, on a GPU: the next run of a compiled module's CUDA graph frees or overwrites what this one returned."""
    return tensor.clone() if tensor.is_cuda else tensor


def _autocast() -> tuple[Any, ...]:
    """What decides whether a cast in a forward makes a copy."""
    kinds = ("cpu", "cuda")
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)


def _copied(inputs: Arguments) -> Arguments:
    """A copy, which a forward may write into; a tensor that stands twice in it stands twice in the copy."""
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        found = copies.get(id(tensor))
        if found is None:
            found = copies[id(tensor)] = tensor.clone()
        return found

    copied: Arguments = map_tensors(inputs, copy)
    return copied


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
