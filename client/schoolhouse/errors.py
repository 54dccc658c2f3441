"""All errors that this package raises on purpose; those that cross the wire come from the contract."""

from schoolhouse_wire.errors import (
    AuthenticationError,
    ConfigError,
    CorruptPayloadError,
    LeaseExpiredError,
    MessageTooLargeError,
    PermissionDeniedError,
    ProtocolError,
    RevisionChangedError,
    SchoolhouseError,
    TeacherBusyError,
    TeacherForwardError,
    TeacherInternalError,
    TeacherMemoryError,
    TeacherTimeoutError,
    TeacherUnavailableError,
    UnknownTapError,
    UnknownTeacherError,
    UnsupportedValueError,
    UsageError,
)

__all__ = [
    "AuthenticationError",
    "CheckpointError",
    "ConfigError",
    "CorruptPayloadError",
    "FeatureMismatchError",
    "LeaseExpiredError",
    "MessageTooLargeError",
    "PermissionDeniedError",
    "ProtocolError",
    "RevisionChangedError",
    "SchoolhouseError",
    "TeacherBusyError",
    "TeacherForwardError",
    "TeacherInternalError",
    "TeacherMemoryError",
    "TeacherTimeoutError",
    "TeacherUnavailableError",
    "UnknownTapError",
    "UnknownTeacherError",
    "UnsupportedValueError",
    "UsageError",
]


class CheckpointError(SchoolhouseError, ValueError):
    """A checkpoint cannot be written, is damaged, or is not of this architecture; the message says which."""


class FeatureMismatchError(SchoolhouseError, RuntimeError):
    """Features arrived, or were asked for, that do not belong to this batch, revision or tap."""
