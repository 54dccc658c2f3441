"""A device that is not there: its tensors are computed by the CPU, say that they are elsewhere, and come back late."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

_WAITS = {torch.equal, *(getattr(torch.Tensor, name) for name in ("item", "cpu", "tolist", "numpy", "__bool__"))}


class LateDevice(TorchFunctionMode):
    """While it is on, `x.to("cuda:0")` makes a tensor of such a device.

    What is copied from it without blocking comes only when an event that was recorded after is waited for. `waits` are
    the calls for which a host waits for a device, `pinned` the tensors that were pinned, and `copied` what was copied
    to a device: whether from pinned memory, and whether without blocking.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.waits, self.late, self.copied, self.streams, self.recorded = [], [], [], [], []
        self._places, self._pinned, self._kept = {}, set(), []
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _stream: self.recorded.append(_key(tensor)))
        real = torch.get_device_module
        monkeypatch.setattr(torch, "get_device_module", lambda device: self if _is_ours(device) else real(device))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        place = next((found for value in given if (found := self._place(value))), None)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._get(func, given[0], place)
        if name in ("pin_memory", "empty_like"):
            return self._memory(name, given[0], kwargs)
        if func in _WAITS and place is not None:
            self.waits.append(name)
        if func is torch.Tensor.copy_ and place is not None and self._place(given[0]) is None:
            return self._back(*given, kwargs)
        asked = next((value for value in (*args, *kwargs.values()) if _is_ours(value)), None)
        if func is torch.Tensor.to and asked is not None:
            return self._there(given[0], torch.device(asked), kwargs.get("non_blocking", False))
        if func is torch.Tensor.cpu or (func is torch.Tensor.to and place and "cpu" in map(str, args)):
            return func(*args, **kwargs).clone()
        result = func(*args, **kwargs)
        if place is not None:
            tree_map_only(torch.Tensor, lambda tensor: self._mark(tensor, place), result)
        return result

    def _get(self, func, tensor, place):
        what = getattr(func, "__self__", None)
        if place is not None and what is torch.Tensor.device:
            return place
        if place is not None and what is torch.Tensor.is_cpu:
            return False
        return func(tensor)

    def _memory(self, name, tensor, kwargs):
        pin = name == "pin_memory" or kwargs.get("pin_memory", False)
        made = tensor.clone() if name == "pin_memory" else torch.empty_like(tensor).fill_(77)
        if pin:
            self._pinned.add(_key(made))
            self._kept.append(made)
        return made

    def _back(self, host, tensor, kwargs):
        if not kwargs.get("non_blocking") or _key(host) not in self._pinned:
            self.waits.append("copy_")
            return host.copy_(tensor)
        self.late.append((host, tensor))
        return host

    def _there(self, tensor, device, non_blocking):
        if self._place(tensor) is None:
            self.copied.append((device, _key(tensor) in self._pinned, non_blocking))
            if not (non_blocking and _key(tensor) in self._pinned):
                self.waits.append("to")
        elif self._place(tensor) == device:
            return tensor
        return self._mark(tensor.clone(), device)

    def _place(self, tensor):
        return self._places.get(_key(tensor))

    def _mark(self, tensor, device):
        self._kept.append(tensor)  # so that its address stays its own
        self._places[_key(tensor)] = device
        return tensor

    # As torch.cuda, for streams and events.

    def current_stream(self, _device):
        return self

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        yield
        self.streams.pop()

    def Stream(self, device):
        return _Stream()

    def Event(self):
        return _Event(self)


class _Stream:
    def wait_stream(self, other):
        pass


class _Event:
    def __init__(self, device):
        self._device = device

    def record(self, _stream):
        self._late, self._device.late = self._device.late, []

    def synchronize(self):
        self._device.waits.append("event")
        with torch._C.DisableTorchFunction():
            for host, tensor in self._late:
                assert _key(tensor) in self._device.recorded  # else its memory may be another tensor's by now
                host.copy_(tensor)


def _key(tensor):
    return tensor.untyped_storage().data_ptr()


def _is_ours(value):
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")
