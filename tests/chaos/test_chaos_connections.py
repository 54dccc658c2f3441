"""Connections that are cut, held, delayed and corrupted while a student trains, by a proxy and in shared memory."""

import random
import time

import pytest
import schoolhouse as sh
import torch
from faults import EVERY, proxied
from memfd import soon
from students import train

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums to less than 1")
OVER_TCP = {
    "transport": sh.Transport(shared_memory=False),
    "timeouts": sh.Timeouts(request_s=30.0, connect_s=3.0),
}
SILENCE_S = 5.0


def connected(room):
    """A teacher with a session for each replica."""
    teacher = sh.connect(room.url, **OVER_TCP)

    def asked():
        teacher.submit((torch.ones(1, 8),), {}, [""]).result(20)
        return len(teacher.open_sessions()) == len(room.replicas)

    assert soon(asked)
    return teacher


@proxied
def test_connections_are_cut(room, rounds):
    def on_step(step):
        if rounds.of(step) is not None or rounds.of(step - 7) is not None:
            random.Random(step).choice(room.replicas).proxy.cut()
        if rounds.of(step - 10) is not None:  # both at once
            for replica in room.replicas:
                replica.proxy.cut()

    with connected(room) as teacher:
        run = train(teacher, rounds.steps, on_step)
    assert sum(replica.proxy.cuts for replica in room.replicas) > rounds.count
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)


@proxied
def test_connections_are_delayed(room, rounds):
    def on_step(step):
        number = rounds.of(step)
        if number is not None:
            room.replicas[number % 2].proxy.delay_s = 0.02
        elif rounds.of(step - EVERY // 2) is not None:
            for replica in room.replicas:
                replica.proxy.delay_s = 0

    with sh.connect(room.url, **OVER_TCP) as teacher:
        run = train(teacher, rounds.steps, on_step)
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)


@proxied
def test_a_connection_goes_silent_for_longer_than_the_deadline(room, rounds):
    def on_step(step):
        if (number := rounds.of(step)) is not None and number < 3:
            room.replicas[number % 2].proxy.hold()
            held_at.append(time.monotonic())
        elif (number := rounds.of(step - 10)) is not None and number < 3:
            time.sleep(max(0, held_at[-1] + SILENCE_S + 0.5 - time.monotonic()))
            room.go_on()

    held_at = []
    with sh.connect(room.url, **OVER_TCP | {"timeouts": sh.Timeouts(request_s=SILENCE_S, connect_s=3.0)}) as teacher:
        run = train(teacher, rounds.steps, on_step)
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)


@proxied
@pytest.mark.parametrize("towards", ["client", "server"])
def test_connections_are_corrupted(room, rounds, towards):
    """Any byte of the stream, HTTP/2's and protobuf's own included: what cannot be told from the right one is none."""

    def on_step(step):
        if (number := rounds.of(step)) is not None:
            room.replicas[number % 2].proxy.corrupt(3, towards)

    with connected(room) as teacher:
        run = train(teacher, rounds.steps, on_step)
    assert sum(replica.proxy.flipped for replica in room.replicas) >= rounds.count
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)


@pytest.mark.parametrize("room", [{}], indirect=True, ids=["direct"])
def test_shared_memory_is_corrupted(room, rounds):
    def on_step(step):
        if (number := rounds.of(step)) is not None:
            room.replicas[number % 2].commands.send(1)

    with sh.connect(room.url, transport=sh.Transport(checksums=True)) as teacher:
        assert teacher.describe().transport == "shared memory"
        run = train(teacher, rounds.steps, on_step)
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)
