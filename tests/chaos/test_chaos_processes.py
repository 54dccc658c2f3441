"""Processes that are killed, stopped and restarted while a student trains: its losses are those of a run without."""

import signal
import time

import pytest
import schoolhouse as sh
from leaks import Held, settled
from memfd import memfds, soon
from rooms import start
from schoolhouse import errors
from students import run_student, train

pytestmark = pytest.mark.filterwarnings("ignore:kd_loss_weight sums to less than 1")
TIMEOUT_S = 5.0


def test_replicas_are_killed(room, rounds):
    def on_step(step):
        if (number := rounds.of(step)) is not None:
            room.replicas[number % 2].process.kill()  # with what is in flight there
        elif (number := rounds.of(step - 10)) is not None:
            room.replace(number % 2)

    with sh.connect(room.url) as teacher:
        run = train(teacher, rounds.steps, on_step)
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)


def test_the_directory_is_killed_and_a_replica_while_it_is_away(room, rounds):
    def on_step(step):
        if rounds.of(step) is not None:
            room.kill_directory()
        elif (number := rounds.of(step - 5)) is not None:
            room.replicas[number % 2].process.kill()
        elif (number := rounds.of(step - 10)) is not None:
            room.replicas.pop(number % 2).kill()
            room.add()
            room.restart_directory()
            assert soon(lambda: {one.address for one in teacher._dispatcher.known.replicas} == {*room.addresses()})

    with sh.connect(room.url) as teacher:
        run = train(teacher, rounds.steps, on_step)
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)


def test_everything_is_restarted(room, rounds):
    def on_step(step):
        if rounds.of(step) is not None:
            room.restart()

    with sh.connect(room.url, timeouts=sh.Timeouts(connect_s=5)) as teacher:
        run = train(teacher, rounds.steps, on_step)
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)


def test_a_replica_stops_for_longer_than_the_deadline(room, rounds):
    def on_step(step):
        if (number := rounds.of(step)) is not None and number < 5:
            room.replicas[number % 2].signal(signal.SIGSTOP)
            stopped_at.append(time.monotonic())
        elif (number := rounds.of(step - 10)) is not None and number < 5:
            time.sleep(max(0, stopped_at[-1] + TIMEOUT_S + 0.5 - time.monotonic()))
            room.replicas[number % 2].signal(signal.SIGCONT)

    stopped_at = []
    with sh.connect(room.url, timeouts=sh.Timeouts(request_s=TIMEOUT_S)) as teacher:
        run = train(teacher, rounds.steps, on_step)
    assert run.errors == []
    run.assert_undisturbed(rounds.steps)


def test_training_goes_on_after_all_had_stopped(room):
    def on_step(step):
        if step == 10:
            for replica in room.replicas:
                replica.signal(signal.SIGSTOP)

    def on_error(_):
        for replica in room.replicas:
            replica.signal(signal.SIGCONT)

    with sh.connect(room.url, timeouts=sh.Timeouts(request_s=2.0)) as teacher:
        run = train(teacher, 20, on_step, on_error)
    assert run.errors
    assert all(isinstance(err, errors.TeacherTimeoutError | errors.TeacherUnavailableError) for err in run.errors)
    run.assert_undisturbed(20)


def test_a_student_is_killed_in_mid_stream(room, rounds):
    replicas, here = {replica.pid: Held.now(replica.pid) for replica in room.replicas}, Held.now()
    for _ in range(min(rounds.count, 10)):
        student = start(run_student, room.url, {"job": "killed"})
        with sh.connect(room.url) as teacher:

            def on_step(step, student=student):
                if step == 10:
                    while student.commands.recv() < 20:
                        pass
                    assert any(memfds(pid) != (0, 0) for pid in replicas)
                    student.kill()

            run = train(teacher, 20, on_step)
        assert run.errors == []
        run.assert_undisturbed(20)
    assert soon(lambda: all(memfds(pid) == (0, 0) for pid in replicas))
    assert [leaked for pid, before in replicas.items() if (leaked := settled(before, pid))] == []
    assert settled(here) == {}
