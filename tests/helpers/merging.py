"""Requests that an engine takes at once, for tests of merging."""

import queue
import threading
import time
from contextlib import contextmanager

import torch
from models import Net
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.teachers.protocol import Features
from schoolhouse.teachers.query import Wanted
from schoolhouse_server.engine.engine import Engine, Job, Ticket
from schoolhouse_server.merge.settings import MergeSettings
from schoolhouse_wire.limits import Limits
from schoolhouse_wire.values import codec
from schoolhouse_wire.values.codec import Arguments
from torch import nn

SAME = MergeSettings(mode="same-shape")


class Gated(nn.Module):
    """Runs `inner`; a request with `hold` waits at the gate, so that those behind it are taken at once."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.began, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.batches = []

    def forward(self, *args, hold=False, **kwargs):
        if hold:
            self.began.release()
            assert self.go.acquire(timeout=20)
            return args[0]
        self.batches.append(next(iter([*args, *kwargs.values()])).shape)
        return self.inner(*args, **kwargs)


class Asked:
    """A request and its answer."""

    def __init__(self, *args, taps=("",), encodings=None, positions=None, timeout_s=60.0, **kwargs):
        self.answers = queue.SimpleQueue()
        self.ticket = Ticket(lambda result: self.answers.put(result), deadline=time.monotonic() + timeout_s)
        wanted = Wanted.of(taps, encodings, positions)
        self.job = Job(Arguments(args, kwargs), wanted, object(), [self.ticket])

    def result(self):
        """What comes: an answer or an error."""
        result = self.answers.get(timeout=20)
        assert self.answers.empty()
        return result

    @property
    def features(self):
        """By tap, as a client unpacks them."""
        result = self.result()
        if isinstance(result, BaseException):
            raise result
        layout = codec.read_layout(result.features.header, Limits())
        payload = bytearray(max(layout.nbytes, 1))
        for slot, tensor in zip(layout.tensors, result.features.tensors, strict=True):
            payload[slot[0] : slot[0] + tensor.nbytes] = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        values = codec.unpack(layout, payload, Limits())
        return Features(dict(zip(self.job.wanted.taps, values, strict=True)), revision=result.revision)


@contextmanager
def engine_of(module, settings=SAME, *, early_stop=False, **more):
    """A started engine over a gated module."""
    engine = Engine(LocalTeacher(Gated(module), early_stop=early_stop), max_queued=100, merge=settings, **more)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def submit(engine, job):
    """Have an engine's loop submit a request, as sessions do."""

    async def prepared():
        await engine.prepare(job, 0)
        engine.submit(job)

    engine.loop.run(prepared()).result(20)


def at_once(engine, *asked):
    """Submit requests so that the engine finds all of them waiting; returns the shapes that ran."""
    gate = engine.teacher.module
    first = Asked(torch.ones(1), hold=True)
    submit(engine, first.job)
    assert gate.began.acquire(timeout=20)
    gate.batches.clear()
    for one in asked:
        submit(engine, one.job)
    last = Asked(torch.ones(1, 2), hold=True)  # not like the first
    submit(engine, last.job)
    gate.go.release(2)
    assert gate.began.acquire(timeout=20)
    first.result(), last.result()  # after the last, nothing of those before it goes on
    return [*gate.batches]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(*rows):
    """Requests of those rows, and what a forward of each alone gives."""
    xs = [randn(n, 8, seed=i) for i, n in enumerate(rows)]
    return [Asked(x) for x in xs], [Net().eval()(x) for x in xs]


class Words(nn.Module):
    """Attends over the tokens that count, of ids `[rows, length]`."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("table", torch.randn(10, 6, generator=generator))
        self.head = nn.Linear(6, 11, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(11, 6, generator=generator))

    def forward(self, ids, mask=None):
        x = self.table[ids]
        scores = x @ x.mT
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -torch.inf)
        return self.head(scores.softmax(-1) @ x)


def ids(rows, length, seed=0):
    return torch.randint(0, 10, (rows, length), generator=torch.Generator().manual_seed(seed))
