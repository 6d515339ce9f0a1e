"""Mishaps inside a site's processes, for which the product has no hook.

Python reads this file in every process that has this folder on its PYTHONPATH. FEDSPAN_MISHAPS names a folder; when
`SITE.json` appears there, it tells the site's worker or its ClientApp process which message to handle wrongly, once,
and how: `{"where", "at", "round", "do", …}`. That it was done is a line of `done.jsonl` there.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("FEDSPAN_MISHAPS", "."))


def head(content: bytes) -> dict[str, Any]:
    """A message's header, read here so that the ClientApp process needs no torch for it."""
    if content[:4] == b"FSPE":  # in an envelope, with the head of the server's log
        content = content[76:]
    (length,) = struct.unpack(">I", content[4:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])["message"]
    return header


def due(where: str, site: str, message: dict[str, Any]) -> dict[str, Any] | None:
    """Return the mishap ordered for this message, if any, and remove the order."""
    path = FOLDER / f"{site}.json"
    if not path.exists():
        return None
    orders: list[dict[str, Any]] = json.loads(path.read_text())
    for order in orders:
        if (order["where"], order["at"], order["round"]) == (where, message["kind"], message.get("round")):
            orders.remove(order)
            path.with_suffix(".new").write_text(json.dumps(orders))
            path.with_suffix(".new").replace(path)
            with (FOLDER / "done.jsonl").open("a") as done:
                done.write(json.dumps({"site": site, "time": time.time(), **order}) + "\n")
            return order
    return None


def spoiled(content: bytes, change: Callable[[list[Any]], None]) -> bytes:
    """An answer with its tensors changed in place."""
    from fedspan.wire import protocol

    header, tensors = protocol.decode(content)
    change(tensors)
    message = protocol.MessageTensors()
    for tensor in tensors:
        message.put(tensor)
    return protocol.encode({k: v for k, v in header.items() if k not in ("schema", "places")}, message)


def pause(seconds: float) -> None:
    """Wait that long, or until the file that says so appears."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (FOLDER / "go on").exists():
        time.sleep(0.05)


def from_file(path: Path) -> bytes:
    while not path.exists():
        time.sleep(0.05)
    return path.read_bytes()


def in_worker(site: str, answer: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The worker's answers, one of them wrong."""
    held: Any = getattr(answer, "__self__", None)

    def after_training(act: Callable[[], object]) -> None:
        work = held.work
        train = work._train

        def trained(*given: Any) -> Any:
            work._train = train
            result = train(*given)
            act()  # it has learnt, and nobody has heard of it
            return result

        work._train = trained

    def answered(content: bytes) -> bytes:
        message = head(content)
        order = due("worker", site, message) or {"do": None}
        match order["do"]:
            case "raise":
                raise RuntimeError("this site's trainer\nis broken")
            case "exit":
                os._exit(7)
            case "exit while training":
                after_training(lambda: os._exit(7))
            case "hang":
                after_training(lambda: time.sleep(3600))
            case "wait":
                after_training(lambda: pause(order["seconds"]))
        reply = answer(content)
        match order["do"]:
            case "NaN":
                reply = spoiled(reply, lambda tensors: tensors[0].fill_(float("nan")))
            case "shape":
                reply = spoiled(reply, lambda tensors: tensors.__setitem__(0, tensors[0][:1].clone()))
            case "replay":
                return from_file(FOLDER / f"{message['run']}-{order['of']}-{order['from']}.answer")
        if message["kind"] == "ask":
            path = FOLDER / f"{message['run']}-{site}-{message['round']}.answer"
            path.with_suffix(".new").write_bytes(reply)
            path.with_suffix(".new").replace(path)
        return reply

    return answered


def install() -> None:
    """Put the mishaps where they belong in this process."""
    words = sys.orig_argv
    if "fedspan.site.worker" in words:
        from fedspan.wire import unix_socket

        site, serve = Path(words[words.index("fedspan.site.worker") + 1]).name, unix_socket.Listener.serve
        unix_socket.Listener.serve = lambda self, answer: serve(self, in_worker(site, answer))
    elif "fedspan.flower.client_app_process" in words:
        from fedspan.flower.worker_supervisor import WorkerSupervisor

        call = WorkerSupervisor.call

        def called(self: WorkerSupervisor, folder: Path, content: bytes, timeout: float) -> bytes:
            if due("client app", folder.name, head(content)) is not None:
                raise RuntimeError("this site's client app\nis broken")
            return call(self, folder, content, timeout)

        WorkerSupervisor.call = called


if "FEDSPAN_MISHAPS" in os.environ:
    install()
