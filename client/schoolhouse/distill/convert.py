"""convert() turns a student and a config into a DistillationModel; export() turns it back."""

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from schoolhouse_wire.encodings import Encoding, Hidden
from schoolhouse_wire.torch_private import children_of
from torch import nn

from schoolhouse.distill.config import KDLossConfig, make_model, make_teacher, read_mode
from schoolhouse.distill.layerwise import LayerwiseDistillationModel
from schoolhouse.distill.loss_arguments import LossArguments
from schoolhouse.distill.mode import EXTRAS
from schoolhouse.distill.model import DistillationModel, meta_class
from schoolhouse.distill.parallel import is_sharded, unwrapped
from schoolhouse.distill.step import Distillation
from schoolhouse.distill.unseen import Unseen
from schoolhouse.errors import ConfigError
from schoolhouse.remote.connecting import connect
from schoolhouse.taps import check_modules, module_names
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.teachers.protocol import Teacher

_STUDENT_CHOICES = "an nn.Module, or a class, callable or tuple (callable, args, kwargs) that makes one"
_KINDS = {"kd_loss": DistillationModel, "layerwise_kd": LayerwiseDistillationModel}


def convert(model: Any, mode: Any) -> Any:
    """Turn `model`, in place, into a meta-model that distils a teacher into it.

    Args:
        model: the student, which becomes an instance of a dynamic subclass of its own class. A class, a callable or a
            tuple `(callable, args, kwargs)` is called first to make the student.
        mode: one mode, as a name, `[name]`, `[(name, config)]` or `{name: config}`. The modes are "kd_loss"
            (`KDLossConfig`), "layerwise_kd" (`LayerwiseKDConfig`), and "export_student", which is `export`. A config
            is an object of that class or a dict of its fields.

    With DistributedDataParallel, convert the inner module before you wrap it. Wrap it without `static_graph`, and
    without `find_unused_parameters` if a loss has parameters. All parameters that require gradients must take part in
    the loss: if the losses are at inner layers only, freeze the layers after them before wrapping. With FSDP2
    (`fully_shard`), shard before or after `convert`; if before, also shard each loss that has parameters. Each rank
    asks the teacher for its own rows.

    Raises:
        ConfigError: if a field is wrong; the message names it and the choices.
        UnknownTapError: for a layer that the student or the teacher does not have; lists close matches.
    """
    name, config = read_mode(mode)
    if name == "export_student":
        return export(model)
    model = model if isinstance(model, nn.Module) else make_model(model, "model", _STUDENT_CHOICES)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model made a {type(model).__name__}; choices: {_STUDENT_CHOICES}")
    _check_student(model)
    config.check()
    pairs = config.pairs()
    check_modules((layer for layer, _ in pairs), module_names(model), "the student")
    return _convert(model, config, pairs, _KINDS[name])


def _convert(
    model: nn.Module, config: KDLossConfig, pairs: dict[tuple[str, str], nn.Module], kind: type[DistillationModel]
) -> nn.Module:
    _check_sharding(model, pairs.values())
    _check_trainable(model)
    encodings = config.tap_encodings(layer for _, layer in pairs)
    teacher, parameters = _teacher(model, config.teacher_model, pairs, encodings.values())
    if encodings:
        _check_encodes(teacher)
    state = Distillation(
        teacher=teacher,
        owns_teacher=teacher is not config.teacher_model,
        criterion=pairs,
        loss_arguments=LossArguments(pairs.values()),
        unseen=Unseen(parameters),
        encodings=encodings,
        positions=config.positions,
        asks_at_once=config.eval_kd or kind._schoolhouse_mode.needs_inputs,
        original_cls=type(model),
        minimal_state_dict=config.expose_minimal_state_dict,
        own_forward=model.__dict__.pop("forward", None),
    )
    object.__setattr__(model, "_schoolhouse", state)
    model.__class__ = meta_class(kind, type(model))
    assert isinstance(model, DistillationModel)
    model._schoolhouse_mode.attach(model, state, config.loss_balancer)
    return model


def _teacher(
    student: nn.Module, given: Any, pairs: Iterable[tuple[str, str]], encodings: Iterable[Encoding]
) -> tuple[Teacher, Iterable[str]]:
    """The teacher, checked to have all the layers, and the names of the parameters of its forward.

    A module is frozen only after a check that it shares no parameters with the student, which would freeze these too.
    """
    made = make_teacher(given, connect)
    heads = [encoding.head for encoding in encodings if isinstance(encoding, Hidden)]
    layers = [*(layer for _, layer in pairs), *heads]
    module = made.module if isinstance(made, LocalTeacher) else made
    if isinstance(module, nn.Module):
        _check_apart(student, module)
        check_modules(layers, module_names(module), "the teacher")
        local = made if isinstance(made, LocalTeacher) else LocalTeacher(module)
        return local, local.parameters
    description = module.describe()
    check_modules(layers, description.modules, f"teacher {description.name!r}", tappable=True)
    return module, description.parameters


def _check_encodes(teacher: Teacher) -> None:
    try:
        inspect.signature(teacher.submit).bind((), {}, (), encodings={}, positions=None)
    except TypeError as err:
        raise ConfigError(
            f"encodings are given, but the submit method of teacher_model, a {type(teacher).__name__}, does not take "
            f"them ({err}); choices: no encodings, or a submit method with encodings= and positions="
        ) from err


def export(model: nn.Module) -> nn.Module:
    """Give the plain student back: the same object, of its own class, without hooks and without a wrapper."""
    inner = unwrapped(model)
    if inner is not model:
        warnings.warn(
            f"export removes the wrapper {type(model).__name__} and changes the model inside; wrap it again if needed",
            stacklevel=2,
        )
    if not isinstance(inner, DistillationModel):
        warnings.warn(f"there is nothing to export: this is a plain {type(inner).__name__}", stacklevel=2)
        return inner
    return inner.export()


def _check_student(model: nn.Module) -> None:
    if isinstance(model, DistillationModel):
        raise ConfigError("the model is converted already; export() it first")
    if unwrapped(model) is not model:
        then = "shard it with fully_shard" if type(model).__name__ == "FullyShardedDataParallel" else "wrap it"
        raise ConfigError(
            f"the model is wrapped in {type(model).__name__}, which would not see the losses' parameters and would be "
            f"left behind: convert the module inside first, then {then}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            "the model is a ScriptModule, whose class cannot change; convert the module that it was made of"
        )
    tensors = (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))
    taken = [name for name in EXTRAS if name in {*children_of(model), *dict(tensors), *vars(model)}]
    if taken:
        raise ConfigError(f"the model has {taken} of its own, and convert adds its parts by these names: rename them")


def _check_sharding(student: nn.Module, losses: Iterable[nn.Module]) -> None:
    alone = [type(loss).__name__ for loss in losses if [*loss.parameters()] and not is_sharded(loss)]
    if alone and is_sharded(student):
        raise ConfigError(
            f"the student is sharded and the trainable losses ({', '.join(alone)}) are not, so their gradients would "
            "not be averaged over ranks: fully_shard each loss too before convert, or convert first"
        )


def _check_trainable(student: nn.Module) -> None:
    parameters = [*student.parameters()]
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        warnings.warn(
            "no parameter of the student requires gradients, so nothing will be trained; if it is a copy of a model "
            "that has been a teacher, call student.requires_grad_() first",
            stacklevel=4,
        )


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    own = {id(parameter): name for name, parameter in student.named_parameters()}
    shared = [own[id(parameter)] for parameter in teacher.parameters() if id(parameter) in own]
    if student is teacher or shared:
        raise ConfigError(
            f"teacher_model shares parameters with the student ({', '.join(shared[:5])}), which would be frozen with "
            "the teacher; give a copy.deepcopy of it"
        )
