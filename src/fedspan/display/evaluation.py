"""The figures of a trained model on new data as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from fedspan.data.class_metrics import ClassReport
from fedspan.display.progress import number

_MOST_CLASSES = 20


def tables(metrics: Mapping[str, float], rows: int, classes: ClassReport | None) -> Iterator[Table]:
    """Yield the figures, and where there are classes precision, recall and confusion of each."""
    figures = _table("", "")
    for name, value in metrics.items():
        figures.add_row(name, number(value))
    figures.add_row("rows", f"{rows:,}")
    yield figures
    if classes is None or len(classes["classes"]) > _MOST_CLASSES:
        return
    names = classes["classes"]
    each = _table("class", "rows", "precision", "recall", *(f"as {name}" for name in names))
    for i, name in enumerate(names):
        shares = number(classes["precision"][i]), number(classes["recall"][i])
        each.add_row(name, f"{classes['rows'][i]:,}", *shares, *(f"{count:,}" for count in classes["confusion"][i]))
    yield each


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), show_header=any(columns))
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=not place)
    return table
