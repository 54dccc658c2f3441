"""Look-ahead over a DataLoader acts as one: for trainers that look at it, make another of it, or go on within it."""

from pathlib import Path

import pytest
from loaders_job import ROWS, Rows, asked, distilled, injected, stepped
from looking_ahead import Asked, batches
from models import Net, converted
from torch.utils.data import DataLoader, SequentialSampler
from two_ranks import two_ranks

HELPERS = Path(__file__).parents[1] / "helpers"

JOB = HELPERS / "loaders_job.py"


class Epochs(DataLoader):
    """Has what trainers call, and a state of its own."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for x in super().__iter__():
            yield x + self.epoch * ROWS


def test_it_is_a_data_loader_with_the_same_attributes():
    model = distilled()
    loader = Epochs(Rows(), batch_size=4, drop_last=True)
    loop = model.prefetch(loader)
    assert isinstance(loop, Epochs)
    assert len(loop) == len(loader) == 4
    for name in ("dataset", "sampler", "batch_sampler", "collate_fn", "generator"):
        assert getattr(loop, name) is getattr(loader, name)
    assert (loop.batch_size, loop.drop_last, loop.num_workers) == (4, True, 0)
    assert loop.multiprocessing_context is None
    loop.set_epoch(2)
    assert loader.epoch == 2  # one loader, seen twice
    assert stepped(model, model, loop) == [[float(2 * ROWS + 4 * i + j) for j in range(4)] for i in range(4)]
    assert loop.steps == 4
    assert len(list(loop)) == len(list(loader)) == 4
    with pytest.raises(AttributeError, match="nothing"):
        loop.nothing  # noqa: B018


def test_two_of_one_loader_have_settings_and_steps_of_their_own():
    loader = DataLoader(Rows(), batch_size=4)
    one, other = distilled(), distilled()
    first, second = one.prefetch(loader), other.prefetch(loader)
    stepped(one, one, first)
    assert (first.steps, second.steps) == (4, 0)
    assert len(one.teacher_model.asked) == 4
    assert other.teacher_model.asked == []
    assert not [name for name in vars(loader) if "schoolhouse" in name or "looks" in name]
    rows = []
    for x in one.prefetch(other.prefetch(loader), depth=3):  # two models over one loader
        rows.append(x[:, 0].tolist())
        for model in (one, other):
            model(x)
            model.compute_kd_loss()
    assert rows == asked(one)[:4]


def test_another_one_of_its_class_looks_ahead_too():
    model = distilled()
    loop = injected(model.prefetch(DataLoader(Rows(), batch_size=4), depth=2), SequentialSampler(range(8)))
    x = next(loop)
    assert len(model.teacher_model.asked) == 2  # the second is what the loader has left
    model(x)
    model.compute_kd_loss()
    assert stepped(model, model, loop) == [[4.0, 5.0, 6.0, 7.0]]


class Steps(DataLoader):
    """Has an attribute and one of its class that look-ahead has a name for, too."""

    steps, waited_s = 3, property(lambda self: -1.0)

    def __len__(self):
        return self.steps

    def set_epoch(self, epoch):
        self.steps = epoch


def test_a_data_loaders_own_attributes_are_its_own():
    loop = distilled().prefetch(Steps(Rows(), batch_size=4))
    assert (len(loop), loop.waited_s) == (3, -1.0)
    loop.set_epoch(2)
    assert len(loop) == loop.steps == 2


class OwnIterator(DataLoader):
    """Is stepped through itself, by what its class says."""

    def __iter__(self):
        self.read = super().__iter__()
        return self

    def __next__(self):
        return next(self.read) + 1


def test_a_data_loader_that_is_its_own_iterator():
    model = distilled()
    rows = stepped(model, model, model.prefetch(OwnIterator(Rows(), batch_size=8)))
    assert rows == [[float(i + 1) for i in range(8)], [float(i + 9) for i in range(8)]]


class Source:
    """No DataLoader, with a length and an attribute."""

    shards = 7

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(batches(3))


def test_other_loaders_keep_their_attributes():
    model = converted(Net(seed=1), Asked())
    loop = model.prefetch(Source())
    assert (loop.shards, len(loop), len(list(loop))) == (7, 3, 3)
    assert not isinstance(loop, DataLoader)


def test_workers_that_persist_are_started_once():
    model = distilled()
    loader = DataLoader(Rows(), batch_size=4, num_workers=1, persistent_workers=True)
    for _ in range(2):
        assert len(stepped(model, model, model.prefetch(loader))) == 4
    workers = loader._iterator._workers
    assert len(stepped(model, model, model.prefetch(loader))) == 4
    assert loader._iterator._workers is workers
    loader._iterator._shutdown_workers()


@pytest.mark.parametrize("prepared", [False, True])
def test_accelerate_goes_on_in_the_middle(prepared):
    accelerate = pytest.importorskip("accelerate")
    model = distilled()
    loader = DataLoader(Rows(), batch_size=4)
    loop = model.prefetch(accelerate.Accelerator(cpu=True).prepare(loader) if prepared else loader)
    rest = accelerate.skip_first_batches(loop, 2)
    assert [x[:, 0].tolist() for x in rest] == [[8.0, 9.0, 10.0, 11.0], [12.0, 13.0, 14.0, 15.0]]
    assert len(stepped(model, model, loop)) == 4  # the next epoch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks(JOB, tmp_path_factory.mktemp("ranks"))


def rows_of(found):
    return [row for step in found["rows"] for row in step]


def test_ranks_that_nothing_shards_say_so(ranks):
    for found in (rank["plain"] for rank in ranks):
        assert sorted(rows_of(found)) == list(range(ROWS))  # each trains on all
        (told,) = found["warned"]
        assert "2 ranks" in told
        assert "SequentialSampler" in told
        assert "DistributedSampler" in told


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["with_sampler", "injected_sampler", "stream", "prepared"])
def test_ranks_share_the_data(ranks, how):
    found = [rank[how] for rank in ranks]
    assert sorted(rows_of(found[0]) + rows_of(found[1])) == list(range(ROWS))
    for one in found:
        assert len(one["rows"]) == 2
        assert one["asked"][:2] == one["rows"]  # once each
        assert one["warned"] == []


def test_accelerate_shards_what_prefetch_returns(ranks):
    found = [rank["prepared_after"] for rank in ranks]
    assert sorted(rows_of(found[0]) + rows_of(found[1])) == list(range(ROWS))


def test_lightning_shards_what_prefetch_returns(ranks):
    found = [rank["lightning"] for rank in ranks]
    if found[0] is None:
        pytest.skip("lightning is not installed; test_ranks_share_the_data has what it does")
    for epoch in (slice(0, 2), slice(2, 4)):
        assert sorted(row for one in found for step in one["rows"][epoch] for row in step) == list(range(ROWS))
    for one in found:
        assert one["asked"] == one["rows"]  # ahead, once each
        assert one["rows"][:2] != one["rows"][2:]  # shuffled anew
