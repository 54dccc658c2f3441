"""Losses between a student's and a teacher's outputs, as modules that hold the settings."""

from schoolhouse.losses.features import AttentionTransferLoss, HiddenCosineLoss, HiddenMSELoss, MGDLoss, RKDLoss
from schoolhouse.losses.logits import (
    CausalLMLoss,
    DKDLoss,
    JSDLoss,
    LogitsDistillationLoss,
    LogitsLoss,
    MFTLoss,
    ReverseKLLoss,
    SkewedKLLoss,
)

__all__ = [
    "AttentionTransferLoss",
    "CausalLMLoss",
    "DKDLoss",
    "HiddenCosineLoss",
    "HiddenMSELoss",
    "JSDLoss",
    "LogitsDistillationLoss",
    "LogitsLoss",
    "MFTLoss",
    "MGDLoss",
    "RKDLoss",
    "ReverseKLLoss",
    "SkewedKLLoss",
]
