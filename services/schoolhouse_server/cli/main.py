"""The `schoolhouse` command: start, watch and stop a pool of teachers, and run the demo."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from schoolhouse_wire.errors import ConfigError, SchoolhouseError

from schoolhouse_server.cli import credentials, observing
from schoolhouse_server.cli.console import Address, connected, err, out, pool_at
from schoolhouse_server.pool.status_rows import job_table, replica_table

app = typer.Typer(
    help=(
        "Serve frozen PyTorch teachers to students that train elsewhere.\n\n"
        "A pool is described by a small YAML file:\n\n"
        "    teachers:\n\n"
        "      resnet: {build: 'my_models:resnet50', weights: resnet50.safetensors, replicas: 2}\n\n"
        "`schoolhouse up pool.yaml` starts it and prints the address that students connect to: "
        'sh.connect("grpc://HOST:PORT/resnet"). Then `schoolhouse status` and `schoolhouse down`.'
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def up(
    pool: Annotated[Path, typer.Argument(help="The pool's YAML file.")],
    address: Address = None,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the replicas, in seconds.")] = 900.0,
) -> None:
    """Start a pool, and wait until it serves.

    It returns when every replica serves. The pool runs in the background until `schoolhouse down`.
    """
    from schoolhouse_server.pool import local_cluster
    from schoolhouse_server.pool.config import load_pool

    config = load_pool(pool)
    if address is None:  # with an address, the paths are on the cluster's nodes
        config.check_files(list(config.teachers))
    started = False
    with out.status("starting Ray"):
        if address is None and local_cluster.running() is None:
            local_cluster.start()
            started = True
    try:
        with connected(address):
            from schoolhouse_server.pool.driver import launch

            with out.status("starting the pool's keeper and directory, or finding those that run"):
                launched = launch(config)
            try:
                with _progress() as show:
                    launched.wait(timeout_s, show)
            except BaseException:
                if launched.made:
                    launched.down()
                raise
            for name in config.teachers:
                out.print(f"students connect to  {launched.url(name)}", soft_wrap=True)
            if launched.page:
                out.print(f"watch it at          {launched.page}", soft_wrap=True)
    except BaseException:
        if started:
            local_cluster.stop()
        raise


@app.command()
def status(address: Address = None) -> None:
    """Show the pool's replicas and their load.

    It also says what failed, and where the directory and the page with charts are.
    """
    with pool_at(address) as found:
        out.print(replica_table(found.status()))
        for name, one in found.teachers().items():
            for trouble in filter(None, (one["error"] and f"cannot start: {one['error']}", one["lost"])):
                out.print(f"{name}: {trouble}", soft_wrap=True, markup=False, highlight=False)
        out.print(f"directory at {found.address}", soft_wrap=True)
        if found.page:
            out.print(f"charts at {found.page}", soft_wrap=True)


@app.command()
def scale(
    teacher: Annotated[str, typer.Argument(help="The teacher's name.")],
    replicas: Annotated[str, typer.Argument(help="How many replicas: N, or MIN-MAX to scale by load between them.")],
    address: Address = None,
) -> None:
    """Change how many replicas a teacher has.

    A replica that is stopped first answers the requests that it has.
    """
    from schoolhouse_server.pool.config import Bounds

    bounds = Bounds.parse(replicas)
    with pool_at(address) as found:
        found.scale(teacher, bounds)
    out.print(f"{teacher}: {replicas} replicas; `schoolhouse status` shows them")


@app.command()
def roll(
    pool: Annotated[Path, typer.Argument(help="The pool's YAML file, which is read again.")],
    teachers: Annotated[list[str] | None, typer.Argument(help="The teachers to roll; default: all.")] = None,
    address: Address = None,
    linger_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds that old revisions stay for jobs that began with them; default: the file's."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the new replicas, in seconds.")] = 900.0,
) -> None:
    """Roll teachers to what the file now says.

    One replica is replaced after the other, and no student is stopped. Jobs that begin from now on get the new
    revision. Running jobs keep the revision that they began with: a replica of it stays until they have ended, or
    `linger_s` has passed. If the new replicas cannot start, the old ones go on.
    """
    from dataclasses import replace

    from schoolhouse_server.pool.config import load_pool

    config = load_pool(pool)
    if linger_s is not None:
        config = replace(config, linger_s=linger_s)
    names = teachers or list(config.teachers)
    if address is None:
        config.check_files(names)
    with pool_at(address) as found:
        with _progress() as show:
            found.roll(config, names, timeout_s, show)
        for name, one in found.teachers().items():
            if name in names:
                left = f"; {one['old']} old replicas stay for jobs that began with them" if one["old"] else ""
                out.print(f"{name} serves revision {one['revision']}{left}", soft_wrap=True)


@app.command()
def jobs(address: Address = None) -> None:
    """Show the jobs that use the pool.

    There is one row for each job of each teacher, with what it asked for and was given.
    """
    with pool_at(address) as found:
        rows = found.jobs()
    out.print(job_table(rows) if rows else "no job has asked for anything yet")


@app.command()
def logs(
    replica: Annotated[str, typer.Argument(help="TEACHER or TEACHER/ID; default: all actors of the pool.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=2000, help="Log records of each actor.")] = 200,
    address: Address = None,
) -> None:
    """Show the last log records of the pool.

    They come from the pool's actors, and do not need Ray's dashboard.
    """
    teacher, _, replica_id = replica.partition("/")
    with pool_at(address) as found:
        for name, records in found.logs(teacher, replica_id, lines).items():
            for record in records:
                out.print(f"{name}  {record}", markup=False, highlight=False, soft_wrap=True)


for command in (observing.top, observing.describe, credentials.certs, credentials.token):
    app.command()(command)


@app.command()
def down(address: Address = None) -> None:
    """Stop the pool.

    If `up` started a local Ray cluster for it, that is stopped too.
    """
    from schoolhouse_server.pool import local_cluster

    with connected(address):
        from schoolhouse_server.pool.driver import clear

        with out.status("stopping the pool"):
            cleared = clear()
        if not cleared and address is not None:
            raise ConfigError("there is no pool on this Ray cluster; start one with `schoolhouse up pool.yaml`")
    if address is None:
        local_cluster.stop()
    out.print("the pool is down")


@app.command()
def demo(
    plot: Annotated[Path, typer.Option(help="The PNG file to write the curves to.")] = Path("schoolhouse-demo.png"),
    seeds: Annotated[int, typer.Option(min=1, max=20, help="How many students of each kind to train.")] = 3,
) -> None:
    """Run a demo: distil a teacher of digits.

    It trains a teacher on handwritten digits, serves it from a local pool, and distils two kinds of students from it.
    """
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the demo needs the extra 'demo': pip install 'schoolhouse[demo]' ({error})") from error
    from schoolhouse_server.cli.demo import run

    interrupted = []

    def interrupt(number: int, _frame: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # so that either way all that was started is stopped
        signal.signal(number, interrupt)
    run(plot.resolve(), seeds, out)
    if interrupted:  # the exception may have been raised in a destructor or inside Ray, where it is swallowed
        raise KeyboardInterrupt


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yields a function that shows rows of replicas in place of the rows before."""
    with Live(console=out, refresh_per_second=4) as live:
        yield lambda rows: live.update(replica_table(rows))
    if not out.is_terminal:
        out.line()  # in a terminal, Live ends its last line itself


def main() -> None:
    """The entry point: our errors become one sentence on stderr and exit status 1."""
    try:
        app()
    except SchoolhouseError as error:
        err.print(f"schoolhouse: {error}", markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        err.print("schoolhouse: interrupted; all that it started is stopped")
        raise SystemExit(130) from None
