"""`schoolhouse demo`: train a teacher on digits, serve it from a local pool, distil two students, draw the curves."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_model
from schoolhouse.demo.models import DigitsTeacher, accuracy, digits
from schoolhouse.demo.student import EPOCHS, KINDS, LABELLED
from schoolhouse_wire import background
from torch.nn import functional as F

from schoolhouse_server.pool.config import load_pool
from schoolhouse_server.pool.driver import Pool, launch, ray_cluster

_TEACHER_EPOCHS = 12
_POOL = """
port: 0
teachers:
  digits:
    build: schoolhouse.demo.models:DigitsTeacher
    weights: teacher.safetensors
    replicas: 2
    threads: 1
    resources: {num_cpus: 0.5}
"""


def run(plot: Path, seeds: int, console: Console) -> None:
    """Run the whole demo, and write the curves to `plot` as a PNG; stops all that it started, whatever happens."""
    began = time.perf_counter()
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="schoolhouse-demo-") as folder, Progress(*columns, console=console) as bars:
        teacher_accuracy = _train_teacher(Path(folder) / "teacher.safetensors", bars)
        (Path(folder) / "pool.yaml").write_text(_POOL)
        with _pool(Path(folder) / "pool.yaml", bars) as pool:
            records = _run_students(pool.url("digits"), seeds, bars)
    console.print(_table(records, teacher_accuracy))
    console.print(
        f"All students saw the same 1,197 images and the labels of {LABELLED} of them; the distilled ones also got the "
        f"teacher's features of each batch, from another process. {seeds} seeds; 600 test images."
    )
    _draw(records, teacher_accuracy, plot)
    console.print(f"curves: {plot}   ({time.perf_counter() - began:.0f} s in all)", soft_wrap=True)


def _train_teacher(weights: Path, bars: Progress) -> float:
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(0)
    teacher = DigitsTeacher()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in bars.track(range(_TEACHER_EPOCHS), description="training the teacher"):
        for rows in torch.randperm(len(labels)).split(64):  # type: ignore[no-untyped-call]
            loss = F.cross_entropy(teacher(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    save_model(teacher, weights)
    return accuracy(teacher, test_images, test_labels)


@contextlib.contextmanager
def _pool(path: Path, bars: Progress) -> Iterator[Pool]:
    task = bars.add_task("starting Ray and two replicas", total=2)
    with ray_cluster(num_cpus=2):
        pool = launch(load_pool(path))
        try:
            pool.wait(120, lambda rows: bars.update(task, completed=sum(r["stage"] == "serving" for r in rows)))
            yield pool
        finally:
            pool.down()


def _run_students(url: str, seeds: int, bars: Progress) -> list[dict[str, Any]]:
    """Run the plain student, then the two distilling jobs side by side; returns the records that they printed."""
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as jobs:
        for group in (KINDS[:1], KINDS[1:]):
            running = [jobs.enter_context(_Job(kind, url, seeds, bars, records)) for kind in group]
            for job in running:
                job.wait()
    return records


class _Job:
    """One student process; the lines that it prints become records and move a progress bar."""

    def __init__(self, kind: str, url: str, seeds: int, bars: Progress, records: list[dict[str, Any]]) -> None:
        command = [sys.executable, "-m", "schoolhouse.demo.student", "--kind", kind, "--seeds", str(seeds)]
        self._command = command if kind == "plain" else [*command, "--url", url]
        self._kind, self._bars, self._records = kind, bars, records
        self._why: BaseException | None = None  # why its output could not be read
        self._task = bars.add_task(f"student: {kind}", total=seeds * EPOCHS)

    def __enter__(self) -> "_Job":
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would block a job that logs much
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True
        )
        self._reader = background.thread(self._read, name="schoolhouse-demo", on_death=self._give_up)
        self._reader.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            record = json.loads(line)
            self._records.append(record)
            if "epoch" in record:
                self._bars.advance(self._task)

    def _give_up(self, error: BaseException) -> None:
        self._why = error
        self._process.kill()

    def wait(self, timeout_s: float = 300.0) -> None:
        """Return when the job is done; raises RuntimeError with the end of its stderr if it failed."""
        self._process.wait(timeout_s)
        self._reader.join(10)
        if self._process.returncode != 0 or self._why is not None:
            self._errors.seek(0)
            raise RuntimeError(f"the student {self._kind!r} failed:\n{self._errors.read()[-2000:]}") from self._why


def _table(records: list[dict[str, Any]], teacher_accuracy: float) -> Table:
    table = Table("", "accuracy", "of each seed", "steps/s", "bytes/step", box=box.SIMPLE_HEAD)
    table.add_row("teacher", f"{teacher_accuracy:.1%}", "", "", "")
    for kind in KINDS:
        final = [r["accuracy"] for r in records if r["kind"] == kind and r.get("epoch") == EPOCHS]
        sums = [r for r in records if r["kind"] == kind and "steps_per_s" in r]
        table.add_row(
            "student alone" if kind == "plain" else f"student, {kind}",
            f"{mean(final):.1%}",
            " ".join(f"{share:.1%}" for share in final),
            f"{mean(r['steps_per_s'] for r in sums):.0f}",
            f"{mean(r['bytes_per_step'] for r in sums):,.0f}",
        )
    return table


def _draw(records: list[dict[str, Any]], teacher_accuracy: float, plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.axhline(teacher_accuracy, color="black", linestyle="--", label="teacher")
    for kind, color in zip(KINDS, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        curves: dict[int, list[tuple[int, float]]] = {}
        for record in records:
            if record["kind"] == kind and "epoch" in record:
                curves.setdefault(record["seed"], []).append((record["step"], record["accuracy"]))
        for i, curve in enumerate(curves.values()):
            label = ("student alone" if kind == "plain" else f"student, {kind}") if i == 0 else None
            axes.plot(*zip(*curve, strict=True), color=color, alpha=0.8, label=label)
    axes.set(
        xlabel="step", ylabel="accuracy on 600 test digits", ylim=(0.3, 1.0), title="A teacher that lives elsewhere"
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(plot, dpi=120)
    pyplot.close(figure)
