"""The revision of a teacher: a digest of everything that decides its results."""

import hashlib
import json
import re
from typing import Any

import xxhash
from schoolhouse_wire.memory import memory_of
from schoolhouse_wire.values.tensors import on_cpu
from torch import nn

_ELSEWHERE = ("_name_or_path", "transformers_version")  # settings that say where a model comes from, not what it is


def revision_of(module: nn.Module) -> str:
    """Digest of a module's weights, buffers and architecture: equal for equal models, on any device or host.

    For Hugging Face's models it includes the config, which decides more than the weights, such as a cap of the logits.
    """
    digest = hashlib.sha256()
    configs: dict[int, Any] = {}  # a model shares one with its submodules
    for name, child in module.named_modules():
        extra = re.sub(r"0x[0-9a-f]+", "", child.extra_repr())  # addresses of objects differ between processes
        digest.update(f"{name}\0{type(child).__qualname__}\0{extra}\0".encode())
        config = getattr(child, "config", None)
        if hasattr(config, "to_diff_dict"):
            configs.setdefault(id(config), config)
    for config in configs.values():
        settings = {key: value for key, value in config.to_dict().items() if key not in _ELSEWHERE}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        plain = on_cpu(tensor)  # held by a name, since memory_of does not keep it alive
        digest.update(xxhash.xxh3_128(memory_of(plain)).digest())
    return digest.hexdigest()[:16]
