"""Regenerate the wire's Python code from the .proto files: `make protos`, or `generate(folder)` for the drift test."""

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("schoolhouse_wire/v1/*.proto"))


def generate(out: Path) -> None:
    """Write the *_pb2.py, *_pb2.pyi and *_pb2_grpc.py of every .proto file below `out`."""
    status = protoc.main(
        ["protoc", f"-I{ROOT}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", *SOURCES]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with exit status {status}")


if __name__ == "__main__":
    generate(ROOT)
    sys.stdout.write(f"generated code for {', '.join(SOURCES)}\n")
