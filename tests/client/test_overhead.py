"""What a step with a teacher in the process costs beside its two forwards: counted in calls, since machines differ."""

import sys
from collections import Counter

import schoolhouse as sh
import torch
import torch.distributed.fsdp  # so that it is looked for too, whether or not another test has imported it
from models import converted
from torch import nn

OURS = ("schoolhouse", "concurrent", "threading", "contextlib", "dataclasses")


class Deep(nn.Module):
    """So many layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.layers(x))


def calls_in_a_step(layers):
    criterion = {("layers.1", "layers.1"): nn.MSELoss(), ("fc", "fc"): sh.LogitsDistillationLoss()}
    model = converted(Deep(layers), sh.LocalTeacher(Deep(layers)), criterion, sh.StaticLossBalancer([0.5, 0.5]))
    x, calls = torch.randn(2, 4), Counter()

    def count(frame, event, _argument):
        if event == "call" and any(part in frame.f_code.co_filename for part in OURS):
            calls[frame.f_code.co_qualname] += 1

    for step in range(3):
        sys.setprofile(count if step == 2 else None)
        try:
            model(x)
            model.compute_kd_loss()
        finally:
            sys.setprofile(None)
    return calls


def test_a_step_calls_few_functions_of_ours_however_large_the_models_are():
    small, large = calls_in_a_step(2), calls_in_a_step(40)
    assert small == large
    assert small.total() <= 200, small.most_common()  # it took 286 once
