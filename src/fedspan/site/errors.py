"""The error that a site answers with."""

from __future__ import annotations

from fedspan.privacy.budget import BudgetSpent
from fedspan.support.errors import FedspanError
from fedspan.wire.protocol import Malformed
from fedspan.wire.refusals import Code


class Refused(FedspanError):
    """A message that this site does not act on.

    The text is for this site's own log, and may quote what it likes. The server is told the code alone.
    """

    def __init__(self, text: str, code: Code = Code.REFUSED) -> None:
        super().__init__(text)
        self.code = code


def code_of(error: BaseException) -> Code:
    """Return the code with which a site answers after an error."""
    if isinstance(error, Refused):
        return error.code
    if isinstance(error, BudgetSpent):
        return Code.BUDGET_SPENT
    if isinstance(error, FedspanError):
        return Code.UNREADABLE if isinstance(error, Malformed) else Code.REFUSED
    # torch's own is a RuntimeError of that name, on every kind of device.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Code.NO_MEMORY
    return Code.FAILED
