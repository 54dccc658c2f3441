"""Two processes of one job, which find each other through a file."""

import subprocess
import sys
from pathlib import Path

import torch


def two_ranks(job, folder, *arguments):
    """What both ranks of `job` have found, which each is given its number, a rendezvous and its file for."""
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(2)]
    commands = [
        [sys.executable, job, str(rank), folder / "rendezvous", out, *arguments] for rank, out in enumerate(outs)
    ]
    started = [subprocess.Popen(c, stdout=log, stderr=log) for c, log in zip(commands, logs, strict=True)]
    try:
        codes = [process.wait(200) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
        texts = [Path(log.name).read_text() for log in logs]
        for log in logs:
            log.close()
    assert codes == [0, 0], "\n".join(texts)
    return [torch.load(out, weights_only=True) for out in outs]
