"""The methods and their options as tables and as records for programs, read from the methods themselves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from fedspan import methods
from fedspan.methods.base import Method

_TAGS = {
    "exact": "exact",
    "gauge": "gauge_invariant",
    "ranks": "hetero_rank",
    "sums": "secure_sum",
    "personal": "personalised",
}
"""Heading of a column -> the property that it shows."""

_MEANINGS = {
    "exact": "what clients receive, at sufficient rank, is the ideal update T = Σ p_k s_k B_k A_k",
    "gauge": "re-factoring a client's (B, A) as (B G, G⁻¹ A) does not change the result",
    "ranks": "clients may train adapters of different ranks",
    "sums": "every exchange is a plain sum, so it runs where the server may see only sums",
    "personal": "each client ends with a model of its own",
    "trains": "LoRA factors, the weights of the target modules, or all weights",
    "up, down": "numbers sent per client, round and m×n module at rank r; K clients, c = Σ r_k, p kept by a threshold",
    "paper": "arXiv id",
}

LEGEND = "\n".join(f"{heading:<8}  {meaning}" for heading, meaning in _MEANINGS.items())
"""The meaning of the columns of `methods_table`."""


def method_records() -> list[dict[str, Any]]:
    """Return every method with its properties."""
    return [_properties(factory()) for factory in methods.METHODS.values()]


def method_record(name: str) -> dict[str, Any]:
    """Return one method with its properties and its options.

    Raises
    ------
    FedspanError
        When there is no method of that name.
    """
    return {**_properties(methods.create(name)), "options": [asdict(option) for option in methods.options(name)]}


def methods_table() -> Table:
    """Return a table of every method with its properties."""
    table = _table()
    table.add_column("name", style="bold", no_wrap=True)
    for heading in _TAGS:
        table.add_column(heading, justify="center")
    for heading in ("trains", "up", "down", "paper"):
        table.add_column(heading)
    for record in method_records():
        table.add_row(
            record["name"],
            *(_mark(record[tag]) for tag in _TAGS.values()),
            record["trains"],
            record["traffic_up"],
            record["traffic_down"],
            record["paper"],
        )
    return table


def properties_table(name: str) -> Table:
    """Return one method's properties, one a line, with their meanings.

    Raises
    ------
    FedspanError
        When there is no method of that name.
    """
    record = _properties(methods.create(name))
    table = _table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    table.add_row("name", record["name"], record["title"])
    for heading, tag in _TAGS.items():
        table.add_row(heading, _mark(record[tag]), _MEANINGS[heading])
    table.add_row("trains", record["trains"], _MEANINGS["trains"])
    table.add_row("up", record["traffic_up"], _MEANINGS["up, down"])
    table.add_row("down", record["traffic_down"], "")
    table.add_row("paper", record["paper"], _MEANINGS["paper"])
    return table


def options_table(name: str) -> Table:
    """Return a table of a method's options; it has no rows where there are none.

    Raises
    ------
    FedspanError
        When there is no method of that name.
    """
    table = _table()
    table.add_column("option", style="bold", no_wrap=True)
    table.add_column("values")
    table.add_column("default", no_wrap=True)
    table.add_column("meaning")
    for option in methods.options(name):
        default = "none" if option.default is None else str(option.default)
        table.add_row(option.name, option.type.replace("'", ""), default, option.meaning)
    return table


def _properties(method: Method) -> dict[str, Any]:
    return {**asdict(method.info), "secure_sum": method.secure_sum}


def _table(**options: Any) -> Table:
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), **options)


def _mark(claim: object) -> str:
    return "yes" if claim else "–"
