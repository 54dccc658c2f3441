"""What the commands share: where they print, and how they reach a pool."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from schoolhouse_wire.errors import ConfigError

if TYPE_CHECKING:  # it imports Ray, which takes seconds
    from schoolhouse_server.pool.driver import Pool

out = Console()
if not out.is_terminal:
    out.width = 1000  # in a pipe no columns need to be left out
err = Console(stderr=True)

Address = Annotated[
    str | None,
    typer.Option(
        help="The Ray cluster, as HOST:PORT of its head, or 'auto' for one started with `ray start` on this machine. "
        "Default: a local cluster, which `up` starts and `down` stops."
    ),
]


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to the Ray cluster at `address`, or to the local one."""
    from schoolhouse_server.pool import local_cluster

    found = address or local_cluster.running()
    if found is None:
        raise ConfigError("no local pool is running; start one with `schoolhouse up pool.yaml`, or give --address")
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"  # our local clusters want the user's token; Ray reads this on import
    from schoolhouse_server.pool.driver import ray_cluster

    with ray_cluster(found):
        yield


@contextlib.contextmanager
def pool_at(address: str | None) -> Iterator["Pool"]:
    """The pool at `address`, or the local one."""
    with connected(address):
        from schoolhouse_server.pool.driver import find

        yield find()
