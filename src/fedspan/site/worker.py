"""The long-lived process of a site, which keeps torch, the base and the data between messages.

    python -m fedspan.site.worker SITE_DIR

It answers over a Unix socket that its owner alone may open (`fedspan.wire.unix_socket`), one message after the other.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fedspan.support.errors import FedspanError
from fedspan.wire.unix_socket import Listener


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, or until stdin closes where that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m fedspan.site.worker", description=__doc__)
    parser.add_argument("folder", type=Path, help="the site's folder, with site.toml and config.toml")
    parser.add_argument("--lifeline", action="store_true", help="end when stdin closes: whoever started this is gone")
    given = parser.parse_args(arguments)
    try:
        listener = Listener(given.folder)
    except (OSError, ValueError) as error:
        print(f"fedspan: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: _end(listener))
    if given.lifeline:
        threading.Thread(target=_watch, args=(listener,), daemon=True).start()
    try:
        from fedspan.site.site import Settings, Site  # torch, transformers: a caller waits meanwhile

        site = Site(Settings.read(given.folder), given.folder, say=lambda line: print(line, flush=True))
    except ValueError as error:
        line = " ".join(str(error).split())
        print(f"fedspan: {line}", file=sys.stderr)
        listener.serve(_refusing(line))
        return 2
    print(f"{site.client.client_id} is ready: rank {site.client.rank}", flush=True)
    listener.serve(site.answer)
    return 0


def _refusing(line: str) -> Callable[[bytes], bytes]:
    def answer(content: bytes) -> bytes:
        raise FedspanError(line)

    return answer


def _watch(listener: Listener) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    _end(listener)


def _end(listener: Listener) -> None:
    listener.close()
    os._exit(0)  # whatever is being worked out has nobody to go to


if __name__ == "__main__":
    sys.exit(main())
