"""Knowledge distillation in which the teacher is a service: the student side. Everything a user types stands here."""

from schoolhouse_wire.codec import Arguments

from schoolhouse import errors, functional
from schoolhouse.balancers import DistillationLossBalancer, StaticLossBalancer
from schoolhouse.distill import convert, export
from schoolhouse.losses import LogitsDistillationLoss
from schoolhouse.meta_model import DistillationModel
from schoolhouse.remote import RemoteTeacher, connect
from schoolhouse.session import Traffic
from schoolhouse.taps import Tap
from schoolhouse.teachers import Features, LocalTeacher, Teacher, TeacherDescription

__all__ = [
    "Arguments",
    "DistillationLossBalancer",
    "DistillationModel",
    "Features",
    "LocalTeacher",
    "LogitsDistillationLoss",
    "RemoteTeacher",
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
