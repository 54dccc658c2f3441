"""Module replacement: one layer of a model is replaced by a smaller one, which learns to do what the old one did.

In the mode "layerwise_kd" the new layer gets the inputs of the teacher's layer, and its outputs are compared with that
layer's. The rest of the student is frozen.
"""

import copy

import schoolhouse as sh
import torch
from common import batches, digits, predicted, share, standing, start, trained_teacher
from torch import nn


def main() -> None:
    """Replace a convolution by a depthwise and a pointwise one, with a fifth of its weights."""
    where = start(__doc__)
    images, labels, test_images, test_labels = digits()
    teacher = trained_teacher(images, labels)
    expected = predicted(teacher, test_images)
    print(f"teacher: accuracy {share(expected, test_labels)}, body has {size(teacher.body)} parameters")

    student = copy.deepcopy(teacher)
    student.body = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 24, 1))
    found = predicted(student, test_images)
    print(f"body replaced: accuracy {share(found, test_labels)}, it has {size(student.body)} parameters")

    with standing(teacher, where) as teacher_model:
        config = {"teacher_model": teacher_model, "criterion": {("body", "body"): nn.MSELoss()}}
        model = sh.convert(student.train(), mode=[("layerwise_kd", config)])
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=1e-2)
        for rows in batches(len(images), 64, epochs=10):
            model(images[rows])
            loss = model.compute_kd_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        student = sh.export(model)

    student.requires_grad_()  # what layerwise_kd froze is still frozen after export
    found = predicted(student, test_images)
    print(f"body distilled: accuracy {share(found, test_labels)}")
    print(f"agreement with the teacher: {share(found, expected)}")
    same = all(torch.equal(w, teacher.state_dict()[k]) for k, w in student.state_dict().items() if "body" not in k)
    print(f"all else is as it was: {same}")


def size(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
