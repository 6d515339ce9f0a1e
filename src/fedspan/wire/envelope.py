"""The envelope of a message: the sender's head, the last line of its log of events, in front of the message itself.

The receiver writes the head into its own log, so that neither side can cut or rewrite its log up to there without the
other one's telling. Introductions travel without an envelope, so that versions that differ can still say so.
"""

from __future__ import annotations

import struct

from fedspan.events.chain import Head

MAGIC = b"FSPE"
_FORM = struct.Struct(">4sQ32s32s")


def sealed(content: bytes, head: Head) -> bytes:
    """Return a message in an envelope."""
    return _FORM.pack(MAGIC, head.number, bytes.fromhex(head.digest), bytes.fromhex(head.log)) + content


def opened(content: bytes) -> tuple[Head | None, bytes]:
    """Return the sender's head, and the message; None and the bytes as they are where they are in no envelope."""
    if content[: len(MAGIC)] != MAGIC or len(content) < _FORM.size:
        return None, content
    _, number, digest, log = _FORM.unpack(content[: _FORM.size])
    return Head(number, digest.hex(), log.hex()), content[_FORM.size :]
