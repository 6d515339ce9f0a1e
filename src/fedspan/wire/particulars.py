"""The particulars of a message that a log of events may hold: where it belongs and what kind it is, never its content.

They are read before the message has been checked, so each is taken only where it has its plain form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedspan.wire import framing
from fedspan.wire.names import is_name
from fedspan.wire.refusals import TEXTS, is_incident

_KINDS = {
    "hello": "greeting",
    "ask": "question",
    "evaluate": "question about held-out rows",
    "advertise": "question for keys",
    "share": "question for shares",
    "receive": "shares",
    "sign": "question to sign survivors",
    "unmask": "question to unmask",
    "convict": "proof of false shares",
    "relay": "question to a region",
}
"""Of the server's messages."""
_ANSWERS = {
    "relayed": "sum of a region",
    "forms": "introduction of a region",
    "update": "update",
    "words": "part of a sum",
    "statistics": "statistics",
    "lacks": "list of lacking tensors",
    "keys": "keys",
    "shares": "shares",
    "false": "receipt of shares",
    "signature": "signature",
    "unmask": "help to unmask",
    "shapes": "introduction",
}
"""By a field that only this kind of answer has."""
_MAX_NAMES = 1000
_COUNTS = {"number": "exchange", "index": "sum", "threshold": "threshold", "num_sums": "num_sums", "rank": "rank"}


def particulars(content: bytes) -> dict[str, Any]:
    """Return the particulars of a message in either direction, as fields of a log's entry."""
    try:
        head = framing.head_of(content)
    except framing.Malformed:
        return {"kind": "unreadable"}
    found: dict[str, Any] = {"kind": _kind(head)}
    found |= {key: head[key] for key in ("run", "session", "client_id") if is_name(head.get(key))}
    if _is_count(head.get("round")):
        found["round"] = head["round"] + 1  # people count from one
    found |= {name: head[key] for key, name in _COUNTS.items() if _is_count(head.get(key))}
    for key in ("members", "survivors", "false"):
        names = head.get(key)
        if isinstance(names, list) and len(names) <= _MAX_NAMES and all(is_name(name) for name in names):
            found[key] = names
    if isinstance(head.get("code"), str) and head["code"] in set(TEXTS):
        found |= {"code": str(head["code"])}
        found |= {"incident": head["incident"]} if is_incident(head.get("incident")) else {}
    return found


def _kind(head: Mapping[str, Any]) -> str:
    if "kind" in head:
        return _KINDS.get(head["kind"], "unknown") if isinstance(head["kind"], str) else "unknown"
    if "code" in head:
        return "refusal"
    return next((kind for key, kind in _ANSWERS.items() if key in head), "receipt")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
