"""`python -m fedspan.flower.superlink [--nodes FOLDER] [--any-local-user] ARGUMENTS`: a guarded `flower-superlink`.

It differs from Flower's own command in this:

* Everything but the fleet API, where every request is signed, is refused to other accounts of this machine
  (`fedspan.flower.access`).
* A large body is read only when a registered node has signed the request, and nodes with a wrong clock are named in the
  log (`fedspan.flower.node_signatures`). The nodes' keys are in FOLDER, `nodes` unless given.
* The process that starts a run's ServerApp hands it its token in a file without a name, not on its command line, which
  every account can read (`fedspan.flower.server_app_starter`).
* A request waits longer for others that write to the database (`fedspan.flower.superlink_database`).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from fedspan.flower import expiry, node_signatures, server_app_starter, superlink_database
from fedspan.flower.access import ANY_LOCAL_USER, GuardedUvicorn, guard
from fedspan.flower.fleet_calls import is_fleet_call
from fedspan.flower.node_signatures import SignedBodies
from fedspan.support.errors import FedspanError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the SuperLink until it is stopped by a signal."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(ANY_LOCAL_USER, action="store_true")
    parser.add_argument("--nodes", type=Path, default=Path("nodes"))
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    command = importlib.import_module("flwr.superlink.cli.flower_superlink")
    try:
        node_signatures.check_folder(options.nodes)
        wrap = functools.partial(SignedBodies, nodes=options.nodes.resolve())
        for line in expiry.check(expiry.given(rest, ("--ssl-certfile", "--ssl-ca-certfile"))):
            sys.stderr.write(f"warning: {line}\n")
        guard(command, GuardedUvicorn(is_fleet_call, options.any_local_user, wrap), "uvicorn.run(")
        server_app_starter.take_place()
        superlink_database.wait_for_writers()
    except FedspanError as error:
        raise SystemExit(f"error: {error}") from None
    sys.argv = ["flower-superlink", *rest]
    command.flower_superlink()


if __name__ == "__main__":
    main()
