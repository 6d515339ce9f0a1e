"""The diagnostics of a run: a table by round, their meaning for this run in plain sentences, a picture."""

from fedspan.inspection.picture import plot
from fedspan.inspection.readings import readings
from fedspan.inspection.record import Inspection, read
from fedspan.inspection.round_table import MAX_ROWS, as_json, legend, table

__all__ = ["MAX_ROWS", "Inspection", "as_json", "legend", "plot", "read", "readings", "table"]
