"""Runs and comparisons as one HTML page: written to a file, or served while they go on."""

from fedspan.reporting.live import Live, serve
from fedspan.reporting.page import MARKER, render, write
from fedspan.reporting.records import Study, Words, read

__all__ = ["MARKER", "Live", "Study", "Words", "read", "render", "serve", "write"]
