"""What `early_stop` saves: the CPU time of forwards for a tap in the middle of a deep net, relative to whole forwards.

The net is an encoder of 24 equal transformer layers; both kinds of forward take turns.
`python benchmarks/early_stop.py --json`
"""

import argparse
import json
import sys
import time
from statistics import median

import schoolhouse as sh
import torch
from torch import nn

LAYERS, WIDTH, ROUNDS = 24, 128, 15


def cpu_s(teacher: sh.LocalTeacher, x: torch.Tensor) -> float:
    """The CPU time of one request."""
    began = time.process_time()
    teacher.submit((x,), {}, [f"layers.{LAYERS // 2 - 1}"]).result()
    return time.process_time() - began


def main() -> None:
    """Measure in turns, and print the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # further threads would spend CPU time on waiting
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
    module = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    x = torch.randn(8, 64, WIDTH)
    whole, early = (sh.LocalTeacher(module, early_stop=early_stop) for early_stop in (False, True))
    cpu_s(whole, x), cpu_s(early, x)  # the first forward is always a whole one
    ratio = median(cpu_s(early, x) / cpu_s(whole, x) for _ in range(options.rounds))
    figures = {"cpu_time_ratio": round(ratio, 2), "layers": LAYERS, "tapped": LAYERS // 2}
    sys.stdout.write(json.dumps(figures) + "\n" if options.json else f"{figures}\n")


if __name__ == "__main__":
    main()
