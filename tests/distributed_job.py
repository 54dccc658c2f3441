"""What two ranks do in tests/test_distributed.py: each check returns plain values, which the tests look at."""

import sys
import tempfile
import warnings
from pathlib import Path

import schoolhouse as sh
import torch
import torch.distributed as dist
from models import Net
from schoolhouse import errors
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

ROWS = 8


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


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def gradients(model, run, x, scale=1.0):
    run(x)
    loss = model.compute_kd_loss()
    (loss * scale).backward()
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

    def __init__(self, rank, url):
        self.rank, self.url = rank, url
        self.mesh = init_device_mesh("cpu", (2,))
        self.x = batch()[rank * ROWS // 2 : (rank + 1) * ROWS // 2]

    def make(self):
        return sh.connect(self.url) if self.url else Net(32, seed=1)

    def shard(self, *modules):
        for module in modules:
            fully_shard(module, mesh=self.mesh)

    def ddp(self):
        model = converted(Net(16, seed=2), self.make())
        wrapped = DistributedDataParallel(model)
        found = {"gradients": gradients(model, wrapped, self.x)}
        traffic = model.teacher_model.traffic().sent_bytes if self.url else None
        model.zero_grad()
        with wrapped.no_sync():
            gradients(model, wrapped, self.x[:2], 0.5)
        found |= {"accumulated": gradients(model, wrapped, self.x[2:], 0.5), "sent": traffic}
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


def main(rank, rendezvous, url, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    job = Job(rank, url)
    found = {name: getattr(job, name)() for name in ("ddp", "ddp_settings", "fsdp_after", "fsdp_before")}
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
