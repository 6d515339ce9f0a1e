"""Keep the runs of a finished comparison with the project: python benchmarks/keep.py runs/NAME benchmarks/NAME

Each line of the comparison's `runs.jsonl` is written to the suite's folder with what CLAIMS.md needs of
its run folder: the rounds with their diagnostics, the times of server and clients, and the number of unseen rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedspan.comparison.run_lines import FILE

Line = dict[str, Any]
OF_A_ROUND = ("round_num", "train_loss", "eval", "bytes_up", "bytes_down")
"""The fields that a line keeps of every round's record."""
DIAGNOSED = 4
"""Every how many rounds a line keeps the diagnostics, besides the first and the last."""
IDENTITY = ("stage", "condition", "arm", "seed", "settings", "config_digest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path, help="folder of a finished comparison")
    parser.add_argument("suite", type=Path, help="folder of its suite")
    arguments = parser.parse_args()
    print(f"{keep(arguments.comparison, arguments.suite)} lines in {arguments.suite / FILE}")


def keep(comparison: Path, suite: Path) -> int:
    """Write the lines of a comparison to its suite's folder, and return their number.

    Raises
    ------
    SystemExit
        When lines are there already that are not of this comparison: two protocols must not be mixed, and committed
        lines are not replaced by others unnoticed.
    """
    lines = [with_its_run(line, comparison / line["folder"]) for line in read(comparison / FILE)]
    lost = {identity(line) for line in read(suite / FILE)} - {identity(line) for line in lines}
    if lost:
        raise SystemExit(
            f"{suite / FILE} holds {len(lost)} runs that {comparison} does not: expected the same comparison, perhaps "
            "extended; remove the file to replace it"
        )
    (suite / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def identity(line: Line) -> str:
    """Return what tells a run and its settings from others."""
    return json.dumps([line[key] for key in IDENTITY], sort_keys=True)


def with_its_run(line: Line, run: Path) -> Line:
    """Return a line with what is kept of its run folder."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        **line,
        "unseen_rows": summary["data"]["rows"].get("unseen"),
        **{key: summary["totals"][key] for key in ("server_seconds", "client_seconds")},
        "rounds": kept_rounds(read(run / "metrics.jsonl")),
    }


def kept_rounds(records: list[Line]) -> list[Line]:
    """Return what is kept of a run's rounds."""
    last = len(records) - 1
    return [brief(one, diagnosed=i in (0, last) or (i + 1) % DIAGNOSED == 0) for i, one in enumerate(records)]


def brief(record: Line, *, diagnosed: bool) -> Line:
    """Return the kept fields of a round's record, diagnostics with four digits."""
    kept = {key: record[key] for key in OF_A_ROUND if key in record}
    if not diagnosed:
        return kept
    figures = {key: digits(value) for key, value in (record.get("diagnostics") or {}).items() if key != "worst"}
    return {**kept, "diagnostics": figures} if figures else kept


def digits(value: Any) -> Any:
    """Round numbers to four significant digits, in mappings too."""
    if isinstance(value, dict):
        return {key: digits(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read(path: Path) -> list[Line]:
    """Return the lines of a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def final_runs(suite: Path) -> list[Line]:
    """Return the kept runs of a suite on the test data, each with the figure of its untouched base.

    A comparison measures this once for all runs of one seed, base and data.
    """
    lines = [line for line in read(suite / FILE) if line["stage"] == "final"]
    bases = {(x["seed"], x["base_key"]): x["base"] for x in lines if x["base"] is not None}
    return [{**x, "base": bases.get((x["seed"], x["base_key"])) if x["base"] is None else x["base"]} for x in lines]


if __name__ == "__main__":
    main()
