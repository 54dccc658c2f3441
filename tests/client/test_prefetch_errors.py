"""Look-ahead over a loader that fails, and with a teacher that does: each error belongs to its batch."""

import gc
import weakref
from concurrent.futures import Future

import pytest
import torch
from looking_ahead import Asked, batches, distilled, expected_loss, train
from models import Net, converted
from schoolhouse.errors import (
    TeacherBusyError,
    TeacherForwardError,
    TeacherTimeoutError,
    TeacherUnavailableError,
)


def test_what_the_loader_raises_comes_after_the_batches_before_it(teach):
    model = distilled(teach)

    def failing():
        yield from batches(3)
        raise OSError("disk")

    loop = iter(model.prefetch(failing(), depth=5))
    for _ in range(3):
        model(next(loop)[0])
        model.compute_kd_loss()
    with pytest.raises(OSError, match="disk"):
        next(loop)
    model(torch.ones(2, 8))  # the loop is over


class Picky(Net):
    def forward(self, x):
        if (x > 100).any():
            raise ValueError("no such number")
        return super().forward(x)


def test_what_the_teacher_raises_belongs_to_its_batch(teach):
    model = distilled(teach, module=Picky(32))
    given = batches(4)
    given[2][0][0, 0] = 1000
    failed = []
    for i, (x, _) in enumerate(model.prefetch(given)):
        model(x)
        try:
            model.compute_kd_loss()
        except TeacherForwardError as err:
            failed.append((i, "no such number" in str(err)))
    assert failed == [(2, True)]


def test_a_busy_teacher_is_asked_later():
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    given = batches(5)
    seen = []
    loop = iter(model.prefetch(given, depth=3))
    teacher.busy_from = 2
    for x, _ in loop:
        seen.append(len(teacher.asked))
        teacher.busy_from = None if len(seen) > 1 else 2
        model(x)
        model.compute_kd_loss()
    assert seen[:2] == [2, 2]
    assert len(teacher.asked) == 5
    assert all(any(torch.equal(asked, x) for asked in teacher.asked) for x, _ in given)


class Flaky(Asked):
    """Fails, once for each of the batches that are told."""

    def __init__(self, errors):
        super().__init__()
        self.errors = errors

    def submit(self, args, kwargs, taps):
        future = super().submit(args, kwargs, taps)
        error = self.errors.pop(len(self.asked) - 1, None)
        if error is not None:
            future = Future()
            future.set_exception(error)
        return future


def test_a_full_queue_at_the_replica_is_asked_again():
    model = converted(Net(seed=1), Flaky({0: TeacherBusyError("full"), 2: TeacherBusyError("full")}))
    for x, _ in model.prefetch(batches(5)):
        model(x)
        loss = model.compute_kd_loss().item()
        assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)


@pytest.mark.parametrize("error", [TeacherUnavailableError("gone"), TeacherTimeoutError("late")])
def test_a_teacher_that_was_away_as_it_was_asked_ahead_is_asked_again(error):
    model = converted(Net(seed=1), teacher := Flaky({1: error, 3: error}))
    for x, _ in model.prefetch(batches(5), depth=3):
        model(x)
        loss = model.compute_kd_loss().item()
        assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)
    assert len(teacher.asked) == 7


def test_a_forward_after_a_failure_asks_again():
    gone = TeacherUnavailableError("gone")
    teacher = Flaky({1: gone, 2: gone, 3: gone})  # ahead, twice, and at the forward
    model = converted(Net(seed=1), teacher)
    failed = 0
    for x, _ in model.prefetch(batches(3)):
        model(x)
        try:
            model.compute_kd_loss()
        except TeacherUnavailableError:
            failed += 1
            model(x)
            loss = model.compute_kd_loss().item()
            assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)
    assert (failed, len(teacher.asked)) == (1, 6)


def test_a_bug_in_a_teacher_belongs_to_its_batch():
    class Buggy(Asked):
        def submit(self, args, kwargs, taps):
            if args[0][0, 0] == 1000:
                raise KeyError("mine")
            return super().submit(args, kwargs, taps)

    model = converted(Net(seed=1), Buggy())
    given = batches(3)
    given[1][0][0, 0] = 1000
    loop = iter(model.prefetch(given))
    model(next(loop)[0])
    model.compute_kd_loss()
    model(next(loop)[0])
    with pytest.raises(KeyError, match="mine"):
        model.compute_kd_loss()
    model(next(loop)[0])
    model.compute_kd_loss()


def test_nothing_is_left_of_a_loader_that_failed():
    model = converted(Net(seed=1), Asked())
    batch = torch.ones(2, 8)
    ref = weakref.ref(batch)

    def failing(x):
        yield x
        del x
        raise OSError("disk")

    looked = model.prefetch(failing(batch))
    del batch
    gc.disable()
    try:
        with pytest.raises(OSError, match="disk"):
            train(model, looked)
        assert ref() is None
    finally:
        gc.enable()
