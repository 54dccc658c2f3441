"""Find the line that called the model, so that warnings name it and not one of this package or of torch."""

import os
import sys
from pathlib import Path

import torch

_INNER = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


def to_caller() -> int:
    """The `stacklevel` with which a warning of the calling function names the line that called the model."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, level = frame.f_back, level + 1
    return level
