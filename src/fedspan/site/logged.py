"""A site's log of events: every message that it was sent, and every answer that it gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedspan.events import chain, fingerprints
from fedspan.events.chain import digest_of
from fedspan.events.log import EventLog
from fedspan.site.settings import SiteSettings
from fedspan.wire.envelope import opened, sealed
from fedspan.wire.particulars import particulars


class SiteLog:
    """The log in a site's folder, which goes on over all runs.

    Parameters
    ----------
    config
        Digest of the settings that it shares with the server.
    notify
        Called with a line for the people at this site when the server's log has lost lines.

    Raises
    ------
    FedspanError
        When the log is damaged.
    """

    def __init__(
        self, folder: Path, client_id: str, settings: SiteSettings, config: str, notify: Callable[[str], None]
    ) -> None:
        trusted = settings.trusted or {}
        identities = {f"identity of {who}": fingerprints.of_identity(key) for who, key in sorted(trusted.items())}
        keys = {**identities, **fingerprints.of_folder(folder)}
        self._log = EventLog(folder / chain.FILE, {"node": client_id, "config": config, "keys": keys})
        self._notify = notify

    def answered(self, content: bytes, answer: Callable[[bytes], bytes]) -> bytes:
        """Return the answer to a message, after writing down first the message and then the answer.

        A message in an envelope is answered in one.

        Raises
        ------
        FedspanError, OSError
            When the log cannot be written; the message is not acted on then, or its answer not sent.
        """
        peer, inner = opened(content)
        received = {"event": "received", "from": "server", **particulars(inner)}
        received |= {"digest": digest_of(inner), "size": len(inner)}
        if peer is not None:
            received["peer"] = peer.listed()
        (entry,) = self._log.append(received)
        if "rolled_back" in entry:
            self._notify(
                f"the server's log of the run ends at line {entry['peer'][0]}, and it has shown line "
                f"{entry['rolled_back']} before: lines of it were cut"
            )
        reply = answer(inner)
        described = {key: value for key, value in particulars(reply).items() if key != "client_id"}
        described |= {"digest": digest_of(reply), "size": len(reply)}
        self._log.append({"event": "answered", "to": "server", "question": entry["number"], **described})
        return reply if peer is None or self._log.head is None else sealed(reply, self._log.head)
