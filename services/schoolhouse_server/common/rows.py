"""How large a request is: the rows and the tokens of its inputs."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from schoolhouse_wire.values.tree import tensors_of


def rows_of(inputs: Any) -> int:
    """The number of rows: the first size that most of the tensors have; 1 if none has a dimension."""
    sizes = [tensor.shape[0] for tensor in tensors_of(inputs) if tensor.dim()]
    if not sizes:
        return 1
    return sizes[0] if len(sizes) == 1 else statistics.mode(sizes)


def tokens_of(inputs: Any) -> int:
    """The number of tokens: rows times the length of ids `[rows, length]` or vectors `[rows, length, width]`."""
    rows = rows_of(inputs)
    lengths = [tensor.shape[1] for tensor in tensors_of(inputs) if _has_length(tensor) and tensor.shape[0] == rows]
    return rows * max(lengths, default=1)


def _has_length(tensor: torch.Tensor) -> bool:
    return tensor.dim() == (3 if tensor.is_floating_point() else 2)


UNITS: dict[str, Callable[[Any], int]] = {"rows": rows_of, "tokens": tokens_of}
