"""`await teacher.ask(...)`: many at once, cancelled, with errors, from the first call on; the caller's loop goes on."""

import asyncio
import gc
import threading
import time

import pytest
import schoolhouse as sh
import torch
from bad_replica import bad_replica, url_of
from directories import Scale, tasks
from memfd import soon
from models import Net
from schoolhouse import encodings, errors
from schoolhouse_server import serve
from torch import nn


async def ask(teacher, value=1.0, size=2):
    features = await teacher.ask((torch.full((size,), float(value)),), {}, [""])
    return features[""][0].item()


class Pulse:
    """Notes the longest time for which the loop did not run."""

    def __init__(self):
        self.longest_s = 0.0

    async def __aenter__(self):
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_exc):
        self._task.cancel()

    async def _beat(self):
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            self.longest_s = max(self.longest_s, time.monotonic() - began)


def test_many_at_once_each_gets_its_own_features():
    async def main(teacher):
        return await asyncio.gather(*(ask(teacher, i) for i in range(300)))

    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        assert asyncio.run(main(teacher)) == [2 * i for i in range(300)]
        assert asyncio.run(main(teacher)) == [2 * i for i in range(300)]  # in another loop
        assert teacher.submit((torch.ones(2),), {}, [""]).result(20)[""][0].item() == 2


def test_two_loops_and_threads_share_a_teacher():
    found = []

    def run(teacher, value):
        found.append(asyncio.run(ask(teacher, value)))

    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        threads = [threading.Thread(target=run, args=(teacher, i)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
    assert sorted(found) == [2 * i for i in range(8)]


def test_the_first_calls_connect_once_and_hold_up_no_loop():
    class Slow(Scale):
        pass

    async def main(teacher):
        async with Pulse() as pulse:
            found = await asyncio.gather(*(ask(teacher, i) for i in range(20)))
        assert pulse.longest_s < 1.0
        return found

    with serve(Slow(2)) as server, sh.RemoteTeacher(server.url) as teacher:
        assert asyncio.run(main(teacher)) == [2 * i for i in range(20)]
        assert len(teacher.open_sessions()) == 1
        assert server.load("teacher").sessions == 1


def test_a_server_that_is_not_there_holds_up_no_loop():
    async def main():
        teacher = sh.RemoteTeacher("grpc://127.0.0.1:1/teacher", timeouts=sh.Timeouts(connect_s=2))
        async with Pulse() as pulse:
            with pytest.raises(errors.TeacherUnavailableError, match="nothing listens"):
                await ask(teacher)
        assert pulse.longest_s < 1.0

    asyncio.run(main())


def test_a_head_is_fetched_without_holding_up_the_loop():
    x = torch.randn(3, 8)

    async def main(teacher):
        async with Pulse() as pulse:
            wish = {"fc": encodings.hidden("fc")}
            found = await asyncio.gather(*(teacher.ask((x,), {}, ["fc"], encodings=wish) for _ in range(10)))
        assert pulse.longest_s < 1.0
        return [features["fc"].dense() for features in found]

    with serve(Net(32), allow_head=True) as server, sh.RemoteTeacher(server.url) as teacher:
        for logits in asyncio.run(main(teacher)):
            assert torch.allclose(logits, Net(32)(x))


def test_large_inputs_and_features():
    async def main(teacher):
        return await asyncio.gather(*(ask(teacher, i, size=3_000_000) for i in range(5)))

    with serve(Scale(2)) as server, sh.connect(server.url) as teacher:
        assert asyncio.run(main(teacher)) == [0, 2, 4, 6, 8]


def test_cancelling_frees_the_teachers_slot():
    module = Scale(2)

    async def main(teacher, server):
        first = asyncio.create_task(ask(teacher, 1))
        await asyncio.to_thread(module.entered.wait, 20)
        rest = [asyncio.create_task(ask(teacher, i)) for i in range(2, 10)]
        assert await asyncio.to_thread(soon, lambda: server.load("teacher").queued == 8)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(rest[0], 0.05)
        for task in rest[1:]:
            task.cancel()
        assert await asyncio.to_thread(soon, lambda: server.load("teacher").queued == 0)
        module.gate.set()
        assert await first == 2
        assert [task.cancelled() for task in rest] == [True] * 8
        assert await ask(teacher, 7) == 14

    module.gate.clear()
    with serve(module) as server, sh.connect(server.url) as teacher:
        asyncio.run(main(teacher, server))
        assert soon(lambda: not teacher._dispatcher.outstanding._requests)


def test_cancelling_the_first_call_leaves_a_teacher_that_can_be_asked():
    async def main(teacher):
        first = asyncio.create_task(ask(teacher))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await ask(teacher, 3)

    with serve(Scale(2)) as server, sh.RemoteTeacher(server.url) as teacher:
        assert asyncio.run(main(teacher)) == 6


def test_errors_are_those_of_submit():
    async def main(server, teacher):
        with pytest.raises(errors.UnknownTapError, match="bodi"):
            await teacher.ask((torch.ones(1, 8),), {}, ["bodi"])
        with pytest.raises(errors.TeacherForwardError, match="shapes"):
            await teacher.ask((torch.randn(2, 9),), {}, [""])
        with pytest.raises(errors.UnsupportedValueError):
            await teacher.ask((object(),), {}, [""])
        with sh.connect(server.url, sharing=sh.Sharing(max_pending=1)) as one:
            found = await asyncio.gather(
                *(one.ask((torch.ones(1, 8),), {}, [""]) for _ in range(2)), return_exceptions=True
            )
            assert sorted(type(each).__name__ for each in found) == ["Features", "TeacherBusyError"]
        teacher.close()
        with pytest.raises(errors.UsageError, match="connect again"):
            await teacher.ask((torch.ones(1, 8),), {}, [""])

    with serve(Net()) as server:
        asyncio.run(main(server, sh.connect(server.url)))


def test_a_teacher_that_dies():
    async def main(teacher, calls):
        with pytest.raises(errors.TeacherUnavailableError, match="4 replicas were lost"):
            await ask(teacher)
        assert len(calls) == 4

    with bad_replica("r1", lambda _call: None) as (replica, calls), sh.connect(url_of(replica)) as teacher:
        asyncio.run(main(teacher, calls))
    server = serve(nn.Identity())
    with sh.connect(server.url, timeouts=sh.Timeouts(teacher_s=0.5)) as teacher:
        server.close()
        with pytest.raises(errors.TeacherUnavailableError, match="teacher_s"):
            asyncio.run(ask(teacher))


def test_a_teacher_whose_loop_ended_in_mid_call_is_freed():
    module = Scale(2)
    module.gate.clear()

    async def main():
        teacher = sh.connect(server.url)
        task = asyncio.create_task(ask(teacher))
        await asyncio.to_thread(module.entered.wait, 20)
        return task  # which `run` cancels

    with serve(module) as server:
        assert asyncio.run(main()).cancelled()
        gc.collect()
        assert soon(lambda: tasks() == []), tasks()
        module.gate.set()
