"""A cache of features by their inputs, for runs of several epochs and for sweeps."""

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.values.codec import Declared
from schoolhouse_wire.values.tensors import bytes_of
from schoolhouse_wire.values.tree import tensors_of

_OBJECT_BYTES = 1 << 10  # the overhead of an entry, and of each of its tensors


class FeatureCache:
    """Features of one teacher revision, by inputs, taps and encodings; the least recently used are dropped.

    They take at most `max_bytes`, overhead included.
    """

    def __init__(self, max_bytes: int) -> None:
        self.hits = self.misses = self.nbytes = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[Declared, int]] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(inputs: Any, wishes: Hashable) -> bytes:
        """A cryptographic digest, unlike a checksum: jobs share these features, and none may forge a collision."""
        digest = hashlib.blake2b(repr(wishes).encode(), digest_size=32)
        for tensor in tensors_of(inputs):
            plain = bytes_of(tensor.contiguous())  # named, since memory_of does not keep it alive
            digest.update(memory_of(plain))
        return digest.digest()

    def get(self, key: bytes) -> Declared | None:
        """The features, or None; counts a hit or a miss."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: bytes, features: Declared) -> None:
        """Keep features; nothing may write into them afterwards."""
        nbytes = _size_of(features)
        if nbytes > self._max_bytes:
            return
        # Pinned memory is scarce, and allocated in powers of two, so it is not kept here.
        tensors = [tensor.clone() if tensor.is_pinned() else tensor for tensor in features.tensors]
        features = dataclasses.replace(features, tensors=tensors)
        with self._lock:
            _, before = self._entries.pop(key, (None, 0))
            self._entries[key] = features, nbytes
            self.nbytes += nbytes - before
            while self.nbytes > self._max_bytes:
                _, (_, gone) = self._entries.popitem(last=False)
                self.nbytes -= gone


def _size_of(features: Declared) -> int:
    storages = [tensor.untyped_storage() for tensor in features.tensors]
    memory = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return _OBJECT_BYTES * (1 + len(storages)) + len(features.header) + memory
