"""Which modules of a teacher hand out its weights as they are: lookups in tables, and what reads a withheld head."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from schoolhouse_wire.torch_private import original_of
from schoolhouse_wire.values.tree import is_plain
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

_Span: TypeAlias = tuple[str, int, int]  # where a tensor is, its first byte, and the byte after its last


def lookups(model: nn.Module, *, heads_withheld: bool) -> frozenset[str]:
    """The names of modules whose taps are kept back where nobody has said what may be tapped.

    These are embeddings, as the features of all ids are the whole table; modules around them that have no other
    weights; modules of another kind that hold an embedding's weight; and parametrizations, which return a weight
    whatever the inputs are. Where heads are withheld, so are modules that hold the weight of a head.

    The heads themselves are no lookups, tied or not: who asks receives their results as logits, and nobody chooses what
    they receive. The model as a whole never is one, nor are blocks with weights of their own around an embedding.
    """
    plain = original_of(model)
    kept = _embeddings(plain) | _parametrizations(plain) | _ties(plain, heads_withheld=heads_withheld)
    kept |= _wrappers(plain)
    return frozenset(name for name, module in plain.named_modules(remove_duplicate=False) if name and module in kept)


def _embeddings(model: nn.Module) -> set[nn.Module]:
    return {module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}


def _parametrizations(model: nn.Module) -> set[nn.Module]:
    found = (module for module in model.modules() if isinstance(module, ParametrizationList))
    return {inner for module in found for inner in module.modules()}


def _wrappers(model: nn.Module) -> set[nn.Module]:
    """Modules whose weights are all those of embeddings within them."""
    embeddings, heads = _embeddings(model), _heads(model)
    tables = {table for module in embeddings for table in module.parameters()}
    return {
        module
        for module in model.modules()
        if tables.issuperset(module.parameters())
        and not embeddings.isdisjoint(inner := [*module.modules()])
        and heads.isdisjoint(inner)
    }


def _heads(model: nn.Module) -> set[nn.Module]:
    """What could be asked for as a head: linear layers, and what models of Hugging Face say is theirs."""
    found = {module for module in model.modules() if isinstance(module, nn.Linear)}
    return (found | _outputs(model)) - _embeddings(model)


def _outputs(model: nn.Module) -> set[nn.Module]:
    found: set[nn.Module] = set()
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        try:
            output = ask() if callable(ask) else None
        except Exception:  # of a model that has the method, and no answer
            continue
        if isinstance(output, nn.Module):
            found.add(output)
    return found


def _ties(model: nn.Module, *, heads_withheld: bool) -> set[nn.Module]:
    """Modules that share a weight with an embedding or with a withheld head, but for the head itself."""
    embeddings, heads, outputs = _embeddings(model), _heads(model), _outputs(model)
    found: set[nn.Module] = set()
    for group in _sharing([*model.modules()]):
        own = [module for module in group if module in heads]
        if heads_withheld and own:
            # The others read a withheld head. Of several linear layers, the last one makes the logits.
            found |= {*group} - ({*own} & outputs or {own[-1]})
        elif not embeddings.isdisjoint(group):
            found |= {*group} - {*own}
    return found


def _sharing(modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Groups of several modules, in the order of registration, whose own tables have memory in common.

    Tensors that only have a storage in common share nothing: those of a checkpoint may be parts of one.
    """
    spans = sorted((*_span(table), number) for number, module in enumerate(modules) for table in _tables(module))
    end: tuple[str, int] = ("", 0)
    groups: list[set[int]] = []
    for place, start, stop, number in spans:
        if (place, start) >= end:
            groups.append(set())
        groups[-1].add(number)
        end = max(end, (place, stop))
    return ([modules[number] for number in sorted(group)] for group in groups if len(group) > 1)


def _tables(module: nn.Module) -> Iterator[torch.Tensor]:
    """The module's own weights that have rows; also those from which a parametrization makes them."""
    inner = module.parametrizations.children() if is_parametrized(module) else ()  # type: ignore[union-attr]
    parts = (module, *inner) if not isinstance(module, ParametrizationList) else ()
    own = (itertools.chain(part.parameters(recurse=False), part.buffers(recurse=False)) for part in parts)
    return (tensor for tensor in itertools.chain.from_iterable(own) if tensor.dim() > 1 and tensor.numel())


def _span(tensor: torch.Tensor) -> _Span:
    if not is_plain(tensor) or tensor.layout is not torch.strided or not tensor.data_ptr():
        return ("", id(tensor), id(tensor) + 1)
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size())
