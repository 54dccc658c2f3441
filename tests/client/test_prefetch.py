"""Look-ahead: order, bounds, pairing, and what is shown of it."""

import threading
import warnings
import weakref
from concurrent.futures import wait

import pytest
import schoolhouse as sh
import torch
from looking_ahead import Asked, Pair, batches, distilled, expected_loss, train
from models import Net, converted
from schoolhouse.distill import answer
from schoolhouse.errors import FeatureMismatchError, UsageError
from schoolhouse_server import serve
from torch import nn
from torch.nn import functional as F


def test_each_forward_gets_the_features_of_its_own_batch(teach):
    model, teacher, plain = distilled(teach), Net(32).eval(), Net(seed=1)
    seen = []
    given = batches()
    for (x, y), (x_given, y_given) in zip(model.prefetch(given, depth=3), given, strict=True):
        assert x is x_given
        assert y is y_given
        model(x)
        seen.append(model.compute_kd_loss().item())
    assert seen == pytest.approx([expected_loss(plain, teacher, x) for x, _ in given], rel=1e-4)


def test_the_teacher_is_asked_in_order_and_no_further_than_depth():
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    given = batches(8)
    read = []
    ahead = []
    for i, (x, _) in enumerate(model.prefetch((read.append(n) or batch for n, batch in enumerate(given)), depth=3)):
        ahead.append(len(read) - i - 1)
        assert len(teacher.asked) == len(read)
        model(x)
        model.compute_kd_loss()
    assert ahead == [3, 3, 3, 3, 3, 2, 1, 0]
    assert all(torch.equal(asked, x) for asked, (x, _) in zip(teacher.asked, given, strict=True))  # once each


def test_bytes_are_bounded():
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    given = batches(6, rows=1000)  # 32,000 bytes of inputs, 20,000 of features
    model_reads = []
    for i, (x, _) in enumerate(model.prefetch(given, depth=5, max_bytes=120_000)):
        model_reads.append(len(teacher.asked) - i - 1)
        model(x)
        model.compute_kd_loss()
    assert model_reads == [1, 1, 1, 1, 1, 0]  # two of 52,000 bytes, and the third would not fit
    assert len(teacher.asked) == 6
    lonely = [len(teacher.asked) for _ in model.prefetch(given, depth=5, max_bytes=1)]
    assert lonely == [7, 8, 9, 10, 11, 12]  # one at a time, always


def test_a_forward_on_another_batch_says_which_was_expected(teach):
    model = distilled(teach)
    given = batches()
    loop = iter(model.prefetch(given))
    next(loop)
    x, _ = next(loop)
    with pytest.raises(FeatureMismatchError, match=r"batch 0, \(float32\[4, 8\]\), or batch 1, \(float32\[4, 8\]\),"):
        model(torch.zeros(4, 8))
    with pytest.raises(FeatureMismatchError, match=r"got \(float32\[3, 8\]\), where"):
        model(x[:3])
    with pytest.raises(FeatureMismatchError, match="with other values"):
        model(given[2][0])  # asked for, not yielded yet
    with pytest.raises(UsageError, match="compute_kd_loss needs a forward"):
        model.compute_kd_loss()
    model(x)
    assert model.compute_kd_loss().item() == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)


def test_a_batch_that_was_changed_in_place_is_another_one(teach):
    model = distilled(teach)
    buffer = torch.zeros(4, 8)

    def reused():
        for i in range(4):
            buffer.numpy()[:] = i  # unseen by version counters
            yield buffer

    loop = iter(model.prefetch(reused(), depth=2))
    with pytest.raises(FeatureMismatchError, match="with other values"):
        train(model, loop)
    loop.close()
    for x, _ in model.prefetch(batches(2)):
        with pytest.raises(FeatureMismatchError, match="with other values"):
            model(x.add_(1))


def test_the_same_call_in_another_form_is_the_same_batch(teach):
    model = distilled(teach)
    for x, _ in model.prefetch(batches(2)):
        model(x=x.clone())
        model.compute_kd_loss()
    for batch in model.prefetch([{"x": x, "y": y} for x, y in batches(2)]):
        model(batch["x"])
        model.compute_kd_loss()
    for batch in model.prefetch([Pair(y, x) for x, y in batches(2)]):
        model(batch.x)
        model.compute_kd_loss()


def test_several_yielded_batches_wait_for_their_forward_in_any_order(teach):
    model = distilled(teach)
    given = batches(6)
    loop = iter(model.prefetch(given, depth=3))
    taken = [next(loop)[0] for _ in range(3)]
    losses = []
    for x in reversed(taken):
        model(x)
        losses.append(model.compute_kd_loss())
    sum(losses).backward()
    expected = [expected_loss(Net(seed=1), Net(32).eval(), x) for x in reversed(taken)]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-4)
    for _ in range(3):
        next(loop)
    with pytest.raises(FeatureMismatchError, match="batch 3, .* or batch 4, .* or batch 5"):
        model(taken[0])


def test_more_batches_than_depth_before_their_forwards(teach):
    model = distilled(teach)
    loop = iter(model.prefetch(batches(6), depth=4))
    taken = [next(loop)[0] for _ in range(6)]  # for gradient accumulation
    with pytest.raises(FeatureMismatchError, match=r"^6 batches .* depth=4 .* accumulation.*: depth=6 or above$"):
        model(taken[0])
    for x in taken[2:]:
        model(x)
        model.compute_kd_loss()
    loop.close()
    one, other = distilled(teach), distilled(teach)
    for x, _ in one.prefetch(other.prefetch(batches(6), depth=4), depth=3):  # two models over one loader
        for each in (one, other):
            each(x)
            loss = each.compute_kd_loss().item()
            assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)


def test_a_skipped_batch_is_dropped_after_depth_others():
    teacher = Asked(hold=True)
    model = converted(Net(seed=1), teacher)
    loop = iter(model.prefetch(batches(6), depth=2))
    x = next(loop)[0]
    next(loop)
    assert not teacher.futures[0].cancelled()
    next(loop)
    assert teacher.futures[0].cancelled()
    with pytest.raises(FeatureMismatchError, match="3 batches .* depth=3 or above"):
        model(x)


def test_gradients_accumulate_over_batches(teach):
    model, plain, teacher = distilled(teach), Net(seed=1), Net(32).eval()
    for x, _ in model.prefetch(batches(4)):
        model(x)
        model.compute_kd_loss().backward()
    for x, _ in batches(4):
        F.kl_div(F.log_softmax(plain(x), -1), F.softmax(teacher(x), -1).detach(), reduction="mean").backward()
    torch.testing.assert_close(model.body.weight.grad, plain.body.weight.grad)


def test_a_batch_may_be_forwarded_again_until_the_next_is_taken():
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    for x, _ in model.prefetch(batches(3)):
        first = (model(x), model.compute_kd_loss())[1]
        again = (model(x), model.compute_kd_loss())[1]
        assert first.item() == again.item()
    assert len(teacher.asked) == 3


@pytest.mark.parametrize("mode", ["eval", "only_student"])
def test_validation_in_between(teach, mode):
    model, teacher = distilled(teach), Net(32).eval()
    validation = batches(2, rows=7, seed=9)
    for x, _ in model.prefetch(batches(4), depth=2):
        model(x)
        model.compute_kd_loss()
        if mode == "only_student":
            with model.only_student_forward():
                assert all(model(v).shape == (7, 5) for v, _ in validation)
            continue
        model.eval()
        for v, _ in validation:  # asks the teacher then and there
            model(v)
            assert model.compute_kd_loss().item() == pytest.approx(expected_loss(Net(seed=1), teacher, v), rel=1e-4)
        for v, _ in model.prefetch(validation):  # or looks ahead itself
            model(v)
            assert model.compute_kd_loss().item() == pytest.approx(expected_loss(Net(seed=1), teacher, v), rel=1e-4)
        model.train()


def test_eval_before_the_forward_leaves_the_look_ahead_as_it_is():
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    for x, _ in model.prefetch(batches(3)):
        model.eval()
        model(x)
        model.train()
        model(x)
        model.compute_kd_loss()
    assert len(teacher.asked) == 3


def test_layerwise_looks_ahead_too(teach):
    def made(teacher):
        mode = ("layerwise_kd", {"teacher_model": teacher, "criterion": {("fc", "fc"): nn.MSELoss()}})
        return sh.convert(Net(seed=1), mode=[mode])

    model, plain = made(teach(Net())), made(Net())
    for x, _ in model.prefetch(batches(3)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for each in (model, plain):
                each(x)
            assert model.compute_kd_loss().item() == plain.compute_kd_loss().item()


def test_until_features_are_known_one_batch_is_asked_for():
    """Features may be larger than all that is allowed."""
    teacher = Asked(hold=True)
    model = converted(Net(seed=1), teacher)
    loop = iter(model.prefetch(batches(8, rows=1000), depth=5, max_bytes=200_000))  # 52,000 each
    next(loop)
    assert len(teacher.asked) == 1
    teacher.futures[0].set_result(teacher.futures[0].made)
    next(loop)
    assert len(teacher.asked) == 3  # one is still here
    longer = iter(model.prefetch([torch.ones(4000, 8), torch.ones(4000, 8)], max_bytes=300_000))  # 208,000 each
    next(longer)
    assert len(teacher.asked) == 4


def test_batches_and_features_are_freed_with_the_next_one():
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    inputs = []

    def loader():
        for x, _ in batches(5):
            inputs.append(weakref.ref(copied := x.clone()))
            yield copied
            del copied

    here = []
    for x in model.prefetch(loader(), depth=2):
        model(x)
        model.compute_kd_loss()
        del x
        here.append([ref() is not None for ref in inputs])
    assert here[2] == [False, False, True, True, True]
    assert here[4] == [False] * 4 + [True]


def test_progress_tells_how_long_each_step_waited(monkeypatch):
    gate = threading.Event()

    def waiting(futures):
        threading.Timer(0.2, gate.set).start()  # from when it waits
        return wait(futures)

    monkeypatch.setattr(answer, "wait", waiting)

    class Gated(Net):
        def forward(self, x):
            assert gate.wait(20)
            return super().forward(x)

    waits, bar = [], []
    with serve(Gated(32)) as server, sh.connect(server.url) as teacher:
        model = converted(Net(seed=1), teacher)
        looked = model.prefetch(batches(3), progress=waits.append)
        for x, _ in looked:
            model(x)
            model.compute_kd_loss()
        assert looked.steps == len(waits) == 3
        assert waits[0] >= 0.15
        assert looked.waited_s == pytest.approx(sum(waits))

        class Bar:
            def set_postfix(self, **shown):
                bar.append(shown)

        for x, _ in model.prefetch(batches(2), progress=Bar()):
            model(x)
            model.compute_kd_loss()
    assert [list(shown) for shown in bar] == [["teacher_wait_ms"]] * 2
