"""Whether a teacher's requests may be merged at all: its modules and an example are checked before it is served."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from schoolhouse.taps import Tap
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.teachers.protocol import TeacherDescription
from schoolhouse.teachers.query import Wanted
from schoolhouse_wire.errors import ConfigError, SchoolhouseError
from schoolhouse_wire.torch_private import version_of
from schoolhouse_wire.values.codec import Arguments
from schoolhouse_wire.values.tree import map_tensors
from torch import nn

from schoolhouse_server.common.rows import rows_of
from schoolhouse_server.device.device import Device
from schoolhouse_server.merge.batching import Batch, Former, in_order
from schoolhouse_server.merge.settings import MergeSettings
from schoolhouse_server.merge.splitting import UnmergeableError, learn

_log = logging.getLogger(__name__)
_TRIES = 8
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTEAD = "serve it with merge='never'"


def check_modules(module: nn.Module, description: TeacherDescription, settings: MergeSettings) -> None:
    """Raise ConfigError for modules that mix rows even in eval mode, and for padding of arguments that do not exist."""
    mixing = [name for name, inner in module.named_modules() if isinstance(inner, _BATCH_NORMS) and _mixes(inner)]
    if mixing:
        raise ConfigError(
            f"teacher {description.name!r} cannot be merged: {', '.join(map(repr, mixing[:5]))} normalise by the "
            f"statistics of the batch, even in eval mode (track_running_stats=False); {_INSTEAD}"
        )
    named = [*settings.pad.values, settings.pad.mask] if settings.pad is not None else []
    wrong = [name for name in named if name not in description.parameters]
    if wrong and not any(name.startswith("**") for name in description.parameters):
        raise ConfigError(
            f"pad names {wrong[0]!r}, which the forward of teacher {description.name!r} does not take; choices: "
            f"{', '.join(map(repr, description.parameters))}"
        )


def _mixes(module: Any) -> bool:
    return not module.track_running_stats or module.running_mean is None


class Traces(NamedTuple):
    """The traces that a forward may leave: random numbers drawn, and buffers written into."""

    random: Callable[[], list[bytes]]
    buffers: Callable[[], list[tuple[int, int]]]
    state: list[Any]

    def changes(self) -> tuple[bool, bool]:
        """Whether random numbers were drawn, and whether buffers were written into, since the last call."""
        now = [self.random(), self.buffers()]
        changed = now[0] != self.state[0], now[1] != self.state[1]
        self.state[:] = now
        return changed


def traces(module: nn.Module, device: Device) -> Traces:
    """The traces that forwards of a module leave from here on."""

    def random() -> list[bytes]:
        states = [torch.get_rng_state()]
        if device.name.type == "cuda":
            states.append(torch.cuda.get_rng_state(device.name))
        return [state.numpy().tobytes() for state in states]

    def buffers() -> list[tuple[int, int]]:  # a replaced buffer has another id, as both live for a moment
        return [(id(buffer), version_of(buffer)) for buffer in module.buffers()]

    return Traces(random, buffers, [random(), buffers()])


def why_not(changes: Sequence[tuple[bool, bool]], again: Callable[[], tuple[bool, bool]]) -> str:
    """Why forwards that left these changes cannot be merged; "" if they can.

    `again` runs one more forward.

    Other threads draw random numbers too, so the forward counts as drawing some only if every run seems to.
    """
    if any(buffers for _, buffers in changes):
        return "the forward writes into the module's buffers, or replaces them"
    if all(random for random, _ in changes) and all(again()[0] for _ in range(_TRIES)):
        return "the forward draws random numbers"
    return ""


def check_example(teacher: LocalTeacher, device: Device, former: Former, example: Callable[[], Any] | None) -> None:
    """Compare a merged forward of an example's rows with single ones; models of transformers bring an example.

    Raises:
        ConfigError: if they differ, or if the example is invalid.
    """
    name = teacher.describe().name
    given = example() if example is not None else _dummy_inputs(teacher.module)
    if given is None:
        return
    try:
        _check(teacher, device, former, _arguments(given))
    except UnmergeableError as err:
        raise ConfigError(f"teacher {name!r} cannot be merged, as its example shows: {err}; {_INSTEAD}") from err
    except (SchoolhouseError, ValueError) as err:
        if example is not None:
            raise ConfigError(f"the example of teacher {name!r} cannot be used: {err}") from err
        _log.info("teacher %r: its dummy inputs cannot be used as an example for merging: %s", name, err)


def _dummy_inputs(module: nn.Module) -> Any:
    of_transformers = any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__)
    return getattr(module, "dummy_inputs", None) if of_transformers else None


def _arguments(given: Any) -> Arguments:
    if isinstance(given, Arguments):
        return given
    if isinstance(given, Mapping):
        return Arguments((), given)
    return Arguments(given if isinstance(given, tuple) else (given,))


def _check(teacher: LocalTeacher, device: Device, former: Former, example: Arguments) -> None:
    inputs = map_tensors(in_order(example), lambda tensor: tensor.to(device.name))
    rows = rows_of(inputs)
    if rows < 2:
        raise ValueError(f"it has {rows} rows; give at least 2 different ones, better 5")
    first = -(-rows // 3)
    parts = [_shorter(former, _some(inputs, rows, 0, first)), _some(inputs, rows, first, rows)]
    forms = [form for part in parts if (form := former.form(part)) is not None]
    if len(forms) < 2 or forms[0].key != forms[1].key:
        raise ValueError("its rows cannot be told apart; give tensors with the rows as their first dimension")
    _compare(teacher, device, Batch(former, parts, forms), parts)


def _compare(teacher: LocalTeacher, device: Device, batch: Batch, parts: Sequence[Arguments]) -> None:
    whole, wanted = Tap(""), Wanted.of([""])
    before = traces(teacher.module, device)

    def run(part: Arguments) -> tuple[Any, tuple[bool, bool]]:
        return teacher.forward(part, wanted)[whole], before.changes()

    singles, changes = zip(*map(run, parts), strict=True)
    if why := why_not(changes, lambda: run(parts[0])[1]):
        raise UnmergeableError(why)
    merged = teacher.forward(batch.inputs(parts), wanted, (batch.key, batch.variant))[whole]
    learn(merged, singles, batch.layout)


def _some(inputs: Arguments, rows: int, start: int, stop: int) -> Arguments:
    part: Arguments = map_tensors(inputs, lambda t: t[start:stop] if t.dim() and t.shape[0] == rows else t)
    return part


def _shorter(former: Former, inputs: Arguments) -> Arguments:
    """The inputs, cut to about two thirds of their length where they may be padded."""
    padded = {id(tensor): tensor for tensor, fill in former.leaves(inputs) if fill is not None and tensor.dim() > 1}
    shorter = {key: tensor[:, : -(-2 * tensor.shape[1] // 3)] for key, tensor in padded.items()}
    cut: Arguments = map_tensors(inputs, lambda tensor: shorter.get(id(tensor), tensor))
    return cut
