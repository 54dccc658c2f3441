"""What `convert` is told: modes and their configs, validated once."""

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
        loss_balancer: reduces the losses to a scalar; needed with several pairs or a loss of the student's own.
        expose_minimal_state_dict: keep the weights of a teacher in this process out of `state_dict()`.
        encodings: how the outputs of teacher layers travel, `{teacher_layer: encoding}` of `schoolhouse.encodings`, or
            one for all; without one they travel as computed. A teacher in this process gives what would have arrived.
        positions: for encodings that are `at_positions`: called with what the forward is called with, it returns the
            bool or 0/1 mask `[batch, length]` of the positions that the losses will read.
        eval_kd: ask the teacher as each forward begins in eval mode and under `no_grad` too, as in training. Without it
            such a forward asks nobody, and `compute_kd_loss` asks for the last one's batch, of which a copy is kept.
    """

    teacher_model: Any = None
    criterion: Any = None
    loss_balancer: DistillationLossBalancer | None = None
    expose_minimal_state_dict: bool = True
    encodings: Any = None
    positions: Callable[..., Any] | None = None
    eval_kd: bool = False

    def pairs(self) -> dict[tuple[str, str], nn.Module]:
        """The criterion as `{(student_layer, teacher_layer): loss instance}`."""
        if self.criterion is None:
            raise ConfigError("criterion is missing; give a loss, or {(student_layer, teacher_layer): loss}")
        given = self.criterion if isinstance(self.criterion, Mapping) else {("", ""): self.criterion}
        if not given:
            raise ConfigError("criterion has no layer pairs; give at least one")
        return {_pair(pair): _loss(loss, pair) for pair, loss in given.items()}

    def tap_encodings(self, layers: Iterable[str]) -> dict[Tap, Encoding]:
        """The encodings by tap of the teacher's layers in the criterion; raises `ConfigError` for others."""
        taps = tuple(dict.fromkeys(map(Tap, layers)))
        given = self.encodings if isinstance(self.encodings, Mapping) else dict.fromkeys(taps, self.encodings)
        pairs = zip(taps, encodings_of(taps, given), strict=True)
        found = {tap: encoding for tap, encoding in pairs if encoding is not None}
        at_positions = any(encoding.positions for encoding in found.values())
        if at_positions and not callable(self.positions):
            raise ConfigError(
                f"positions is {self.positions!r:.80}, and encodings are at_positions; give a function that makes the "
                "mask of what the forward is called with"
            )
        if self.positions is not None and not at_positions:
            raise ConfigError("positions is given, and no encoding needs it; wrap one in encodings.at_positions")
        return found

    def check(self) -> None:
        """Raise `ConfigError` for what is wrong or missing, with the field's name and the choices."""
        if self.teacher_model is None:
            raise ConfigError(f"teacher_model is missing; choices: {_TEACHER_CHOICES}")
        for name in ("expose_minimal_state_dict", "eval_kd"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} is {value!r}; choices: True, False")
        several = isinstance(self.criterion, Mapping) and len(self.criterion) > 1
        _check_balancer(self.loss_balancer, several)


@dataclass(frozen=True, kw_only=True)
class LayerwiseKDConfig(KDLossConfig):
    """Config of the mode "layerwise_kd": as `KDLossConfig`, with a criterion of named layers only."""

    def pairs(self) -> dict[tuple[str, str], nn.Module]:
        """The criterion; each student layer takes the inputs of one teacher layer."""
        if self.criterion is not None and not isinstance(self.criterion, Mapping):
            raise ConfigError("criterion: the mode 'layerwise_kd' needs {(student_layer, teacher_layer): loss}")
        pairs = super().pairs()
        if any("" in pair for pair in pairs):
            raise ConfigError("criterion: the mode 'layerwise_kd' needs named layers on both sides; '' is the model")
        layers = [layer for layer, _ in pairs]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        if twice:
            raise ConfigError(
                f"criterion: the student's layers {twice} stand in several pairs; in the mode 'layerwise_kd' a layer "
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
    """The name and config of the one mode that `mode` stands for: a string, a list, a list of pairs, or a dict."""
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
    """What `given` is or makes: a module, or a class, callable or tuple `(callable, args, kwargs)` that returns one."""
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
    """The module or Teacher that the field `teacher_model` stands for; a URL is connected to."""
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
        raise ConfigError("loss_balancer has parameters, which no loss would train; keep its state in buffers")
