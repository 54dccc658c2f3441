"""What a payload's checksum costs: XXH3-128 over 64 MiB in frames of 2 MiB, beside zlib's CRC-32 and a plain copy.

`python benchmarks/checksum.py --json` prints GB/s on one thread.
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from statistics import median

import xxhash

FRAME, FRAMES, ROUNDS = 2 << 20, 32, 9


def rate(consume: Callable[[memoryview], object], data: memoryview) -> float:
    """GB/s of `consume` over the frames of `data`."""
    began = time.perf_counter()
    for offset in range(0, data.nbytes, FRAME):
        consume(data[offset : offset + FRAME])
    return data.nbytes / (time.perf_counter() - began) / 1e9


def main() -> None:
    """Measure them in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data, target = memoryview(os.urandom(FRAME * FRAMES)), memoryview(bytearray(FRAME))

    def copy(frame: memoryview) -> None:
        target[:] = frame

    kinds: dict[str, Callable[[memoryview], object]] = {
        "xxh3_128": xxhash.xxh3_128().update,
        "crc32_zlib": zlib.crc32,
        "copy": copy,
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, consume in kinds.items():
            rates[name].append(rate(consume, data))
    figures = {name: round(median(found), 2) for name, found in rates.items()}
    sys.stdout.write(json.dumps(figures) + "\n" if options.json else f"GB/s: {figures}\n")


if __name__ == "__main__":
    main()
