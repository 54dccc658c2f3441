"""A custom loss, which takes the logits out of the models' outputs, and gets another argument with each batch.

The teacher here has learned from 150 images and is often wrong. Where it is wrong, the student learns from the label
instead: `compute_kd_loss(labels=...)` passes the labels on to the loss.
"""

import schoolhouse as sh
import torch
from common import Digits, batches, digits, share, standing, start, trained_teacher
from torch import nn
from torch.nn import functional as F


class WithFeatures(nn.Module):
    """A network whose output is a dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `[batch, 10]` and mean brightness `[batch]`."""
        return {"logits": self.net(x), "brightness": x.mean((1, 2, 3))}


class TeacherOnly(nn.Module):
    """KL divergence from the teacher's distribution."""

    def forward(self, out_s: dict, out_t: dict, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of outputs with logits `[batch, classes]`; the labels `[batch]` are not used."""
        return self.per_example(out_s["logits"], out_t["logits"]).mean()

    def per_example(self, logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
        """The losses `[batch]` for logits `[batch, classes]`."""
        return F.kl_div(F.log_softmax(logits_s, dim=-1), F.softmax(logits_t, dim=-1), reduction="none").sum(-1)


class TeacherOrLabel(TeacherOnly):
    """KL divergence where the teacher is right, and cross entropy with the label where it is wrong."""

    def forward(self, out_s: dict, out_t: dict, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of the student's and the teacher's outputs, for labels `[batch]`."""
        right = out_t["logits"].argmax(-1) == labels
        own = F.cross_entropy(out_s["logits"], labels, reduction="none")
        return torch.where(right, self.per_example(out_s["logits"], out_t["logits"]), own).mean()


def main() -> None:
    """Distil with both losses."""
    where = start(__doc__)
    images, labels, test_images, test_labels = digits()
    teacher = WithFeatures(trained_teacher(images[:150], labels[:150], epochs=12)).eval()
    first = WithFeatures(Digits(width=8)).state_dict()
    print(f"teacher: accuracy {accuracy(teacher, test_images, test_labels)}")

    with standing(teacher, where) as teacher_model:
        for criterion in (TeacherOnly(), TeacherOrLabel()):
            student = WithFeatures(Digits(width=8))
            student.load_state_dict(first)
            model = sh.convert(student, mode=[("kd_loss", {"teacher_model": teacher_model, "criterion": criterion})])
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for rows in batches(len(images), 32, epochs=10):
                model(images[rows])
                loss = model.compute_kd_loss(labels=labels[rows])  # keyword arguments are passed to the loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            student = sh.export(model)
            print(f"student, {type(criterion).__name__}: accuracy {accuracy(student, test_images, test_labels)}")


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> str:
    """The share of images that a plain model classifies correctly, as text."""
    return share(model.eval()(images)["logits"].argmax(-1), labels)


if __name__ == "__main__":
    main()
