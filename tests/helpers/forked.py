"""Forks of the test's own process that end in time, whatever they do."""

import os
import signal
import sys
import time

_WITHIN_S = 60


def in_a_fork(ask):
    """What `ask` exits with in a child; one that hangs says where, and is ended."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not what the test runner does at it
        signal.alarm(_WITHIN_S + 10)  # if nobody waits for it
        try:
            os._exit(ask())
        except BaseException as err:
            sys.stderr.write(f"{err!r}\n")
            os._exit(1)
    deadline = time.monotonic() + _WITHIN_S
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)  # pytest's faulthandler says where it was
            deadline += 1
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])
