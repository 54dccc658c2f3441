"""Features kept for the same inputs: for runs of several epochs, and for sweeps."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from schoolhouse.taps import Tap, tensors_of
from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.tensors import bytes_of

Values = dict[Tap, Any]


class FeatureCache:
    """Features of one teacher revision by inputs and wishes, at most `max_bytes` of them; the least lately used go."""

    def __init__(self, max_bytes: int) -> None:
        self.hits = self.misses = self.nbytes = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[Values, int]] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(inputs: Any, wishes: Hashable) -> bytes:
        """A digest that nobody can make two inputs for, unlike a checksum: jobs share these features."""
        digest = hashlib.blake2b(repr(wishes).encode(), digest_size=32)
        for tensor in tensors_of(inputs):
            plain = bytes_of(tensor.contiguous())  # named, since memory_of does not keep it alive
            digest.update(memory_of(plain))
        return digest.digest()

    def get(self, key: bytes) -> Values | None:
        """The features, or None; counted."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: bytes, values: Values) -> None:
        """Keep features that nothing else will write into."""
        storages = [tensor.untyped_storage() for tensor in tensors_of(values)]
        nbytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        if nbytes > self._max_bytes:
            return
        with self._lock:
            _, before = self._entries.pop(key, (None, 0))
            self._entries[key] = values, nbytes
            self.nbytes += nbytes - before
            while self.nbytes > self._max_bytes:
                _, (_, gone) = self._entries.popitem(last=False)
                self.nbytes -= gone
