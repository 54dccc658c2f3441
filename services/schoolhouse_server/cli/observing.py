"""Commands that look at servers over gRPC: `top` and `describe`."""

from pathlib import Path
from textwrap import wrap
from typing import Annotated

import typer
from schoolhouse_wire.errors import ConfigError

from schoolhouse_server.cli.console import Address, out, pool_at

Ca = Annotated[Path | None, typer.Option(help="PEM file of the authority that signed the server's certificate.")]
Cert = Annotated[Path | None, typer.Option(help="PEM file of this client's certificate.")]
Key = Annotated[Path | None, typer.Option(help="PEM file of the key to --cert.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plaintext to other machines.")]


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
        with pool_at(address) as found:
            url = found.directory_url
    target, tls = target_of(url), url.startswith("grpcs://")
    read = ClientSecurity.read(ca=ca, cert=cert, key=key, token=_token_in(token_file), insecure=insecure)
    security = read.towards(target.rpartition(":")[0].strip("[]"), tls=tls)
    watch(target, out, interval_s=interval_s, once=once, security=security)


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
    from schoolhouse import Security, Timeouts, connect

    token = _token_in(token_file)
    with connect(
        url,
        security=Security(ca=ca, cert=cert, key=key, token=token, insecure=insecure),
        timeouts=Timeouts(connect_s=timeout_s),
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
