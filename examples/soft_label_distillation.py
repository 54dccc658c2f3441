"""Soft-label distillation: a student learns the teacher's class distributions, without any labels."""

import schoolhouse as sh
import torch
from common import Digits, batches, digits, predicted, share, standing, start, trained_teacher


def main() -> None:
    """Distil the digits teacher into a network with an eighth of its parameters."""
    where = start(__doc__)
    images, labels, test_images, test_labels = digits()
    teacher = trained_teacher(images, labels)
    student = Digits(width=8)
    for name, model in (("teacher", teacher), ("student", student)):
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name}: {size} parameters, accuracy {share(predicted(model, test_images), test_labels)}")

    with standing(teacher, where) as teacher_model:
        config = {
            "teacher_model": teacher_model,  # the module, or the URL of a server
            "criterion": sh.LogitsDistillationLoss(temperature=2.0, reduction="batchmean"),
        }
        model = sh.convert(student.train(), mode=[("kd_loss", config)])
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for rows in batches(len(images), 32, epochs=12):
            model(images[rows])  # asks the teacher, then runs the student
            loss = model.compute_kd_loss()  # waits for the teacher
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if isinstance(model.teacher_model, sh.RemoteTeacher):
            traffic = model.teacher_model.traffic()
            print(f"over the wire: {(traffic.sent_bytes + traffic.received_bytes) // traffic.requests} bytes a step")
        student = sh.export(model)

    found = predicted(student, test_images)
    print(f"student, distilled: accuracy {share(found, test_labels)}")
    print(f"agreement with the teacher: {share(found, predicted(teacher, test_images))}")


if __name__ == "__main__":
    main()
