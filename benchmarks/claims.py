"""The papers' claims and whether the committed runs reproduce them: the tables of CLAIMS.md, made by table.py.

A claim that one method beats another is judged for each condition as `fedspan compare` judges a difference: paired by
seed, corrected for the number of all such claims. A claim about the algebra is judged by the diagnostics in the runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keep import Line, final_runs

from fedspan.comparison.differences import Difference, Pairs, judge, pair
from fedspan.comparison.results import deviation
from fedspan.comparison.results import mean as mean_of
from fedspan.comparison.suite import POINT

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
CONFIDENCE = 0.95
VERDICTS = {"better": "**yes**", "worse": "**no**", "equivalent": "*no difference*", "open": "*open*"}


@dataclass(frozen=True)
class Better:
    """A claim that `arm` does better than `rival` under these conditions."""

    text: str
    source: str
    arm: str
    rival: str
    conditions: tuple[str, ...]
    unseen: bool = False
    """Judged by the unseen data, not by what the clients ended with on the test data."""


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
        True,
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
    return lambda line: mean_of(values(line, name))


def growth(name: str) -> Callable[[Line], float | None]:
    """Return a function to a diagnostic's last value divided by its first."""
    return lambda line: found[-1] / found[0] if len(found := values(line, name)) > 1 and found[0] > 0 else None


def smallest_rank_loss(line: Line) -> float | None:
    """Return the share of the ideal update that the smallest rank's readout leaves out, mean over the rounds."""
    found = [r["diagnostics"]["readout_loss"] for r in line["rounds"] if r.get("diagnostics", {}).get("readout_loss")]
    return mean_of([losses[min(losses, key=int)] for losses in found])


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


def page() -> str:
    """Return the page CLAIMS.md."""
    lines = {suite: found for suite in SUITES if (found := final_runs(HERE / suite))}
    parts = ["# Reproduction of the papers' claims", "", *PREFACE]
    parts += ["", "## Claims that one method beats another", "", *better(lines)]
    parts += ["", "## Claims about the algebra", "", *measured(lines)]
    parts += ["", "## The underlying figures", ""]
    for suite, found in lines.items():
        parts += [f"### {SUITES[suite]}", "", *figures(found, False), ""]
        if any(x["unseen"] is not None for x in found):
            parts += ["Unseen (other images of the same classes; tasks that no client trained on):", ""]
            parts += [*figures(found, True), ""]
    return "\n".join(parts)


PREFACE = [
    "Made by `python benchmarks/table.py` from `claims-*/runs.jsonl`. The difference is the mean over the seeds of the",
    "paired differences ± half its 95 % interval (Student's t), as `fedspan compare` computes them; p is that of the",
    "paired t-test, by Holm's correction for all rows of the table. **yes** or **no** where p is below 0.05, *no",
    "difference* where the two are shown to be equal within a point, *open* otherwise. Three to five seeds on bases",
    "of about a million parameters can support or contradict a claim here; they cannot settle it for large models.",
    "Nothing is left out.",
    "",
    "The figures on the digits flatter every method: its learning rate was chosen on the test rows",
    "([README.md](README.md)). Those on the tasks have one rate for all, which was chosen with test rows in view.",
]


def better(lines: dict[str, list[Line]]) -> list[str]:
    """Return one row for every claim, suite and condition with two runs or more of both methods."""
    rows = ["| claim | source | data | condition | difference | p | seeds | reproduced |", "|" + " --- |" * 8]
    every = [
        (claim, suite, condition, pairs)
        for claim in BETTER
        for suite, found in lines.items()
        for condition in claim.conditions
        if (pairs := paired(found, claim, condition)) is not None
    ]
    family = [pairs for *_, pairs in every]
    judged = judge(family, margin=POINT, confidence=CONFIDENCE, higher_is_better=True, point=POINT)
    for (claim, suite, condition, _), one in zip(every, judged, strict=True):
        where = [claim.text, claim.source, SUITES[suite].split(",")[0], CONDITIONS[condition]]
        rows.append("| " + " | ".join([*where, *judgement(one)]) + " |")
    return rows


def paired(lines: Sequence[Line], claim: Better, condition: str) -> Pairs | None:
    """Return the differences of a claim under a condition, by seed; None for fewer than two."""
    runs = {
        arm: {x["seed"]: value(x, claim.unseen) for x in lines if (x["arm"], x["condition"]) == (arm, condition)}
        for arm in (claim.arm, claim.rival)
    }
    rows = next((x["unseen_rows" if claim.unseen else "rows"] for x in lines if x["condition"] == condition), None)
    if rows is None:
        return None
    found = pair(condition, claim.arm, runs[claim.arm], runs[claim.rival], rows)
    return found if len(found.values) > 1 else None


def judgement(one: Difference) -> list[str]:
    """Return the cells of a difference of at least two seeds."""
    assert one.interval is not None
    assert one.p_adjusted is not None
    half = (one.interval[1] - one.interval[0]) / 2
    p = "< 0.001" if one.p_adjusted < 0.001 else f"{one.p_adjusted:.3f}"
    return [f"{one.pairs.mean:+.3f} ± {half:.3f}", p, str(len(one.pairs.values)), VERDICTS[one.verdict]]


def value(line: Line, unseen: bool) -> float | None:
    """Return a run's figure on the unseen data, or what its clients ended with; None where it has none."""
    figure: float | None = line["unseen"] if unseen else line["figures"]["last"]
    return figure


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


def figures(lines: Sequence[Line], unseen: bool) -> list[str]:
    """Return a table of arms by conditions: mean ± standard deviation over the seeds (number of seeds)."""
    conditions = [c for c in CONDITIONS if any(x["condition"] == c for x in lines)]
    rows = ["| | " + " | ".join(CONDITIONS[c] for c in conditions) + " | MB up | MB down |"]
    rows.append("|" + " --- |" * (len(conditions) + 3))
    if not unseen:
        bases = [
            mean_of([x["base"] for x in lines if x["condition"] == c and x["base"] is not None]) for c in conditions
        ]
        rows.append("| untouched base | " + " | ".join("–" if x is None else f"{x:.3f}" for x in bases) + " | | |")
    for arm in dict.fromkeys(x["arm"] for x in lines):
        own = [[x for x in lines if (x["arm"], x["condition"]) == (arm, c)] for c in conditions]
        cells = [cell([y for x in runs if (y := value(x, unseen)) is not None]) for runs in own]
        for key in ("bytes_up", "bytes_down"):
            traffic = mean_of([x[key] for x in own[0]])
            cells.append("–" if traffic is None else f"{traffic / 1e6:.1f}")
        rows.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return rows


def cell(values: Sequence[float]) -> str:
    """Return mean ± standard deviation (number of seeds)."""
    if not values:
        return "–"
    spread = "" if len(values) < 2 else f" ± {deviation(values):.3f}"
    return f"{mean_of(values):.3f}{spread} ({len(values)})"
