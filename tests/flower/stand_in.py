"""A worker whose messages say what it does: `stand_in.py FOLDER --lifeline`, run by the ClientApp process in tests."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from fedspan.wire.unix_socket import Listener


def answer(content: bytes) -> bytes:
    word = content[:10].split(b" ")[0]
    if word == b"exit":
        os._exit(3)
    if word == b"hang":
        time.sleep(600)
    if word == b"raise":
        raise ValueError("this cannot be\ndone")
    return f"{os.getpid()} ".encode() + content


def watch() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def main(folder: Path) -> None:
    if (folder / "broken").exists():
        sys.exit(5)
    listener = Listener(folder)
    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    listener.serve(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
