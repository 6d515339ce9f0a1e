"""A server step over updates that are never all in memory: folded as they arrive, in as many passes as the rule needs.

A method whose exchange is a sum takes one pass. One that asks queries (`fedspan.methods.queries`) takes a
pass per query; every result is a weighted sum over the clients, so memory is O(R(m+n)) per module however many
there are, and servers may form a tree whose nodes add up their children's sums.
"""

from fedspan.methods.folds import SUM, Partial
from fedspan.streaming.source import Source, Tree
from fedspan.streaming.stream import Progress, aggregate_passes, aggregate_stream, sum_pass

merge = SUM.merge
"""Add up two servers' partials of one pass."""

__all__ = ["Partial", "Progress", "Source", "Tree", "aggregate_passes", "aggregate_stream", "merge", "sum_pass"]
