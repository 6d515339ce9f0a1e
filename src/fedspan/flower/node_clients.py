"""The client id that belongs to each node's key, from the server's folder.

`nodes/SITE.pub` holds a site's public key and `clients.json` its client id. Flower has checked that a node has the
private key; that it may speak for a client of the federation is checked with these files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedspan.flower.node_keys import read_keys
from fedspan.support.errors import FedspanError

CLIENTS = "clients.json"
NODES = "nodes"
_EXPECTED = 'expected {"SITE": "CLIENT_ID", ...} with each nodes/SITE.pub and the client_id of its site.toml'


@dataclass(frozen=True, slots=True)
class NodeClients:
    """The bindings in a server's folder, read anew for each question, because keys are renewed during a run."""

    folder: Path

    def check(self) -> None:
        """Check that there are bindings, so that a run ends at once where no site could be let in.

        Raises
        ------
        FedspanError
            When `clients.json` is missing or holds something else.
        """
        self._clients()

    def client_of(self, key: bytes) -> str:
        """Return the client id for which the holder of a key may speak.

        Parameters
        ----------
        key
            A node's public key, as Flower encodes it.

        Raises
        ------
        FedspanError
            For a key that no site has, and a site without a client id.
        """
        clients = self._clients()
        for site, own in read_keys(self.folder / NODES).items():
            if own == key:
                if site not in clients:
                    raise FedspanError(f"{self.folder / CLIENTS} gives the site {site} no client id: expected one")
                return clients[site]
        raise FedspanError(f"its key is not in {self.folder / NODES}: expected the key of a site")

    def _clients(self) -> dict[str, str]:
        path = self.folder / CLIENTS
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise FedspanError(f"{path} cannot be read ({reason}): {_EXPECTED}") from None
        if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
            raise FedspanError(f"{path} holds something else: {_EXPECTED}")
        if len(set(content.values())) < len(content):
            raise FedspanError(f"{path} gives two sites one client id: expected different ones")
        return content
