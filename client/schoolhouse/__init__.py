"""Knowledge distillation with the teacher as a service: the student side, and every name that a user needs."""

from typing import TYPE_CHECKING, Any

from schoolhouse_wire.values.codec import Arguments, Opaque

from schoolhouse import encodings, errors, functional, sparse
from schoolhouse.checkpoint.checkpoint import restore, save
from schoolhouse.distill.config import ExportStudentConfig, KDLossConfig, LayerwiseKDConfig
from schoolhouse.distill.convert import convert, export
from schoolhouse.distill.layerwise import LayerwiseDistillationModel
from schoolhouse.distill.model import DistillationModel
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
from schoolhouse.losses.balancers import (
    STUDENT_LOSS_KEY,
    CosineSchedule,
    DistillationLossBalancer,
    GradientScaleBalancer,
    LinearSchedule,
    LossScaleBalancer,
    ScaleBalancer,
    ScheduledLossBalancer,
    StaticLossBalancer,
)
from schoolhouse.remote.connecting import connect
from schoolhouse.remote.request import Traffic
from schoolhouse.remote.settings import Security, Sharing, Timeouts, Transport
from schoolhouse.remote.verification import Verification, VerifiedTeacher
from schoolhouse.taps import Tap
from schoolhouse.teachers.local import LocalTeacher
from schoolhouse.teachers.protocol import Features, Teacher, TeacherDescription

if TYPE_CHECKING:
    from schoolhouse.remote.teacher import RemoteTeacher

__all__ = [
    "STUDENT_LOSS_KEY",
    "Arguments",
    "AttentionTransferLoss",
    "CausalLMLoss",
    "CosineSchedule",
    "DKDLoss",
    "DistillationLossBalancer",
    "DistillationModel",
    "ExportStudentConfig",
    "Features",
    "GradientScaleBalancer",
    "HiddenCosineLoss",
    "HiddenMSELoss",
    "JSDLoss",
    "KDLossConfig",
    "LayerwiseDistillationModel",
    "LayerwiseKDConfig",
    "LinearSchedule",
    "LocalTeacher",
    "LogitsDistillationLoss",
    "LogitsLoss",
    "LossScaleBalancer",
    "MFTLoss",
    "MGDLoss",
    "Opaque",
    "RKDLoss",
    "RemoteTeacher",
    "ReverseKLLoss",
    "ScaleBalancer",
    "ScheduledLossBalancer",
    "Security",
    "Sharing",
    "SkewedKLLoss",
    "StaticLossBalancer",
    "Tap",
    "Teacher",
    "TeacherDescription",
    "Timeouts",
    "Traffic",
    "Transport",
    "Verification",
    "VerifiedTeacher",
    "connect",
    "convert",
    "encodings",
    "errors",
    "export",
    "functional",
    "restore",
    "save",
    "sparse",
]


def __getattr__(name: str) -> Any:
    if name != "RemoteTeacher":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from schoolhouse.remote.teacher import RemoteTeacher  # late: it imports gRPC, which a local teacher does not need

    return RemoteTeacher
