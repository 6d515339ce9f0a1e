"""`python -m fedspan.flower.superlink [--any-local-user] ARGUMENTS`: Flower's `flower-superlink` for one account.

It differs from Flower's own command in this:

* Everything but the fleet API, where every request is signed, is refused to other accounts of this machine
  (`fedspan.flower.access`).
* A large body is read only when a registered node has signed the request (`fedspan.flower.signed_bodies`).
* The process that starts a run's ServerApp hands it its token in a file without a name, not on its command line, which
  every account can read (`fedspan.flower.server_app_starter`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fedspan.flower import server_app_starter
from fedspan.flower.access import ANY_LOCAL_USER, GuardedUvicorn, guard
from fedspan.flower.fleet_calls import is_fleet_call
from fedspan.support.errors import FedspanError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the SuperLink until it is stopped by a signal."""
    command = importlib.import_module("flwr.superlink.cli.flower_superlink")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        guard(command, GuardedUvicorn(is_fleet_call, ANY_LOCAL_USER in given), "uvicorn.run(")
        server_app_starter.take_place()
    except FedspanError as error:
        raise SystemExit(f"error: {error}") from None
    sys.argv = ["flower-superlink", *(argument for argument in given if argument != ANY_LOCAL_USER)]
    command.flower_superlink()


if __name__ == "__main__":
    main()
