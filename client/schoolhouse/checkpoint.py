"""save() and restore(): the student on disk, without the teacher and without code."""

import contextlib
import fcntl
import glob
import json
import os
import pickle
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import nn

from schoolhouse.distillation import is_sharded, unwrapped
from schoolhouse.distillation_model import BALANCER, LOSSES, DistillationModel
from schoolhouse.errors import CheckpointError
from schoolhouse.layerwise_distillation_model import LayerwiseDistillationModel

_FORMAT = "schoolhouse.student.v1"
_MAX_NAMES = 5  # that an error message lists
_SAFETENSORS_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def save(model: nn.Module, path: str | os.PathLike[str], *, include_losses: bool = False) -> None:
    """Write the student alone to `path`; the teacher is never in it.

    The file is safetensors, or, where the student's state holds what that format cannot (such as a module's extra
    state), what `torch.load(weights_only=True)` reads. Tensors that share memory are written once. It is written
    beside `path`, synced and renamed, so that a crash leaves the former checkpoint as it was. It takes memory for a
    copy of the student.

    With FSDP2 every rank calls it, and rank 0 writes the whole tensors; with DistributedDataParallel call it on rank 0.

    Args:
        model: a converted or a plain student, or one inside DistributedDataParallel or torch.compile.
        path: the file; its folder must exist.
        include_losses: also write the losses' parameters and the balancer's state. `restore` puts them into a
            converted model.

    Raises:
        CheckpointError: if the state holds an object that cannot be read back without running code.
    """
    inner = unwrapped(model)
    sharded = is_sharded(inner)
    state = _state_of(inner, sharded)
    if not include_losses:
        state = {name: value for name, value in state.items() if not _is_extra(name)}
    try:
        if not sharded or torch.distributed.get_rank() == 0:
            _write(Path(path), state, inner)
    finally:
        if sharded:
            torch.distributed.barrier()


def restore(student: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> nn.Module:
    """Load what `save` wrote into `student`, which is returned.

    A plain student stays plain: the meta-model does not come back. If the file is of a converted one, a warning says
    how to convert again. A converted student also gets the losses and the balancer's state, if the file has them.
    Nothing is loaded unless all of it fits, and no code in a file is ever run.

    Args:
        student: a student of the same architecture, converted or not.
        path: the file.
        strict: refuse a file that has too few or too many names; shapes must be equal in any case.

    Raises:
        CheckpointError: if the file is damaged, of another format, or of another architecture.
        FileNotFoundError: if there is none.
    """
    inner = unwrapped(student)
    facts, state = _read(Path(path))
    if not isinstance(inner, DistillationModel):
        _say_how_to_convert(facts, any(map(_is_extra, state)))
        state = {name: value for name, value in state.items() if not _is_extra(name)}
    given = {_extra(name) for name in state}
    sharded = is_sharded(inner)
    expected = {name: value for name, value in _own_state(inner).items() if _extra(name) in ("", *given)}
    _check(state, expected, strict, path)
    _load(inner, {name: value for name, value in state.items() if name in expected}, sharded)
    return student


def _extra(name: str) -> str:
    """The part of a meta-model, beside the student, that a name of its state belongs to; "" for the student."""
    part = name.split(".", 1)[0]
    return part if part in (LOSSES, BALANCER) else ""


def _is_extra(name: str) -> bool:
    return _extra(name) != ""


# State of models.


def _own_state(model: nn.Module) -> dict[str, Any]:
    """The state without a teacher's."""
    if not isinstance(model, DistillationModel):
        return model.state_dict()
    with model.hide_teacher_model():
        state: dict[str, Any] = model.state_dict()
        return state


def _state_of(model: nn.Module, sharded: bool) -> dict[str, Any]:
    """Whole tensors; of a sharded model on rank 0 alone."""
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


def _check(state: Mapping[str, Any], expected: Mapping[str, Any], strict: bool, path: Any) -> None:
    wrong = [
        f"{name} is {tuple(value.shape)} in the file and {tuple(expected[name].shape)} in the model"
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
        and isinstance(expected.get(name), torch.Tensor)
        and value.shape != expected[name].shape
    ]
    faults = [("of other shapes", wrong)]
    if strict:
        faults.append(("missing in the file", [name for name in expected if name not in state]))
        faults.append(("unknown to the model", [name for name in state if name not in expected]))
    found = [f"{len(names)} {what}: {_shortened(names)}" for what, names in faults if names]
    if found:
        raise CheckpointError(f"{path} does not fit this student, which is unchanged: {'; '.join(found)}")


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")


# What a file says of the meta-model.


def _facts(model: nn.Module) -> dict[str, str]:
    converted = isinstance(model, DistillationModel)
    student = model.original_cls if isinstance(model, DistillationModel) else type(model)
    facts = {"format": _FORMAT, "student": f"{student.__module__}.{student.__qualname__}"}
    return {**facts, "distillation": json.dumps(_distillation(model))} if converted else facts


def _distillation(model: Any) -> dict[str, Any]:
    state, balancer = model._distillation, model.loss_balancer
    return {
        "mode": "layerwise_kd" if isinstance(model, LayerwiseDistillationModel) else "kd_loss",
        "criterion": [[*pair, type(loss).__name__] for pair, loss in state.criterion.items()],
        "balancer": type(balancer).__name__ if balancer is not None else None,
    }


def _say_how_to_convert(facts: Mapping[str, Any], extras: bool) -> None:
    try:
        was = json.loads(facts["distillation"])
        criterion = ", ".join(f"({s!r}, {t!r}): {loss}(...)" for s, t, loss in was["criterion"])
        balancer = f", 'loss_balancer': {was['balancer']}(...)" if was["balancer"] else ""
        again = f"[({was['mode']!r}, {{'teacher_model': ..., 'criterion': {{{criterion}}}{balancer}}})]"
    except (KeyError, TypeError, ValueError):
        again = "[('kd_loss', {...})]"
        if not extras:
            return
    also = "; then restore again, for the losses and the balancer in the file" if extras else ""
    warnings.warn(
        f"restored the student alone; to go on distilling, convert it: convert(student, mode={again}){also}",
        stacklevel=3,
    )


# The file.


def _write(path: Path, state: dict[str, Any], model: nn.Module) -> None:
    facts = _facts(model)
    if all(map(_fits_safetensors, state.values())):
        tensors, tied = _untied(state)
        metadata = {**facts, "tied": json.dumps(tied)}
        _replace(path, lambda file: file.write(safetensors.torch.save(tensors, metadata)))
    else:
        _replace(path, lambda file: _save_torch({**facts, "state": dict(state)}, file))


def _fits_safetensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dtype in _SAFETENSORS_DTYPES


def _untied(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once, in memory of its own; and the names that stand for the same tensor as another name."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        plain = value.detach()
        if plain.device.type == "meta":
            raise CheckpointError(f"{name} is on the meta device and has no values; load the student first")
        key = (plain.device, plain.untyped_storage().data_ptr(), plain.storage_offset(), plain.shape, plain.stride())
        kept = names.setdefault(key, name) if plain.numel() else name
        if kept != name:
            tied[name] = kept
        else:
            alone = plain.untyped_storage().nbytes() == plain.nbytes
            tensors[name] = plain.contiguous() if alone else plain.contiguous().clone()
    return tensors, tied


def _save_torch(content: dict[str, Any], file: BinaryIO) -> None:
    torch.save(content, file)
    file.seek(0)
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as err:
        kinds = sorted({type(value).__name__ for value in content["state"].values()} - {"Tensor", "Parameter"})
        raise CheckpointError(
            f"the student's state holds objects that only running code could restore, within {kinds}: make its "
            "get_extra_state return tensors, numbers, strings, lists and dicts"
        ) from err


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside `path`, make sure that it is on disk, and rename it to `path`."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of a file")
    _remove_orphans(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with beside.open("x+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: so an orphan can be told from it
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _remove_orphans(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file says of itself, and the state in it, on CPU."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of a file")
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(path)
    if head[8:] == b"{":
        return _read_safetensors(path)
    raise CheckpointError(f"{path} is neither a safetensors file nor one that torch.save wrote")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tied = json.loads(facts.get("tied", "{}"))
        return facts, {**state, **{name: state[kept] for name, kept in tied.items()}}
    except (safetensors.SafetensorError, KeyError, ValueError, AttributeError) as err:
        raise CheckpointError(f"{path} is damaged: {err}") from err


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with path.open("rb") as file:  # by its name, torch may take it for something else
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as err:
        raise CheckpointError(
            f"{path} is damaged, or holds objects that only running code could restore; nothing of it was run"
        ) from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a student's state is a dict")
    state = content.get("state") if content.get("format") == _FORMAT else content
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds no student's state: its names are not strings")
    return (content if state is not content else {}), state
