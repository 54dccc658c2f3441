"""Students on several ranks: what DistributedDataParallel and FSDP2 need, and checks for what they cannot do."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from schoolhouse_wire.torch_private import active_ddp, original_of
from schoolhouse_wire.values.tree import tensors_of
from torch import nn

from schoolhouse.errors import ConfigError


def check_data_parallel(model: nn.Module, losses: nn.Module | None) -> None:
    """Refuse settings of DistributedDataParallel under which gradients of a loss at inner layers go wrong.

    It expects gradients to come only from the outputs of its own forward: with `static_graph` the first gradients are
    not averaged, and with `find_unused_parameters` the gradients of a loss's parameters raise an error in the backward.
    """
    wrapper = active_ddp()
    if wrapper is None or wrapper.module is not model:
        return
    trainable = losses is not None and any(parameter.requires_grad for parameter in losses.parameters())
    settings = {"static_graph": wrapper.static_graph}
    settings["find_unused_parameters"] = wrapper.find_unused_parameters and trainable
    wrong = [name for name, on in settings.items() if on]
    if wrong:
        raise ConfigError(
            f"DistributedDataParallel({wrong[0]}=True) does not see the gradients that a distillation loss sends into "
            "inner layers and into its own parameters; leave that setting out"
        )


def _fsdp_class() -> Any:
    """The class that `fully_shard` adds to a module; () if FSDP2 was never imported, which would take long."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def check_loss_sharding(model: nn.Module, losses: nn.Module | None) -> None:
    """Refuse losses whose gradients FSDP2 would not average, since only parts of the student are sharded."""
    kind = _fsdp_class()
    if not kind or not losses or isinstance(model, kind):
        return
    alone = [
        type(loss).__name__
        for loss in losses.children()
        if any(p.requires_grad for p in loss.parameters()) and not any(isinstance(m, kind) for m in loss.modules())
    ]
    if alone and any(isinstance(module, kind) for module in model.modules()):
        raise ConfigError(
            f"parts of the student are sharded and the trainable losses ({', '.join(alone)}) are not, so their "
            "gradients would not be averaged over ranks: fully_shard the converted model as a whole too, or each loss"
        )


def as_forward(model: nn.Module, layers: Iterable[str], compute: Callable[[], Any]) -> Any:
    """Run `compute()` as a part of the forward of what FSDP2 shards: the model, or else its parts around `layers`.

    So the parameters of losses are unsharded while it runs, and a backward from its results triggers FSDP2's hooks even
    if the output of the sharded module does not take part in them.
    """
    kind = _fsdp_class()
    if not kind:
        return compute()
    outermost = [[model]] if isinstance(model, kind) else [_sharded_around(model, layer) for layer in layers]
    for module in dict.fromkeys(around[0] for around in outermost if around):
        compute = functools.partial(_within, module, compute)
    return compute()


def _within(module: nn.Module, compute: Callable[[], Any]) -> Any:
    object.__setattr__(module, "_as_forward", compute)
    try:
        sys.modules["torch.distributed.fsdp"].register_fsdp_forward_method(module, "_as_forward")
        return module._as_forward()  # type: ignore[operator]
    finally:
        object.__delattr__(module, "_as_forward")


def _sharded_around(model: nn.Module, layer: str) -> list[Any]:
    """The submodules that are sharded on their own and hold `layer`, or are `layer`; outermost first."""
    kind, found = _fsdp_class(), []
    module: Any = model
    for name in layer.split(".") if kind and layer else ():
        module = module.get_submodule(name)
        if isinstance(module, kind):
            found.append(module)
    return found


def unshard_in_backward(model: nn.Module, layer: str, output: Any) -> None:
    """Have FSDP2 unshard the parts around `layer` when a backward begins at its output instead of at theirs."""
    sharded = _sharded_around(model, layer)
    for tensor in tensors_of(output) if sharded else ():
        if tensor.requires_grad:
            tensor.register_hook(functools.partial(_unshard, sharded))  # type: ignore[no-untyped-call]


def _unshard(sharded: Iterable[Any], _gradient: torch.Tensor) -> None:
    for module in sharded:
        module.unshard()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, FSDP1 or torch.compile, or the module itself."""
    kind = type(model)  # by name, since importing all of them takes seconds
    wraps = kind.__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    inner: Any = model.module if wraps and kind.__module__.startswith("torch.") else original_of(model)
    return model if inner is model else unwrapped(inner)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of the model are DTensors, as FSDP2 and tensor parallelism make them."""
    module = sys.modules.get("torch.distributed.tensor")  # imported by whatever made DTensors
    return module is not None and any(isinstance(parameter, module.DTensor) for parameter in model.parameters())
