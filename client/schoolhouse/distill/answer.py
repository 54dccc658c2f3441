"""The teacher's answer to one batch."""

import functools
import os
import time
from concurrent.futures import CancelledError, Future, wait

import torch
from schoolhouse_wire.torch_private import version_of
from schoolhouse_wire.values.tree import tensors_of

from schoolhouse.errors import FeatureMismatchError, UsageError
from schoolhouse.teachers.protocol import Features


class Answer:
    """The teacher's features of one batch, arrived or not; `features` raises if they were changed after arrival."""

    def __init__(self, future: "Future[Features]") -> None:
        self.future = future
        self.waited_s = 0.0  # seconds that steps have waited for the features
        self._features: Features | None = None  # once they have arrived
        self._versions: list[tuple[torch.Tensor, int, bool]] = []
        self._pid = os.getpid()
        if future.done() and self.error() is None:
            self._watch(future.result())

    def _watch(self, features: Features) -> Features:
        for tap, value in features.items():
            output = tap.side == "output"
            self._versions += [(tensor, version_of(tensor), output) for tensor in tensors_of(value)]
        self._features = features
        return features

    def features(self) -> Features:
        """Wait for the features; raises whatever kept the teacher from answering."""
        if self._features is None:
            return self._watch(self._awaited())
        for tensor, version, output in self._versions:
            if output and version_of(tensor) != version:
                raise FeatureMismatchError(
                    "the teacher's features were changed in place after its forward, so they are no longer those of "
                    "this batch: a loss or hook that changes them must work on a clone"
                )
        return self._features

    def _awaited(self) -> Features:
        if self.lost:
            raise UsageError("the teacher was asked before this process was forked; forward the batch again")
        if not self.future.done():
            began = time.perf_counter()
            wait([self.future])
            self.waited_s += time.perf_counter() - began
        return self.future.result()

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the features, which must have arrived."""
        return sum(tensor.nbytes for tensor in tensors_of(self.future.result()))

    @property
    def lost(self) -> bool:
        """Whether the features can never arrive, since the request was made before this process was forked."""
        return self._pid != os.getpid() and not self.future.done()

    def error(self) -> BaseException | None:
        """The error of the request; None if it has not ended, or has succeeded."""
        if not self.future.done():
            return None
        return CancelledError() if self.future.cancelled() else self.future.exception()

    def untouched(self) -> bool:
        """Whether another forward may use the features: neither outputs nor injected inputs were changed in place."""
        return self.error() is None and all(version_of(tensor) == version for tensor, version, _ in self._versions)
