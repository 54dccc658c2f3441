"""Features stand in memory of their own: what nobody else holds is taken as it is, all else is copied."""

import numpy as np
import pytest
import schoolhouse as sh
import torch
from schoolhouse.teachers.capture import owned
from schoolhouse_wire.values.tree import tensors_of
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

HELD = []  # by a module, say


def held(value):
    HELD.append(value)
    return value


class Marked(torch.Tensor):
    """Of a class that may do anything."""


def storage_of_its_own(tensor):
    held(tensor.untyped_storage())
    return tensor


def typed_storage(tensor):
    held(tensor.storage())
    return tensor


def exported(tensor):
    held(torch.utils.dlpack.to_dlpack(tensor))
    return tensor


def as_array(tensor):
    held(tensor.numpy())
    return tensor


def tied():
    tensor = torch.randn(6)
    return [tensor, (tensor, tensor[2:]), {"a": tensor.view(2, 3)}]


FREE = {
    "fresh": lambda: torch.randn(6),
    "slice": lambda: torch.randn(60)[3:9],
    "slices": lambda: torch.randn(60).split(10),
    "transposed": lambda: torch.randn(3, 4).t(),
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "tied": tied,
    "output": lambda: CausalLMOutput(logits=torch.randn(3), hidden_states=(torch.randn(2), torch.randn(2))),
    "parameter": lambda: nn.Parameter(torch.randn(6)),
    "empty": lambda: [torch.randn(0), torch.randn(0)],
    "bfloat16": lambda: torch.randn(6).bfloat16(),
}
TAKEN = {
    "held": lambda: held(torch.randn(6)),
    "view of held": lambda: held(torch.randn(6))[2:],
    "held view": lambda: held(torch.randn(60)[3:9]).view(2, 3),
    "held alias": lambda: held(held(torch.randn(6)).detach())[:3],
    "storage": lambda: storage_of_its_own(torch.randn(6)),
    "made of a storage": lambda: torch.empty(0).set_(held(torch.UntypedStorage(24)).fill_(1), 0, (6,)),
    "typed storage": lambda: typed_storage(torch.randn(6)),
    "exported": lambda: exported(torch.randn(6)),
    "array": lambda: as_array(torch.randn(6)),
    "of an array": lambda: torch.from_numpy(held(np.ones(6))),
    "of a buffer": lambda: torch.frombuffer(held(bytearray(24)), dtype=torch.float32),
    "of a class": lambda: torch.randn(6).as_subclass(Marked),
    "one of two": lambda: (lambda tensor: [tensor[:2], held(tensor[2:])])(torch.randn(6)),
}


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    HELD.clear()


def taken(make):
    """Whether each tensor was copied."""
    with torch.no_grad():
        values = [make()]
        before = [(tensor.data_ptr(), tensor.clone()) for tensor in tensors_of(values)]
        mine = [*tensors_of(owned(values))]
    assert not values
    assert [tensor.shape for tensor in mine] == [copy.shape for _, copy in before]
    assert all(torch.equal(tensor, copy) for tensor, (_, copy) in zip(mine, before, strict=True))
    return [tensor.data_ptr() != at for tensor, (at, _) in zip(mine, before, strict=True)]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", TAKEN)
def test_what_others_hold_is_copied(name):
    assert all(taken(TAKEN[name]))


@pytest.mark.parametrize("name", FREE)
def test_what_nobody_else_holds_is_not_copied(name):
    assert not any(taken(FREE[name]))


def test_tied_tensors_stay_tied_in_a_copy():
    mine = owned([(lambda tensor: [tensor, held(tensor)])(torch.randn(3))])
    assert mine[0] is mine[1]


@pytest.mark.parametrize("kind", ["storage", "class"])
def test_features_of_one_batch_are_not_those_of_the_next(kind):
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = torch.UntypedStorage(4000)

        def forward(self, x):
            out = torch.empty(0).set_(self.kept, 0, (1000,)).fill_(x.item())
            return out.as_subclass(Marked) if kind == "class" else out

    teacher = sh.LocalTeacher(Reusing())
    futures = [teacher.submit((torch.tensor(float(i)),), {}, [""]) for i in range(3)]
    assert [future.result()[""][0].item() for future in futures] == [0, 1, 2]
