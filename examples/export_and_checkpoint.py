"""Checkpoints and export: stop half-way, go on in another process, and end with a plain model of its own class.

`save` writes the student, never the teacher, and with `include_losses` also the parameters of the losses. `restore`
does not bring the meta-model back, so the second half converts the student again.
"""

import tempfile
from pathlib import Path

import schoolhouse as sh
import torch
from common import Digits, batches, digits, predicted, share, standing, start, trained_teacher
from safetensors.torch import load_file
from torch import nn


def main() -> None:
    """Distil in two halves with a checkpoint between them, then export."""
    where = start(__doc__)
    images, labels, test_images, test_labels = digits()
    teacher = trained_teacher(images, labels)
    with tempfile.TemporaryDirectory() as folder, standing(teacher, where) as teacher_model:
        half_way, finished = Path(folder) / "half-way.safetensors", Path(folder) / "student.safetensors"

        model = convert(Digits(width=8), teacher_model)
        train(model, images)
        sh.save(model, half_way, include_losses=True)
        names = list(load_file(half_way))
        print(f"half-way: {len(names)} tensors, of the losses: {[name for name in names if name.startswith('_loss')]}")
        sh.export(model)

        model = convert(Digits(width=8), teacher_model)  # as another process would
        sh.restore(model, half_way)
        with model.only_student_forward():  # the teacher is not asked
            print(f"restored: accuracy {share(predicted(model, test_images), test_labels)}")
        train(model, images)
        student = sh.export(model)
        sh.save(student, finished)

    found = predicted(student, test_images)
    print(f"exported: a {type(student).__name__} with {len(student.state_dict())} tensors")
    print(f"student: accuracy {share(found, test_labels)}")
    print(f"agreement with the teacher: {share(found, predicted(teacher, test_images))}")


def convert(student: nn.Module, teacher_model: nn.Module | str) -> sh.DistillationModel:
    """Convert the student, with a loss that has a parameter of its own: the projection from 16 features to 48."""
    config = {
        "teacher_model": teacher_model,
        "criterion": {
            ("neck", "neck"): sh.HiddenMSELoss(student_width=16, teacher_width=48),
            ("fc", "fc"): sh.LogitsDistillationLoss(temperature=2.0, reduction="batchmean"),
        },
        "loss_balancer": sh.StaticLossBalancer([0.2, 0.8]),
    }
    return sh.convert(student, mode=[("kd_loss", config)])


def train(model: sh.DistillationModel, images: torch.Tensor) -> None:
    """Do half of the training, without labels."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for rows in batches(len(images), 32, epochs=6):
        model(images[rows])
        loss = model.compute_kd_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
