"""A device whose streams are really late, and whose allocator really uses freed memory again, at once: both on a CPU.

What a stage launches stands in its stream's queue until it runs: in a stream that is late, only when somebody waits for
it; in another one, as soon as what it waits for is done. A kernel reads and writes memory, whoever owns that by then.
Of each stream, freed blocks go to the next tensors of that stream, unless others were recorded to use them, as torch
does on CUDA: https://docs.pytorch.org/docs/stable/generated/torch.Tensor.record_stream.html
"""

import contextlib
import ctypes
import threading
import weakref
from collections import defaultdict, deque

import torch
from schoolhouse_server.device.device import Device, Stage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

STAGES = ("h2d", "forward", "encode", "d2h")
_READ_BY_HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
_lock = threading.RLock()  # of all queues


class Event:
    """A place in a stream."""

    def __init__(self, enable_timing=False):
        self.stream, self.at = None, 0

    def record(self, stream):
        self.stream, self.at = stream, stream.launched
        return self

    @property
    def passed(self):
        return self.stream.done >= self.at

    def synchronize(self):
        self.stream.reach(self.at)

    def elapsed_time(self, _other):
        return 1.0


class Stream:
    """Kernels, and events to wait for, in their order."""

    def __init__(self, name, late, others):
        self.name, self.late, self.others = name, late, others
        self.queue, self.launched, self.done = deque(), 0, 0

    def launch(self, work):
        with _lock:
            self.queue.append(work)
            self.launched += 1
            self.run_prompt()

    wait_event = launch

    def reach(self, at):
        """Run up to there, and what that waits for, as the host wants it."""
        with _lock:
            while self.done < at:
                if isinstance(self.queue[0], Event) and not self.queue[0].passed:
                    self.queue[0].synchronize()  # meanwhile this one may have gone on, too
                else:
                    self.step()
            for stream in self.others:
                stream.run_prompt()

    def run_prompt(self):
        while self.queue and not self.late and (not isinstance(self.queue[0], Event) or self.queue[0].passed):
            self.step()

    def step(self):
        work = self.queue.popleft()
        if not isinstance(work, Event):
            with _disable_current_modes(), torch.no_grad():
                work()
        self.done += 1


class Memory:
    """Blocks by stream and size."""

    def __init__(self):
        self.free, self.limbo, self.lent = defaultdict(list), [], {}
        self.reused = 0

    def tensor(self, like, stream):
        """One of the same size and strides, in memory of its own."""
        if not like.numel():
            return torch.empty_like(like)
        elements = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
        block, nbytes = self.take(elements * like.itemsize, stream)
        owner = (ctypes.c_char * nbytes).from_buffer(block)
        address = ctypes.addressof(owner)
        with _lock:
            self.lent[address] = block, set()
        weakref.finalize(owner, self.give_back, address, stream).atexit = False
        return torch.frombuffer(owner, dtype=like.dtype, count=elements).as_strided(like.shape, like.stride())

    def take(self, nbytes, stream):
        nbytes = -(-nbytes // 512) * 512
        with _lock:
            for held in list(self.limbo):
                if all(event.passed for event in held[1]):
                    self.limbo.remove(held)
                    self.free[held[2]].append(held[0])
            found = self.free[stream, nbytes]
            self.reused += bool(found)
            return (found.pop() if found else bytearray(nbytes)), nbytes

    def give_back(self, address, stream):
        with _lock:
            block, users = self.lent.pop(address)
            if users:
                self.limbo.append((block, [Event().record(user) for user in users], (stream, len(block))))
            else:
                self.free[stream, len(block)].append(block)

    def has(self, tensor):
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self.lent

    def record(self, tensor, stream):
        with _lock:
            self.lent[tensor.untyped_storage().data_ptr()][1].add(stream)

    def bare(self, tensor):
        """The same numbers, in memory that this tensor does not keep."""
        if not self.has(tensor):
            return tensor
        block, _ = self.lent[tensor.untyped_storage().data_ptr()]
        flat = torch.frombuffer(block, dtype=torch.uint8).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Launching(TorchDispatchMode):
    """Has what is called on tensors of the device launched; what they will hold is not known, only its shape."""

    def __init__(self, memory, stream):
        super().__init__()
        self.memory, self.stream = memory, stream

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs, memory = kwargs or {}, self.memory
        given = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
        if not any(map(memory.has, given)):
            return func(*args, **kwargs)
        if func in _READ_BY_HOST:
            self.stream.reach(self.stream.launched)
            return func(*args, **kwargs)
        bare_args, bare_kwargs = tree_map_only(torch.Tensor, memory.bare, (args, kwargs))
        if func._schema.is_mutable:
            self.stream.launch(lambda: func(*bare_args, **bare_kwargs))
            return args[0]
        made = func(*args, **kwargs)
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        found = [item for item in tree_flatten(made)[0] if isinstance(item, torch.Tensor)]
        if any(item.untyped_storage().data_ptr() in storages for item in found):
            return made  # a view
        placed = tree_map_only(torch.Tensor, lambda tensor: memory.tensor(tensor, self.stream), made)
        targets = [memory.bare(item) for item in tree_flatten(placed)[0] if isinstance(item, torch.Tensor)]

        def run():
            values = tree_flatten(func(*bare_args, **bare_kwargs))[0]
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

        self.stream.launch(run)
        return placed


class Reading(TorchFunctionMode):
    """What brings numbers to the host waits for the stream, as on a GPU."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.cpu):
            self.stream.reach(self.stream.launched)
        return func(*args, **(kwargs or {}))


class LateDevice(Device):
    """`late` names the stages whose streams run only as they are waited for. Tensors of modules stay on the host."""

    Event = Event

    def __init__(self, late):
        self.name, self.is_host, self.pins = torch.device("cpu"), False, True
        self.kit, self.memory, self.streams = self, Memory(), []
        self.current = threading.local()
        for name in STAGES:
            self.streams.append(Stream(name, name in late, self.streams))
            setattr(self, name, Stage(self))

    def new_stream(self):
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current.stream = getattr(self.current, "stream", None), stream
        with Launching(self.memory, stream), Reading(stream):
            yield
        self.current.stream = before

    def empty_cache(self):
        pass

    def synchronize(self, _device=None):
        for stream in self.streams:
            stream.reach(stream.launched)

    def pin(self, value):
        return value

    def record(self, tensor, stream):
        if self.memory.has(tensor):
            self.memory.record(tensor, stream)

    def _load(self, tensor):
        with _disable_current_modes():
            made = self.memory.tensor(tensor, stream := self.current.stream)
            target = self.memory.bare(made)
        stream.launch(lambda: target.copy_(tensor))
        return made

    def _fetch(self, tensor):
        if not self.memory.has(tensor):
            return tensor
        with _disable_current_modes():
            here, source = torch.empty_like(tensor), self.memory.bare(tensor)
        self.current.stream.launch(lambda: here.copy_(source))  # it keeps what it writes into, as torch does
        return here
