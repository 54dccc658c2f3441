"""A student that trains on a teacher, step after step, and what is compared of two of its runs."""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import schoolhouse as sh
import torch
from leaks import Held, settled
from models import Net, bits
from rooms import WIDTH, teacher_model
from torch.nn import functional as F

ROWS = 64
_RETRIES = 20


@dataclass
class Run:
    """The trajectory of the losses and the final weights, to the bit; which batches were drawn and used, and errors."""

    losses: list[bytes] = field(default_factory=list)
    weights: dict[str, bytes] = field(default_factory=dict)
    drawn: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def assert_undisturbed(self, steps: int) -> None:
        """It is what a teacher in the student's own process gives, and every batch was used exactly once."""
        plain = undisturbed(steps)
        assert self.drawn == self.used == plain.used == list(range(steps))
        assert [a == b for a, b in zip(self.losses, plain.losses, strict=True)] == [True] * steps
        assert self.weights == plain.weights


def batch(number: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Number, input and target: no two are alike."""
    generator = torch.Generator().manual_seed(number)
    return number, torch.randn(ROWS, 8, generator=generator), torch.randn(ROWS, 5, generator=generator)


def train(
    teacher: Any,
    steps: int | Iterable[int],
    on_step: Callable[[int], Any] = lambda step: None,
    on_error: Callable[[Exception], Any] | None = None,
    depth: int = 4,
) -> Run:
    """Train for so many steps, or as long as numbers of steps come. `on_step` is called before each.

    With `on_error`, a step that fails is done again.
    """
    run = Run()
    student = Net(WIDTH, seed=2)
    criterion = {("body", "body"): torch.nn.MSELoss(), ("fc", "fc"): sh.LogitsDistillationLoss()}
    balancer = sh.StaticLossBalancer([0.3, 0.4])  # and 0.3 for its own loss
    settings = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": balancer}
    model = sh.convert(student, mode=[("kd_loss", settings)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    numbers = range(steps) if isinstance(steps, int) else steps
    loader = (run.drawn.append(number) or batch(number) for number in numbers)
    for number, x, y in model.prefetch(loader, depth=depth, inputs=lambda found: found[1]):
        on_step(number)
        loss = _loss(model, x, y, run, on_error)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.detach().numpy().tobytes())
        run.used.append(number)
    run.weights = bits(sh.export(model))
    return run


def _loss(model: Any, x: torch.Tensor, y: torch.Tensor, run: Run, on_error: Any) -> torch.Tensor:
    for _ in range(_RETRIES):
        try:
            return model.compute_kd_loss(student_loss=F.mse_loss(model(x), y))
        except sh.errors.SchoolhouseError as err:
            if on_error is None:
                raise
            run.errors.append(err)
            on_error(err)
    raise AssertionError(f"the step failed {_RETRIES} times: {run.errors[-1]}")


@functools.cache
def undisturbed(steps: int) -> Run:
    """The run with the teacher in the student's own process."""
    return train(sh.LocalTeacher(teacher_model()), steps)


def run_student(commands: Any, url: str, settings: dict[str, Any]) -> None:
    """A student in a process of its own, which goes on until it is killed and tells each step."""
    torch.set_num_threads(1)
    with sh.connect(url, **settings) as teacher:
        commands.send((0, ""))  # it has no port
        train(teacher, 1 << 30, on_step=commands.send)


def run_slowly(commands: Any, url: str, settings: dict[str, Any]) -> None:
    """A student in a process of its own: tells each step and is told whether to go on; then (run, what it leaked)."""
    going = [True]

    def on_step(step: int) -> None:
        commands.send(step)
        going[0] = commands.recv()

    torch.set_num_threads(1)
    with sh.connect(url, **settings) as teacher:
        train(teacher, 2)
    before = Held.now()
    commands.send((0, ""))  # it has no port
    with sh.connect(url, **settings) as teacher:
        run = train(teacher, itertools.takewhile(lambda _: going[0], itertools.count()), on_step)
    commands.send((run, settled(before)))
