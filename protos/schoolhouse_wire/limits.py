"""What a receiver accepts, checked against a message's declarations before memory is taken for it."""

from dataclasses import dataclass

FRAME_BYTES = 2 << 20  # of 1 MiB take a tenth more of a CPU, of 4 hold up what is small no longer than they must
INLINE_BYTES = 64 << 10  # a payload up to this size stands in its header message
ALIGNMENT = 64  # of each tensor in a payload
MAX_JOB_NAME = 256  # characters
MAX_NAME = 256  # characters of a teacher's name, a revision or a trace's context
MAX_MODULE_NAME = 1024  # characters of a tap or a head: close names are looked for, which takes the square of it
MAX_TYPE_NAME = 1024  # characters of a record's type
MAX_TAPS = 4096  # of one call
MAX_RELEASED = 65_536  # blocks in one message
MAX_INTEGER_BYTES = 1024  # of an integer beyond 64 bits
MAX_ODD_KEYS = 1024  # of a dict, once one is not a string: they can be chosen to collide, which takes the square of it


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request or reply. A value beyond them raises `MessageTooLargeError`.

    The elements of a tensor are bounded by its bytes, of which each takes one at least. One without elements may still
    have large dimensions, and what is reduced over the empty one is as large as the others: they have their own bound.
    """

    max_payload_bytes: int = 2 << 30
    max_tensors: int = 16_384
    max_rank: int = 64  # torch's own bound
    max_empty_elements: int = 1 << 31  # that an empty tensor would have, were its dimensions of 0 of 1
    max_nesting: int = 32  # two messages a level, and protobuf's own bound is 100
    max_values: int = 131_072  # in the structure, those within others included
    max_header_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
