"""save() and restore(): write a student to disk and read it, without the teacher and without running code."""

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from schoolhouse.checkpoint.file import read, shortened, write
from schoolhouse.distill.layerwise import LayerwiseDistillationModel
from schoolhouse.distill.mode import BALANCER, LOSSES
from schoolhouse.distill.model import DistillationModel
from schoolhouse.distill.parallel import is_sharded, unwrapped
from schoolhouse.errors import CheckpointError


def save(model: nn.Module, path: str | os.PathLike[str], *, include_losses: bool = False) -> None:
    """Write the student to `path`, without the teacher.

    The file is in the safetensors format or, if the state holds something that this format cannot store (such as a
    module's extra state), in the format that `torch.load(weights_only=True)` reads. Tensors that share memory are
    written once. The file is written beside `path`, synced and renamed, so that a crash leaves the former checkpoint as
    it was. An existing file keeps its permission bits, and a link keeps pointing to its target, which is replaced.
    Saving takes memory for a copy of the student.

    With FSDP2, call it on every rank; rank 0 writes the whole tensors. With DistributedDataParallel, call it on rank 0.

    Args:
        model: a converted or a plain student, or one inside DistributedDataParallel or torch.compile.
        path: the file; its folder must exist.
        include_losses: also write the losses' parameters and the balancer's state, which `restore` loads into a
            converted model.

    Raises:
        CheckpointError: if the state holds something that cannot be read back without running code, or a tensor without
            values; the former checkpoint stays as it was.
    """
    inner = unwrapped(model)
    sharded = is_sharded(inner)
    state = _state_of(inner, sharded)
    if isinstance(inner, DistillationModel) and not include_losses:
        state = {name: value for name, value in state.items() if not _extra(name)}
    try:
        if not sharded or torch.distributed.get_rank() == 0:
            write(Path(path), _facts(inner), state)
    finally:
        if sharded:
            torch.distributed.barrier()


def restore(student: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> nn.Module:
    """Load a file that `save` wrote into `student`, which is returned.

    A plain student stays plain; if the file comes from a converted student, a warning says how to convert it again. A
    converted student also gets the state of the losses and the balancer, if the file has it. Nothing is loaded unless
    everything fits, and no code in a file is ever run. If loading fails all the same, the student's former state is put
    back, which takes memory for a copy of the student beside that for the file.

    Args:
        student: a student of the same architecture, converted or not. Unless it is sharded, its tensors need memory, so
            they cannot be on the device `meta`.
        path: the file.
        strict: refuse a file in which names are missing, or that has unknown ones. In any case shapes and layouts must
            be equal, and no complex number becomes a real one, nor a float an integer; a float may change its
            precision.

    Raises:
        CheckpointError: if the file is damaged, or of another format or architecture, or if the student's own code
            refuses it; the student is unchanged.
        FileNotFoundError: if there is no such file.
    """
    inner = unwrapped(student)
    facts, given = read(Path(path))
    mode = _mode(facts, path)
    own, state = _own_state(inner), given
    if isinstance(inner, DistillationModel):
        own = _of_same_parts(own, given)
    else:
        state = _of_same_parts(given, own)
    sharded = is_sharded(inner)
    _check(state, own, strict, sharded, path)
    state = {name: value for name, value in state.items() if name in own}
    _load_or_put_back(inner, state, {name: own[name] for name in state}, sharded, path)
    if not isinstance(inner, DistillationModel):
        _say_how_to_convert(mode, len(_of_same_parts(given, own)) < len(given))
    return student


def _extra(name: str) -> str:
    """The part of a meta-model, losses or balancer, to which a name in its state belongs; "" for the student."""
    part = name.split(".", 1)[0]
    return part if part in (LOSSES, BALANCER) else ""


def _of_same_parts(state: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A state without losses or balancer if the `other` state has none."""
    parts = {"", *map(_extra, other)}
    return {name: value for name, value in state.items() if _extra(name) in parts}


# State of models.


def _own_state(model: nn.Module) -> dict[str, Any]:
    """The model's state, without the teacher's."""
    if not isinstance(model, DistillationModel):
        return model.state_dict()
    with model.hide_teacher_model():
        state: dict[str, Any] = model.state_dict()
        return state


def _state_of(model: nn.Module, sharded: bool) -> dict[str, Any]:
    """The model's state in whole tensors; of a sharded model on rank 0 only."""
    if not sharded:
        return _own_state(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with model.hide_teacher_model() if isinstance(model, DistillationModel) else contextlib.nullcontext():
        return get_model_state_dict(model, options=options)


def _load(model: nn.Module, state: dict[str, Any], sharded: bool) -> None:
    if not sharded:
        model.load_state_dict(state, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    with model.hide_teacher_model() if isinstance(model, DistillationModel) else contextlib.nullcontext():
        set_model_state_dict(model, state, options=options)


def _load_or_put_back(
    model: nn.Module, state: dict[str, Any], own: Mapping[str, Any], sharded: bool, path: Any
) -> None:
    """Load `state`; if that raises, load back the former values, which are `own`."""
    before: dict[str, Any] = {}
    try:
        before.update((name, _copy(value, sharded)) for name, value in own.items())
        _load(model, state, sharded)
    except BaseException as err:
        left = _put_back(model, before)
        if not isinstance(err, Exception):
            raise
        raise CheckpointError(
            f"{path} cannot be loaded into this student ({type(err).__name__}: {err}); the student is unchanged{left}"
        ) from err


def _copy(value: Any, sharded: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    return value.detach().clone() if sharded else value.detach().to("cpu", copy=True)


def _put_back(model: nn.Module, before: dict[str, Any]) -> str:
    """Load the former values; returns a remark for the error message if some may not be as before."""
    without_memory = any(isinstance(value, torch.Tensor) and value.is_meta for value in before.values())
    try:
        model.load_state_dict(before, strict=False, assign=without_memory)
    except Exception:
        return ", except for what its own code, such as set_extra_state, changed before it raised"
    return ""


# Whether a file fits a student.


def _check(state: Mapping[str, Any], own: Mapping[str, Any], strict: bool, sharded: bool, path: Any) -> None:
    found: dict[str, list[str]] = {}
    for what, name in _misfits(state, own, strict, sharded):
        found.setdefault(what, []).append(name)
    if found:
        faults = "; ".join(f"{len(names)} {what}: {shortened(names)}" for what, names in found.items())
        raise CheckpointError(f"{path} does not fit this student, which is unchanged: {faults}")


def _misfits(
    state: Mapping[str, Any], own: Mapping[str, Any], strict: bool, sharded: bool
) -> Iterator[tuple[str, str]]:
    """The kind of each misfit, and the name of its value."""
    for name, value in state.items():
        if name in own and name.rpartition(".")[2] != "_extra_state":  # the student's own code checks extra state
            if unwritable := _unwritable(own[name], sharded):
                yield unwritable, name
            elif difference := _difference(value, own[name]):
                yield "of another kind, shape or dtype", f"{name} is {difference}"
    if strict:
        yield from (("missing in the file", name) for name in own if name not in state)
        yield from (("unknown to the model", name) for name in state if name not in own)


def _unwritable(own: Any, sharded: bool) -> str:
    """Why nothing can be loaded into a value of the student, and what to do; "" if something can."""
    if not isinstance(own, torch.Tensor):
        return ""
    if is_lazy(own):
        return "uninitialised in the model (run a forward first)"
    if own.is_nested:
        return "nested in the model (keep padded tensors instead)"
    if own.is_meta and not sharded:
        return "on the meta device in the model (call its to_empty(device=...), or build it with memory, first)"
    steps = zip(own.shape, own.stride(), strict=True) if own.layout is torch.strided else ()
    if any(size > 1 and step == 0 for size, step in steps):
        return "expanded in the model, with elements that share memory (make them .contiguous() first)"
    return ""


def _difference(given: Any, own: Any) -> str:
    """What the file and the model have, if the file's value cannot become the model's without loss; otherwise ""."""
    tensors = isinstance(given, torch.Tensor), isinstance(own, torch.Tensor)
    if not any(tensors):
        return ""
    if _kind(given) != _kind(own):
        return f"{_kind(given)} in the file and {_kind(own)} in the model"
    if given.is_meta:
        return "without values in the file, on the meta device"
    if given.shape != own.shape:
        return f"{tuple(given.shape)} in the file and {tuple(own.shape)} in the model"
    if _loses(given.dtype, own.dtype):
        return f"{given.dtype} in the file and {own.dtype} in the model"
    return ""


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"no tensor but a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    return f"a quantised tensor of {value.dtype}" if value.is_quantized else f"a tensor of layout {value.layout}"


def _loses(given: torch.dtype, own: torch.dtype) -> bool:
    """Whether a cast loses more than precision."""
    return not own.is_complex and (given.is_complex or (given.is_floating_point and not own.is_floating_point))


# What a file says about the meta-model.


def _facts(model: nn.Module) -> dict[str, str]:
    converted = isinstance(model, DistillationModel)
    student = model.original_cls if isinstance(model, DistillationModel) else type(model)
    facts = {"student": f"{student.__module__}.{student.__qualname__}"}
    return {**facts, "distillation": json.dumps(_distillation(model))} if converted else facts


def _distillation(model: Any) -> dict[str, Any]:
    state, balancer = model._schoolhouse, model.loss_balancer
    return {
        "mode": "layerwise_kd" if isinstance(model, LayerwiseDistillationModel) else "kd_loss",
        "criterion": [[*pair, type(loss).__name__] for pair, loss in state.criterion.items()],
        "balancer": type(balancer).__name__ if balancer is not None else None,
    }


def _mode(facts: Mapping[str, Any], path: Any) -> str:
    """The argument `mode` of `convert`, as code; "" if the file does not come from a converted student."""
    if "distillation" not in facts:
        return ""
    try:
        was = json.loads(facts["distillation"])
        criterion = ", ".join(f"({s!r}, {t!r}): {loss}(...)" for s, t, loss in was["criterion"])
        balancer = f", 'loss_balancer': {was['balancer']}(...)" if was["balancer"] else ""
        return f"[({was['mode']!r}, {{'teacher_model': ..., 'criterion': {{{criterion}}}{balancer}}})]"
    except (KeyError, TypeError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} is damaged: its record of the distillation cannot be read: {err!r}") from err


def _say_how_to_convert(mode: str, extras: bool) -> None:
    if not mode and not extras:
        return
    again = mode or "[('kd_loss', {...})]"
    also = "; then restore again, for the losses and the balancer in the file" if extras else ""
    warnings.warn(
        f"restored only the student; to go on distilling, convert it: convert(student, mode={again}){also}",
        stacklevel=3,
    )
