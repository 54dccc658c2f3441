"""The file of a checkpoint: its content, and how it is read without running code."""

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash
from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.values.tensors import bytes_of
from torch.nn.parameter import is_lazy

from schoolhouse.errors import CheckpointError
from schoolhouse.files import write_whole

_FORMAT = "schoolhouse.student.v1"  # in the format of torch, which has checksums of its own
_DIGESTED = "schoolhouse.student.v2"  # a safetensors file with the digest of all that it holds
_DIGEST = "schoolhouse.digest"
_MAX_NAMES = 5  # how many names an error message lists
_SAFETENSORS_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def write(path: Path, facts: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Write a state and the facts about it to `path`, or to the file to which it links.

    Raises:
        CheckpointError: if the file could not be read back; the former file stays as it was.
    """
    _check_is_a_file(path)
    for name, value in state.items():
        _check_has_values(name, value)
    content = _content({"format": _FORMAT, **facts}, state)
    write_whole(Path(os.path.realpath(path)), [content])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the facts about a state, and the state, on CPU.

    Raises:
        CheckpointError: if the file is damaged, or of another format.
        FileNotFoundError: if there is no such file.
    """
    _check_is_a_file(path)
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(path)
    if head[8:] == b"{":
        return _read_safetensors(path)
    raise CheckpointError(f"{path} is neither a safetensors file nor one that torch.save wrote")


def shortened(names: list[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")


def _check_is_a_file(path: Path) -> None:
    """Raises if there is something else at `path`: a pipe may block for ever, and a device has no end."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is a pipe, a socket or a device; give the name of a regular file")


# Writing.


def _check_has_values(name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and value.is_nested:
        raise CheckpointError(f"{name} is a nested tensor, which cannot be restored; keep a padded one instead")
    for tensor in _tensors(value):
        if is_lazy(tensor):
            raise CheckpointError(f"{name} is uninitialised and has no values; run a forward of the student first")
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no values; load the student first")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors within dicts, lists and tuples, however deep, even if these contain themselves."""
    items, seen = [value], set[int]()
    for item in items:  # the list grows meanwhile
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, Mapping | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            items.extend(item.values() if isinstance(item, Mapping) else item)


def _content(facts: Mapping[str, str], state: Mapping[str, Any]) -> bytes:
    try:
        if all(map(_fits_safetensors, state, state.values())):
            tensors, tied = _untied(state)
            facts = {**facts, "format": _DIGESTED, "tied": json.dumps(tied)}
            content: bytes = safetensors.torch.save(tensors, {**facts, _DIGEST: _digest(facts, tensors)})
            return content
        return _torch_content({**facts, "state": dict(state)})
    except MemoryError:
        raise
    except Exception as err:  # pickling an object may raise anything
        odd = [f"{n} ({type(value).__name__})" for n, value in state.items() if not _fits_safetensors(n, value)]
        raise CheckpointError(
            f"the student's state holds something that cannot be saved, or that only running code could restore, in "
            f"{shortened(odd) or 'its tensors or their names'}: make its get_extra_state return tensors, numbers, "
            "strings, lists and dicts, and save a student before it is quantised"
        ) from err


def _fits_safetensors(name: str, value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dtype in _SAFETENSORS_DTYPES
    return plain and name != "__metadata__"


def _untied(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once, in memory of its own; and, by name, the name of the equal tensor for tied ones."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    taken: set[tuple[torch.device, int]] = set()
    for name, value in state.items():
        plain = value.detach().resolve_neg()
        kept = names.setdefault(_view(plain), name) if plain.numel() else name
        if kept != name:
            tied[name] = kept
        else:
            memory = plain.untyped_storage()
            alone = memory.nbytes() == plain.nbytes and (plain.device, memory.data_ptr()) not in taken
            taken.add((plain.device, memory.data_ptr()))
            tensors[name] = plain.contiguous() if alone else plain.contiguous().clone()
    return tensors, tied


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A key that is equal for tensors that are the same view of the same memory."""
    memory = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*memory, tensor.shape, tensor.stride(), tensor.dtype)


def _torch_content(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    torch.load(file, map_location="meta", weights_only=True)  # fails now if `restore` would fail later
    return file.getvalue()


# Reading.


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_digest(facts, state)
        tied = json.loads(facts.get("tied", "{}"))
        return facts, {**state, **{name: state[kept] for name, kept in tied.items()}}
    except Exception as err:  # a damaged file may make any of this raise anything
        raise CheckpointError(f"{path} is damaged: {err!r}") from err


def _digest(facts: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """The XXH3 digest of the facts and of each tensor's name, dtype, shape and bytes, in the order of the names."""
    digest = xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        here = tensor.cpu()
        digest.update(json.dumps([name, str(here.dtype), [*here.shape]]).encode())
        digest.update(memory_of(bytes_of(here)))
    return digest.hexdigest()


def _check_digest(facts: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `ValueError` if something was changed in a file that has a digest; those of other programs have none."""
    if _DIGEST not in facts and facts.get("format") != _DIGESTED:
        return
    given = {name: value for name, value in facts.items() if name != _DIGEST}
    if _digest(given, tensors) != facts.get(_DIGEST):
        raise ValueError("its digest does not match what it holds, so something in it was changed")


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        _check_zip(path)
        with path.open("rb") as file:  # not by path, whose name torch may take for another format
            content = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as err:  # a damaged file may make this raise anything
        raise CheckpointError(
            f"{path} is damaged, or holds objects that only running code could restore; nothing of it was run"
        ) from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a student's state is a dict")
    state = content.get("state") if content.get("format") == _FORMAT else content
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} holds no student's state: its names are not strings")
    return (content if state is not content else {}), state


def _check_zip(path: Path) -> None:
    """Refuse parts whose checksums do not match, at which torch does not look, and compressed ones.

    torch.save never compresses, and a compressed part may take a thousand times the file's size.
    """
    with zipfile.ZipFile(path) as archive:
        packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CheckpointError(f"{path} has compressed parts, which torch.save does not write: {shortened(packed)}")
        if (changed := archive.testzip()) is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of its part {changed} does not match")
