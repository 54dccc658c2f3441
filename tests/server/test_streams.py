"""Hand-overs between the streams of a device: no stage's memory is used again while another stage still reads it."""

import itertools

import pytest
import torch
from late_device import STAGES, LateDevice
from merging import Asked, at_once, engine_of
from schoolhouse import encodings
from schoolhouse.errors import UnsupportedValueError
from schoolhouse.sparse import decode
from torch import nn

LATE = [late for n in range(5) for late in itertools.combinations(STAGES, n)]


class Scaled(nn.Module):
    """Three times its inputs, by way of memory that is freed in between; and what is the same for all inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return {"scaled": (x + x) * self.weight, "same": x[:1, :64] * 0 + 7}


@pytest.fixture(params=LATE, ids=lambda late: "+".join(late) or "none")
def device(monkeypatch, request):
    made = LateDevice(request.param)
    monkeypatch.setattr("schoolhouse_server.engine.engine.Device", lambda _name: made)
    return made


def constants(values, encodings_, shape=(4, 256)):
    pairs = zip(values, encodings_, strict=True)
    return [Asked(torch.full(shape, float(value)), encodings={"": encoding}) for value, encoding in pairs]


def is_its_own(asked, value):
    features = decode(asked.features[""])
    return bool(features["scaled"].eq(3 * value).all() and features["same"].eq(7).all())


def test_merged_jobs_get_their_own_features_however_late_a_stream_is(device):
    with engine_of(Scaled()) as engine:
        for turn in range(6):  # the first, second and fourth are held against single ones
            values = [1 + turn, 17 + turn, 33 + turn, 49 + turn]
            asked = constants(values, [encodings.bf16, encodings.bf16, None, encodings.bf16])
            shapes = at_once(engine, *asked)
            assert [is_its_own(*pair) for pair in zip(asked, values, strict=True)] == [True] * 4
            assert shapes == [(16, 256)] or turn in (0, 1, 3)
        assert engine.merger.refusals == 0
        assert device.memory.reused > 10


def test_features_that_cannot_be_encoded_leave_the_others_theirs(device):
    with engine_of(Scaled()) as engine:
        for turn in range(3):
            values = [1 + turn, 1e6, 33 + turn, 1e6, 49 + turn]  # which float16 cannot hold three times
            asked = constants(values, [encodings.fp16] * 5)
            at_once(engine, *asked)
            for one, value in zip(asked, values, strict=True):
                if value < 1e6:
                    assert is_its_own(one, value)
                else:
                    with pytest.raises(UnsupportedValueError, match="cannot hold"):
                        one.features  # noqa: B018


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_merged_jobs_get_their_own_features():
    module = Scaled().cuda()
    with engine_of(module) as engine:
        for turn in range(60):
            values = [1 + turn % 40, 41 + turn % 40]  # of which bfloat16 has three times without an error
            asked = constants(values, [encodings.bf16] * 2, shape=(64, 65_536))  # 8 MiB each as they travel
            at_once(engine, *asked)
            assert [is_its_own(*pair) for pair in zip(asked, values, strict=True)] == [True, True], turn
        assert engine.merger.refusals == 0
