"""Make RESULTS.md, CLAIMS.md and the README's table from the committed results: python benchmarks/table.py

Every figure comes from a line of a results.jsonl; nothing is typed by hand.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import claims
from run import read

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


def main() -> None:
    parts = ["# Results\n", "Made by `python benchmarks/table.py` from `*/results.jsonl`; see README.md."]
    for name, title in SUITES.items():
        lines = read(HERE / name / "results.jsonl")
        if lines:
            parts += [f"\n## {title}\n", *table(lines)]
    (HERE / "CLAIMS.md").write_text(claims.main() + "\n")
    (HERE / "RESULTS.md").write_text("\n".join(parts) + "\n")
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(before + BEGIN + "\n" + headlines() + END + rest.partition(END)[2])


def headlines() -> str:
    """Return the README's table: one row per method, one column per suite."""
    final = {
        name: [x for x in read(HERE / name / "results.jsonl") if x["purpose"] == "test"]
        for name in SUITES
        if (HERE / name / "results.jsonl").exists()
    }
    head = [f"{title} ({final[name][0]['summary']['metric']})" for name, title in SUITES.items() if name in final]
    rows = ["| | " + " | ".join(head) + " |", "|" + " --- |" * (len(head) + 1)]
    arms = list(dict.fromkeys(line["arm"] for lines in final.values() for line in lines))
    bases = [statistics.mean(x["summary"]["base"] for x in lines) for lines in final.values()]
    rows.append("| untouched base | " + " | ".join(f"{value:.3f}" for value in bases) + " |")
    for arm in sorted(HEADLINES & {*arms}, key=lambda arm: (arm.startswith("centralised"), arm != "local", arm)):
        runs = [[x for x in lines if x["arm"] == arm] for lines in final.values()]
        rows.append(f"| `{arm}` | " + " | ".join(spread(x, "federated") for x in runs) + " |")
    return "\n".join(rows) + "\n"


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Return one suite's table and its notes."""
    final = [line for line in lines if line["purpose"] == "test"]
    arms = {line["arm"]: [x for x in final if x["arm"] == line["arm"]] for line in final}
    if not arms:
        return ["No run on the test data yet."]
    summary = final[0]["summary"]
    unseen = any(x["summary"]["unseen"] is not None for x in final)
    head = ["method", "learning rate", f"{summary['metric']} (clients)", *(["unseen"] if unseen else []), "seeds"]
    head += ["MB up", "MB down", "server s", "client s"]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    order = sorted(arms, key=lambda arm: (arm in CONTROLS, -mean(arms[arm], "federated")))
    for arm in order:
        runs = arms[arm]
        cells = [arm, f"{runs[0]['learning_rate']:g}{edge(arm, lines)}", spread(runs, "federated")]
        cells += [spread(runs, "unseen")] if unseen else []
        totals = [x["summary"]["totals"] for x in runs]
        cells += [str(len(runs))]
        megabytes = [statistics.mean(t[key] for t in totals) / 1e6 for key in ("bytes_up", "bytes_down")]
        cells += ["–" if arm in CONTROLS else f"{value:.2f}" for value in megabytes]
        cells += [f"{statistics.mean(t[key] for t in totals):.2f}" for key in ("server_seconds", "client_seconds")]
        rows.append("| " + " | ".join(cells) + " |")
    bases = {x["seed"]: x["summary"]["base"] for x in final if x["summary"]["base"] is not None}
    notes = [f"\nUntouched base: {', '.join(f'{value:.3f} (seed {seed})' for seed, value in sorted(bases.items()))}."]
    notes.append(
        "± is half the range over two seeds, which is not a confidence interval: differences of that size mean "
        "nothing. Figures without it come from one seed. "
        "\\* the best rate is at the edge of the grid that was tried; † given, not tuned (see the suite)."
    )
    if "local" in arms:
        alone = mean(arms["local"], "federated")
        losers = [arm for arm in order if arm not in CONTROLS and mean(arms[arm], "federated") <= alone]
        notes.append(f"Not better than local-only: {', '.join(losers) or 'none'}.")
    return [*rows, *notes]


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Return a figure's mean over the seeds."""
    return statistics.mean(run["summary"][key] for run in runs)


def spread(runs: list[dict[str, Any]], key: str) -> str:
    """Return mean ± half the range over the seeds; for one seed only the figure."""
    values = [run["summary"][key] for run in runs if run["summary"][key] is not None]
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}" if values else "–"


def edge(arm: str, lines: list[dict[str, Any]]) -> str:
    """Return a star where the chosen rate is the smallest or largest of those tried, a dagger where none was tried."""
    tried = sorted({line["learning_rate"] for line in lines if line["arm"] == arm and line["purpose"] == "tune"})
    chosen = {line["learning_rate"] for line in lines if line["arm"] == arm and line["purpose"] == "test"}
    if not tried:
        return "†"
    return "\\*" if chosen & {tried[0], tried[-1]} else ""


if __name__ == "__main__":
    main()
