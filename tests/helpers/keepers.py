"""Keepers with faults, and what their replicas may be made of; Ray's workers import them from here."""

import os
import time

from models import Net
from ray.exceptions import RaySystemError
from schoolhouse_server.pool import replica_handle
from schoolhouse_server.pool.keeper import KeeperActor


class Hiccup(KeeperActor):
    """Ray does not answer its first two questions of what is there."""

    def __init__(self, *args):
        adopt, failed = replica_handle.adopt, []

        def late():
            if len(failed) < 2:
                failed.append(True)
                raise RaySystemError("the GCS does not answer")
            return adopt()

        replica_handle.adopt = late
        super().__init__(*args)


def end_the_thread(keeper):
    """What no `except Exception` holds up; returns the process."""

    def end():
        raise SystemExit

    keeper._table = end
    return os.getpid()


def pid(actor):
    """That of the actor's process."""
    return os.getpid()


def raising(width):
    """A teacher that cannot be built."""
    raise ValueError(f"a width of {width}\nis too much")


def slow_to_load(seconds):
    """A teacher that takes its time."""
    time.sleep(seconds)
    return Net(32, seed=1)
