"""What two ranks do in tests/client/test_prefetch_loaders.py: each check returns plain values for the tests."""

import importlib.util
import os
import sys
import warnings

import torch
import torch.distributed as dist
from looking_ahead import Asked
from models import Net, converted
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

ROWS = 16


class Rows(Dataset):
    """Row i is all i."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return torch.full((8,), float(i))


class Stream(IterableDataset):
    """Shards itself, as such datasets do."""

    def __iter__(self):
        for i in range(dist.get_rank(), ROWS, dist.get_world_size()):
            yield torch.full((8,), float(i))


def injected(loader, sampler):
    """Another DataLoader of the same class with another sampler, made of one's attributes: as Lightning makes it."""
    kept = ("dataset", "batch_size", "num_workers", "collate_fn", "drop_last")
    attributes = {name: value for name, value in vars(loader).items() if name in kept}
    return type(loader)(**attributes, sampler=sampler)


def stepped(model, run, loop):
    """The rows of each step; each batch's features were asked for before it was yielded."""
    taken = []
    for x in loop:
        assert sum(map(len, model.teacher_model.asked)) >= sum(map(len, taken)) + len(x)
        taken.append(x[:, 0].tolist())
        run(x)
        model.compute_kd_loss().backward()
    return taken


def distilled():
    return converted(Net(seed=1), Asked())


def asked(model):
    """The rows of each batch that its teacher was asked for."""
    return [x[:, 0].tolist() for x in model.teacher_model.asked]


def warned(loop):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        next(iter(loop))
    return [str(warning.message) for warning in caught if "shards" in str(warning.message)]


def trained(make):
    model = distilled()
    run = DistributedDataParallel(model)
    loop = make(model)
    return {"rows": stepped(model, run, loop), "asked": asked(model), "warned": warned(loop)}


def plain():
    return trained(lambda model: model.prefetch(DataLoader(Rows(), batch_size=4)))


def with_sampler():
    return trained(lambda model: model.prefetch(DataLoader(Rows(), 4, sampler=DistributedSampler(Rows()))))


def injected_sampler():
    def make(model):
        loop = injected(model.prefetch(DataLoader(Rows(), batch_size=4)), DistributedSampler(Rows(), shuffle=False))
        assert isinstance(loop, DataLoader)
        return loop

    return trained(make)


def stream():
    return trained(lambda model: model.prefetch(DataLoader(Stream(), batch_size=4)))


def prepared():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return trained(lambda model: model.prefetch(accelerator.prepare(DataLoader(Rows(), batch_size=4))))


def prepared_after():
    from accelerate import Accelerator

    model = distilled()
    loader = Accelerator(cpu=True).prepare(model.prefetch(DataLoader(Rows(), batch_size=4)))
    return {"rows": [x[:, 0].tolist() for x in loader]}


def lightning():
    if importlib.util.find_spec("lightning") is None:
        return None
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.rows = distilled(), []

        def train_dataloader(self):
            return self.model.prefetch(DataLoader(Rows(), batch_size=4, shuffle=True))

        def training_step(self, x, _):
            self.rows.append(x[:, 0].tolist())
            self.model(x)
            return self.model.compute_kd_loss()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, **quiet)
    assert trainer.world_size == 2
    trainer.fit(module)
    return {"rows": module.rows, "asked": asked(module.model)}


CHECKS = [plain, with_sampler, injected_sampler, stream, prepared, prepared_after, lightning]


def main(rank, rendezvous, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(place, TORCHELASTIC_RUN_ID="tests", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GROUP_RANK="0")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.save({check.__name__: check() for check in CHECKS}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
