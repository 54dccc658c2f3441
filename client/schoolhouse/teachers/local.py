"""LocalTeacher: a frozen module in this process."""

import inspect
import threading
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from schoolhouse_wire.encodings import Encoding
from schoolhouse_wire.torch_private import is_compiled, original_of
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import map_tensors, signature_of
from torch import nn

from schoolhouse.errors import SchoolhouseError, TeacherForwardError, UnknownTapError
from schoolhouse.lm_head.describe import check_head
from schoolhouse.lm_head.head import Head
from schoolhouse.lm_head.local import OwnHeads
from schoolhouse.sparse import decoded
from schoolhouse.taps import STATE, Tap, TapLike, check_modules
from schoolhouse.teachers.capture import EarlyStop, owned, run_with_taps
from schoolhouse.teachers.encoder import encode, hidden_states, logits_of
from schoolhouse.teachers.fingerprint import revision_of
from schoolhouse.teachers.protocol import Features, TeacherDescription
from schoolhouse.teachers.query import Wanted

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class LocalTeacher:
    """A module in this process: frozen, in eval mode, without gradients. `submit` computes before it returns.

    Args:
        module: the teacher. If it comes from `torch.compile`, it runs compiled only if nothing but its whole output is
            asked for; otherwise the plain module runs, since hooks do not see the inner values of compiled code.
        name: the name in messages.
        early_stop: end a forward as soon as each tap has a value, to save the rest. Use it only if you know that the
            values and shapes of inputs do not decide whether a tapped module runs again, or whether its output is
            written into. The first forward with each tap runs whole; if that shows either, all forwards with that tap
            run whole. Without `early_stop`, every forward runs whole, so that each feature is what a plain hook would
            have at the end. In both cases, a forward for nothing but hidden states ends where the last head begins.
    """

    def __init__(self, module: nn.Module, name: str = "teacher", *, early_stop: bool = False) -> None:
        self.module = module.requires_grad_(False).eval()
        self._plain = original_of(module)
        self._compiled = any(map(is_compiled, module.modules()))
        self._name = name
        self._early = EarlyStop(allowed=early_stop)
        named = self._plain.named_modules(remove_duplicate=False)
        self._modules = {name: type(inner).__name__ for name, inner in named}
        self._revision = ""
        self._heads = OwnHeads(self._plain)
        self._lock = threading.Lock()  # hooks are on the module, so one forward at a time

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters of the module's forward, as in `TeacherDescription`."""
        found = inspect.signature(self._plain.forward).parameters.values()
        typed = [kind for p in found if p.kind is p.VAR_KEYWORD for kind in typing.get_args(p.annotation)]
        names = [name for kind in typed if typing.is_typeddict(kind) for name in kind.__annotations__]
        return tuple(dict.fromkeys([*(_STARS.get(p.kind, "") + p.name for p in found), *names]))

    def describe(self) -> TeacherDescription:
        """Describe the teacher. The first call computes the revision, for which it reads every weight once."""
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

        With `encodings` by tap, and the mask `positions` `[batch, length]` for encodings that need one, the features
        are what would have arrived from a remote teacher.
        """
        future: Future[Features] = Future()
        try:
            wanted = Wanted.of(taps, encodings, positions)
            future.set_result(self.compute(Arguments(args, kwargs), wanted.with_seeds()))
        except Exception as err:
            future.set_exception(err)
        return future

    def compute(self, inputs: Arguments, wanted: Wanted) -> Features:
        """Features as they would arrive, encoded and decoded; raises what `forward`, `head` and `encode` raise."""
        values = self.forward(inputs, wanted)
        if not wanted.as_computed:
            heads = {tap: self.head(name, tap.module) for tap, name in wanted.heads().items()}
            values = decoded(self.encode(values, wanted), heads)
        return Features(values, revision=self._revision)

    def head(self, name: str, tap_module: str) -> Head:
        """The head that computes the logits that `tap_module` returns from what the submodule `name` receives.

        Raises:
            UnknownTapError: if there is no such submodule.
            UnsupportedValueError: if the head is not made of known operations.
        """
        check_modules((name, tap_module), self._modules, f"teacher {self._name!r}")
        with self._lock, torch.no_grad():  # it may run the submodule, on which a forward may have hooks
            return self._heads.get(name, tap_module)

    def encode(self, values: dict[Tap, Any], wanted: Wanted) -> dict[Tap, Any]:
        """The values that `forward` returned, as they travel.

        Raises:
            UnsupportedValueError: for features that an encoding cannot hold.
        """
        if wanted.as_computed:
            return values
        encodings = dict(zip(wanted.taps, wanted.encodings, strict=True))
        return {tap: encode(value, encodings[tap], wanted.mask) for tap, value in values.items()}

    def forward(self, inputs: Arguments, wanted: Wanted, like: Hashable = None) -> dict[Tap, Any]:
        """Features as plain forward hooks would see them at the end of the forward. The inputs stay unchanged.

        Give `like` for inputs that were merged from several batches: a key that is equal for inputs which a forward
        treats alike although their shapes differ. Nothing else refers to such inputs, so the forward may change them.

        For logits that travel as hidden states, the value is what the head is called with, copied at that moment. For
        the first inputs of each signature, and ever more rarely for later ones, the head is compared with the logits
        that the module itself returns. Other forwards for nothing but hidden states end where the last head begins,
        unless a head ran twice in one of the compared ones.

        No feature shares memory with the inputs or with anything that the module keeps, so that neither the next batch
        nor the student can write into it.

        Raises:
            UnknownTapError: for a submodule that does not exist, or that did not run.
            TeacherForwardError: if the module's forward raises; its own error is the cause.
            UnsupportedValueError: if a head does not compute these logits.
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
                if self.module.training:  # train() on a model that contains this one sets its mode, too
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
            if self._compiled or not any(map(is_compiled, self.module.modules())):
                raise
        self._compiled = True  # it was compiled after the constructor had looked
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


def _out_of_graph(tensor: torch.Tensor) -> torch.Tensor:
    """A copy if it is on a GPU, where the next run of a CUDA graph frees or overwrites what this run returned."""
    return tensor.clone() if tensor.is_cuda else tensor


def _autocast() -> tuple[Any, ...]:
    """The autocast settings, which decide whether a cast in a forward makes a copy."""
    kinds = ("cpu", "cuda")
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)


def _copied(inputs: Arguments) -> Arguments:
    """A copy that a forward may write into; a tensor that occurs twice is copied once and occurs twice."""
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
