"""Two processes of one job, which find each other through a file."""

import programs
import torch


def two_ranks(job, folder, *arguments):
    """What both ranks of `job` have found, which each is given its number, a rendezvous and its file for."""
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    given = [(job, rank, folder / "rendezvous", out, *arguments) for rank, out in enumerate(outs)]
    started = [programs.start(*one, timeout_s=200) for one in given]
    try:
        ended = [program.wait() for program in started]
    finally:
        for program in started:
            program.kill()
    assert [one.returncode for one in ended] == [0, 0], "\n".join(one.stdout + one.stderr for one in ended)
    return [torch.load(out, weights_only=True) for out in outs]
