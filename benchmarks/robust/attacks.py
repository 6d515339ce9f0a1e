"""Every attack against every filter: the distance of the aggregate from that of the honest clients.

    python benchmarks/robust/attacks.py [--out benchmarks/robust/results.jsonl] [--runs]

One line for each attack, method and filter; the table is written to `docs/robust.md`. With --runs also five whole runs
on the digits, in which two of seven sites have flipped labels (a minute or two); otherwise their lines are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from fedspan import config as settings
from fedspan.methods import METHODS
from fedspan.robust import Filter, refusal, screen

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "robust"))  # the attacks are those of the tests

attacks, flipped = import_module("attacks"), import_module("flipped")

TRIED = ("fedit", "flexlora", "glora", "ffa_lora", "fedavg")
FILTERS: tuple[Filter | Literal["none"], ...] = (
    "none",
    "krum",
    "multi_krum",
    "geometric_median",
    "median",
    "trimmed_mean",
)
NUM, BAD = 9, (1, 5)
PAGE = ROOT / "docs" / "robust.md"
RUNS = (("none", 0), ("none", 2), ("krum", 2), ("multi_krum", 2), ("geometric_median", 2))


def figures() -> Iterator[dict[str, Any]]:
    """Yield the relative distance of the aggregate of all clients from that of the honest ones, for each attack."""
    for name in TRIED:
        method = METHODS[name]()
        stage, early = (attacks.stage(method, NUM, seed=1, rounds=r) for r in (2, 0))
        centre = stage.delivered([u for k, u in enumerate(stage.updates) if k not in BAD])
        tried = {
            "nobody": attacks.scaled(1.0),
            **attacks.ATTACKS,
            "stale": attacks.stale(early),
            "sign flip, 1e9 examples": attacks.claiming(attacks.scaled(-1.0), 1e9),
        }
        for attack, act in tried.items():
            updates = attacks.mixed(stage, BAD, act)
            for kind in FILTERS:
                line: dict[str, Any] = {"attack": attack, "method": name, "filter": kind, "error": None}
                if refusal(method, kind, False, False) is None:
                    robust = {"filter": kind, "attackers": len(BAD)}
                    screened = screen(settings.from_mapping({"robust": robust}).robust, method)
                    kept = updates if screened is None else screened(updates, stage.sent).updates
                    line["error"] = attacks.distance(stage.delivered(kept), centre)
                yield line


def runs() -> Iterator[dict[str, Any]]:
    """Yield the final accuracy of GLoRA on the digits when the bad sites train on label y + 1 instead of y."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, bad in RUNS:
            options = {"attackers": bad} if kind != "none" else {}
            accuracy = flipped.accuracy(Path(folder), "glora", kind, bad, **options)
            yield {"attack": "label flip", "method": "glora", "filter": kind, "bad": bad, "accuracy": accuracy}


def short(error: float | None) -> str:
    if error is None:
        return "refused"
    return "< 1e-6" if error < 1e-6 else f"{error:.2g}" if error < 1000 else f"{error:.0f}"


def table(lines: list[Mapping[str, Any]]) -> str:
    """Return a table with one row for each attack and method, one column for each filter."""
    measured = [line for line in lines if "error" in line]
    cells = {(x["attack"], x["method"], x["filter"]): short(x["error"]) for x in measured}
    rows = ["| attack | method | " + " | ".join(FILTERS) + " |", "|---" * (2 + len(FILTERS)) + "|"]
    for attack in dict.fromkeys(x["attack"] for x in measured):
        for name in TRIED:
            rows.append(f"| {attack} | {name} | " + " | ".join(cells[attack, name, kind] for kind in FILTERS) + " |")
    rows += ["", "| digits, labels flipped at | filter | final accuracy |", "|---|---|---|"]
    rows += [f"| {x['bad']} of 7 | {x['filter']} | {x['accuracy']:.3f} |" for x in lines if "accuracy" in x]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--runs", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    old = [json.loads(x) for x in options.out.read_text().splitlines()] if options.out.exists() else []
    lines = [*figures(), *(runs() if options.runs else [x for x in old if "accuracy" in x])]
    options.out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    before, _, rest = PAGE.read_text().partition("<!-- attacks -->\n")
    _, _, after = rest.partition("<!-- end -->")
    PAGE.write_text(f"{before}<!-- attacks -->\n{table(lines)}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
