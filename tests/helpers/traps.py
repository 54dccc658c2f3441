"""Errors in the background, and what raises them where a test wants them."""

import threading

import pytest
from schoolhouse_server.session.server_session import ServerSession


class Panic(BaseException):
    """As those that come from Rust."""


ERRORS = [RuntimeError, Panic]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)


class Trap:
    """In the place of an attribute: raises `times` times once it is `set`, and does what the original does else."""

    def __init__(self, monkeypatch, owner, name, error=ERRORS[0], times=1):
        self.sprung, self.left, self._times = threading.Event(), 0, times
        original = getattr(owner, name)

        def trap(*args, **kwargs):
            if self.left > 0:
                self.left -= 1
                self.sprung.set()
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, trap)

    @staticmethod
    def raising(error):
        """What raises it."""

        def fail(*_args):
            raise error

        return fail

    def set(self):
        self.left = self._times
        return self.sprung


def opened(monkeypatch):
    """The sessions that servers of this process have had."""
    found, run = [], ServerSession.run
    monkeypatch.setattr(ServerSession, "run", lambda self: (found.append(self), run(self))[1])
    return found
