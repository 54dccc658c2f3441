"""What a receiver accepts, checked against a message's declarations before memory is taken for it."""

from dataclasses import dataclass

FRAME_BYTES = 2 << 20  # of 1 MiB take a tenth more of a CPU, of 4 hold up what is small no longer than they must
INLINE_BYTES = 64 << 10  # a payload up to this size stands in its header message
ALIGNMENT = 64  # of each tensor in a payload
MAX_JOB_NAME = 256  # characters


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request or reply. A value beyond them raises `MessageTooLargeError`."""

    max_payload_bytes: int = 2 << 30
    max_tensors: int = 16_384
    max_rank: int = 64  # torch's own bound
    max_nesting: int = 32  # two messages a level, and protobuf's own bound is 100
    max_header_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
