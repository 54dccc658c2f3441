"""What a process holds that could leak: threads, children, descriptors, shared memory; and how much memory."""

import contextlib
import gc
import os
import threading
import time
from dataclasses import dataclass

import psutil
from memfd import memfds

_OS_THREADS = 8  # gRPC's own come and go as it needs them; a leak of one a fault is more


@dataclass(frozen=True)
class Held:
    """What a process holds at a moment. `threads` are those of Python, and 0 for another process."""

    threads: int
    os_threads: int
    children: int
    fds: int
    memfds: tuple[int, int]  # descriptors and mappings of segments
    named: frozenset[str]  # in /dev/shm

    @classmethod
    def now(cls, pid: int | None = None) -> "Held":
        """By this process, or by another."""
        gc.collect()
        process = psutil.Process(pid)
        return cls(
            threads=threading.active_count() if pid is None else 0,
            os_threads=process.num_threads(),
            children=sum(map(_is_alive, _children(process))),
            fds=process.num_fds(),
            memfds=memfds(process.pid),
            named=frozenset(name for name in os.listdir("/dev/shm") if "schoolhouse" in name),
        )

    def leaked(self, before: "Held") -> dict[str, object]:
        """What is held beyond `before`, by name; empty: nothing."""
        pairs = {name: (getattr(before, name), value) for name, value in vars(self).items()}
        pairs["os_threads"] = (before.os_threads + _OS_THREADS, self.os_threads)
        found: dict[str, object] = {
            name: f"{was} -> {value}" for name, (was, value) in pairs.items() if name != "named" and value > was
        }
        if self.named - before.named:
            found["named"] = sorted(self.named - before.named)
        return found


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def settled(before: Held, pid: int | None = None, timeout_s: float = 20.0) -> dict[str, object]:
    """What is still held beyond `before` after `timeout_s`: what ends in threads of gRPC takes a moment."""
    deadline = time.monotonic() + timeout_s
    while (leaked := Held.now(pid).leaked(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return leaked


def rss_mib(pid: int | None = None) -> float:
    """Memory of a process that is its own, without what it shares with others and files, in MiB."""
    gc.collect()
    found = psutil.Process(pid).memory_info()
    return float(found.rss - found.shared) / (1 << 20)
