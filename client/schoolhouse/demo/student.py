"""The demo's job that trains students, in a process of its own: `python -m schoolhouse.demo.student --help`.

It needs no Ray and holds no teacher weights; it prints a JSON line after each epoch and each seed.
"""

import argparse
import json
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import schoolhouse as sh
from schoolhouse.demo.models import DigitsStudent, accuracy, digits

KINDS = ("plain", "logits", "logits+features")
EPOCHS, BATCH, LABELLED = 15, 64, 150


def convert(student: DigitsStudent, kind: str, teacher: sh.RemoteTeacher) -> Any:
    """Convert the student, with the losses of `kind` between it and the teacher."""
    criterion: dict[tuple[str, str], nn.Module] = {("fc", "fc"): sh.LogitsDistillationLoss(2.0, "batchmean")}
    weights = [0.7]
    if kind == "logits+features":
        criterion["hint", "neck"] = nn.MSELoss()
        weights = [0.6, 0.2]
    config = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": sh.StaticLossBalancer(weights)}
    return sh.convert(student, mode=[("kd_loss", config)])


def say(**fields: Any) -> None:
    """Print one JSON line."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def train(kind: str, seed: int, teacher: sh.RemoteTeacher | None) -> None:
    """Train one student. It sees all images, but the labels of the first 150 only."""
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(seed)
    student = DigitsStudent()
    model: Any = student if teacher is None else convert(student, kind, teacher)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    began = teacher.traffic() if teacher is not None else sh.Traffic()
    seconds, steps = 0.0, 0
    for epoch in range(EPOCHS):
        start = time.perf_counter()
        batches: Any = torch.randperm(len(labels)).split(BATCH)  # type: ignore[no-untyped-call]
        if teacher is not None:
            batches = model.prefetch(batches, inputs=lambda rows: images[rows])
        for rows in batches:
            output, labelled = model(images[rows]), rows < LABELLED
            loss = F.cross_entropy(output[labelled], labels[rows][labelled], reduction="sum") / max(1, labelled.sum())
            if teacher is not None:
                loss = model.compute_kd_loss(student_loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        seconds += time.perf_counter() - start
        if teacher is None:
            share = accuracy(model, test_images, test_labels)
        else:
            with model.only_student_forward():
                share = accuracy(model, test_images, test_labels)
        say(kind=kind, seed=seed, epoch=epoch + 1, step=steps, accuracy=share)
    ended = teacher.traffic() if teacher is not None else sh.Traffic()
    moved = ended.sent_bytes + ended.received_bytes - began.sent_bytes - began.received_bytes
    say(kind=kind, seed=seed, steps_per_s=steps / seconds, bytes_per_step=moved / steps)


def main() -> None:
    """Train a student of one kind for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--url", help="grpc://HOST:PORT/NAME of the teacher; not for a plain student")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if (options.url is None) != (options.kind == "plain"):
        parser.error("--url goes with the distilling kinds, and only with them")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    teacher = None if options.url is None else sh.connect(options.url, job=f"demo-{options.kind}")
    for seed in range(options.seeds):
        train(options.kind, seed, teacher)
    if teacher is not None:
        teacher.close()


if __name__ == "__main__":
    main()
