"""A cache of fetched heads: on disk for later runs, and shared by the teachers of one process."""

import contextlib
import hashlib
import json
import os
import re
import struct
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
import torch
from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.values.tensors import on_cpu

from schoolhouse.errors import CorruptPayloadError
from schoolhouse.files import remove_orphans, write_whole
from schoolhouse.lm_head.head import Head

_FORMAT = "schoolhouse.head.v1"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FILE_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")

_Key: TypeAlias = tuple[str, str, str, str]  # folder, revision, name, tapped module
_guard = threading.Lock()
_locks: weakref.WeakValueDictionary[_Key, Any] = weakref.WeakValueDictionary()  # held while a head is loaded
_alive: weakref.WeakValueDictionary[_Key, Head] = weakref.WeakValueDictionary()
_warned: set[Path] = set()


def default_cache_folder() -> Path | None:
    """The default folder for heads; None for a user without a home directory, as in some containers."""
    try:
        return Path.home() / ".cache" / "schoolhouse" / "heads"
    except RuntimeError:
        return None


class HeadCache:
    """Heads by the teacher's revision, the head's submodule, and the module whose logits it computes.

    Several processes may share the folder, and it may be removed at any time. If it cannot be written to, there is a
    warning, and each process fetches its own heads.

    Args:
        folder: created when the first head is stored. None shares heads only within the process.
        max_bytes: bound of the folder's size; beyond it the least recently used files are removed.
    """

    def __init__(self, folder: str | Path | None, max_bytes: int = 8 << 30) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}; expected 0 or more")
        self.folder = None if folder is None else Path(folder).expanduser()
        self.max_bytes = max_bytes

    def fetch(self, revision: str, name: str, tap_module: str, load: Callable[[], Head], *, digest: str = "") -> Head:
        """The head from memory, from the folder or, as a last resort, from `load`; all callers here share one object.

        Of simultaneous callers one loads and the others wait; if it fails, the next one tries its own `load`. If the
        `digest` of the teacher's head is given, a cached head with another digest is fetched again.

        Raises:
            CorruptPayloadError: if `load` returns a head with another digest.
        """
        folder = str(self.folder.absolute()) if self.folder is not None else ""
        key = (folder, *_checked(revision, name, tap_module))
        with _guard:
            lock = _locks.setdefault(key, threading.Lock())
        with lock:
            head = _if_it_is(_alive.get(key), digest) or _if_it_is(self.get(revision, name, tap_module), digest)
            if head is None:
                head = _if_it_is(load(), digest)
                if head is None:
                    raise CorruptPayloadError(f"the teacher sent a head with another digest than its own {digest!r}")
                self.put(revision, name, tap_module, head)
            _alive[key] = head
            return head

    def get(self, revision: str, name: str, tap_module: str) -> Head | None:
        """The head on disk, checked by its digest, or None. A file that is damaged or of another head is removed."""
        if self.folder is None:
            return None
        path = _path(self.folder, revision, name, tap_module)
        try:
            if not path.is_file():
                return None
            head = _read(path, _checked(revision, name, tap_module))
        except MemoryError:
            raise
        except Exception:  # reading a damaged file may raise anything
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # so that `_prune` knows when it was used
        return head

    def put(self, revision: str, name: str, tap_module: str, head: Head) -> None:
        """Store the head on disk, unless it is larger than `max_bytes`."""
        if self.folder is None or head.nbytes > self.max_bytes:
            return
        path = _path(self.folder, revision, name, tap_module)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(path, head, _checked(revision, name, tap_module))
            self._prune(self.folder, path)
        except OSError as err:
            _warn(self.folder, err)

    def _prune(self, folder: Path, latest: Path) -> None:
        remove_orphans(folder, "*.safetensors")
        files: list[tuple[bool, float, int, Path]] = []
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may prune at the same time
                if _FILE_NAME.fullmatch(path.name):
                    facts = path.stat()
                    files.append((path == latest, facts.st_mtime, facts.st_size, path))
        kept_bytes = 0
        for _, _, nbytes, path in sorted(files, reverse=True):
            kept_bytes += nbytes
            if kept_bytes > self.max_bytes:
                path.unlink(missing_ok=True)


def _if_it_is(head: Head | None, digest: str) -> Head | None:
    return head if head is not None and digest in ("", head.digest) else None


def _path(folder: Path, revision: str, name: str, tap_module: str) -> Path:
    """The path of a head's file, whose name is a hash, since revisions and names come from a server."""
    key = json.dumps([_FORMAT, *_checked(revision, name, tap_module)])
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _warn(folder: Path, err: OSError) -> None:
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(
            f"the teacher's head cannot be kept in {folder}, so each run fetches it again: {err}", stacklevel=4
        )


def _checked(revision: str, name: str, tap_module: str) -> tuple[str, str, str]:
    if not revision:
        raise ValueError("the revision is ''; heads are kept by the revision that describe() returns")
    return revision, name, tap_module


# The file is in the safetensors format; it is written without another copy of the weights in memory.


def _write(path: Path, head: Head, key: tuple[str, str, str]) -> None:
    value, entries, weights = head.to_value(), dict[str, Any](), list[torch.Tensor]()
    end = 0
    for i, operation in enumerate(value["operations"]):
        for name, weight in operation["weights"].items():
            start, end = end, end + weight.nbytes
            weights.append(on_cpu(weight))
            place = {"shape": list(weight.shape), "data_offsets": [start, end]}
            entries[f"{i}.{name}"] = {"dtype": _DTYPES[weight.dtype], **place}
        operation["weights"] = list(operation["weights"])
    facts = {"format": _FORMAT, "key": json.dumps(key), "head": json.dumps(value)}
    header = json.dumps({"__metadata__": facts, **entries}).encode()
    header += b" " * (-len(header) % 8)
    write_whole(path, [struct.pack("<Q", len(header)), header, *map(memory_of, weights)])


def _read(path: Path, key: tuple[str, str, str]) -> Head:
    with safetensors.safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
        if facts.get("format") != _FORMAT or facts.get("key") != json.dumps(key):
            raise ValueError(f"{path} is not of the head {key}")
        value = json.loads(facts["head"])
        for i, operation in enumerate(value["operations"]):
            names = operation["weights"]
            # Copied, since another process may write the file while it is mapped.
            operation["weights"] = {name: file.get_tensor(f"{i}.{name}").clone() for name in names}
    return Head.from_value(value)
