"""convert() and export(): a student and a config become a DistillationModel, and back."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from schoolhouse.balancers import DistillationLossBalancer
from schoolhouse.errors import ConfigError
from schoolhouse.meta_model import Distillation, DistillationModel
from schoolhouse.remote import connect
from schoolhouse.taps import check_modules, module_names
from schoolhouse.teachers import LocalTeacher, Teacher

_FIELDS = ("teacher_model", "criterion", "loss_balancer")


def convert(model: nn.Module, mode: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """Turn `model`, in place, into a meta-model that distils a teacher into it.

    Args:
        model: the student; afterwards an instance of a dynamic subclass of its own class.
        mode: `[("kd_loss", config)]`. The config's fields: `teacher_model` (a Teacher, an `nn.Module`, or a
            `grpc://` URL), `criterion` (one loss for the whole outputs, or `{(student_layer, teacher_layer): loss}`),
            and `loss_balancer`, needed with several pairs or a student loss.

    Raises:
        ConfigError: a field is wrong; the message names it.
        UnknownTapError: a layer that the student or the teacher does not have; lists close matches.
    """
    if isinstance(model, DistillationModel):
        raise ConfigError("the model is converted already; export() it first")
    config = _config(mode)
    criterion = _criterion(config.get("criterion"))
    balancer = config.get("loss_balancer")
    if balancer is not None and not isinstance(balancer, DistillationLossBalancer):
        raise ConfigError(f"loss_balancer is a {type(balancer).__name__}; expected a DistillationLossBalancer or None")
    if balancer is None and len(criterion) > 1:
        raise ConfigError("criterion has several layer pairs; they need a loss_balancer, such as StaticLossBalancer()")
    teacher = _teacher(config.get("teacher_model"))
    check_modules((layer for layer, _ in criterion), module_names(model), "the student")
    description = teacher.describe()
    check_modules((layer for _, layer in criterion), description.modules, f"teacher {description.name!r}")
    student_class = type(model)
    state = Distillation(teacher, criterion, balancer, student_class)
    for layer in dict.fromkeys(layer for layer, _ in criterion if layer != ""):
        state.handles.append(model.get_submodule(layer).register_forward_hook(_capture(state, layer)))
    object.__setattr__(model, "_distillation", state)
    model.__class__ = _meta_class(student_class)  # type: ignore[arg-type]
    return model


def export(model: nn.Module) -> nn.Module:
    """The plain student back: the same object, of its own class, without hooks."""
    if not isinstance(model, DistillationModel):
        raise ConfigError(f"export needs a converted model; this is a plain {type(model).__name__}")
    state = model._distillation
    for handle in state.handles:
        handle.remove()
    state.drop_step()
    model.__class__ = state.student_class  # type: ignore[assignment]
    object.__delattr__(model, "_distillation")
    return model


def _config(mode: Any) -> Mapping[str, Any]:
    form = "mode must be [('kd_loss', config)]"
    if not isinstance(mode, Sequence) or len(mode) != 1 or not isinstance(mode[0], Sequence) or len(mode[0]) != 2:
        raise ConfigError(f"{form}; got {mode!r}")
    name, config = mode[0]
    if name != "kd_loss" or not isinstance(config, Mapping):
        raise ConfigError(f"{form}; got the mode {name!r}; choices: 'kd_loss'")
    unknown = [key for key in config if key not in _FIELDS]
    if unknown:
        raise ConfigError(f"the config has unknown fields {unknown}; choices: {', '.join(_FIELDS)}")
    return config


def _criterion(criterion: Any) -> dict[tuple[str, str], nn.Module]:
    if criterion is None:
        raise ConfigError("criterion is missing; give a loss, or {(student_layer, teacher_layer): loss}")
    pairs = dict(criterion) if isinstance(criterion, Mapping) else {("", ""): criterion}
    if not pairs:
        raise ConfigError("criterion has no layer pairs; give at least one")
    for loss in pairs.values():
        if not isinstance(loss, nn.Module):
            raise ConfigError(f"criterion holds a {type(loss).__name__}; each loss must be an nn.Module instance")
    return pairs


def _teacher(given: Any) -> Teacher:
    if isinstance(given, nn.Module):
        return LocalTeacher(given)
    if isinstance(given, str):
        return connect(given)
    if isinstance(given, Teacher):
        return given
    raise ConfigError(f"teacher_model is a {type(given).__name__}; choices: a Teacher, an nn.Module, a grpc:// URL")


def _capture(state: Distillation, layer: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        if state.recording and state.step is not None:
            state.step.outputs[layer] = output

    return hook


@functools.cache
def _meta_class(student_class: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(student_class.forward)
    def forward(self: DistillationModel, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    name = f"Distillation{student_class.__name__}"
    return type(name, (DistillationModel, student_class), {"forward": forward, "__module__": student_class.__module__})
