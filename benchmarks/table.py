"""Make RESULTS.md, CLAIMS.md and the README's table from the committed runs: python benchmarks/table.py

Every figure comes from a line of a runs.jsonl; nothing is typed by hand.
"""

from __future__ import annotations

from pathlib import Path

import claims
from keep import FILE, Line, final_runs, read

from fedspan.comparison.results import mean
from fedspan.comparison.tuning import choice

HERE = Path(__file__).parent
SUITES = {
    "sst2": "SST-2, label-skewed clients",
    "superni": "Super-NaturalInstructions, one task per client",
    "mri": "Brain-MRI images, label-skewed sites",
}
BEGIN, END = "<!-- results: made by benchmarks/table.py -->", "<!-- end of results -->"
HEADLINES = {
    "glora",
    "glora_plus",
    "glora_sums",
    "flexlora",
    "raflora",
    "fedex_lora",
    "fedavg",
    "centralised_full",
    "flora",
    "ffa_lora",
    "hetlora",
    "fedit",
    "fedftg",
    "shared_galore",
    "local",
    "centralised",
}
"""The arms of the README's table."""
CONTROLS = ("local", "centralised", "centralised_full")
RATE = "local.learning_rate"


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Return every page that is made from the committed runs."""
    parts = ["# Results\n", "Made by `python benchmarks/table.py` from `*/runs.jsonl`; see README.md."]
    for name, title in SUITES.items():
        lines = read(HERE / name / FILE)
        if lines:
            parts += [f"\n## {title}\n", *table(lines)]
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    return {
        HERE / "CLAIMS.md": claims.page() + "\n",
        HERE / "RESULTS.md": "\n".join(parts) + "\n",
        readme: before + BEGIN + "\n" + headlines() + END + rest.partition(END)[2],
    }


def headlines() -> str:
    """Return the README's table: one row per method, one column per suite."""
    final = {name: lines for name in SUITES if (lines := final_runs(HERE / name))}
    head = [f"{SUITES[name]} ({lines[0]['metric']})" for name, lines in final.items()]
    rows = ["| | " + " | ".join(head) + " |", "|" + " --- |" * (len(head) + 1)]
    arms = list(dict.fromkeys(line["arm"] for lines in final.values() for line in lines))
    bases = [number(mean(known([x["base"] for x in lines]))) for lines in final.values()]
    rows.append("| untouched base | " + " | ".join(bases) + " |")
    for arm in sorted(HEADLINES & {*arms}, key=lambda arm: (arm.startswith("centralised"), arm != "local", arm)):
        runs = [[x for x in lines if x["arm"] == arm] for lines in final.values()]
        rows.append(f"| `{arm}` | " + " | ".join(spread(figures(x)) for x in runs) + " |")
    return "\n".join(rows) + "\n"


def table(lines: list[Line]) -> list[str]:
    """Return one suite's table and its notes."""
    final = [line for line in lines if line["stage"] == "final"]
    arms = {line["arm"]: [x for x in final if x["arm"] == line["arm"]] for line in final}
    if not arms:
        return ["No run on the test data yet."]
    unseen = any(x["unseen"] is not None for x in final)
    head = ["method", "learning rate", f"{final[0]['metric']} (clients)", *(["unseen"] if unseen else []), "seeds"]
    head += ["MB up", "MB down", "server s", "client s"]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    order = sorted(arms, key=lambda arm: (arm in CONTROLS, -(mean(figures(arms[arm])) or 0.0)))
    for arm in order:
        tried = [line for line in lines if line["arm"] == arm and line["stage"] == "tune"]
        rows.append("| " + " | ".join(cells(arm, arms[arm], tried, unseen)) + " |")
    bases = {x["seed"]: x["base"] for x in final if x["base"] is not None}
    notes = [f"\nUntouched base: {', '.join(f'{value:.3f} (seed {seed})' for seed, value in sorted(bases.items()))}."]
    notes.append(
        "± is half the range over two seeds, which is not a confidence interval: differences of that size mean "
        "nothing. Figures without it come from one seed. "
        "\\* the best rate is at the edge of the grid that was tried; † given, not tuned (see the suite)."
    )
    if "local" in arms:
        alone = mean(figures(arms["local"])) or 0.0
        losers = [arm for arm in order if arm not in CONTROLS and (mean(figures(arms[arm])) or 0.0) <= alone]
        notes.append(f"Not better than local-only: {', '.join(losers) or 'none'}.")
    return [*rows, *notes]


def cells(arm: str, runs: list[Line], tried: list[Line], unseen: bool) -> list[str]:
    """Return an arm's row."""
    row = [arm, f"{runs[0]['settings'][RATE]:g}{edge(tried)}", spread(figures(runs))]
    row += [spread(known([x["unseen"] for x in runs]))] if unseen else []
    row.append(str(len(runs)))
    for key in ("bytes_up", "bytes_down"):
        row.append("–" if arm in CONTROLS else f"{(mean([x[key] for x in runs]) or 0.0) / 1e6:.2f}")
    return row + [f"{mean([x[key] for x in runs]):.2f}" for key in ("server_seconds", "client_seconds")]


def figures(runs: list[Line]) -> list[float]:
    """Return what the clients ended with, for every run that did not diverge."""
    return known([line["figures"]["last"] for line in runs])


def known(values: list[float | None]) -> list[float]:
    """Return the values that are there."""
    return [value for value in values if value is not None]


def number(value: float | None) -> str:
    """Return a figure with three decimals."""
    return "–" if value is None else f"{value:.3f}"


def spread(values: list[float]) -> str:
    """Return mean ± half the range over the seeds; for one seed only the figure."""
    half = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return number(mean(values)) + half


def edge(tried: list[Line]) -> str:
    """Return a star where the best rate is the smallest or largest of those tried, a dagger where none was tried."""
    if not tried:
        return "†"
    higher = tried[0]["higher_is_better"]
    scores = [-float("inf") if x is None else x if higher else -x for x in (t["figures"]["last"] for t in tried)]
    return "\\*" if choice([line["settings"] for line in tried], scores).at_edge else ""


if __name__ == "__main__":
    main()
