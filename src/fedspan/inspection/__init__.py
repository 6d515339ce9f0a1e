"""What the diagnostics of a run say: a table by round, plain sentences about this run, a picture."""

from fedspan.inspection.display import MAX_ROWS, as_json, legend, table
from fedspan.inspection.picture import plot
from fedspan.inspection.readings import readings
from fedspan.inspection.record import Inspection, read

__all__ = ["MAX_ROWS", "Inspection", "as_json", "legend", "plot", "read", "readings", "table"]
