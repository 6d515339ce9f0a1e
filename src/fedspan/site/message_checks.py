"""The checks that a message must pass before a site acts on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedspan.site.errors import Refused
from fedspan.wire import agreement

_MAX_COUNT = 2**31


@dataclass(frozen=True, slots=True)
class RoundHeader:
    """The fields of a message that place it in a run, each of the right type."""

    run: str
    round_num: int
    counted: int
    """Rounds that were finished when this client's answer last counted: its state is the one of then."""
    number: int
    """Of the exchange, in the method's list."""
    rank: int
    """The server's."""
    num_clients: int
    """Of the run."""

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> RoundHeader:
        """Read the fields of a message.

        Raises
        ------
        Refused
            When one of them is not of its type.
        """
        run, round_num, counted = message["run"], message["round"], message["counted"]
        # The run names a folder on this site's disk: letters and digits only, so that no path can be made of it.
        if not isinstance(run, str) or not run.isalnum() or type(round_num) is not int or type(counted) is not int:
            raise Refused(f"run {run!r}, round {round_num!r}, counted {counted!r}: expected a name and two counts")
        for key in ("number", "rank", "num_clients"):
            if type(message[key]) is not int or not 0 <= message[key] < _MAX_COUNT:
                raise Refused(f"{key} = {message[key]!r}: expected a count")
        if not 0 <= counted <= round_num:
            raise Refused(f"round {round_num} after {counted} finished rounds: expected the next one")
        return cls(run, round_num, counted, message["number"], message["rank"], message["num_clients"])


class MessageChecks:
    """The checks that a message belongs to this federation, and is not an old one.

    Parameters
    ----------
    terms
        The settings that the site shares with the server.
    """

    def __init__(self, terms: Mapping[str, Any]) -> None:
        self._terms = agreement.digest(terms)
        self._newest = ("", 0)
        """Run, and the largest count of finished rounds that the server has named in it."""

    def check(self, message: Mapping[str, Any], base: str) -> RoundHeader:
        """Return the header of a message that this site may act on.

        Parameters
        ----------
        base
            Digest of the site's untouched base.

        Raises
        ------
        Refused
            When the message belongs to another federation or to a round before the last one that counted.
        """
        if message.get("terms") != self._terms:
            raise Refused("a message for other settings: say hello first")
        if message.get("base") != base:
            raise Refused("a message for other base weights: say hello first")
        header = RoundHeader.read(message)
        run, newest = self._newest
        # An old question, delayed or replayed, would have the site train from an old state and overwrite a newer one.
        if header.run == run and header.counted < newest:
            raise Refused(f"a message from before round {newest}, which this site has seen finished")
        self._newest = (header.run, header.counted)
        return header
