"""The reasons for which a site gives no answer: codes of a fixed list, with texts that the server knows beforehand.

An error at a site may quote its data: a label that is not allowed, a value, a path. Therefore no text of an error
leaves a site. The server is sent a `Code` and the incident's number, under which the text stands in the site's own log.
"""

from __future__ import annotations

import re
import secrets
from enum import StrEnum


class Code(StrEnum):
    """One reason why a site does not answer."""

    UNREADABLE = "unreadable"
    OTHER_SETTINGS = "other-settings"
    OTHER_BASE = "other-base"
    OLD = "old"
    NOT_HELD = "not-held"
    OWN_UPDATE = "own-update"
    NO_KEYS = "no-keys"
    UNMASKED = "unmasked"
    INCONSISTENT = "inconsistent"
    DIFFERENCING = "differencing"
    UNFIT = "unfit"
    BUDGET_SPENT = "budget-spent"
    REFUSED = "refused"
    NO_MEMORY = "no-memory"
    FAILED = "failed"
    NOT_READY = "not-ready"
    WORKER_GONE = "worker-gone"
    WORKER_LATE = "worker-late"
    ENDING = "ending"
    NOT_PASSED_ON = "not-passed-on"


TEXTS = {
    Code.UNREADABLE: "it cannot read the message: expected one of this version of fedspan",
    Code.OTHER_SETTINGS: "the message is for other settings: expected those that the site shares with the server",
    Code.OTHER_BASE: "the message is for other base weights: expected those of the site",
    Code.OLD: "the message is from before a round that the site has seen finished",
    Code.NOT_HELD: "the server counts on a state, a patch or a result of the site, which it does not hold",
    Code.OWN_UPDATE: "it was asked for its own update, where only sums may be known: its settings forbid it",
    Code.NO_KEYS: "it has no keys for the secure sum: it was restarted, or joined too late",
    Code.UNMASKED: "it unmasked this sum for other clients before, and the difference would reveal the update of one of"
    " them; a new run needs another seed, and the site's log says what the person responsible for it may do",
    Code.INCONSISTENT: "it was not shown that enough sites were told the same survivors of the sum: it reveals nothing",
    Code.DIFFERENCING: "the sum is over nearly the same sites as an earlier one, whose difference could be read: its"
    " settings forbid it (privacy.differencing)",
    Code.UNFIT: "its update cannot be sent: it is not finite, or does not fit the fixed point of the sum",
    Code.BUDGET_SPENT: "its privacy budget does not allow another answer",
    Code.REFUSED: "it refuses the message",
    Code.NO_MEMORY: "it has not enough memory",
    Code.FAILED: "an error of its own",
    Code.NOT_READY: "its settings, its base or its data cannot be used",
    Code.WORKER_GONE: "its worker failed or cannot be reached",
    Code.WORKER_LATE: "its worker did not answer within the time for one answer",
    Code.ENDING: "it is being shut down",
    Code.NOT_PASSED_ON: "its answer could not be passed on",
}
"""The sentence of each code, as the server's log shows it after the client's name."""
_INCIDENT = re.compile(r"[0-9a-f]{6}")
_IN_LINE = re.compile(rf"\(incident {_INCIDENT.pattern} ")


def new_incident() -> str:
    """Return the number of an incident, six random hexadecimal digits: two of one day hardly ever have the same."""
    return secrets.token_hex(3)


def is_incident(value: object) -> bool:
    """Return whether a value is the number of an incident."""
    return isinstance(value, str) and _INCIDENT.fullmatch(value) is not None


def line(code: Code, incident: str) -> str:
    """Return what people at the server read of an incident at a site."""
    return f"{TEXTS[code]} (incident {incident} in the site's log)"


def without_incident(text: str) -> str:
    """Return a text with the numbers of its incidents left out: two answers of one kind are then the same."""
    return _IN_LINE.sub("", text)


def packed(code: Code, incident: str) -> str:
    """Return an incident as the text of a transport's own error reply."""
    return f"{code} {incident}"


def unpacked(text: str) -> str | None:
    """Return the line of an incident that `packed` put into a text; None where the text is another."""
    code, _, incident = text.partition(" ")
    if code not in TEXTS or _INCIDENT.fullmatch(incident) is None:
        return None
    return line(Code(code), incident)
