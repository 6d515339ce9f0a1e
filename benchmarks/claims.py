"""The papers' claims and whether the committed runs reproduce them: the tables of CLAIMS.md, made by table.py.

A claim that one method beats another is judged for each condition by the mean of the paired differences (same seed,
split, schedule and base) with a 95 % interval (Student's t over the seeds). A claim about the algebra is judged by the
diagnostics in the runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run import read

HERE = Path(__file__).parent
SUITES = {
    "claims-digits": "handwritten digits, accuracy",
    "claims-tasks": "embedded instruction tasks, exact match",
    "claims-mri": "brain-MRI images, accuracy",
    "claims-superni": "Super-NaturalInstructions, ROUGE-L",
}
CONDITIONS = {
    "dir01": "label skew Dir(0.1), equal ranks",
    "dir05": "label skew Dir(0.5), equal ranks",
    "equal": "one task per client, equal ranks",
    "heavy_tail": "mixed ranks, heavy tail",
    "sparse": "50 clients, 10 % take part",
}
T975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t by the number of pairs."""

FINEST = 0.01
"""Half the narrowest interval: about the sampling error of a few hundred test examples, which all seeds share."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Better:
    """A claim that `arm` does better than `rival` under these conditions."""

    text: str
    source: str
    arm: str
    rival: str
    conditions: tuple[str, ...]
    figure: str = "federated"


GLORA, FTG, OURS = "GLoRA (2605.06733)", "FedFTG (2410.23111)", "ours"
SKEW, EQUAL = ("dir01", "dir05"), ("dir01", "dir05", "equal")
BETTER = (
    Better("GLoRA beats FedEx-LoRA under label skew", GLORA, "glora", "fedex_lora", EQUAL),
    Better("GLoRA beats FlexLoRA under label skew", GLORA, "glora", "flexlora", EQUAL),
    Better("GLoRA beats FlexLoRA with mixed ranks", GLORA, "glora", "flexlora", ("heavy_tail",)),
    Better("GLoRA beats raFLoRA with mixed ranks", GLORA, "glora", "raflora", ("heavy_tail",)),
    Better("GLoRA beats FlexLoRA when few clients take part", GLORA, "glora", "flexlora", ("sparse",)),
    Better("GLoRA beats FedEx-LoRA when few clients take part", GLORA, "glora", "fedex_lora", ("sparse",)),
    Better(
        "GLoRA carries over to unseen tasks better than FlexLoRA",
        GLORA,
        "glora",
        "flexlora",
        tuple(CONDITIONS),
        "unseen",
    ),
    Better("GaLore and averaged weights beat FlexLoRA", FTG, "fedftg", "flexlora", EQUAL),
    Better("GaLore and averaged weights beat FFA-LoRA", FTG, "fedftg", "ffa_lora", EQUAL),
    Better("FFA-LoRA falls behind FlexLoRA, which trains both factors", FTG, "flexlora", "ffa_lora", EQUAL),
    Better("GLoRA+ beats GLoRA with mixed ranks", OURS, "glora_plus", "glora", ("heavy_tail",)),
    Better("GLoRA+ beats GLoRA when few clients take part", OURS, "glora_plus", "glora", ("sparse",)),
    Better("GLoRA+ beats FlexLoRA", OURS, "glora_plus", "flexlora", tuple(CONDITIONS)),
    Better("a balanced readout beats the root one", OURS, "glora", "glora_root", tuple(CONDITIONS)),
    Better(
        "a shared projector beats FedFTG with a quarter of the uploaded bytes",
        OURS,
        "shared_galore",
        "fedftg",
        tuple(CONDITIONS),
    ),
)


@dataclass(frozen=True)
class Measured:
    """A claim about the algebra: a figure of every run of some arms, and the values that support the claim."""

    text: str
    source: str
    arms: tuple[str, ...]
    figure: Callable[[Line], float | None]
    holds: Callable[[float], bool]
    shown: str
    """The figure's description."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)


def largest(name: str) -> Callable[[Line], float | None]:
    """Return a function to a diagnostic's largest value over a run's rounds."""
    return lambda line: max(values(line, name), default=None)


def mean(name: str) -> Callable[[Line], float | None]:
    """Return a function to a diagnostic's mean over a run's rounds."""
    return lambda line: statistics.mean(found) if (found := values(line, name)) else None


def growth(name: str) -> Callable[[Line], float | None]:
    """Return a function to a diagnostic's last value divided by its first."""
    return lambda line: found[-1] / found[0] if len(found := values(line, name)) > 1 and found[0] > 0 else None


def smallest_rank_loss(line: Line) -> float | None:
    """Return the share of the ideal update that the smallest rank's readout leaves out, mean over the rounds."""
    found = [r["diagnostics"]["readout_loss"] for r in line["rounds"] if r.get("diagnostics", {}).get("readout_loss")]
    return statistics.mean(losses[min(losses, key=int)] for losses in found) if found else None


def values(line: Line, name: str) -> list[float]:
    """Return a diagnostic's values in the rounds that have it."""
    return [x for r in line["rounds"] if (x := r.get("diagnostics", {}).get(name)) is not None]


MEASURED = (
    Measured(
        "Proposition 2: GLoRA does not depend on the clients' gauges",
        GLORA,
        ("glora", "glora_plus"),
        largest("gauge_sensitivity"),
        lambda x: x < 1e-3,
        "largest relative change when every client is re-factored",
    ),
    Measured(
        "averaging the factors depends on them",
        GLORA,
        ("fedit",),
        mean("gauge_sensitivity"),
        lambda x: x > 0.01,
        "the same, mean over the rounds",
    ),
    Measured(
        "averaged factors are not the average update: cross terms",
        GLORA,
        ("fedit",),
        mean("distance_from_ideal"),
        lambda x: x > 0.01,
        "‖B̄Ā − T‖/‖T‖, mean over the rounds",
    ),
    Measured(
        "FlexLoRA loses what it truncates",
        FTG,
        ("flexlora",),
        smallest_rank_loss,
        lambda x: x > 0.01,
        "(Σ_{j>r} σ_j²)^½/‖T‖ at the smallest rank, mean over the rounds",
    ),
    Measured(
        "FFA-LoRA stays in the row space of its first A",
        FTG,
        ("ffa_lora",),
        largest("first_a_escape"),
        lambda x: x < 1e-3,
        "energy outside this space, largest over the rounds",
    ),
    Measured(
        "FlexLoRA leaves it",
        FTG,
        ("flexlora",),
        largest("first_a_escape"),
        lambda x: x > 0.01,
        "energy outside this space, largest over the rounds",
    ),
    Measured(
        "the rank of GaLore's accumulated update grows with the rounds",
        FTG,
        ("fedftg", "shared_galore"),
        growth("effective_rank"),
        lambda x: x > 1.1,
        "effective rank, last round over first",
    ),
    Measured(
        "under mixed ranks FlexLoRA's rank collapses",
        "raFLoRA (2602.13486)",
        ("flexlora",),
        growth("effective_rank"),
        lambda x: x < 0.9,
        "effective rank, last round over first",
        ("heavy_tail",),
    ),
    Measured(
        "averaged weights are exact",
        FTG,
        ("fedftg", "shared_galore"),
        largest("distance_from_ideal"),
        lambda x: x < 1e-3,
        "distance of the broadcast from the mean, largest over the rounds",
    ),
)


def main() -> str:
    """Return the page CLAIMS.md."""
    lines = {suite: [x for x in read(HERE / suite / "results.jsonl") if x["purpose"] == "test"] for suite in SUITES}
    lines = {suite: found for suite, found in lines.items() if found}
    parts = ["# Reproduction of the papers' claims", "", *PREFACE]
    parts += ["", "## Claims that one method beats another", "", *better(lines)]
    parts += ["", "## Claims about the algebra", "", *measured(lines)]
    parts += ["", "## The underlying figures", ""]
    for suite, found in lines.items():
        parts += [f"### {SUITES[suite]}", "", *figures(found, "federated"), ""]
        if any(x["summary"]["unseen"] is not None for x in found):
            parts += ["Unseen (other images of the same classes; tasks that no client trained on):", ""]
            parts += [*figures(found, "unseen"), ""]
    return "\n".join(parts)


PREFACE = [
    "Made by `python benchmarks/table.py` from `claims-*/results.jsonl`. The difference is the mean over the seeds of",
    "the paired differences, with a 95 % interval by Student's t: **yes** or **no** where it excludes 0, *open* where",
    "it does not. No interval is narrower than ± 0.01, which a few hundred test examples cannot resolve. Three to five",
    "seeds on bases of about a million parameters can support or contradict a claim here; they cannot settle it for",
    "large models. Nothing is left out.",
]


def paired(lines: Sequence[Line], claim: Better, condition: str) -> tuple[float, float, int] | None:
    """Return (mean difference, half the interval, number of seeds) of a claim under a condition."""
    runs = {
        arm: {x["seed"]: x["summary"][claim.figure] for x in lines if (x["arm"], x["condition"]) == (arm, condition)}
        for arm in (claim.arm, claim.rival)
    }
    seeds = sorted(runs[claim.arm].keys() & runs[claim.rival].keys())
    pairs = [(runs[claim.arm][s], runs[claim.rival][s]) for s in seeds]
    gaps = [x - y for x, y in pairs if x is not None and y is not None]
    if len(gaps) < 2:
        return None
    half = max(FINEST, T975[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5)
    return statistics.mean(gaps), half, len(gaps)


def verdict(gap: float, half: float) -> str:
    """Return the answer in the table: yes or no if the interval excludes 0, else open."""
    return "*open*" if abs(gap) <= half else "**yes**" if gap > 0 else "**no**"


def better(lines: dict[str, list[Line]]) -> list[str]:
    """Return one row for every claim, suite and condition with runs."""
    rows = ["| claim | source | data | condition | difference | seeds | reproduced |", "|" + " --- |" * 7]
    for claim in BETTER:
        for suite, found in lines.items():
            for condition in claim.conditions:
                result = paired(found, claim, condition)
                if result is not None:
                    gap, half, count = result
                    cells = [claim.text, claim.source, SUITES[suite].split(",")[0], CONDITIONS[condition]]
                    cells += [f"{gap:+.3f} ± {half:.3f}", str(count), verdict(gap, half)]
                    rows.append("| " + " | ".join(cells) + " |")
    return rows


def measured(lines: dict[str, list[Line]]) -> list[str]:
    """Return one row for every claim about the algebra."""
    rows = [
        "| claim | source | figure | smallest, median, largest over the runs | runs | reproduced |",
        "|" + " --- |" * 6,
    ]
    for claim in MEASURED:
        chosen = [
            x
            for found in lines.values()
            for x in found
            if x["arm"] in claim.arms and x["condition"] in claim.conditions
        ]
        got = [value for x in chosen if (value := claim.figure(x)) is not None]
        if not got:
            continue
        share = sum(map(claim.holds, got)) / len(got)
        answer = "**yes**" if share == 1 else "**no**" if share == 0 else f"in {share:.0%} of the runs"
        spread = ", ".join(f"{value:.2g}" for value in (min(got), statistics.median(got), max(got)))
        rows.append(f"| {claim.text} | {claim.source} | {claim.shown} | {spread} | {len(got)} | {answer} |")
    return rows


def figures(lines: Sequence[Line], figure: str) -> list[str]:
    """Return a table of arms by conditions: mean ± standard deviation over the seeds (number of seeds)."""
    conditions = [c for c in CONDITIONS if any(x["condition"] == c for x in lines)]
    arms = list(dict.fromkeys(x["arm"] for x in lines))
    rows = ["| | " + " | ".join(CONDITIONS[c] for c in conditions) + " | MB up | MB down |"]
    rows.append("|" + " --- |" * (len(conditions) + 3))
    bases = [statistics.mean(x["summary"]["base"] for x in lines if x["condition"] == c) for c in conditions]
    if figure == "federated":
        rows.append("| untouched base | " + " | ".join(f"{value:.3f}" for value in bases) + " | | |")
    for arm in arms:
        cells = []
        for condition in conditions:
            got = [x["summary"][figure] for x in lines if (x["arm"], x["condition"]) == (arm, condition)]
            got = [value for value in got if value is not None]
            spread = f" ± {statistics.stdev(got):.3f}" if len(got) > 1 else ""
            cells.append(f"{statistics.mean(got):.3f}{spread} ({len(got)})" if got else "–")
        totals = [x["summary"]["totals"] for x in lines if (x["arm"], x["condition"]) == (arm, conditions[0])]
        cells += [
            f"{statistics.mean(t[k] for t in totals) / 1e6:.1f}" if totals else "–" for k in ("bytes_up", "bytes_down")
        ]
        rows.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return rows
