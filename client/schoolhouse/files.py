"""Files that are written whole or not at all, also where several processes write the same one."""

import contextlib
import glob
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path


def write_whole(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file, made of `parts`, so that any reader finds either the former one or this one, whole and on disk."""
    remove_orphans(path.parent, glob.escape(path.name))
    while not _replace(path, parts):
        pass
    _sync_folder(path.parent)


def remove_orphans(folder: Path, pattern: str) -> None:
    """Remove the partial files of processes that were killed while they wrote files whose names match `pattern`."""
    import fcntl

    for part in folder.glob(f".{pattern}.*.part"):
        with contextlib.suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _replace(path: Path, parts: Sequence[bytes | memoryview]) -> bool:
    """Write a file beside `path`, make sure that it is on disk, and rename it to `path`.

    False, with nothing done, if another process that writes `path` removed the new file, which was not locked yet, as
    an orphan.
    """
    import fcntl  # not at the top: the package can be imported on systems that have no fcntl

    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    mode = _mode(path)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    with open(descriptor, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed; a file without the lock is an orphan
            if not part.exists():
                return False
            if mode is not None:
                os.fchmod(descriptor, mode)
            file.writelines(parts)
            file.flush()
            os.fsync(descriptor)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    return True


def _mode(path: Path) -> int | None:
    """The permission bits of a file; None if there is no such file."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
