"""A student on a device: nobody waits for it in a step but for one event, and each layer gets its features there."""

import pytest
import schoolhouse as sh
import torch
from looking_ahead import Asked, batches, expected_loss
from models import Net, config, converted
from schoolhouse.errors import FeatureMismatchError
from student_device import LateDevice
from torch import nn
from torch.nn import functional as F

CUDA = "cuda:0"


@pytest.fixture
def device(monkeypatch):
    with LateDevice(monkeypatch) as device:
        yield device


@pytest.fixture(params=["host", "device"])
def moved(request):
    """What a loop does with a batch before the forward."""
    if request.param == "host":
        return torch.clone
    request.getfixturevalue("device")
    return lambda x: x.to(CUDA)


def wanted(x):
    return pytest.approx(expected_loss(Net(seed=1), Net(32).eval(), x), rel=1e-4)


def test_a_forward_on_a_copy_elsewhere_waits_for_nothing_and_its_loss_for_one_event(device, teach):
    model = converted(Net(seed=1), teach(Net(32)))
    for x, _ in model.prefetch(batches(5), depth=3):
        there = x.to(CUDA)
        device.waits.clear()
        model(there)
        assert device.waits == []
        loss = model.compute_kd_loss()
        assert device.waits == ["event"]
        assert loss.item() == wanted(x)


def test_a_batch_that_is_on_the_device_when_it_is_yielded_is_not_waited_for_either(device):
    model = converted(Net(seed=1), sh.LocalTeacher(Net(32)))
    for x in model.prefetch([x.to(CUDA) for x, _ in batches(4)], depth=2):
        device.waits.clear()
        model(x)
        assert device.waits == []
        assert model.compute_kd_loss().item() == wanted(x)


@pytest.mark.parametrize("changed", ["before", "in place"])
def test_other_values_on_the_device_never_get_a_loss(device, teach, changed):
    model = converted(Net(seed=1), teach(Net(32)))
    for i, (x, _) in enumerate(model.prefetch(batches(4), depth=2)):
        there = (x + (changed == "before")).to(CUDA)
        if changed == "in place":
            there.data[-1, -1] += 1  # unseen by version counters
        model(there)
        with pytest.raises(FeatureMismatchError, match=rf"with other values, where batch {i}, "):
            model.compute_kd_loss()
        model(x.to(CUDA))
        assert model.compute_kd_loss().item() == wanted(x)


class Overwrites(Net):
    """A student that writes into its batch."""

    def forward(self, x):
        out = super().forward(x)
        x.zero_()
        return out


def test_a_student_that_writes_into_its_batch_on_the_device(device):
    model = converted(Overwrites(seed=1), sh.LocalTeacher(Net(32)))
    for x, _ in model.prefetch(batches(4), depth=2):
        model(x.to(CUDA))
        assert model.compute_kd_loss().item() == wanted(x)


def test_batches_that_were_taken_together_are_found_in_any_order(device, teach):
    model = converted(Net(seed=1), teach(Net(32)))
    loop = iter(model.prefetch(batches(7), depth=3))
    for order in ([0, 1, 2], [2, 0, 1]):
        taken = [next(loop)[0] for _ in order]
        for x in [taken[i] for i in order for _ in range(2)]:  # each twice
            model(x.to(CUDA))
            assert model.compute_kd_loss().item() == wanted(x)
    x = next(loop)[0]
    with pytest.raises(FeatureMismatchError, match="with other values, where batch 6"):
        (model(taken[0].to(CUDA)), model.compute_kd_loss())
    model(x.to(CUDA))
    assert model.compute_kd_loss().item() == wanted(x)


def test_the_depth_that_was_needed_is_told(moved):
    model = converted(Net(seed=1), sh.LocalTeacher(Net(32)))
    loop = iter(model.prefetch(batches(6), depth=2))
    taken = [next(loop)[0] for _ in range(4)]
    with pytest.raises(FeatureMismatchError, match="depth=4 or above"):
        (model(moved(taken[0])), model.compute_kd_loss())


def test_a_loop_may_go_on_between_a_forward_and_its_loss(moved):
    model = converted(Net(seed=1), sh.LocalTeacher(Net(32)))
    loop = iter(model.prefetch(batches(6), depth=3))
    first, second = next(loop)[0], next(loop)[0]
    model(moved(second))
    third = next(loop)[0]
    assert model.compute_kd_loss().item() == wanted(second)
    for x in (first, third):
        model(moved(x))
        assert model.compute_kd_loss().item() == wanted(x)


def test_a_batch_that_a_full_queue_left_out_is_asked_for_with_its_own_forward(moved):
    teacher = Asked()
    model = converted(Net(seed=1), teacher)
    loop, teacher.busy_from = iter(model.prefetch(batches(4), depth=2)), 1
    first, second = next(loop)[0], next(loop)[0]
    teacher.busy_from = None
    for x in (second, first, first):
        model(moved(x))
        assert model.compute_kd_loss().item() == wanted(x)


def test_forwards_without_a_loss_take_no_other_batchs_features(moved):
    model = converted(Net(seed=1), sh.LocalTeacher(Net(32)))
    loop = iter(model.prefetch(batches(4), depth=3))
    first, second = next(loop)[0], next(loop)[0]
    model(moved(first))
    for _ in range(2):
        with pytest.warns(UserWarning, match="again without compute_kd_loss"):
            model(moved(first))
    assert model.compute_kd_loss().item() == wanted(first)
    next(loop)
    model(moved(second))
    assert model.compute_kd_loss().item() == wanted(second)


class Labelled(Net):
    """The teacher's answer tells whether it was asked with labels."""

    def forward(self, x, labels=None):
        return super().forward(x) * (1 if labels is None else 2)


@pytest.mark.parametrize("inputs", [(None, dict), (dict, None)])
def test_loops_within_loops_ask_each_in_its_own_way(moved, inputs):
    model = converted(Labelled(seed=1), sh.LocalTeacher(Labelled(seed=2)))
    outer, inner = ([{"x": x, "labels": y} for x, y in batches(2, seed=seed)] for seed in (1, 2))
    for first in model.prefetch(outer, inputs=inputs[0]):
        for second in model.prefetch(inner, inputs=inputs[1]):
            for batch, own in ((first, inputs[0]), (second, inputs[1])):
                out = model(**{name: moved(value) for name, value in batch.items()})
                theirs = Labelled(seed=2)(batch["x"], batch["labels"] if own else None)
                assert torch.equal(model.compute_kd_loss().cpu(), sh.LogitsDistillationLoss()(out.cpu(), theirs))


def layerwise():
    torch.manual_seed(0)
    student, module = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    settings = config(sh.LocalTeacher(module), {("1", "1"): nn.MSELoss()})
    return sh.convert(student, mode=[("layerwise_kd", settings)]), module


def loss_of(model, module, x):
    with torch.no_grad():
        given = module[0](x)
        return F.mse_loss(model[1](given), module[1](given))


def test_layers_that_get_the_teachers_inputs_get_those_of_their_batch(device):
    model, module = layerwise()
    for x, _ in model.prefetch(batches(3), depth=2):
        there = x.to(CUDA)
        device.waits.clear()
        model(there)
        assert device.waits == []
        assert torch.equal(model.compute_kd_loss().cpu(), loss_of(model, module, x))
    loop = iter(model.prefetch(batches(4), depth=3))
    next(loop)  # is not forwarded
    x = next(loop)[0]
    model(x.to(CUDA))
    assert torch.equal(model.compute_kd_loss().cpu(), loss_of(model, module, x))
    x = next(loop)[0]
    with pytest.raises(FeatureMismatchError, match="with other values"):
        (model(x.to(CUDA) + 1), model.compute_kd_loss())


def test_layers_get_the_inputs_of_their_batch_again(moved):
    model, module = layerwise()
    loop = iter(model.prefetch(batches(4), depth=3))
    first, second = next(loop)[0], next(loop)[0]
    for x in (first, first, second, second):
        model(moved(x))
        assert torch.equal(model.compute_kd_loss().cpu(), loss_of(model, module, x))


class Twice(nn.Module):
    """The halves of a student on two devices, of a teacher on the host."""

    def __init__(self, seed, apart):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.apart = nn.Linear(8, 8), nn.Linear(8, 5), apart

    def forward(self, x):
        out = self.first(x)
        return self.second(out.to("cuda:1") if self.apart else out)


def test_each_feature_goes_to_the_device_of_its_layer_from_pinned_memory_without_blocking(device):
    criterion = {("first", "first"): nn.MSELoss(), ("second", "second"): sh.LogitsDistillationLoss()}
    teacher = sh.LocalTeacher(Twice(1, False))
    model = converted(Twice(0, True), teacher, criterion, sh.StaticLossBalancer([0.5, 0.5]))
    for x, _ in model.prefetch(batches(3)):
        there = x.to(CUDA)
        device.waits.clear()
        model(there)
        device.copied.clear()
        losses = model.compute_kd_loss(skip_balancer=True)
        assert device.copied == [(torch.device("cuda:0"), True, True), (torch.device("cuda:1"), True, True)]
        first = F.mse_loss(Twice(0, False).first(x), Twice(1, False).first(x))
        assert torch.equal(losses["MSELoss_0"].detach().cpu(), first.detach())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_no_step_waits_for_the_device(teach):
    model = converted(Net(seed=1).cuda(), teach(Net(32)))
    seen = []
    for x, _ in model.prefetch([(x.pin_memory(), y) for x, y in batches(6)], depth=3):
        with _no_waits():
            there = x.to("cuda", non_blocking=True)
            model(there)
            loss = model.compute_kd_loss()
            loss.backward()
        seen.append((loss.detach(), x))
    assert [loss.item() for loss, _ in seen] == [wanted(x) for _, x in seen]
    for x, _ in model.prefetch(batches(2)):
        model(x.cuda() + 1)
        with pytest.raises(FeatureMismatchError, match="with other values"):
            model.compute_kd_loss()


@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
def test_on_a_gpu_pinned_memory_of_features_is_not_used_again_before_its_copy_is_done():
    from schoolhouse_wire.pinned import Fetched, to_device

    device = torch.device("cuda:0")
    torch.cuda._sleep(500_000_000)  # what follows stands in line behind it
    there = [to_device(torch.full((1 << 20,), float(i)), device) for i in range(20)]
    back = [Fetched(tensor) for tensor in there]
    assert [tensor.unique().tolist() for tensor in there] == [[float(i)] for i in range(20)]
    assert [one.wait().unique().tolist() for one in back] == [[float(i)] for i in range(20)]


class _no_waits:
    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_exc):
        torch.cuda.set_sync_debug_mode("default")
