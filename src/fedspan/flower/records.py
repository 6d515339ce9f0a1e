"""Bytes in and out of Flower's messages; nothing here interprets them."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedspan.support.errors import FedspanError

MESSAGE_TYPE = "query.fedspan"
SERIALISATION = "fedspan.bytes"
"""A serialisation type of our own, so that no receiver reads the bytes as an array."""
SMALL = 1 << 20
"""Bytes; larger contents travel as an array, which Flower sends in pieces of 5 MiB, smaller ones save a request."""
_CONFIG, _ARRAYS, _CONTENT, _LIFETIME = "fedspan", "fedspan-content", "content", "lifetime"


def pack(content: bytes, lifetime: float = 0.0) -> RecordDict:
    """Return a message's content as Flower's records.

    Parameters
    ----------
    lifetime
        Seconds that the receiver has for its answer; without meaning in an answer.
    """
    config = ConfigRecord({_LIFETIME: float(lifetime)})
    records = RecordDict({_CONFIG: config})
    if len(content) <= SMALL:
        config[_CONTENT] = content
    else:
        array = Array(dtype="uint8", shape=(len(content),), stype=SERIALISATION, data=content)
        records[_ARRAYS] = ArrayRecord({_CONTENT: array})
    return records


def unpack(message: Message) -> tuple[bytes, float]:
    """Return the content and the lifetime that `pack` was given.

    Raises
    ------
    FedspanError
        When the message was not made by `pack`.
    """
    records = message.content
    config = records.config_records.get(_CONFIG)
    if config is None:
        raise FedspanError(f"a message holds the records {sorted(records)}: expected {_CONFIG!r}")
    lifetime = config.get(_LIFETIME)
    if not isinstance(lifetime, float):
        raise FedspanError(f"a message's lifetime is {lifetime!r}: expected a number of seconds")
    content = config.get(_CONTENT)
    if isinstance(content, bytes):
        return content, lifetime
    arrays = records.array_records.get(_ARRAYS)
    array = None if arrays is None else arrays.get(_CONTENT)
    if array is None or array.stype != SERIALISATION:
        kind = None if array is None else array.stype
        raise FedspanError(f"a message's content has the type {kind!r}: expected {SERIALISATION!r}")
    return array.data, lifetime
