"""Mutated frames, by atheris: against the codec, and against a live server, over the stream and through pipes.

`python tests/fuzz/run.py --frames 1000000 --seconds 540` prints one JSON object: `frames` that were read, `sessions` by
how they ended, `statuses` of frames and requests, `crashes`, `hangs`, `faults` (what no client should be told) and
`rss_growth_mb` after the first tenth. It exits with 1 if there was one of these, or fewer frames than asked for.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARES = {"codec": 0.6, "stream": 0.2, "pipes": 0.2}  # of the frames
TIMES = {"codec": 0.3, "stream": 0.4, "pipes": 0.3}  # of the seconds, at most
HANG_S = 30
MAX_GROWTH_MB = 128  # atheris keeps a corpus in the same process


def main():
    """Run each target in a process of its own, and add up what they say."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--frames", type=int, default=1_000_000)
    asked.add_argument("--seconds", type=float, default=540.0)
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--target", choices=[*SHARES])
    given = asked.parse_args()
    if given.target is not None:
        fuzz(given.target, given.frames, given.seconds, given.seed)
    found = [run(target, given) for target in SHARES]
    total = {key: sum(one[key] for one in found) for key in ("frames", "crashes", "hangs", "seconds", "rss_growth_mb")}
    total["rss_growth_mb"] = round(total["rss_growth_mb"], 1)
    total["faults"] = [fault for one in found for fault in one["faults"]]
    for key in ("sessions", "statuses"):
        total[key] = dict(sum((collections.Counter(one[key]) for one in found), collections.Counter()))
    print(json.dumps(total), flush=True)
    bad = total["crashes"] or total["hangs"] or total["faults"] or total["frames"] < given.frames
    sys.exit(1 if bad or any(one["rss_growth_mb"] > MAX_GROWTH_MB for one in found) else 0)


def run(target, given):
    """One target in a process of its own: a crash, or a hang, ends only that."""
    frames, seconds = int(SHARES[target] * given.frames), TIMES[target] * given.seconds
    command = [sys.executable, __file__, "--target", target, "--frames", str(frames), "--seconds", str(seconds)]
    nothing = {"frames": 0, "hangs": 0, "crashes": 1, "seconds": 0, "rss_growth_mb": 0}
    nothing |= {"faults": [], "sessions": {}, "statuses": {}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*command, "--seed", str(given.seed)], cwd=folder, stdout=subprocess.PIPE, timeout=seconds + 4 * HANG_S
            )
        except subprocess.TimeoutExpired:
            return nothing | {"hangs": 1, "crashes": 0}
    lines = done.stdout.decode(errors="replace").splitlines()
    found = json.loads(lines[-1]) if done.returncode == 0 and lines else nothing
    print(f"{target}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def fuzz(target, frames, seconds, seed):
    """Fuzz in this process until there were as many frames, or the time is over; prints what was found, and exits."""
    import atheris

    with atheris.instrument_imports(include=["schoolhouse_wire", "schoolhouse_server"]):
        sys.path.insert(0, str(HERE.parent / "helpers"))
        from fuzzing import Live, Source, parse, session_of
    statuses, began = collections.Counter(), time.monotonic()
    state = {"frames": 0, "rss": 0}
    live = None if target == "codec" else Live(timeout_s=HANG_S).__enter__()
    send = {"stream": lambda found: live.send(found), "pipes": lambda found: live.send_through_pipes(found[1:])}

    def one(data):
        messages = session_of(Source(data))
        if live is None:
            statuses.update(map(parse, messages))
            state["frames"] += len(messages)
        else:
            send[target](messages)
            state["frames"] = live.taken
        state["rss"] = state["rss"] or (rss_mb() if state["frames"] >= frames / 10 else 0)
        if state["frames"] >= frames or time.monotonic() - began > seconds:
            finish(state, statuses, live, time.monotonic() - began)

    corpus = Path("corpus")
    corpus.mkdir()
    for i in range(256):
        (corpus / str(i)).write_bytes(_seed(i))
    options = ["-max_len=3000", f"-timeout={HANG_S}", f"-seed={seed}", "-rss_limit_mb=8192", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def finish(state, statuses, live, seconds):
    """Say what was found, and end the process at once."""
    faults, sessions = [], {}
    if live is not None:
        faults, sessions = live.wrong(), dict(live.ends)
        statuses.update(live.failures)
        print(live.reasons.most_common(12), file=sys.stderr)
    found = {
        "frames": state["frames"],
        "seconds": round(seconds, 1),
        "crashes": 0,
        "hangs": sessions.get("DEADLINE_EXCEEDED", 0),
        "rss_growth_mb": round(rss_mb() - state["rss"], 1) if state["rss"] else 0,
        "faults": faults,
        "sessions": sessions,
        "statuses": dict(statuses),
    }
    print(json.dumps(found), flush=True)
    os._exit(0)


def rss_mb():
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _seed(number):
    import random

    generator = random.Random(number)
    return generator.randbytes(generator.randrange(1, 3000))


if __name__ == "__main__":
    main()
