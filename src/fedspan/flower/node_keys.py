"""The nodes that may connect, kept as a folder of public keys.

    python -m fedspan.flower.node_keys --superlink HOST:PORT --ca FILE NODES

Flower keeps the registered nodes in its database; here the folder of public keys says what is in there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedspan.support.errors import FedspanError

_GONE = "unregistered"
_PATIENCE = 60.0
_PAUSE = 0.2


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the SuperLink knows it."""

    node_id: int
    name: str
    public_key: bytes
    status: str
    """registered, online, offline."""


def connect(superlink: str, ca: Path) -> ControlHttpClient:
    """A SuperLink's control API.

    Parameters
    ----------
    superlink
        HOST:PORT.
    ca
        The certificate of the authority that vouches for it.
    """
    return ControlHttpClient.from_server_address(
        superlink, False, ca.read_bytes(), [RuntimeVersionHttpInterceptor("flwr CLI")]
    )


def nodes(client: ControlHttpClient) -> list[Node]:
    """The nodes that are registered."""
    found = client.ListNodes(ListNodesRequest()).nodes_info
    return [Node(node.node_id, node.name, node.public_key, node.status) for node in found if node.status != _GONE]


def keys(folder: Path) -> dict[str, bytes]:
    """Each site's public key, from `SITE.pub` files in OpenSSH's format, as Flower takes it.

    Raises
    ------
    ValueError
        For a file that holds no such key, one key under two names, and a folder without keys.
    """
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            key = load_ssh_public_key(path.read_bytes())
        except ValueError:
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise FedspanError(
                f"{path} holds no public key on a NIST curve: expected one as ssh-keygen -t ecdsa makes it"
            )
        encoded = public_key_to_bytes(key)
        for name, other in found.items():
            if other == encoded:
                raise FedspanError(f"{path} holds the key of {name} too: expected a key of its own")
        found[path.stem] = encoded
    if not found:
        raise FedspanError(f"{folder} holds no public key: expected SITE.pub files")
    return found


def agree(client: ControlHttpClient, wanted: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """Register the nodes with these keys, shut all others out; the names of both."""
    known = {node.public_key: node for node in nodes(client)}
    # First out, then in: a key that is given to another site is registered anew under its name.
    out = [node for key, node in known.items() if key not in wanted.values()]
    for node in out:
        client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
    added = [name for name, key in wanted.items() if key not in known]
    for name in added:
        client.RegisterNode(RegisterNodeRequest(public_key=wanted[name], name=name))
    return added, [node.name or str(node.node_id) for node in out]


def _patiently(client: ControlHttpClient) -> None:
    """Until the SuperLink answers."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            nodes(client)
            return
        except httpx.TransportError as error:
            if time.monotonic() > end:
                raise FedspanError(f"the SuperLink does not answer ({error})") from None
        time.sleep(_PAUSE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the SuperLink's nodes those of a folder."""
    parser = argparse.ArgumentParser(prog="python -m fedspan.flower.node_keys", description="Who may connect.")
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT")
    parser.add_argument("--ca", required=True, type=Path, metavar="FILE")
    parser.add_argument("nodes", type=Path, metavar="NODES", help="a folder of SITE.pub files")
    options = parser.parse_args(arguments)
    try:
        wanted = keys(options.nodes)
        client = connect(options.superlink, options.ca)
        _patiently(client)
        added, out = agree(client, wanted)
    except (ValueError, OSError, httpx.HTTPError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
    for name in added:
        sys.stdout.write(f"registered {name}\n")
    for name in out:
        sys.stdout.write(f"shut out {name}\n")
    sys.stdout.write(f"{len(wanted)} sites may connect\n")


if __name__ == "__main__":
    main()
