"""A device without room: batches are run in halves, requests in parts of their rows, and no other one is affected."""

import threading
import time

import pytest
import schoolhouse as sh
import torch
from merging import Asked, at_once, close, engine_of, pair, randn, submit
from models import Net
from schoolhouse import encodings, errors
from schoolhouse_server import serve
from schoolhouse_server.device.device import lacks_memory
from schoolhouse_server.engine.engine import Engine
from schoolhouse_server.merge.settings import MergeSettings, Padding
from schoolhouse_server.session import server_session
from test_engine import Wide
from torch import nn

NEVER = MergeSettings()


def no_room():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_host_room():
    torch.empty(1 << 55)


def no_python_room():
    raise MemoryError


class Room(nn.Module):
    """Runs `inner` on up to `room` rows."""

    def __init__(self, inner, room, fail=no_room):
        super().__init__()
        self.inner, self.room, self.fail = inner, room, fail
        self.shapes = []

    def forward(self, x, **kwargs):
        self.shapes.append(len(x))
        if len(x) > self.room:
            self.fail()
        return self.inner(x, **kwargs)


class Exact(nn.Module):
    """Gives each row the same bits, whatever is beside it."""

    def forward(self, x):
        y = x * 3.0 + 1.0
        return {"rows": y, "twice": y, "whole": torch.arange(4), "pairs": y.repeat_interleave(2, 0)}


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def ask(engine, x, *taps, **more):
    asked = Asked(x, taps=taps or ("",), **more)
    submit(engine, asked.job)
    return asked.features


@pytest.mark.parametrize("fail", [no_room, no_host_room, no_python_room])
def test_a_request_that_has_no_room_runs_in_parts_of_its_rows(fail):
    module = Room(Exact(), 3, fail)
    x = randn(11, 8)
    with engine_of(module) as engine:
        got = ask(engine, x)[""]
        expected = Exact()(x)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert got["rows"] is got["twice"]
        assert module.shapes[:4] == [11, 11, 6, 3]  # once more with the device for itself, and then halves
        module.shapes.clear()
        ask(engine, x)
        assert module.shapes[:3] == [11, 11, 3]  # what has room is known by now
        assert engine.running == 0


def test_encodings_heads_and_taps_are_those_of_all_rows():
    x = randn(8, 8)
    net = Net().eval()
    plain, made = net(x), {"inner.fc": encodings.int8, "inner.body": encodings.bf16}
    with serve(Room(Net(), 4), merge="same-shape") as server, sh.connect(server.url) as teacher:
        taps = [*made, ("inner.fc", "input"), ""]
        got = teacher.submit((x,), {}, taps, encodings=made).result(30)
        close(got[""], plain)
        close(got["inner.fc", "input"][0], net.act(net.body(x)))
        torch.testing.assert_close(got["inner.fc"], plain, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got["inner.body"].float(), net.act(net.body(x)), rtol=2e-2, atol=2e-2)


def test_rows_that_mix_are_not_run_apart_and_the_request_says_so():
    with engine_of(Room(Mixing(), 4)) as engine:
        with pytest.raises(errors.TeacherMemoryError, match="cannot be run apart"):
            ask(engine, randn(8, 8))
        assert torch.equal(ask(engine, x := randn(4, 8))[""], Mixing()(x))


class Rounding(nn.Module):
    """As a kernel that adds in another order where there are more rows."""

    def forward(self, x):
        return x * (1.0 + 2e-7 * (len(x) > 2))


def test_another_rounding_is_none_of_its_rows_mixing():
    x = randn(8, 8).abs() + 1
    with engine_of(Room(Rounding(), 4)) as engine:
        close(ask(engine, x)[""], x)


def test_where_bits_are_promised_no_request_is_run_apart():
    module = Room(Exact(), 4)
    with engine_of(module, NEVER) as engine:
        with pytest.raises(errors.TeacherMemoryError, match="merge='same-shape'"):
            ask(engine, randn(8, 8))
        assert module.shapes == [8, 8]  # once more with the device for itself
        assert torch.equal(ask(engine, x := randn(4, 8))[""]["rows"], Exact()(x)["rows"])


class Drawing(nn.Module):
    def forward(self, x):
        torch.rand(1)
        return x + 0.0


def test_a_forward_that_draws_random_numbers_is_not_run_apart():
    with (
        engine_of(Room(Drawing(), 4)) as engine,
        pytest.raises(errors.TeacherMemoryError, match="random numbers"),
    ):
        ask(engine, randn(8, 8))


@pytest.mark.parametrize(("rows", "room"), [(1, 0), (8, 0), (2, 1)])
def test_what_cannot_be_split_fails_by_itself(rows, room):
    module = Room(Exact(), room)
    with serve(module, merge="same-shape") as server, sh.connect(server.url) as teacher:
        with pytest.raises(errors.TeacherMemoryError, match="no room"):
            teacher.submit((randn(rows, 8),), {}, [""]).result(30)
        module.room = 100
        got = teacher.submit((x := randn(3, 8),), {}, [""]).result(30)
        assert torch.equal(got[""]["rows"], Exact()(x)["rows"])


def test_rows_that_have_room_only_one_by_one_are_trusted_where_such_requests_were_merged():
    with engine_of(Room(Net(), 100)) as engine:
        for _ in range(2):
            asked, _ = pair(2, 3)
            at_once(engine, *asked)
            [one.features for one in asked]
        engine.teacher.module.inner.room = 1
        asked = Asked(x := randn(2, 8))
        submit(engine, asked.job)
        close(asked.features[""], Net().eval()(x))


def test_lengths_that_were_padded_are_each_request_s_own():
    pad = MergeSettings(mode="pad", pad=Padding(values={"x": 0}, mask="mask"))

    class Masked(nn.Module):
        def forward(self, x, mask=None):
            return x * 2 if mask is None else x * 2 * mask

    with engine_of(Room(Masked(), 4), pad) as engine:
        asked = [Asked(x=randn(6, 3)), Asked(x=randn(2, 5))]
        for one in asked:
            submit(engine, one.job)
        for one in asked:
            assert torch.equal(one.features[""], one.job.inputs.kwargs["x"] * 2)


def test_a_merged_batch_without_room_is_run_in_halves_and_the_one_without_any_fails_alone():
    with engine_of(Room(Net(), 100)) as engine:
        room = engine.teacher.module.inner
        for _ in range(2):
            asked, _ = pair(2, 3)
            at_once(engine, *asked)
            [one.features for one in asked]
        room.room = 4
        room.shapes.clear()
        asked, expected = pair(2, 2, 2, 2)
        at_once(engine, *asked)
        for one, e in zip(asked, expected, strict=True):
            close(one.features[""], e)
        assert room.shapes[0] == 8
        assert max(room.shapes[1:]) == 4
        big = Asked(torch.ones(5, 8), taps=["inner.inner.body"])
        room.fail, room.room = no_room, 2
        asked, expected = pair(2, 1)
        at_once(engine, asked[0], big, asked[1])
        close(asked[0].features[""], expected[0])
        close(asked[1].features[""], expected[1])
        assert big.features["inner.inner.body"].shape == (5, 16)


def failing_once(call, times=1):
    left = [times]

    def other(*args):
        if left[0]:
            left[0] -= 1
            no_room()
        return call(*args)

    return other


@pytest.mark.parametrize(("stage", "times"), [("encode", 1), ("encode", 2), ("encode", 3), ("fetch", 2), ("load", 1)])
def test_features_and_inputs_that_have_no_room_on_their_way_are_tried_again(stage, times):
    x = randn(6, 8)
    with engine_of(Exact(), NEVER) as engine:
        owner = engine.teacher if stage == "encode" else engine.device
        setattr(owner, stage, failing_once(getattr(owner, stage), times))
        if times == 3 and stage == "encode":  # on the device twice, and on the host
            with pytest.raises(errors.TeacherMemoryError, match="no room"):
                ask(engine, x)
        else:
            assert torch.equal(ask(engine, x)[""]["rows"], Exact()(x)["rows"])
        assert torch.equal(ask(engine, x)[""]["rows"], Exact()(x)["rows"])
        assert engine.running == 0


class Held(sh.LocalTeacher):
    """Encodes when it may, and a little later."""

    def __init__(self, module):
        super().__init__(module)
        self.began, self.may = threading.Event(), threading.Event()

    def encode(self, values, wanted):
        self.began.set()
        assert self.may.wait(20)
        time.sleep(0.2)
        return super().encode(values, wanted)


def test_a_forward_runs_again_whole_once_the_features_before_it_have_left_the_device():
    """So that what other forwards hold never changes its bits."""
    module = Room(Exact(), 10_000)
    teacher = Held(module)
    engine = Engine(teacher, max_queued=9)
    engine.start()
    first, second = (Asked(randn(4000, 8)) for _ in range(2))
    submit(engine, first.job)
    assert teacher.began.wait(20)
    left = []

    def fail():
        teacher.may.set()
        module.room, module.inner = 10_000, Watched()
        no_room()

    class Watched(Exact):
        def forward(self, x):
            left.append(engine.served)
            return super().forward(x)

    module.room, module.fail = 0, fail
    submit(engine, second.job)
    for one in (first, second):
        assert torch.equal(one.features[""]["rows"], Exact()(one.job.inputs[0])["rows"])
    assert (module.shapes, left) == ([4000, 4000, 4000], [1])
    engine.close()


def test_a_request_that_the_host_has_no_memory_to_receive_is_told_so(monkeypatch):
    def refused(*_args):
        raise MemoryError

    with serve(Exact()) as server, sh.connect(server.url) as teacher:
        teacher.submit((x := randn(2, 8),), {}, [""]).result(30)
        monkeypatch.setattr(server_session.framing, "Incoming", refused)
        with pytest.raises(errors.TeacherMemoryError, match="host"):
            teacher.submit((x,), {}, [""]).result(30)
        monkeypatch.undo()
        assert len(teacher.submit((x,), {}, [""]).result(30)[""]["rows"]) == 2


def test_features_that_the_host_has_no_memory_to_send_or_to_keep(monkeypatch):
    def refused(outgoing, _request_id):
        if not outgoing.inline:
            raise MemoryError
        return iter(())

    x = randn(2, 8)
    with (
        serve(Wide(), cache_bytes=10 << 20) as server,
        sh.connect(server.url, transport=sh.Transport(shared_memory=False)) as teacher,
    ):
        monkeypatch.setattr(server_session.framing.Outgoing, "frames", refused)
        with pytest.raises(errors.TeacherMemoryError, match="host"):
            teacher.submit((x,), {}, [""]).result(30)
        monkeypatch.undo()
        monkeypatch.setattr(server.engines["teacher"].cache, "put", failing_once(lambda *_args: None, 99))
        for value in (x, randn(3, 8)):  # in the same session
            assert torch.equal(teacher.submit((value,), {}, [""]).result(30)[""], Wide()(value))
        assert server._servicer.sessions == 1


def test_what_says_that_memory_ran_out():
    for error in (torch.OutOfMemoryError(), MemoryError(), RuntimeError("CUDA error: out of memory")):
        assert lacks_memory(error)
        wrapped = errors.TeacherForwardError("raised")
        wrapped.__cause__ = error
        assert lacks_memory(wrapped)
    with pytest.raises(RuntimeError) as raised:
        no_host_room()
    assert lacks_memory(raised.value)
    assert not lacks_memory(ValueError("out of memory"))
    assert not lacks_memory(None)
