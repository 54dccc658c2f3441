"""Look-ahead: every way out of a loop."""

import copy
import gc
import os
import sys
import threading
import warnings

import pytest
import schoolhouse as sh
import torch
from looking_ahead import Asked, batches, expected_loss, train
from memfd import soon
from models import Net, converted
from schoolhouse.distill.answer import Answer
from schoolhouse.distill.batch_identity import Inputs
from schoolhouse.errors import FeatureMismatchError, UsageError
from schoolhouse_server import serve


def test_leaving_the_loop_early_drops_what_was_asked_for():
    teacher = Asked(hold=True)
    model = converted(Net(seed=1), teacher)
    for i, (x, _) in enumerate(model.prefetch(batches(8), depth=3)):
        if i:
            break
        teacher.futures[0].set_result(teacher.futures[0].made)
        model(x)
        model.compute_kd_loss()
    assert [future.cancelled() for future in teacher.futures] == [False] + [True] * 4
    teacher.hold = False
    model(torch.ones(2, 8))  # asks as without prefetch
    model.compute_kd_loss()
    loop = iter(model.prefetch(batches(8), depth=3))
    next(loop)
    loop.close()
    assert next(loop, None) is None
    model(torch.ones(2, 8))
    with iter(model.prefetch(batches(2))) as loop:
        next(loop)
    model(torch.ones(2, 8))


def test_an_exception_in_the_loop_ends_it():
    model = converted(Net(seed=1), Asked())

    def train():
        for x, _ in model.prefetch(batches(8)):
            model(x)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    model.compute_kd_loss()
    model(torch.ones(2, 8))


def test_a_prefetch_can_be_passed_over_again():
    model = converted(Net(seed=1), Asked())
    looked = model.prefetch(batches(3))
    first = next(looked)
    assert [x is not first[0] for x, _ in looked] == [True, True]  # goes on
    assert len(list(looked)) == 3
    next(looked)
    assert [next(looked, None) is None for _ in range(4)] == [False, False, True, True]
    assert len(list(looked)) == 3  # that pass is over
    next(looked)
    del looked
    model(torch.ones(2, 8))  # and so is one that nobody holds


def test_copies_and_pickles_begin_without_look_ahead():
    model = converted(Net(seed=1), Net(32))
    for x, _ in model.prefetch(batches(2)):
        twin = copy.deepcopy(model)
        twin(torch.ones(3, 8))
        twin.compute_kd_loss()
        model(x)
        model.compute_kd_loss()


def test_after_export_the_loop_goes_on_without_the_teacher():
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    given = batches(6)

    def failing():
        yield from given
        raise OSError("disk")

    seen = []
    loop = iter(model.prefetch(failing(), depth=2))
    for x, _ in loop:
        seen.append(x)
        if len(seen) == 2:
            sh.export(model)
        model(x)
        if len(seen) < 2:
            model.compute_kd_loss()
        if len(seen) == 6:
            break
    with pytest.raises(OSError, match="disk"):
        next(loop)
    assert [id(x) for x in seen] == [id(x) for x, _ in given]
    assert len(teacher.asked) == 4


def test_a_child_process_asks_the_teacher_itself(monkeypatch):
    teacher = Asked(hold=True)
    model = converted(Net(seed=1), teacher)
    loop = iter(model.prefetch([x for x, _ in batches(3)]))
    x = next(loop)
    model(x)
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)  # a real one could not use torch's threads
    with pytest.raises(UsageError, match="before this process was forked; forward the batch again"):
        model.compute_kd_loss()
    teacher.hold = False
    model(x)
    assert model.compute_kd_loss().item() == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)
    train(model, loop)
    assert not teacher.futures[0].cancelled()


def cyclic(loop):
    """Leave the loop to the garbage collector."""
    held = [loop]
    held.append(held)


def test_the_collector_ends_a_loop_in_a_thread_that_holds_a_lock():
    gate = threading.Event()

    class Gated(Net):
        def forward(self, x):
            assert gate.wait(20)
            return super().forward(x)

    with serve(Gated(32)) as server, sh.connect(server.url) as teacher:
        model = converted(Net(seed=1), teacher)
        loop = iter(model.prefetch(batches(3)))
        next(loop)
        assert soon(lambda: len(teacher.open_sessions()) == 1)
        (session,) = teacher.open_sessions()
        cyclic(loop)
        del loop

        def collect():
            # As when it runs in the middle of the session's work.
            with session._loop._lock, teacher._dispatcher.outstanding._lock:
                collected.append(gc.collect())

        collected = []
        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(30)
        stuck = thread.is_alive()
        gate.set()
        assert collected
        assert not stuck
        model(torch.ones(2, 8))
        model.compute_kd_loss()


def test_the_collector_ends_a_loop_while_a_forward_looks_for_its_batch(monkeypatch):
    model = converted(Net(seed=1), Asked())
    loop = iter(model.prefetch(batches(4)))
    next(loop)
    next(loop)
    cyclic(loop)
    del loop
    same_form = Inputs.same_form_as
    monkeypatch.setattr(Inputs, "same_form_as", lambda self, other: (gc.collect() and False) or same_form(self, other))
    model(torch.ones(2, 8))
    model.compute_kd_loss()


def interrupted(function):
    """Run what Ctrl-C ends, and keep what an interactive session keeps of it."""
    with pytest.raises(KeyboardInterrupt) as caught:
        function()
    sys.last_type, sys.last_value, sys.last_traceback = caught.type, caught.value, caught.tb


@pytest.fixture(autouse=True)
def no_session():
    yield
    for name in ("last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)


WHERE = ["loader", "asking", "body before the forward", "forward", "waiting", "body after the loss"]


@pytest.mark.parametrize("where", WHERE)
def test_a_loop_that_was_interrupted_leaves_nothing(where, monkeypatch):
    """The last traceback keeps the frames of the loop, and with them the iterator."""
    teacher = Asked()
    model = converted(Net(seed=1), teacher)

    def ctrl_c(*_args, **_kwargs):
        raise KeyboardInterrupt

    def loader():
        yield from batches(3)
        if where == "loader":
            ctrl_c()
        yield from batches(3, seed=1)

    def train():
        kept = iter(model.prefetch(loader(), depth=2))
        for i, (x, _) in enumerate(kept):
            if i == 1 and where == "asking":
                monkeypatch.setattr(teacher, "submit", ctrl_c)
            if i == 1 and where == "body before the forward":
                ctrl_c()
            if i == 1 and where == "forward":
                model.act.register_forward_hook(ctrl_c)
            model(x)
            if i == 1 and where == "waiting":
                monkeypatch.setattr(Answer, "features", ctrl_c)
            model.compute_kd_loss()
            if i == 1 and where == "body after the loss":
                ctrl_c()

    interrupted(train)
    monkeypatch.undo()
    model.act._forward_hooks.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a step of the loop may wait for its loss
        model(torch.ones(2, 8))  # a forward outside
    assert model.compute_kd_loss().item() == pytest.approx(
        expected_loss(Net(seed=1), Net(32).eval(), torch.ones(2, 8)), rel=1e-4
    )
    assert model._schoolhouse.loops.open == []
    asked = len(teacher.asked)
    train_again = batches(3, seed=2)
    for x, _ in model.prefetch(train_again):  # and a new pass
        model(x)
        assert model.compute_kd_loss().item() == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)
    assert len(teacher.asked) == asked + 3


def test_a_session_drops_the_look_ahead_of_what_was_interrupted():
    teacher = Asked(hold=True)
    model = converted(Net(seed=1), teacher)

    def failing():
        yield from batches(1)
        raise KeyboardInterrupt

    def train():
        for x, _ in model.prefetch(failing()):
            teacher.futures[0].set_result(teacher.futures[0].made)
            model(x)
            model.compute_kd_loss()

    interrupted(train)
    assert model._schoolhouse.loops.open == []


def test_an_iterator_goes_on_after_an_error_of_the_session():
    """As one that is stepped through by hand."""
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    loop = iter(model.prefetch(batches(5), depth=2))
    for i in range(5):
        x, _ = next(loop)
        if i == 2:
            interrupted(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        model(x)
        assert model.compute_kd_loss().item() == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)
    assert next(loop, None) is None
    assert len(teacher.asked) == 5 + 3  # what was ahead then, and the batch itself, once more


@pytest.mark.parametrize("used", [True, False])
def test_a_kept_iterator_does_not_block_the_next_loop(used):
    model = converted(Net(seed=1), Asked())
    kept = iter(model.prefetch(batches(4)))
    x, _ = next(kept)
    if used:
        model(x)
        model.compute_kd_loss()
    for given in (model.prefetch(batches(3, seed=1)), batches(3, seed=2)):  # one that looks ahead, and one that doesn't
        for x, _ in given:
            model(x)
            model.compute_kd_loss()
    for x, _ in kept:  # it goes on
        with pytest.raises(FeatureMismatchError, match="where batch"):
            model(torch.ones(2, 8))
        model(x)
        model.compute_kd_loss()
