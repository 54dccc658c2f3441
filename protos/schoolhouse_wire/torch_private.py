"""All that is used of torch under private names: each says why, and a test holds what it relies on."""

import sys
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Methods of nn.Module that classes of ours override, since torch calls them and has no public hook in their place: for
# the name that `print` shows, casts of a module, its checkpoints, and its copies for DataParallel.
OVERRIDDEN = ("_get_name", "_apply", "_load_from_state_dict", "_replicate_for_data_parallel")
# What torch's losses and ModelOpt's are instances of, by which programs know a loss.
Loss = nn.modules.loss._Loss
_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place; always 0 for an inference tensor, for which torch does not count.

    Nothing public tells that a tensor was written into, short of comparing all of it.
    """
    return 0 if tensor.is_inference() else tensor._version


def versions_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """As `version_of`, of tensors that are no inference tensors; cheaper, as each request asks for all weights."""
    return [tensor._version for tensor in tensors]


def storage_of(tensor: torch.Tensor) -> int:
    """A number that is equal for tensors of one storage; the public address of the memory is 0 for empty ones."""
    return int(tensor.untyped_storage()._cdata)


def is_unshared(tensor: torch.Tensor, tensors: int) -> bool:
    """Whether torch allocated the storage, and only so many tensors, which the caller knows, refer to it.

    Without it features would have to be copied whenever a module might keep what it returns, which is always.
    """
    storage = tensor.untyped_storage()  # one Python object per storage, which torch's own count includes at most once
    alone = torch._C._storage_Use_Count(storage._cdata) <= tensors + 1
    return alone and storage.resizable() and sys.getrefcount(storage) == _REFERENCES


def in_backward() -> bool:
    """Whether this thread runs a backward, in which checkpointed modules run again; no public name says so."""
    return torch._C._current_graph_task_id() != -1


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The registered submodules by name, in torch's own dict: to take one out and put it back in its place.

    The public `named_children` leaves out what is None or stands twice, and assigning runs a student's `__setattr__`.
    """
    return module._modules


def original_of(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given if it returned `module`, otherwise `module`; nothing public says so."""
    kind = type(module)  # compared by name, since importing the class takes seconds
    return module._orig_mod if (kind.__module__, kind.__name__) == _COMPILED else module  # type: ignore[return-value]


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is what `torch.compile` returned, or was compiled in place, which nothing public tells."""
    return original_of(module) is not module or module._compiled_call_impl is not None


def active_ddp() -> DistributedDataParallel | None:
    """The wrapper whose forward runs; the module inside has no public way to its wrapper."""
    return DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-any-return, no-untyped-call]


def _references() -> int:
    """Python's reference count of a storage to which only its tensor and the calling function refer."""
    tensor = torch.empty(1)
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


_REFERENCES = _references()
