"""Filters that keep a few bad clients from spoiling a round, composed before any method.

`screen` makes the function that the round loop calls between the answers of an exchange and their fold. It returns a
list of updates again, so that no method knows of it: some of them (a norm bound, Krum), the same ones with other
weights (the geometric median), or the same ones with other contents (the median of every coordinate).
"""

from fedspan.robust.screening import Ask, Filter, Screen, Screened, refusal, screen

__all__ = ["Ask", "Filter", "Screen", "Screened", "refusal", "screen"]
