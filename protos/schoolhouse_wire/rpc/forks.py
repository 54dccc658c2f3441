"""gRPC, which all of us take from here, and in a process that was forked from another: a copy of its own.

gRPC's threads are not in a fork. With its own support of forks, a child that does nothing with it is sometimes aborted
(`Mutex::Fer with pending CondVar queueing`), such as a `DataLoader`'s worker; without, one that uses it hangs. So that
support is off, unless the environment says something else or gRPC was imported before this, and a child that uses gRPC
loads it anew, under a path that the dynamic linker has not seen yet. `import schoolhouse` does not import this module:
the first connection does. To free a channel or a server of the parent's
would wait for its threads, for ever: what was garbage at the fork is never collected in the child.
"""

import contextlib
import gc
import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType

_EXTENSION, _SUPPORT = "grpc._cython.cygrpc", "GRPC_ENABLE_FORK_SUPPORT"
_USERS = ("schoolhouse", "schoolhouse_wire", "schoolhouse_server", "grpc_health", "grpc_reflection")


@contextlib.contextmanager
def _without_fork_support() -> Iterator[None]:
    """While gRPC is imported, which is when it reads the environment, and never again."""
    if _SUPPORT in os.environ:
        yield
        return
    os.environ[_SUPPORT] = "0"
    try:
        yield
    finally:
        del os.environ[_SUPPORT]


with _without_fork_support():
    import grpc as grpc

_pid = os.getpid()
_extension = ""  # the path of the file that was installed
_lock = threading.Lock()
_used = False  # there may be channels or servers


def before_grpc() -> None:
    """To be called before a channel or a server is made."""
    global _pid, _used
    _used = True
    if _pid == os.getpid():
        return
    with _lock:
        if _pid != os.getpid():
            _load_anew()
            _pid = os.getpid()


def _load_anew() -> None:
    global _extension
    old = sys.modules["grpc"]
    _extension = _extension or str(sys.modules[_EXTENSION].__file__)
    for name in [name for name in sys.modules if name.split(".")[0] == "grpc"]:
        del sys.modules[name]
    with _copied(_extension) as path, _without_fork_support():
        finder = _Finder(path)
        sys.meta_path.insert(0, finder)
        try:
            new = importlib.import_module("grpc")
        finally:
            sys.meta_path.remove(finder)
    for module in list(sys.modules.values()):
        if getattr(module, "grpc", None) is old and module.__name__.split(".")[0] in _USERS:
            module.grpc = new  # type: ignore[attr-defined]


class _Finder:
    """Finds gRPC's extension at another path."""

    def __init__(self, path: str) -> None:
        self._path = path

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The extension's spec; None for all else."""
        if name != _EXTENSION:
            return None
        return spec_from_file_location(name, self._path, loader=ExtensionFileLoader(name, self._path))


@contextlib.contextmanager
def _copied(path: str) -> Iterator[str]:
    """A file of its own inode and name, as long as it is asked for: the linker knows libraries by these."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open(path, "rb"))
        if hasattr(os, "memfd_create"):  # a folder for temporary files may forbid to run what lies there
            target = stack.enter_context(open(os.memfd_create("cygrpc"), "wb"))
            name = f"/proc/{os.getpid()}/fd/{target.fileno()}"  # it knows them by name, too
        else:
            target = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".so"))  # type: ignore[arg-type]
            name = target.name
        while chunk := source.read(1 << 20):
            target.write(chunk)
        target.flush()
        yield name


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()
    if _used:
        gc.freeze()


os.register_at_fork(after_in_child=_in_child)
