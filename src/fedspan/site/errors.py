"""The error that a site answers with."""

from __future__ import annotations

from fedspan.support.errors import FedspanError


class Refused(FedspanError):
    """A message that this site does not act on; the text says why and is sent back."""
