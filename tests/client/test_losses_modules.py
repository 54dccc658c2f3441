"""Losses between logits as modules: they hold the settings of the functions, and refuse wrong ones at once."""

import copy
import math

import pytest
import schoolhouse as sh
import torch
from models import Net, converted, some_logits
from schoolhouse import functional
from schoolhouse.losses import (
    AttentionTransferLoss,
    CausalLMLoss,
    DKDLoss,
    HiddenCosineLoss,
    HiddenMSELoss,
    JSDLoss,
    LogitsDistillationLoss,
    MFTLoss,
    MGDLoss,
    ReverseKLLoss,
    RKDLoss,
    SkewedKLLoss,
)

INF = math.inf
MODULES = [LogitsDistillationLoss, ReverseKLLoss, JSDLoss, SkewedKLLoss, MFTLoss, DKDLoss]


class ModelOutput:
    logits = torch.zeros(2, 3)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_not_a_tensor_is_refused_with_advice(module):
    labels = (torch.zeros(2, dtype=torch.int64),) if module in (MFTLoss, DKDLoss) else ()
    for pair, whose in [
        ((ModelOutput(), torch.zeros(2, 3)), "student"),
        ((torch.zeros(2, 3), ModelOutput()), "teacher"),
    ]:
        with pytest.raises(TypeError, match=rf"{whose}'s logits came as .*ModelOutput.*\"lm_head\".*`\.logits`"):
            module()(*pair, *labels)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_modules_hold_the_settings_of_the_functions(module, reduction):
    student, teacher = some_logits(4, 5)
    labels = torch.tensor([0, 4, 2, 1])
    cases = {
        LogitsDistillationLoss: (functional.logits_distillation, {}),
        ReverseKLLoss: (functional.reverse_kl, {}),
        JSDLoss: (functional.jsd, {"beta": 0.3}),
        SkewedKLLoss: (functional.skewed_kl, {"alpha": 0.3, "reverse": True}),
        MFTLoss: (functional.mft, {"threshold": 0.4}),
        DKDLoss: (functional.dkd, {"alpha": 2.0, "beta": 3.0}),
    }
    function, settings = cases[module]
    inputs = (student, teacher, labels) if module in (MFTLoss, DKDLoss) else (student, teacher)
    made = module(temperature=3.0, reduction=reduction, **settings)
    want = function(*inputs, temperature=3.0, reduction=reduction, **settings)
    assert torch.equal(made(*inputs), want)
    each = function(*inputs, temperature=3.0, reduction="none", **settings)
    each = each.sum(-1) if module is MFTLoss else each
    assert torch.equal(made.per_example(student, teacher, labels), each)


@pytest.mark.parametrize("module", [MFTLoss, DKDLoss])
def test_per_example_needs_labels_and_keeps_shapes(module):
    student, teacher = some_logits(2, 3, 5)
    labels = torch.tensor([[0, 1, 2], [3, 4, 0]])
    each = module().per_example(student, teacher, labels)
    flat = module().per_example(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
    assert torch.equal(each, flat.reshape(2, 3))
    with pytest.raises(ValueError, match=f"{module.__name__} needs labels"):
        module().per_example(student, teacher)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", INF),
        ("reduction", "avg"),
    ],
)
def test_settings_of_all_are_refused_at_once(module, field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*(above 0|'mean', 'batchmean', 'sum', 'none')"):
        module(**{field: value})


@pytest.mark.parametrize(
    ("module", "field", "value", "choices"),
    [
        (JSDLoss, "beta", -0.1, "between 0 and 1"),
        (JSDLoss, "beta", 1.1, "between 0 and 1"),
        (JSDLoss, "beta", math.nan, "between 0 and 1"),
        (SkewedKLLoss, "alpha", -0.1, "0 or above and below 1"),
        (SkewedKLLoss, "alpha", 1.0, "0 or above and below 1"),
        (MFTLoss, "threshold", -0.1, "between 0 and 1"),
        (MFTLoss, "threshold", 1.1, "between 0 and 1"),
        (DKDLoss, "alpha", -1.0, "0 or above"),
        (DKDLoss, "beta", INF, "finite"),
    ],
)
def test_settings_of_one_are_refused_at_once(module, field, value, choices):
    with pytest.raises(ValueError, match=f"{field} is .*{choices}"):
        module(**{field: value})


def test_defaults_are_those_documented():
    assert (MFTLoss()._temperature, MFTLoss()._threshold, MFTLoss()._reduction) == (1.0, 0.2, "batchmean")
    assert (LogitsDistillationLoss()._temperature, LogitsDistillationLoss()._reduction) == (1.0, "mean")
    for module in MODULES[1:]:
        assert module().reduction == "batchmean"


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        (LogitsDistillationLoss(2.0), "temperature=2.0, reduction='mean', vocabulary='equal'"),
        (ReverseKLLoss(2.0, vocabulary="shared"), "temperature=2.0, reduction='batchmean', vocabulary='shared'"),
        (JSDLoss(0.3), "beta=0.3, temperature=1.0, reduction='batchmean', vocabulary='equal'"),
        (
            SkewedKLLoss(0.2, reverse=True),
            "alpha=0.2, reverse=True, temperature=1.0, reduction='batchmean', vocabulary='equal'",
        ),
        (MFTLoss(), "threshold=0.2, temperature=1.0, reduction='batchmean', vocabulary='equal'"),
        (DKDLoss(), "alpha=1.0, beta=8.0, temperature=4.0, reduction='batchmean', vocabulary='equal'"),
        (HiddenMSELoss(3, 3), "student_width=3, teacher_width=3, reduction='mean'"),
        (HiddenCosineLoss(3, 4, "sum"), "student_width=3, teacher_width=4, reduction='sum'"),
        (AttentionTransferLoss(3.0), "p=3.0, reduction='mean'"),
        (RKDLoss(1.0, 2.0), "distance_weight=1.0, angle_weight=2.0"),
        (MGDLoss(2, 2, 0.5), "alpha_mgd=0.5, lambda_mgd=0.65"),
        (CausalLMLoss(JSDLoss()), "ignore_index=-100"),
        (sh.StaticLossBalancer([0.25, 0.5]), "kd_loss_weight=[0.25, 0.5]"),
        (
            sh.ScheduledLossBalancer(sh.LinearSchedule(0.1, 0.9, 10), 2),
            "schedule=LinearSchedule(start=0.1, end=0.9, steps=10), accumulation_steps=2",
        ),
        (sh.LossScaleBalancer(0.5, decay=0.9), "kd_loss_weight=[0.5], decay=0.9, max_factor=10000.0"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_print_shows_the_settings(module, shown):
    assert module.extra_repr() == shown
    kind = type(module).__name__
    assert repr(module).startswith(f"{kind}({shown})" if not [*module.children()] else f"{kind}(\n  {shown}\n")
    twin = copy.deepcopy(module)
    assert repr(twin) == repr(module)


def test_a_print_of_a_model_shows_weights_and_temperatures():
    criterion = {("fc", "fc"): sh.LogitsDistillationLoss(3.0), ("body", "body"): sh.HiddenMSELoss(16, 32)}
    model = converted(Net(), Net(32), criterion, sh.StaticLossBalancer([0.25, 0.5]))
    assert "(_loss_balancer): StaticLossBalancer(kd_loss_weight=[0.25, 0.5])" in repr(model)
    assert "('body', 'body'): HiddenMSELoss(\n    student_width=16, teacher_width=32" in repr(model)
    loss = "LogitsDistillationLoss(temperature=3.0, reduction='mean', vocabulary='equal')"
    assert f"('fc', 'fc'): {loss}" in repr(model)
    assert "LogitsDistillationLoss" not in repr(sh.export(model))
