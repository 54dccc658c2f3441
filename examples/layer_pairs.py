"""Layer pairs: hidden states and logits are each compared with a layer of the teacher, besides the student's loss."""

import schoolhouse as sh
import torch
from common import Digits, batches, digits, predicted, share, standing, start, trained_teacher
from torch.nn import functional as F

LABELLED = 100  # the student sees all images, and the labels of the first hundred


def main() -> None:
    """Distil over two pairs of layers and print each loss by its name."""
    where = start(__doc__)
    images, labels, test_images, test_labels = digits()
    teacher = trained_teacher(images, labels)
    print(f"teacher: accuracy {share(predicted(teacher, test_images), test_labels)}")

    with standing(teacher, where) as teacher_model:
        config = {
            "teacher_model": teacher_model,
            "criterion": {
                # (layer of the student, layer of the teacher): loss
                ("neck", "neck"): sh.HiddenMSELoss(student_width=10, teacher_width=48),
                ("fc", "fc"): sh.LogitsDistillationLoss(temperature=2.0, reduction="batchmean"),
            },
            "loss_balancer": sh.StaticLossBalancer([0.2, 0.6]),  # the rest, 0.2, weighs the student's own loss
        }
        model = sh.convert(Digits(width=5), mode=[("kd_loss", config)])
        # HiddenMSELoss projects 10 features to 48; the projection is among the model's parameters until export.
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for epoch in range(12):
            for rows in batches(len(images), 32, epochs=1):
                output, labelled = model(images[rows]), rows < LABELLED
                own = F.cross_entropy(output[labelled], labels[rows][labelled], reduction="sum") / len(rows)
                loss = model.compute_kd_loss(student_loss=own)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if epoch in (0, 11):
                report(f"after epoch {epoch + 1}", model, images[:256], labels[:256])
        student = sh.export(model)

    found = predicted(student, test_images)
    print(f"student: accuracy {share(found, test_labels)}")
    print(f"agreement with the teacher: {share(found, predicted(teacher, test_images))}")


@torch.no_grad()
def report(when: str, model: sh.DistillationModel, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Print each loss before balancing."""
    losses = model.compute_kd_loss(student_loss=F.cross_entropy(model(images), labels), skip_balancer=True)
    print(f"{when}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


if __name__ == "__main__":
    main()
