"""Make docs/internet_scale.md from the committed lines: python benchmarks/scale/page.py"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
LINES = HERE / "results.jsonl"
TEMPLATE = HERE / "template.md"
PAGE = HERE.parents[1] / "docs" / "internet_scale.md"
SITES, REGIONS, GBIT = 10_000, 100, 10.0
MODELS = {
    "MiniLM, rank 8 in 24 layers of 384": (384, 8, 24),
    "1B, rank 16 in 112 layers of 2048": (2048, 16, 112),
    "7B, rank 16 in 224 layers of 4096": (4096, 16, 224),
}
"""Name -> (d, r, number of d×d modules), to which the figures are extrapolated."""

Line = dict[str, Any]


def read(path: Path = LINES) -> list[Line]:
    """Return the committed lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def of_million(lines: Sequence[Line]) -> str:
    """Return what is said of the rounds of ten thousand."""
    rounds = [x for x in lines if x["case"][0] == "million"]
    first, last, clients = rounds[0], rounds[-1], sum(x["clients"] for x in rounds)
    peak = max(x["peak_mib"] for x in rounds)
    rows: list[tuple[str, object]] = [
        ("rounds", len(rounds)),
        ("answers of clients; clients that took part", f"{clients:,}; {last['distinct']:,}"),
        ("largest peak memory of the process (limit), MiB", f"{peak:.0f} ({first['limit_mib']})"),
        ("peak memory of the first and the last round, MiB", f"{first['peak_mib']:.0f}; {last['peak_mib']:.0f}"),
    ]
    for part, name in _PARTS:
        seconds = sum(x["cpu_seconds"][part] for x in rounds)
        rows.append((f"CPU microseconds a client: {name}", f"{1e6 * seconds / clients:.1f}"))
    rows.append(
        (
            "CPU seconds of the checkpoint, first and last round",
            "; ".join(f"{x['cpu_seconds']['checkpoint']:.3f}" for x in (first, last)),
        )
    )
    if trees := [x["tree"]["largest_difference"] for x in rounds if "tree" in x]:
        rows.append(("sums over 100 regions: largest difference, of the largest entry", f"{max(trees):.1e}"))
    note = f"Of the 100 rounds that make a million answers, {len(rounds)} are done."
    return table(("FedIT, one layer of 64×64, rank 4", ""), rows) + ("" if len(rounds) == 100 else f"\n\n{note}")


_PARTS = (
    ("sampling", "drawing the round"),
    ("round", "the round and its fold"),
    ("checkpoint", "the checkpoint"),
    ("making", "(making the updates, not the library's)"),
)


def of_width(lines: Sequence[Line]) -> str:
    """Return the table of costs by the size of the round."""
    arms = {("round", "fedit"): "sum", ("tree", "glora"): "tree", ("round", "glora"): "collected"}
    found = {tuple(x["case"][1:]): x for x in lines if x["case"][0] == "width" and x["case"][3] == "small"}
    rows = []
    for k in sorted({key[3] for key in found}):
        row: list[str] = [f"{k:,}"]
        for arm in arms:
            line = found.get((*arm, "small", k))
            row += ["", ""] if line is None else [f"{line['us_per_client']:.0f}", f"{line['grown_mib']:.1f}"]
        rows.append(row)
    head = ["clients in the round", *(f"{name}, {unit}" for name in arms.values() for unit in ("µs", "MiB"))]
    return table(head, rows)


def fitted(lines: Sequence[Line], value: Callable[[Line], float]) -> np.ndarray:
    """Return (a, b, c) with value ≈ a + b · modules + c · MiB of the update, by relative least squares."""
    terms = np.array([[1.0, x["modules"], x["update_bytes"] / 2**20] for x in lines])
    values = np.array([value(x) for x in lines])
    free = [0, 1, 2]
    while True:  # drop the most negative term until there is none
        found = np.zeros(3)
        found[free] = np.linalg.lstsq(terms[:, free] / values[:, None], np.ones(len(values)), rcond=None)[0]
        if (found >= 0).all():
            return found
        free.remove(int(found.argmin()))


def costs(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Return the fitted microseconds a client of the parts of a server's work."""
    rounds = [x for x in lines if x["case"][:3] == ["width", "round", "fedit"] and x["case"][4] >= 100]
    sent = [x for x in lines if x["case"][0] == "messages"]
    return {
        "making a client's message": fitted(sent, lambda x: x["us"]["broadcast"]),
        "taking an answer apart": fitted(sent, lambda x: x["us"]["decode"]),
        "a client of a round": fitted(rounds, lambda x: x["us_per_client"]),
    }


def of_terms(lines: Sequence[Line]) -> str:
    """Return the table of the fitted terms."""
    rows = [(name, *(f"{x:.0f}" for x in found)) for name, found in costs(lines).items()]
    head = ("CPU microseconds of the server", "each", "for each layer", "for each MiB of the update")
    note = "From rounds of 100 clients or more, and from messages in float32; `results.jsonl` has every figure."
    return f"{table(head, rows)}\n\n{note}"


def of_sites(lines: Sequence[Line]) -> str:
    """Return the table for real sites."""
    terms, rows = costs(lines), []
    for name, (d, rank, modules) in MODELS.items():
        mib = 8 * d * rank * modules / 2**20

        def seconds(clients: int, size: float, modules: int = modules) -> float:
            return clients * sum(float(t @ [1.0, modules, size]) for t in terms.values()) / 1e6

        def network(clients: int, size: float) -> float:
            return clients * size * 2**20 * 8 / (GBIT * 1e9)

        each = SITES // REGIONS
        rows.append(
            (
                name,
                f"{mib:.1f}",
                f"{SITES * mib / 1024:.0f}",
                f"{network(SITES, mib):.0f}",
                f"{seconds(SITES, mib):.0f}",
                f"{network(each, mib):.1f}; {seconds(each, mib):.1f}",
                f"{network(REGIONS, 2 * mib):.1f}; {seconds(REGIONS, 2 * mib):.1f}",
            )
        )
    head = (
        "model",
        "MiB an update",
        "GiB a round, each way",
        "one server: network, s",
        "one server: CPU, s",
        "each region: network, CPU, s",
        "top server: network, CPU, s",
    )
    return table(head, rows)


def page(lines: Sequence[Line]) -> str:
    """Return the whole page."""
    rounds = [x for x in lines if x["case"][0] == "million"]
    tree = next(x for x in lines if x["case"][:2] == ["width", "tree"])
    start = max((x for x in lines if x["case"][0] == "start"), key=lambda x: x["case"][1])
    more = [rounds[-1][name] - rounds[0][name] for name in ("peak_mib", "distinct")]
    held = more[0] * 2**20 / max(more[1], 1)
    d, rank, modules = MODELS["7B, rank 16 in 224 layers of 4096"]
    return TEMPLATE.read_text(encoding="utf-8").format(
        limit=rounds[0]["limit_mib"],
        million=of_million(lines),
        passes=int(tree["cpu_seconds"]["passes"]),
        width=of_width(lines),
        terms=of_terms(lines),
        sites=f"{SITES:,}",
        regions=REGIONS,
        each=SITES // REGIONS,
        extrapolated=of_sites(lines),
        largest=max(x["update_bytes"] for x in lines if "update_bytes" in x) / 2**20,
        gbit=GBIT,
        collected=SITES * 8 * d * rank * modules / 1e12,
        coins=next(x["ns_per_client"] for x in lines if x["case"][0] == "coins"),
        checkpoint=f"{rounds[-1]['cpu_seconds']['checkpoint']:.2f}",
        distinct=f"{rounds[-1]['distinct']:,}",
        held=held,
        start_us=start["us_per_client"],
        start_bytes=start["bytes_per_client"],
    )


if __name__ == "__main__":
    PAGE.write_text(page(read()), encoding="utf-8")
