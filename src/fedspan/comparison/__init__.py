"""Comparisons of arms under conditions over seeds: tuned, run, and judged by paired differences."""

from fedspan.comparison.runner import AT_ONCE, Comparison, compare, dry_run

__all__ = ["AT_ONCE", "Comparison", "compare", "dry_run"]
