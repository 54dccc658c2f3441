"""A TCP proxy on loopback that cuts, holds, delays and corrupts the connections that go through it."""

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

_CHUNK_BYTES = 64 << 10
_RESET = struct.pack("ii", 1, 0)  # a close sends RST: what was not sent yet is lost, and the peer sees an error


class Proxy:
    """Forwards each connection to `127.0.0.1:port`. Settings hold for the connections there are, too."""

    def __init__(self, port: int, seed: int = 0) -> None:
        self.target = port
        self.delay_s = 0.0  # of each chunk, both ways
        self.refuses = False  # a new connection is cut at once
        self.flipped = self.cuts = 0
        self._flips = {"server": 0, "client": 0}  # chunks that are still to be corrupted, by where they go
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._open: dict[int, tuple[socket.socket, socket.socket]] = {}
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.closed = False
        self._threads = [self._thread(self._accept)]

    def cut(self) -> None:
        """Reset all connections."""
        with self._lock:
            pairs, self._open = list(self._open.values()), {}
        self.cuts += len(pairs)
        for one in [end for pair in pairs for end in pair]:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                one.shutdown(socket.SHUT_RDWR)  # wakes who reads it, and that one closes it

    def hold(self) -> None:
        """Forward nothing, and end nothing, until `go_on`: nobody is told, as when a cable is pulled."""
        self._goes_on.clear()

    def go_on(self) -> None:
        """Forward again."""
        self._goes_on.set()

    def corrupt(self, chunks: int, towards: str = "client") -> None:
        """Flip one bit in each of the next `chunks` pieces of data that go to the "client" or to the "server"."""
        with self._lock:
            self._flips[towards] = chunks

    def close(self) -> None:
        """End it and its connections."""
        self.closed, self.refuses = True, True
        self.go_on()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _thread(self, run: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=run, args=args, name=f"proxy-{self.port}", daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        while not self.closed:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open[id(client)] = client, server
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._threads += [self._thread(self._pump, client, server, "server")]
            self._threads += [self._thread(self._pump, server, client, "client")]
            if self.refuses:
                self.cut()

    def _pump(self, source: socket.socket, sink: socket.socket, towards: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                self._goes_on.wait()
                if self.delay_s:
                    time.sleep(self.delay_s)
                sink.sendall(self._passed(data, towards))
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)  # the other direction ends, too
        with self._lock:
            self._open.pop(id(source), None)
            self._open.pop(id(sink), None)
        source.close()  # each pump closes the one that it reads

    def _passed(self, data: bytes, towards: str) -> bytes:
        with self._lock:
            if not self._flips[towards]:
                return data
            self._flips[towards] -= 1
            self.flipped += 1
            at, bit = self._random.randrange(len(data)), 1 << self._random.randrange(8)
        return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
