"""What two ranks do in tests/client/test_distributed.py: each check returns plain values, which the tests look at."""

import datetime
import itertools
import sys
import tempfile
import time
import warnings
from pathlib import Path

import schoolhouse as sh
import torch
import torch.distributed as dist
from models import Net
from schoolhouse import errors
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

ROWS = 8
GIVE_UP_S = 1  # a rank that waits for one that failed


class Taught(Net):
    """A teacher that keeps the batches which it was asked for, and fails on one with a NaN."""

    def __init__(self, seen):
        super().__init__(32, seed=1)
        self.seen = seen

    def forward(self, x):
        if x.isnan().any():
            raise ValueError("a batch with NaN")
        self.seen.append(x.clone())
        return super().forward(x)


class Blocks(nn.Module):
    """Two blocks and a head."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.two, self.lm_head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 5)

    def forward(self, x):
        return self.lm_head(self.two(self.one(x)))


KINDS = ["kd_loss", "layerwise_kd"]
LAYERS = [("one.2",), ("one.2", "two")]  # a backward from one.2 reads its weight, for the sake of one.0
SHARDED = {"whole": [""], "blocks and whole": ["one", "two", ""], "blocks": ["one", "two"]}
WHEN = ["after convert", "before convert"]


class Projected(nn.Module):
    """A loss with parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(9)
        self.map = nn.Linear(16, 32)

    def forward(self, out_s, out_t):
        return F.mse_loss(self.map(out_s), out_t)


def batch():
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))


def converted(student, teacher, loss=None):
    pairs = {("body", "body"): loss or Projected(), ("fc", "fc"): nn.MSELoss()}
    balancer = sh.StaticLossBalancer([0.5, 0.5])
    return sh.convert(student, {"kd_loss": {"teacher_model": teacher, "criterion": pairs, "loss_balancer": balancer}})


def inner(student, teacher, layers, kind="kd_loss"):
    """With losses at inner layers only."""
    pairs = {(layer, layer): nn.MSELoss() for layer in layers}
    balancer = sh.StaticLossBalancer([1 / len(layers)] * len(layers))
    return sh.convert(student, {kind: {"teacher_model": teacher, "criterion": pairs, "loss_balancer": balancer}})


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def gradients(model, run, x, scale=1.0):
    run(x)
    loss = model.compute_kd_loss()
    (loss * scale).backward()
    return held(model)


def held(model):
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def trained(model, run, x, steps=5):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        run(x)
        model.compute_kd_loss().backward()
        optimizer.step()
    return {n: whole(p) for n, p in model.named_parameters() if not n.startswith("_teacher")}


def refusal(action):
    try:
        action()
    except errors.ConfigError as err:
        return str(err)
    return "nothing was refused"


class Job:
    """One rank; `make` gives a teacher, here or elsewhere."""

    def __init__(self, rank, urls):
        self.rank = rank
        self.mesh = init_device_mesh("cpu", (2,))
        self.x = batch()[rank * ROWS // 2 : (rank + 1) * ROWS // 2]
        self.seen = []  # by teachers in this process
        self.served = [sh.connect(url) for url in urls]

    def make(self):
        return self.served[0] if self.served else Taught(self.seen)

    def make_blocks(self):
        return self.served[1] if self.served else Blocks(1)

    def asked(self):
        """How many batches the teacher of `make` got from this rank, and those that a teacher here got."""
        return {"requests": self.served[0].traffic().requests if self.served else len(self.seen), "seen": self.seen}

    def shard(self, *modules, **settings):
        for module in modules:
            fully_shard(module, mesh=self.mesh, **settings)

    def ddp(self):
        model = converted(Net(16, seed=2), self.make())
        wrapped = DistributedDataParallel(model)
        found = {"gradients": gradients(model, wrapped, self.x)}
        model.zero_grad()
        with wrapped.no_sync():
            gradients(model, wrapped, self.x[:2], 0.5)
        found["accumulated"] = gradients(model, wrapped, self.x[2:], 0.5)
        found["weights"] = trained(model, wrapped, self.x)
        state = wrapped.state_dict()
        other = DistributedDataParallel(converted(Net(16, seed=5), self.make()))
        other.load_state_dict(state)
        found |= {"names": list(state), "loaded": all(torch.equal(v, other.state_dict()[n]) for n, v in state.items())}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found["exported"] = type(sh.export(wrapped)).__name__
        return {**found, "said": str(caught[-1].message)}

    def ddp_settings(self):
        found = {}
        for name in ("static_graph", "find_unused_parameters"):
            wrapped = DistributedDataParallel(converted(Net(16, seed=2), self.make()), **{name: True})
            found[name] = refusal(lambda wrapped=wrapped: wrapped(self.x))
        found["before"] = refusal(lambda: converted(DistributedDataParallel(Net(16, seed=2)), self.make()))
        plain = {("fc", "fc"): nn.MSELoss()}
        model = sh.convert(Net(16, seed=2), {"kd_loss": {"teacher_model": self.make(), "criterion": plain}})
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        return {**found, "unused": gradients(model, wrapped, self.x)}

    def ddp_inner(self):
        """Losses at inner layers only, with all else frozen: by hand, or by the mode."""
        found = {}
        for kind in KINDS:
            model = inner(Blocks(2), self.make_blocks(), LAYERS[0], kind)
            if kind == "kd_loss":
                model.two.requires_grad_(False)
                model.lm_head.requires_grad_(False)
            found[kind] = self.steps(model, DistributedDataParallel(model))
        return found

    def steps(self, model, run):
        """Gradients of two steps, of accumulated ones, of two graphs at once, and of separate forwards."""
        half = len(self.x) // 2
        found = [gradients(model, run, self.x)]
        model.zero_grad()
        found.append(gradients(model, run, self.x))
        model.zero_grad()
        gradients(model, run, self.x[:half], 0.5)
        found.append(gradients(model, run, self.x[half:], 0.5))
        if run is model:  # DistributedDataParallel has one graph at a time, and splits no forward
            model.zero_grad()
            losses = [(run(part), model.compute_kd_loss())[1] for part in self.x.split(half)]
            (sum(losses) / 2).backward()
            found.append(held(model))
            model.zero_grad()
            with model.only_teacher_forward():
                model(self.x)
            with model.only_student_forward():
                found.append(gradients(model, run, self.x))
        return found

    def fsdp_inner(self):
        """Losses at layers inside sharded parts, whose own outputs have no part in them."""
        found = {}
        for kind, layers, sharded, when in itertools.product(KINDS, LAYERS, SHARDED, WHEN):
            student = Blocks(2)
            if when == "before convert":
                self.shard(*map(student.get_submodule, SHARDED[sharded]))
            model = inner(student, self.make_blocks(), layers, kind)
            if when == "after convert":
                self.shard(*map(model.get_submodule, SHARDED[sharded]))
            found[kind, layers, sharded, when] = self.steps(model, model)
        return found

    def fsdp_settings(self):
        model = converted(Net(16, seed=2), self.make())
        self.shard(model.body, model, reshard_after_forward=True)
        found = {"resharded": gradients(model, model, self.x)}
        model = converted(Net(16, seed=2), self.make())
        self.shard(model.body, model.fc)
        found["losses alone"] = refusal(lambda: model(self.x))
        self.shard(*model.loss_modules)
        found["loss by itself"] = gradients(model, model, self.x)
        fsdp1 = FullyShardedDataParallel(Net(16, seed=2), device_id=torch.device("cpu"))
        return {**found, "fsdp1": refusal(lambda: converted(fsdp1, self.make()))}

    def sharded_teacher(self):
        """A teacher in this process, sharded on its own, asked for less than its output."""
        found = {}
        for sharded in SHARDED if not self.served else ():
            teacher = Blocks(1)
            self.shard(*map(teacher.get_submodule, SHARDED[sharded]))
            model = inner(Blocks(2), teacher, LAYERS[1])
            self.shard(model)
            found[sharded] = self.steps(model, model)
        return found

    def failing(self):
        """The teacher fails on rank 1; rank 0 waits for its gradients no longer than the group's timeout."""
        found = {}
        for how in ("ddp", "fsdp"):
            group = dist.new_group()
            pairs = {("fc", "fc"): nn.MSELoss()}
            model = sh.convert(Net(16, seed=2), {"kd_loss": {"teacher_model": self.make(), "criterion": pairs}})
            run = DistributedDataParallel(model, process_group=group) if how == "ddp" else model
            if how == "fsdp":
                fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
            run(torch.full_like(self.x, torch.nan) if self.rank else self.x)
            dist.barrier()  # up to here one may be as slow as it likes
            _set_pg_timeout(datetime.timedelta(seconds=GIVE_UP_S), group)
            began = time.monotonic()
            try:
                model.compute_kd_loss().backward()
                found[how] = ("nothing", 0.0)
            except Exception as err:
                found[how] = (type(err).__name__, time.monotonic() - began)
            dist.barrier()
        return found

    def fsdp_after(self):
        model = converted(Net(16, seed=2), self.make())
        self.shard(model.body, model)
        found = {"gradients": gradients(model, model, self.x)}
        model.zero_grad()
        return {**found, "weights": trained(model, model, self.x), **self.kept(model)}

    def fsdp_before(self):
        student, loss = Net(16, seed=2), Projected()
        self.shard(student.body, student)
        refused = refusal(lambda: converted(student, self.make()))
        self.shard(loss)
        model = converted(student, self.make(), loss)
        found = {"refused": refused, "gradients": gradients(model, model, self.x)}
        model.zero_grad()
        return {**found, "weights": trained(model, model, self.x), **self.kept(model)}

    def kept(self, model):
        """What a sharded meta-model writes, and what export leaves of it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        names = list(get_model_state_dict(model, options=options))
        shared = [tempfile.mktemp() if self.rank == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        path = Path(shared[0])
        sh.save(model, path, include_losses=True)
        again = converted(Net(16, seed=7), self.make())
        self.shard(again.body, again)
        sh.restore(again, path)
        mine, theirs = (dict(m.named_parameters()) for m in (model, again))
        equal = all(torch.equal(whole(p), whole(theirs[n])) for n, p in mine.items() if not n.startswith("_teacher"))
        dist.barrier()
        path.unlink(missing_ok=True)
        student = sh.export(model)
        student(self.x).sum().backward()
        bases = [base.__name__ for base in type(student).__mro__]
        return {"names": names, "restored": equal, "bases": bases}


def main(rank, rendezvous, out, *urls):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    job = Job(rank, urls)
    checks = ["ddp", "ddp_settings", "ddp_inner", "fsdp_after", "fsdp_before", "fsdp_inner", "fsdp_settings"]
    found = {name: getattr(job, name)() for name in [*checks, "sharded_teacher", "failing", "asked"]}
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
