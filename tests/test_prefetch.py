"""Look-ahead: order, bounds, pairing, and every way out of a loop."""

import collections
import gc
import threading
import warnings

import pytest
import schoolhouse as sh
import torch
from models import Net, converted
from schoolhouse.errors import ConfigError, FeatureMismatchError, TeacherBusyError, TeacherForwardError
from schoolhouse_server import serve
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Pair = collections.namedtuple("Pair", "y x")


def batches(count=6, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 8, generator=generator), torch.randint(0, 5, (rows,), generator=generator))
        for _ in range(count)
    ]


def distilled(teach, criterion=None, module=None, student=None):
    return converted(student or Net(seed=1), teach(module or Net(32)), criterion)


def expected_loss(student, teacher, x):
    """KL of the plain modules, in float64."""
    with torch.no_grad():
        log_s = F.log_softmax(student(x).double(), -1)
        t = F.softmax(teacher(x).double(), -1)
    return (t * (t.log() - log_s)).mean().item()


class Asked:
    """A teacher in this process that writes down what it was asked for, and answers when told to."""

    def __init__(self, module=None, hold=False):
        self.inner = sh.LocalTeacher(module or Net(32))
        self.asked, self.futures, self.hold, self.busy_from = [], [], hold, None

    def describe(self):
        return self.inner.describe()

    def submit(self, args, kwargs, taps):
        if self.busy_from is not None and len(self.asked) >= self.busy_from:
            raise TeacherBusyError("full")
        self.asked.append(args[0].clone())
        future = self.inner.submit(args, kwargs, taps)
        if self.hold:
            made, future = future.result(), type(future)()
            future.made = made
        self.futures.append(future)
        return future

    def close(self):
        pass


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
    assert max(model_reads) == 1  # two of 52,000 bytes, and the third would not fit
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
    with pytest.raises(FeatureMismatchError, match="of other values"):
        model(given[2][0])  # asked for, not yielded yet
    with pytest.raises(FeatureMismatchError, match="compute_kd_loss needs a forward"):
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

    x = next(loop := iter(model.prefetch(reused(), depth=2)))
    with pytest.raises(FeatureMismatchError, match="of other values"):
        model(x)
    loop.close()
    for x, _ in model.prefetch(batches(2)):
        with pytest.raises(FeatureMismatchError, match="of other values"):
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


def test_a_skipped_batch_is_dropped_after_depth_others():
    teacher = Asked(hold=True)
    model = converted(Net(seed=1), teacher)
    loop = iter(model.prefetch(batches(6), depth=2))
    x = next(loop)[0]
    next(loop)
    assert not teacher.futures[0].cancelled()
    next(loop)
    assert teacher.futures[0].cancelled()
    with pytest.raises(FeatureMismatchError, match="batch 1, .* or batch 2, "):
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


def test_leaving_the_loop_early_drops_what_was_asked_for():
    teacher = Asked(hold=True)
    model = converted(Net(seed=1), teacher)
    for _ in model.prefetch(batches(8), depth=3):
        break
    assert [future.cancelled() for future in teacher.futures] == [True] * 4
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
    gc.collect()
    model.compute_kd_loss()
    model(torch.ones(2, 8))


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


def test_inputs_say_what_the_forward_gets(teach):
    model = distilled(teach)
    for inputs in (
        lambda b: b["a"] * 2,
        lambda b: (b["a"] * 2,),
        lambda b: {"x": b["a"] * 2},
        lambda b: ((), {"x": b["a"] * 2}),
    ):
        for batch in model.prefetch([{"a": x} for x, _ in batches(2)], inputs=inputs):
            assert set(batch) == {"a"}
            model(batch["a"] * 2)
            loss = model.compute_kd_loss().item()
            assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), batch["a"] * 2), rel=1e-4)
    with pytest.raises(ConfigError, match=r"takes \['x'\], and the batch has \['a'\]: give prefetch inputs="):
        next(model.prefetch([{"a": torch.ones(2, 8)}]))


class Many(nn.Module):
    """A forward like those of language models."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = Net(seed=seed)

    def forward(self, input_ids=None, scale=None, labels=None):
        out = self.net(input_ids) * (1 if scale is None else scale)
        return out if labels is None else out + labels.sum()


def test_default_inputs_take_what_the_forward_takes():
    model = converted(Many(1), Many())
    x = torch.ones(2, 8)
    for batch in model.prefetch([{"input_ids": x, "scale": torch.tensor(2.0), "id": "a"}]):
        model(input_ids=batch["input_ids"], scale=batch["scale"])
        model.compute_kd_loss()
    for batch in model.prefetch([(x, torch.ones(2)), [x], x]):  # the first argument alone, since none is needed
        model(batch if isinstance(batch, torch.Tensor) else batch[0])
        model.compute_kd_loss()
    next(loop := iter(model.prefetch([{"input_ids": x, "labels": torch.ones(2, dtype=torch.int64)}])))
    with pytest.raises(FeatureMismatchError, match=r"labels=int64\[2\]"):
        model(input_ids=x)
    loop.close()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # nothing to pin for on this machine
def test_a_data_loader_with_workers():
    data = TensorDataset(torch.randn(20, 8), torch.arange(20))
    with serve(Net(32)) as server, sh.connect(server.url) as teacher:
        model = converted(Net(seed=1), teacher)
        loader = DataLoader(data, batch_size=4, num_workers=2, pin_memory=True, multiprocessing_context="spawn")
        seen = []
        for x, y in model.prefetch(loader, depth=2):
            model(x)
            loss = model.compute_kd_loss().item()
            assert loss == pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)
            seen += y.tolist()
    assert seen == list(range(20))
    assert len(model.prefetch(loader)) == 5


def test_progress_tells_how_long_each_step_waited():
    gate = threading.Event()

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
            threading.Timer(0.2, gate.set).start()
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


def test_a_prefetch_can_be_passed_over_again():
    model = converted(Net(seed=1), Asked())
    looked = model.prefetch(batches(3))
    first = next(looked)
    assert [x is not first[0] for x, _ in looked] == [True, True]  # goes on
    assert len(list(looked)) == 3


def test_copies_and_pickles_begin_without_look_ahead():
    import copy

    model = converted(Net(seed=1), Net(32))
    for x, _ in model.prefetch(batches(2)):
        twin = copy.deepcopy(model)
        twin(torch.ones(3, 8))
        twin.compute_kd_loss()
        model(x)
        model.compute_kd_loss()
    for _ in model.prefetch(batches(2)):
        student = sh.export(model)
        break
    assert student(torch.ones(3, 8)).shape == (3, 5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"depth": True}, "depth is True"),
        ({"depth": 2.0}, "depth is 2.0"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"inputs": "x"}, "inputs is a str"),
        ({"progress": 3}, "progress is a int"),
    ],
)
def test_wrong_settings(wrong, says):
    model = converted(Net(seed=1), Net(32))
    with pytest.raises(ConfigError, match=says):
        model.prefetch(batches(1), **wrong)
    with pytest.raises(ConfigError, match="loader is a int"):
        model.prefetch(3)


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
