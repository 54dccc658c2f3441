"""Certificates for tests: two authorities, made once, and what their servers and clients have."""

import ssl
import urllib.request
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from schoolhouse_server import ServerTls
from schoolhouse_server.security.certs import Authority

_FOLDER = TemporaryDirectory(prefix="schoolhouse-certs-")


class Certificates:
    """The files of one authority: those of a server for `hosts`, and of a client."""

    def __init__(self, name, hosts=("pool.test",)):
        self.folder = Path(_FOLDER.name) / name
        authority = Authority.make(self.folder)
        authority.add_server("server", hosts, days=2)
        authority.add_client("client", days=2)
        self.ca = self.folder / "ca.pem"

    def server(self, *, client_ca=None):
        """The settings of a server; with the authority of clients, it wants their certificates."""
        return ServerTls(cert=self.folder / "server.pem", key=self.folder / "server-key.pem", client_ca=client_ca)

    def client(self):
        """The files of a client that has a certificate."""
        return {"ca": self.ca, "cert": self.folder / "client.pem", "key": self.folder / "client-key.pem"}


@cache
def ours():
    """The authority of the pool."""
    return Certificates("ours")


@cache
def theirs():
    """Another one."""
    return Certificates("theirs")


def fetched(url, ca, cert=None, key=None):
    """The status of a GET of `url`'s metrics."""
    context = ssl.create_default_context(cafile=ca)
    if cert is not None:
        context.load_cert_chain(cert, key)
    with urllib.request.urlopen(url + "/metrics", context=context, timeout=10) as answer:
        return answer.status
