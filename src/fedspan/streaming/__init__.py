"""A server step over updates that are never held at once: folded as they come, in as many passes as the rule asks.

A method whose exchange is a sum takes one pass. One that asks queries (`fedspan.methods.queries`) takes a
pass per question; every answer is a weighted sum over the clients, so memory is O(R(m+n)) per module however many
they are, and servers may form a tree whose nodes add up their children's sums.
"""

from fedspan.methods.folds import SUM, Partial
from fedspan.streaming.source import Source, Tree
from fedspan.streaming.stream import Progress, aggregate_stream, drive, sum_pass

merge = SUM.merge
"""Two servers' partials of one pass, added up."""

__all__ = ["Partial", "Progress", "Source", "Tree", "aggregate_stream", "drive", "merge", "sum_pass"]
