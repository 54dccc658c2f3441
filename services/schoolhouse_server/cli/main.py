"""The `schoolhouse` command: start, watch and stop a pool of teachers, and a demo of the whole."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from schoolhouse.errors import ConfigError, SchoolhouseError

from schoolhouse_server.pool.status_rows import job_table, replica_table

if TYPE_CHECKING:  # it imports Ray, which takes seconds
    from schoolhouse_server.pool.driver import Pool

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
out = Console()
if not out.is_terminal:
    out.width = 1000  # a pipe has no edge at which to leave out columns
err = Console(stderr=True)

Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to use, as HOST:PORT of its head ('auto' for one started with `ray start` on this machine). "
        "Without it: a local one, started by `up` and stopped by `down`."
    ),
]
Ca = Annotated[Path | None, typer.Option(help="PEM file of who vouches for the server.")]
Cert = Annotated[Path | None, typer.Option(help="PEM file of a certificate to show.")]
Key = Annotated[Path | None, typer.Option(help="PEM file of its key.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plaintext to other machines.")]


@app.command()
def up(
    pool: Annotated[Path, typer.Argument(help="The pool's YAML file.")],
    address: Address = None,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the teachers, in seconds.")] = 900.0,
) -> None:
    """Start a pool and return when every replica serves; it goes on in the background until `down`."""
    from schoolhouse_server.pool import local_cluster
    from schoolhouse_server.pool.config import load_pool

    config = load_pool(pool)
    if address is None:  # else the paths are those of the cluster's nodes
        config.check_files(list(config.teachers))
    started = False
    with out.status("starting Ray"):
        if address is None and local_cluster.running() is None:
            local_cluster.start()
            started = True
    try:
        with _connected(address):
            from schoolhouse_server.pool.driver import launch

            with out.status("starting the pool's keeper and directory, or waiting for those that are there"):
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
    """Show the pool: its teachers, revisions, replicas and load."""
    with _pool(address) as found:
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
    """Give a teacher more or fewer replicas; those that go answer what they have first."""
    from schoolhouse_server.pool.config import Bounds

    bounds = Bounds.parse(replicas)
    with _pool(address) as found:
        found.scale(teacher, bounds)
    out.print(f"{teacher}: {replicas} replicas; `schoolhouse status` shows them")


@app.command()
def roll(
    pool: Annotated[Path, typer.Argument(help="The pool's YAML file, read again.")],
    teachers: Annotated[list[str] | None, typer.Argument(help="Which teachers; all of the file without it.")] = None,
    address: Address = None,
    linger_s: Annotated[
        float | None,
        typer.Option(min=0, help="How long old revisions stay for jobs that began with them; in place of the file's."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the new replicas, in seconds.")] = 900.0,
) -> None:
    """Replace teachers by what the file now says, one replica after the other, without stopping a student.

    Jobs that begin from now on get the new revision. Those that run keep the one that they began with: a replica of it
    stays until they end, or `linger_s` has passed. If the new replicas cannot start, the old ones serve on.
    """
    from dataclasses import replace

    from schoolhouse_server.pool.config import load_pool

    config = load_pool(pool)
    if linger_s is not None:
        config = replace(config, linger_s=linger_s)
    names = teachers or list(config.teachers)
    if address is None:
        config.check_files(names)
    with _pool(address) as found:
        with _progress() as show:
            found.roll(config, names, timeout_s, show)
        for name, one in found.teachers().items():
            if name in names:
                left = f"; {one['old']} replicas stay for jobs that began before" if one["old"] else ""
                out.print(f"{name} serves revision {one['revision']}{left}", soft_wrap=True)


@app.command()
def jobs(address: Address = None) -> None:
    """Show the jobs that use the pool, and what each of them got."""
    with _pool(address) as found:
        rows = found.jobs()
    out.print(job_table(rows) if rows else "no job has asked for anything yet")


@app.command()
def logs(
    replica: Annotated[str, typer.Argument(help="TEACHER or TEACHER/ID; all actors of the pool without it.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=2000, help="Of each actor.")] = 200,
    address: Address = None,
) -> None:
    """Show the last log records of the pool's actors; Ray's dashboard need not run."""
    teacher, _, replica_id = replica.partition("/")
    with _pool(address) as found:
        for name, records in found.logs(teacher, replica_id, lines).items():
            for record in records:
                out.print(f"{name}  {record}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def top(
    url: Annotated[
        str | None,
        typer.Argument(help="A directory or replica: HOST:PORT, grpc://HOST:PORT/NAME or grpcs://. Else: the pool."),
    ] = None,
    address: Address = None,
    interval_s: Annotated[float, typer.Option(min=0.1, max=3600, help="Between looks, in seconds.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one table, of the rates of one interval, and end.")
    ] = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    token_file: Annotated[Path | None, typer.Option(help="File with a token; an admin's sees all jobs.")] = None,
    insecure: Insecure = False,
) -> None:
    """Watch replicas and jobs, live; 'q' ends it."""
    from schoolhouse_wire.rpc.security import ClientSecurity

    from schoolhouse_server.observe.top import target_of, watch

    if url is None:
        with _pool(address) as found:
            url = found.directory_url
    target, tls = target_of(url), url.startswith("grpcs://")
    read = ClientSecurity.read(ca=ca, cert=cert, key=key, token=_token_in(token_file), insecure=insecure)
    security = read.towards(target.rpartition(":")[0].strip("[]"), tls=tls)
    watch(target, out, interval_s=interval_s, once=once, security=security)


@app.command()
def describe(
    url: Annotated[str, typer.Argument(help="The teacher: grpc://HOST:PORT/NAME, or grpcs:// with TLS.")],
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    token_file: Annotated[Path | None, typer.Option(help="File with a token that may use the teacher.")] = None,
    insecure: Insecure = False,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="How long to wait for the server, in seconds.")] = 10.0,
) -> None:
    """Show what a teacher is, and the modules of it that may be tapped; it needs no Ray."""
    from schoolhouse import connect

    token = _token_in(token_file)
    with connect(
        url, ca=ca, cert=cert, key=key, token=token, insecure=insecure, connect_timeout_s=timeout_s
    ) as teacher:
        found = teacher.describe()
    facts = {
        "teacher": found.name,
        "revision": found.revision,
        "class": found.class_name,
        "dtype": found.dtype,
        "device": found.device,
        "merge": found.merge,
        "transport": found.transport,
        "parameters": ", ".join(found.parameters) or "none",
        "modules": str(len(found.modules)),
    }
    for title, fact in facts.items():
        lines = wrap(f"{title:10}  {fact}", out.width, subsequent_indent=" " * 12, break_long_words=False)
        out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    out.print(f"\n{found.tree()}", markup=False, highlight=False, soft_wrap=True)


def _token_in(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="Where the files go; it is made if need be. Keep ca-key.pem safe.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or an address that students connect to; again for each. Loopback is always one."),
    ] = None,
    add_server: Annotated[
        str, typer.Option(metavar="NAME", help="Add a server's certificate of the authority that is in the folder.")
    ] = "",
    add_client: Annotated[
        str, typer.Option(metavar="NAME", help="Add a client's certificate of the authority that is in the folder.")
    ] = "",
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificates hold.")] = 365,
) -> None:
    """Make a private authority, and a certificate each for the servers of a pool and for a client, as PEM files.

    Servers get server.pem and server-key.pem (`security: {tls: {cert:, key:}}` in the pool file), and ca.pem as
    `client_ca` if clients must have a certificate. Clients get ca.pem: connect("grpcs://HOST:PORT/NAME", ca="ca.pem"),
    and where they must have one, client.pem as cert and client-key.pem as key.
    """
    from schoolhouse_server.security.certs import Authority, check_hosts

    if add_server or add_client:
        if host and not add_server:
            raise ConfigError("--host goes with a server's certificate; add --add-server NAME, or leave it out")
        authority = Authority.load(folder)
    else:
        if not host:
            raise ConfigError("give the names and addresses that students connect to: --host HOST, again for each")
        check_hosts(host)
        authority = Authority.make(folder)
        add_server, add_client = "server", "client"
    paths = authority.add_server(add_server, host or (), days) if add_server else []
    paths += authority.add_client(add_client, days) if add_client else []
    for path in paths:
        out.print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command()
def token() -> None:
    """Make a random token for a job, and its line for the tokens file, which holds no tokens but their digests."""
    from schoolhouse_server.security.tokens import digest_of, new_token

    made = new_token()
    out.print(f"token, for sh.connect(token=...): {made}", soft_wrap=True, highlight=False, markup=False)
    out.print("It is shown only now. The tokens file gets, under `tokens:`, a line like this one:", soft_wrap=True)
    line = f'- {{sha256: "{digest_of(made)}", job: NAME, teachers: ["*"]}}'
    out.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command()
def down(address: Address = None) -> None:
    """Stop the pool, and the local Ray cluster if `up` started it."""
    from schoolhouse_server.pool import local_cluster

    with _connected(address):
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
    plot: Annotated[Path, typer.Option(help="Where to write the curves, as a PNG.")] = Path("schoolhouse-demo.png"),
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Students of each kind.")] = 3,
) -> None:
    """Train a teacher on handwritten digits, serve it from a local pool, and distil two students from it."""
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

    for number in (signal.SIGINT, signal.SIGTERM):  # cleaned up after, either way
        signal.signal(number, interrupt)
    run(plot.resolve(), seeds, out)
    if interrupted:  # in a destructor, or within Ray, which ignore what is raised there
        raise KeyboardInterrupt


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    from schoolhouse_server.pool import local_cluster

    found = address or local_cluster.running()
    if found is None:
        raise ConfigError("no local pool is running; start one with `schoolhouse up pool.yaml`, or give --address")
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray guards local clusters with the user's token; read when it loads
    from schoolhouse_server.pool.driver import ray_cluster

    with ray_cluster(found):
        yield


@contextlib.contextmanager
def _pool(address: str | None) -> Iterator["Pool"]:
    """The pool at `address`, or the local one."""
    with _connected(address):
        from schoolhouse_server.pool.driver import find

        yield find()


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Gives what shows rows of replicas in the place of those before."""
    with Live(console=out, refresh_per_second=4) as live:
        yield lambda rows: live.update(replica_table(rows))
    if not out.is_terminal:
        out.line()  # a terminal's view ends its last line itself


def main() -> None:
    """Entry point: our errors become one sentence on stderr and exit status 1."""
    try:
        app()
    except SchoolhouseError as error:
        err.print(f"schoolhouse: {error}", markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        err.print("schoolhouse: interrupted; all that was started is stopped")
        raise SystemExit(130) from None
