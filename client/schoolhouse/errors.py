"""All errors that this package raises on purpose; those that can cross the wire are defined in `schoolhouse_wire`."""

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
    """A checkpoint cannot be written, is damaged, or belongs to another architecture; the message says which."""


class FeatureMismatchError(SchoolhouseError, RuntimeError):
    """Features that arrived or were asked for do not belong to this batch, revision or tap."""
