"""Bytes in and out of Flower's messages; nothing here knows what they say."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedspan.support.errors import FedspanError

MESSAGE_TYPE = "query.fedspan"
SERIALISATION = "fedspan.bytes"
"""Ours, so that nobody takes the bytes for an array's."""
SMALL = 1 << 20
"""Larger contents travel as an array, which Flower sends in pieces of 5 MiB; smaller ones in one request less."""
_CONFIG, _ARRAYS, _CONTENT, _LIFETIME = "fedspan", "fedspan-content", "content", "lifetime"


def pack(content: bytes, lifetime: float = 0.0) -> RecordDict:
    """The content of a message.

    Parameters
    ----------
    lifetime
        Seconds that whoever gets it has for the answer; of no meaning in an answer.
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
    """What `pack` was given.

    Raises
    ------
    ValueError
        When the message is none of ours.
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
        found = None if array is None else array.stype
        raise FedspanError(f"a message's content is of the type {found!r}: expected {SERIALISATION!r}")
    return array.data, lifetime


def one_line(error: object) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
