"""What a receiver accepts; a message's declarations are checked against it before memory is taken for the message."""

from dataclasses import dataclass

FRAME_BYTES = 2 << 20  # frames of 1 MiB cost a tenth more CPU; those of 4 MiB hold up small messages for longer
INLINE_BYTES = 64 << 10  # a payload up to this size travels inside its header message
ALIGNMENT = 64  # bytes, of each tensor in a payload
MAX_JOB_NAME = 256  # characters
MAX_NAME = 256  # characters of a teacher's name, a revision or a trace's context
MAX_MODULE_NAME = 1024  # characters of a tap or a head: the search for close names takes time quadratic in it
MAX_TYPE_NAME = 1024  # characters of a record's type
MAX_TAPS = 4096  # in one call
MAX_BROKE = 2  # replicas that may get stuck or break under one request
MAX_RELEASED = 65_536  # released blocks in one message
MAX_INTEGER_BYTES = 1024  # of an integer beyond 64 bits
MAX_ODD_KEYS = 1024  # in a dict with a key that is not a string: a peer can make such keys collide, in quadratic time


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request or reply. A value beyond them raises `MessageTooLargeError`.

    The bound of bytes also bounds the elements of a tensor, as each takes at least one byte. A tensor without elements
    may still have large dimensions, and a reduction over its empty dimension is as large as the others. So these have a
    bound of their own.
    """

    max_payload_bytes: int = 2 << 30
    max_tensors: int = 16_384
    max_rank: int = 64  # torch's own bound
    max_empty_elements: int = 1 << 31  # elements of an empty tensor if its dimensions of size 0 had size 1
    max_nesting: int = 32  # each level takes two messages, and protobuf's own bound is 100
    max_values: int = 131_072  # in the structure, nested ones included
    max_header_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
