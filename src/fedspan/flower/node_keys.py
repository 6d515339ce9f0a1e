"""Registration of the nodes that may connect, from a folder of public keys.

    python -m fedspan.flower.node_keys --superlink HOST:PORT --ca FILE NODES

Flower keeps the registered nodes in its database; this command makes the database match the folder.
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

from fedspan.support.errors import FedspanError, one_line

_UNREGISTERED = "unregistered"
_PATIENCE = 60.0
_PAUSE = 0.2


@dataclass(frozen=True, slots=True)
class Node:
    """A registered node, as the SuperLink reports it."""

    node_id: int
    name: str
    public_key: bytes
    status: str
    """`registered`, `online` or `offline`."""


def connect(superlink: str, ca: Path) -> ControlHttpClient:
    """Return a client of a SuperLink's control API.

    Parameters
    ----------
    superlink
        HOST:PORT.
    ca
        Certificate of the authority that signed the SuperLink's.
    """
    return ControlHttpClient.from_server_address(
        superlink, False, ca.read_bytes(), [RuntimeVersionHttpInterceptor("flwr CLI")]
    )


def nodes(client: ControlHttpClient) -> list[Node]:
    """Return the registered nodes."""
    return [node for node in _all_nodes(client) if node.status != _UNREGISTERED]


def _all_nodes(client: ControlHttpClient) -> list[Node]:
    infos = client.ListNodes(ListNodesRequest()).nodes_info
    return [Node(info.node_id, info.name, info.public_key, info.status) for info in infos]


def read_keys(folder: Path) -> dict[str, bytes]:
    """Read each site's public key from `SITE.pub` files in OpenSSH's format, encoded as Flower expects it.

    Raises
    ------
    FedspanError
        For a file without such a key, one key under two names, and a folder without keys.
    """
    keys: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            key = load_ssh_public_key(path.read_bytes())
        except ValueError:
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise FedspanError(f"{path} holds no public key on a NIST curve: expected one made by ssh-keygen -t ecdsa")
        encoded = public_key_to_bytes(key)
        for name, other in keys.items():
            if other == encoded:
                raise FedspanError(f"{path} holds the same key as {name}: expected a different key for each site")
        keys[path.stem] = encoded
    if not keys:
        raise FedspanError(f"{folder} holds no public key: expected SITE.pub files")
    return keys


def synchronise(client: ControlHttpClient, wanted: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """Register the nodes with these keys and unregister all others; return the names of both.

    Raises
    ------
    FedspanError
        For a key that was unregistered before, which Flower never takes again; the others are as they should be.
    """
    listed = _all_nodes(client)
    known = {node.public_key: node for node in listed if node.status != _UNREGISTERED}
    spent = {node.public_key for node in listed} - known.keys()
    # Unregister first: a key that moved to another site is then registered under that site's name.
    removed = [node for key, node in known.items() if key not in wanted.values()]
    for node in removed:
        client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
    added = [name for name, key in wanted.items() if key not in known and key not in spent]
    for name in added:
        client.RegisterNode(RegisterNodeRequest(public_key=wanted[name], name=name))
    back = [name for name, key in wanted.items() if key in spent]
    if back:
        raise FedspanError(
            f"{', '.join(back)}: this key was unregistered before, and Flower takes none twice: expected a new one, "
            "which `fedspan flower keys rotate` makes at the site; all other sites are registered as the folder says"
        )
    return added, [node.name or str(node.node_id) for node in removed]


def _wait_for_superlink(client: ControlHttpClient) -> None:
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
    """Register the nodes whose keys are in a folder, and no others."""
    parser = argparse.ArgumentParser(
        prog="python -m fedspan.flower.node_keys", description="Register the sites that may connect."
    )
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="the SuperLink's control API")
    parser.add_argument("--ca", required=True, type=Path, metavar="FILE", help="certificate of its authority")
    parser.add_argument("nodes", type=Path, metavar="NODES", help="a folder of SITE.pub files")
    options = parser.parse_args(arguments)
    try:
        wanted = read_keys(options.nodes)
        client = connect(options.superlink, options.ca)
        _wait_for_superlink(client)
        added, removed = synchronise(client, wanted)
    except (FedspanError, OSError, httpx.HTTPError) as error:
        raise SystemExit(f"error: {one_line(error)}") from None
    for name in added:
        sys.stdout.write(f"registered {name}\n")
    for name in removed:
        sys.stdout.write(f"unregistered {name}\n")
    sys.stdout.write(f"{len(wanted)} sites may connect\n")


if __name__ == "__main__":
    main()
