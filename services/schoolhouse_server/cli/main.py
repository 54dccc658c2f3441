"""The `schoolhouse` command: start, watch and stop a pool of teachers; make certificates and tokens; run the demo."""

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
    out.width = 1000  # in a pipe no columns need to be left out
err = Console(stderr=True)

Address = Annotated[
    str | None,
    typer.Option(
        help="The Ray cluster, as HOST:PORT of its head, or 'auto' for one started with `ray start` on this machine. "
        "Default: a local cluster, which `up` starts and `down` stops."
    ),
]
Ca = Annotated[Path | None, typer.Option(help="PEM file of the authority that signed the server's certificate.")]
Cert = Annotated[Path | None, typer.Option(help="PEM file of this client's certificate.")]
Key = Annotated[Path | None, typer.Option(help="PEM file of the key to --cert.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plaintext to other machines.")]


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
        with _connected(address):
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
    """Change how many replicas a teacher has.

    A replica that is stopped first answers the requests that it has.
    """
    from schoolhouse_server.pool.config import Bounds

    bounds = Bounds.parse(replicas)
    with _pool(address) as found:
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
    with _pool(address) as found:
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
    with _pool(address) as found:
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
    with _pool(address) as found:
        for name, records in found.logs(teacher, replica_id, lines).items():
            for record in records:
                out.print(f"{name}  {record}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def top(
    url: Annotated[
        str | None,
        typer.Argument(
            help="A directory or replica: HOST:PORT, or grpc:// or grpcs://HOST:PORT/NAME. Default: the pool."
        ),
    ] = None,
    address: Address = None,
    interval_s: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two updates.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one table, with the rates over one interval, and exit.")
    ] = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    token_file: Annotated[Path | None, typer.Option(help="File with a token; an admin's token shows all jobs.")] = None,
    insecure: Insecure = False,
) -> None:
    """Watch replicas and jobs live; 'q' quits."""
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
    """Show a teacher's facts, and what can be tapped.

    It prints the teacher's revision, class, dtype and the like, and the tree of its modules. It needs no Ray.
    """
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
    folder: Annotated[
        Path, typer.Argument(help="The folder for the files; it is made if it does not exist. Keep ca-key.pem secret.")
    ],
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or address that students connect to; may be repeated. Loopback is always included."),
    ] = None,
    add_server: Annotated[
        str, typer.Option(metavar="NAME", help="Add a server's certificate, signed by the authority in the folder.")
    ] = "",
    add_client: Annotated[
        str, typer.Option(metavar="NAME", help="Add a client's certificate, signed by the authority in the folder.")
    ] = "",
    days: Annotated[int, typer.Option(min=1, max=3650, help="How many days the certificates are valid.")] = 365,
) -> None:
    """Make certificates for a pool with TLS.

    It makes a private authority, a certificate for the pool's servers, and one for a client, as PEM files. With
    --add-server or --add-client it adds a certificate of the authority that is in the folder already.

    Servers get server.pem and server-key.pem (`security: {tls: {cert:, key:}}` in the pool file), and ca.pem as
    `client_ca` if clients must have a certificate. Clients get ca.pem: connect("grpcs://HOST:PORT/NAME", ca="ca.pem");
    where they must have a certificate, also client.pem as cert and client-key.pem as key.
    """
    from schoolhouse_server.security.certs import Authority, check_hosts

    if add_server or add_client:
        if host and not add_server:
            raise ConfigError("--host is for a server's certificate; add --add-server NAME, or leave --host out")
        authority = Authority.load(folder)
    else:
        if not host:
            raise ConfigError("give the names and addresses that students connect to: one --host HOST for each")
        check_hosts(host)
        authority = Authority.make(folder)
        add_server, add_client = "server", "client"
    paths = authority.add_server(add_server, host or (), days) if add_server else []
    paths += authority.add_client(add_client, days) if add_client else []
    for path in paths:
        out.print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command()
def token() -> None:
    """Make a random token for a job.

    It prints the token, and its line for the tokens file, which holds only digests of tokens.
    """
    from schoolhouse_server.security.tokens import digest_of, new_token

    made = new_token()
    out.print(f"token, for sh.connect(token=...): {made}", soft_wrap=True, highlight=False, markup=False)
    out.print("It is shown only now. Add a line like this one to the tokens file, under `tokens:`", soft_wrap=True)
    line = f'- {{sha256: "{digest_of(made)}", job: NAME, teachers: ["*"]}}'
    out.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command()
def down(address: Address = None) -> None:
    """Stop the pool.

    If `up` started a local Ray cluster for it, that is stopped too.
    """
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
def _connected(address: str | None) -> Iterator[None]:
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
def _pool(address: str | None) -> Iterator["Pool"]:
    """The pool at `address`, or the local one."""
    with _connected(address):
        from schoolhouse_server.pool.driver import find

        yield find()


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
