"""Numbers of other libraries, such as NumPy's, as Python's own."""

from __future__ import annotations

from numbers import Integral, Real

from fedspan.support.errors import FedspanError


def plain(value: object) -> object:
    """Return another library's whole or real number as an int or a float; anything else as it is."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def whole(name: str, value: object, least: int) -> int:
    """Return a whole number of at least `least`, where a caller may have given one of NumPy's.

    Raises
    ------
    FedspanError
        For anything else, a bool included; `name` stands in front of the message.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise FedspanError(f"{name} = {value!r}: expected a whole number of at least {least}")
    return number
