"""Commands that make what proves who somebody is: `certs` and `token`."""

from pathlib import Path
from typing import Annotated

import typer
from schoolhouse_wire.errors import ConfigError

from schoolhouse_server.cli.console import err, out


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
    `client_ca` if clients must have a certificate. Clients get ca.pem:
    connect("grpcs://HOST:PORT/NAME", security=Security(ca="ca.pem")), and where they must have a certificate, also
    client.pem as cert and client-key.pem as key.
    """
    from schoolhouse_server.security.certs import Authority, check_hosts, open_to_others

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
    for fault in open_to_others(folder):
        err.print(f"warning: {fault}", markup=False, highlight=False, soft_wrap=True)


def token() -> None:
    """Make a random token for a job.

    It prints the token, and its line for the tokens file, which holds only digests of tokens.
    """
    from schoolhouse_server.security.tokens import digest_of, new_token

    made = new_token()
    out.print(
        f"token, for sh.connect(security=sh.Security(token=...)): {made}", soft_wrap=True, highlight=False, markup=False
    )
    out.print("It is shown only now. Add a line like this one to the tokens file, under `tokens:`", soft_wrap=True)
    line = f'- {{sha256: "{digest_of(made)}", job: NAME, teachers: ["*"]}}'
    out.print(line, soft_wrap=True, highlight=False, markup=False)
