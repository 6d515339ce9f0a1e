"""The server's log of a run of real sites: its messages, its decisions about sites, its rounds and its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspan.config import Config
from fedspan.events import chain, fingerprints
from fedspan.events.log import EventLog
from fedspan.runs.events import Event, OnEvent
from fedspan.server.logged_transport import LoggedTransport
from fedspan.support.errors import one_line
from fedspan.wire import agreement
from fedspan.wire.transport import Transport

SERVER = "server"
"""The name of the server in its own log."""
_LINES = {"site": "decision", "budget": "decision", "note": "note"}
_ROUND = ("num_clients", "wire_up", "wire_down")
_MAX_LINE = 500


def logged(
    out: Path,
    config: Config,
    on_event: OnEvent,
    transport: Transport,
    trusted: Mapping[str, bytes] | None,
    keys: Mapping[str, str] | None,
) -> tuple[OnEvent, Transport]:
    """Return a handler of events and a transport that write into the run's log before they do what the given ones do.

    Parameters
    ----------
    out
        The run's folder.
    trusted
        Public identity keys by client.
    keys
        Fingerprints of other keys and certificates, by name.

    Raises
    ------
    FedspanError
        When the run has a log already, and it is damaged.
    """
    identities = {f"identity of {who}": fingerprints.of_identity(key) for who, key in sorted((trusted or {}).items())}
    opening = {
        "node": SERVER,
        "run_name": out.name,
        "config": agreement.digest(agreement.terms(config)),
        "keys": {**identities, **(keys or {})},
    }
    log = EventLog(out / chain.FILE, opening)

    def write(event: Event) -> None:
        entry = _entry(event, out)
        if entry is not None:
            log.append(entry)
        on_event(event)

    return write, LoggedTransport(transport, log, lambda line: write(Event("site", {"line": line})))


def _entry(event: Event, out: Path) -> dict[str, Any] | None:
    """Return an event of the run as a log holds it; None for one that it does not."""
    if event.kind in _LINES:
        return {"event": _LINES[event.kind], "line": one_line(event.data["line"], _MAX_LINE)}
    if event.kind == "round":
        record = event.data["record"]
        figures = {key: record[key] for key in _ROUND if key in record}
        rejected = {who: one_line(why, _MAX_LINE) for who, why in (record.get("rejected") or {}).items()}
        return {"event": "round", "round": record["round_num"], **figures, "rejected": rejected}
    if event.kind == "end":
        return {"event": "end", "results": _results(out)}
    return None


def _results(out: Path) -> dict[str, str]:
    """Return the digests of the files with the result."""
    files = [out / "summary.json", *sorted((out / "adapter").rglob("*")), *sorted((out / "model").rglob("*"))]
    return {path.relative_to(out).as_posix(): fingerprints.of_file(path) for path in files if path.is_file()}
