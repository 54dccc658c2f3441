"""The modes of `convert` and their configs, validated once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from schoolhouse_wire.encodings import Encoding
from torch import nn

from schoolhouse.errors import ConfigError
from schoolhouse.losses.balancers import DistillationLossBalancer
from schoolhouse.taps import Tap
from schoolhouse.teachers.protocol import Teacher
from schoolhouse.teachers.query import encodings_of

Criterion: TypeAlias = "nn.Module | type[nn.Module] | Mapping[tuple[str, str], nn.Module | type[nn.Module]]"
ModelLike: TypeAlias = "nn.Module | type[nn.Module] | Callable[..., nn.Module] | tuple[Any, ...]"

_TEACHER_CHOICES = (
    "an nn.Module, a class or callable that makes one, (callable,), (callable, args), (callable, args, kwargs), "
    "a Teacher such as connect(...) returns, or a grpc:// or grpcs:// URL with HOST:PORT/NAME"
)


@dataclass(frozen=True, kw_only=True)
class KDLossConfig:
    """Config of the mode "kd_loss".

    Args:
        teacher_model: a module, a class or callable that makes one, `(callable,)`, `(callable, args)`,
            `(callable, args, kwargs)`, a Teacher such as `connect` returns, or its URL.
        criterion: one loss for the whole outputs, or `{(student_layer, teacher_layer): loss}`; a loss is an instance,
            or a class that needs no arguments. Several pairs may share a layer.
        loss_balancer: reduces the losses to a scalar; needed for several pairs, or if the student has a loss of its
            own.
        expose_minimal_state_dict: keep the weights of a teacher in this process out of `state_dict()`.
        encodings: how the outputs of teacher layers travel: `{teacher_layer: encoding}` with encodings of
            `schoolhouse.encodings`, or one encoding for all layers. Without one, outputs travel as computed. A teacher
            in this process gives exactly what would arrive over the wire.
        positions: for encodings that are `at_positions`: a function that is called with the arguments of the forward
            and returns the bool or 0/1 mask `[batch, length]` of the positions that the losses will read.
        eval_kd: ask the teacher when each forward begins, as in training, also in eval mode and under `no_grad`.
            Otherwise such a forward does not ask the teacher; it keeps a copy of its batch, and `compute_kd_loss` asks
            the teacher for the last such batch.
    """

    teacher_model: Any = None
    criterion: Any = None
    loss_balancer: DistillationLossBalancer | None = None
    expose_minimal_state_dict: bool = True
    encodings: Any = None
    positions: Callable[..., Any] | None = None
    eval_kd: bool = False

    def pairs(self) -> dict[tuple[str, str], nn.Module]:
        """The criterion as `{(student_layer, teacher_layer): loss instance}`; raises `ConfigError` if it is no such."""
        if self.criterion is None:
            raise ConfigError("criterion is missing; give a loss, or {(student_layer, teacher_layer): loss}")
        given = self.criterion if isinstance(self.criterion, Mapping) else {("", ""): self.criterion}
        if not given:
            raise ConfigError("criterion has no layer pairs; give at least one")
        return {_pair(pair): _loss(loss, pair) for pair, loss in given.items()}

    def tap_encodings(self, layers: Iterable[str]) -> dict[Tap, Encoding]:
        """The encoding of each tap, for teacher `layers` in the criterion; raises `ConfigError` for other layers."""
        taps = tuple(dict.fromkeys(map(Tap, layers)))
        given = self.encodings if isinstance(self.encodings, Mapping) else dict.fromkeys(taps, self.encodings)
        pairs = zip(taps, encodings_of(taps, given), strict=True)
        found = {tap: encoding for tap, encoding in pairs if encoding is not None}
        at_positions = any(encoding.positions for encoding in found.values())
        if at_positions and not callable(self.positions):
            raise ConfigError(
                f"positions is {self.positions!r:.80}, and encodings are at_positions; give a function that makes the "
                "mask from the arguments of the forward"
            )
        if self.positions is not None and not at_positions:
            raise ConfigError("positions is given, and no encoding needs it; wrap one in encodings.at_positions")
        return found

    def check(self) -> None:
        """Raise `ConfigError` for a wrong or missing field, with its name and the choices."""
        if self.teacher_model is None:
            raise ConfigError(f"teacher_model is missing; choices: {_TEACHER_CHOICES}")
        for name in ("expose_minimal_state_dict", "eval_kd"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} is {value!r}; choices: True, False")
        several = isinstance(self.criterion, Mapping) and len(self.criterion) > 1
        _check_balancer(self.loss_balancer, several)


@dataclass(frozen=True, kw_only=True)
class LayerwiseKDConfig(KDLossConfig):
    """Config of the mode "layerwise_kd": like `KDLossConfig`, but all layers in the criterion must be named."""

    def pairs(self) -> dict[tuple[str, str], nn.Module]:
        """As in `KDLossConfig`; also refuses a student layer in several pairs, and the whole model as a layer."""
        if self.criterion is not None and not isinstance(self.criterion, Mapping):
            raise ConfigError("criterion: the mode 'layerwise_kd' needs {(student_layer, teacher_layer): loss}")
        pairs = super().pairs()
        if any("" in pair for pair in pairs):
            raise ConfigError(
                "criterion: the mode 'layerwise_kd' needs named layers on both sides; '' is the whole model"
            )
        layers = [layer for layer, _ in pairs]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        if twice:
            raise ConfigError(
                f"criterion: the student's layers {twice} appear in several pairs; in the mode 'layerwise_kd' a layer "
                "takes the inputs of one teacher layer only"
            )
        return pairs


@dataclass(frozen=True, kw_only=True)
class ExportStudentConfig:
    """Config of the mode "export_student": nothing to set."""


MODES: dict[str, type[Any]] = {
    "kd_loss": KDLossConfig,
    "layerwise_kd": LayerwiseKDConfig,
    "export_student": ExportStudentConfig,
}


def read_mode(mode: Any) -> tuple[str, Any]:
    """The name and config of the one mode in `mode`: a name, `[name]`, `[(name, config)]` or `{name: config}`."""
    entries = list(mode.items()) if isinstance(mode, Mapping) else mode
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list | tuple) or len(entries) != 1:
        raise ConfigError(f"mode must name one mode, as in [('kd_loss', config)]; got {mode!r}")
    entry = (entries[0], None) if isinstance(entries[0], str) else entries[0]
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[0], str):
        raise ConfigError(f"mode must be a name, a list of names or of (name, config), or a dict; got {mode!r}")
    name, config = entry
    if name not in MODES:
        raise ConfigError(f"there is no mode {name!r}; choices: {', '.join(map(repr, MODES))}")
    return name, _read_config(name, config)


def _read_config(name: str, config: Any) -> Any:
    kind = MODES[name]
    if isinstance(config, kind):
        return config
    if not isinstance(config, Mapping | None):
        raise ConfigError(f"the config of {name!r} is a {type(config).__name__}; choices: a dict, a {kind.__name__}")
    known = [field.name for field in fields(kind)]
    unknown = [key for key in config or {} if key not in known]
    if unknown:
        raise ConfigError(f"the config of {name!r} has unknown fields {unknown}; choices: {', '.join(known) or 'none'}")
    return kind(**(config or {}))


def make_model(given: Any, field: str, choices: str) -> Any:
    """Call `given`, a class, a callable or a tuple `(callable, args, kwargs)`, and return the model that it makes."""
    if isinstance(given, tuple):
        if not 1 <= len(given) <= 3:
            raise ConfigError(f"{field} is a tuple of {len(given)}; choices: {choices}")
        make = given[0]
        args = given[1] if len(given) > 1 else ()
        kwargs = given[2] if len(given) > 2 else {}
    else:
        make, args, kwargs = given, (), {}
    if not callable(make) or not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        raise ConfigError(f"{field} is {given!r:.200}; choices: {choices}")
    return make(*args, **kwargs)


def make_teacher(given: Any, connect: Callable[[str], Teacher]) -> nn.Module | Teacher:
    """The module or Teacher that the field `teacher_model` stands for; for a URL, connect to the teacher there."""
    made = given
    if isinstance(given, type) or not isinstance(given, nn.Module | str | Teacher):
        made = make_model(given, "teacher_model", _TEACHER_CHOICES)
    if isinstance(made, str):
        return connect(made)
    if isinstance(made, nn.Module | Teacher):
        return made
    raise ConfigError(f"teacher_model made a {type(made).__name__}; choices: {_TEACHER_CHOICES}")


def _pair(pair: Any) -> tuple[str, str]:
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(layer, str) for layer in pair):
        raise ConfigError(f"criterion has the key {pair!r}; a key must be (student_layer, teacher_layer)")
    return pair


def _loss(loss: Any, pair: tuple[str, str]) -> nn.Module:
    made = loss
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        try:
            made = loss()
        except TypeError as err:
            raise ConfigError(f"criterion{list(pair)}: {loss.__name__}() failed, give an instance: {err}") from err
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"criterion{list(pair)} is a {type(loss).__name__}; choices: a loss, which is an nn.Module, or its class"
        )
    return made


def _check_balancer(balancer: Any, several: bool) -> None:
    if balancer is None:
        if several:
            raise ConfigError(
                "criterion has several layer pairs; they need a loss_balancer, such as StaticLossBalancer()"
            )
        return
    if not isinstance(balancer, DistillationLossBalancer):
        raise ConfigError(f"loss_balancer is a {type(balancer).__name__}; choices: a DistillationLossBalancer, None")
    if next(balancer.parameters(), None) is not None:
        raise ConfigError("loss_balancer has parameters, which would not be trained; keep its state in buffers")
