"""The diagnostics of a run: a table by round, plain sentences about this run, a picture."""

from fedspan.inspection.picture import plot
from fedspan.inspection.readings import readings
from fedspan.inspection.record import Inspection, read
from fedspan.inspection.round_table import MAX_ROWS, as_json, legend, table

__all__ = ["MAX_ROWS", "Inspection", "as_json", "legend", "plot", "read", "readings", "table"]
