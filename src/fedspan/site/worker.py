"""The long-lived process of a site, which keeps torch, the base and the data between messages.

    python -m fedspan.site.worker SITE_DIR

It answers over a Unix socket that only its owner may open (`fedspan.wire.unix_socket`), one message after the other.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fedspan.support.errors import FedspanError, one_line
from fedspan.wire.unix_socket import Listener


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, or until stdin closes where `--lifeline` was given; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedspan.site.worker", description=__doc__)
    parser.add_argument("folder", type=Path, help="the site's folder, with site.toml and config.toml")
    parser.add_argument(
        "--lifeline", action="store_true", help="end when stdin closes, as it does when the parent ends"
    )
    options = parser.parse_args(arguments)
    try:
        # Before the base is read, so that callers wait for an answer instead of being refused.
        listener = Listener(options.folder)
    except (OSError, FedspanError) as error:
        print(f"fedspan: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: _end(listener))
    if options.lifeline:
        threading.Thread(target=_watch_stdin, args=(listener,), daemon=True).start()
    try:
        from fedspan.site.settings import SiteSettings
        from fedspan.site.site import Site  # imports torch and transformers, which takes seconds

        site = Site(SiteSettings.read(options.folder), options.folder, notify=_log)
    except (OSError, FedspanError) as error:
        print(f"fedspan: {one_line(error)}", file=sys.stderr)
        # Every caller is told so, until someone has mended the folder and starts the worker again.
        listener.serve(_refusing(error))
        return 2
    print(f"{site.client.client_id} is ready: rank {site.client.rank}", flush=True)
    listener.serve(site.answer)
    return 0


def _log(line: str) -> None:
    print(one_line(line), flush=True)


def _refusing(error: Exception) -> Callable[[bytes], bytes]:
    from fedspan.site.incidents import refusal  # imports torch
    from fedspan.wire.refusals import Code

    # A FedspanError, whatever it was: the line is in the log already, and the traceback of a missing file helps nobody.
    reason = FedspanError(one_line(error))
    return lambda content: refusal(None, Code.NOT_READY, reason, _log)


def _watch_stdin(listener: Listener) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    _end(listener)


def _end(listener: Listener) -> None:
    listener.close()
    # Not sys.exit, which in the thread that watches stdin would end that thread only.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
