"""Knowledge distillation in which the teacher is a service: the student side. Everything a user types stands here."""

from schoolhouse_wire.codec import Arguments, Opaque

from schoolhouse import errors, functional
from schoolhouse.balancers import STUDENT_LOSS_KEY, DistillationLossBalancer, StaticLossBalancer
from schoolhouse.config import ExportStudentConfig, KDLossConfig, LayerwiseKDConfig
from schoolhouse.distillation import convert, export
from schoolhouse.distillation_model import DistillationModel
from schoolhouse.layerwise_distillation_model import LayerwiseDistillationModel
from schoolhouse.losses import (
    AttentionTransferLoss,
    CausalLMLoss,
    DKDLoss,
    HiddenCosineLoss,
    HiddenMSELoss,
    JSDLoss,
    LogitsDistillationLoss,
    LogitsLoss,
    MFTLoss,
    MGDLoss,
    ReverseKLLoss,
    RKDLoss,
    SkewedKLLoss,
)
from schoolhouse.remote import RemoteTeacher, connect
from schoolhouse.session import Traffic
from schoolhouse.taps import Tap
from schoolhouse.teachers import Features, LocalTeacher, Teacher, TeacherDescription

__all__ = [
    "STUDENT_LOSS_KEY",
    "Arguments",
    "AttentionTransferLoss",
    "CausalLMLoss",
    "DKDLoss",
    "DistillationLossBalancer",
    "DistillationModel",
    "ExportStudentConfig",
    "Features",
    "HiddenCosineLoss",
    "HiddenMSELoss",
    "JSDLoss",
    "KDLossConfig",
    "LayerwiseDistillationModel",
    "LayerwiseKDConfig",
    "LocalTeacher",
    "LogitsDistillationLoss",
    "LogitsLoss",
    "MFTLoss",
    "MGDLoss",
    "Opaque",
    "RKDLoss",
    "RemoteTeacher",
    "ReverseKLLoss",
    "SkewedKLLoss",
    "StaticLossBalancer",
    "Tap",
    "Teacher",
    "TeacherDescription",
    "Traffic",
    "connect",
    "convert",
    "errors",
    "export",
    "functional",
]
