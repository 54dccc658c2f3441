"""Runs programs, each in a process of its own that is forked from one which has imported torch, as that takes seconds.

As a script it is that process: it reads paths of programs from stdin, and answers each with its exit status.
"""

import faulthandler
import os
import runpy
import subprocess
import sys
from pathlib import Path


class Runner:
    """Use it in a `with`. `options` are those of the Python that runs the programs."""

    def __init__(self, *options):
        self._command = [sys.executable, *options, __file__]

    def __enter__(self):
        self._server = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_exc):
        self._server.stdin.close()
        self._server.wait(timeout=30)
        self._server.stdout.close()

    def run(self, path, timeout_s):
        """The exit status of a program, which runs in its own folder, and what it wrote to stderr."""
        self._server.stdin.write(f"{timeout_s} {path}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline()), path.with_suffix(".stderr").read_text()


def forked(path):
    """The process id of a child that is to run the program; in the child, 0."""
    pid = os.fork()
    if pid == 0:
        os.chdir(path.parent)
        for number, name in enumerate((os.devnull, os.devnull, path.with_suffix(".stderr"))):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    return pid


def main():
    """Serve until stdin ends. A child returns from here after its program, and ends as any script does."""
    import schoolhouse  # noqa: F401
    import torch._dynamo  # noqa: F401  # which the first step of an optimizer imports, for longer than torch takes

    for line in sys.stdin:
        timeout_s, _, name = line.rstrip("\n").partition(" ")
        pid = forked(Path(name))
        if pid == 0:
            faulthandler.dump_traceback_later(float(timeout_s), exit=True)
            runpy.run_path(name, run_name="__main__")
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
