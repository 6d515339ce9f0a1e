"""The papers' claims, each judged by the committed runs: the first tables of CLAIMS.md, which table.py makes.

A row is one claim on one data set under one condition. Its verdict is that of its own 95 % interval; whether it would
stand among all rows of the page is said beside it, by Holm's correction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keep import Line, final_runs

from fedspan.comparison.differences import Difference, Pairs, judge, pair
from fedspan.comparison.suite import POINT, Suite, read

HERE = Path(__file__).parent
SUITES = {
    "claims-digits": "digits",
    "claims-tasks": "tasks",
    "drift": "tasks, SGD on query and value",
    "medquad": "MedQuAD, MiniLM, SGD",
    "medquad-sites": "MedQuAD, MiniLM",
    "fedsvd": "GLUE, MiniLM",
    "rolora": "SST-2, MiniLM, 50 clients",
    "ftg": "Dolly and MedQuAD, SmolLM2",
    "claims-mri": "brain MRI",
    "claims-superni": "Super-NaturalInstructions",
}
CONDITIONS = {
    "base": "as the suite says",
    "dir01": "Dir(0.1)",
    "dir05": "Dir(0.5)",
    "equal": "tasks of their own, equal ranks",
    "heavy_tail": "mixed ranks, heavy tail",
    "sites": "nine institutes, equal ranks",
    "small": "a base a quarter as large",
    "sparse": "50 clients, 10 % a round",
}
CONFIDENCE = 0.95
MARGIN = 1.0  # points
Verdict = Literal["better", "worse", "equivalent", "open"]
Kind = Literal["figure", "unseen", "same traffic", "larger base"]
SMALL = "small"
"""The condition of a suite that repeats another with a smaller base."""


@dataclass(frozen=True)
class Claim:
    """A claim about two arms."""

    key: str
    """Its letter on the page."""
    text: str
    arm: str
    rival: str
    conditions: tuple[str, ...]
    source: str
    kind: Kind = "figure"
    """The suite's figure, that on unseen data, or the rival's when it has sent as much as the arm in its whole run.
    `larger base`: the lead over the rival under the condition, beyond that under `small`."""
    published: str = "–"
    """The difference that the source reports, in points, where we know it."""


@dataclass(frozen=True)
class Row:
    """A claim under one condition of one suite, and its judgement."""

    claim: Claim
    suite: str
    condition: str
    found: Difference

    @property
    def verdict(self) -> Verdict:
        """The verdict of the row's own interval."""
        if self.found.pairs.missing or self.found.interval is None:
            return "open"
        low, high = self.found.interval
        if low > 0 or high < 0:
            return "better" if low > 0 else "worse"
        return "equivalent" if low > -MARGIN * POINT and high < MARGIN * POINT else "open"


GLORA, FTG, OURS = "2605.06733", "2410.23111", "ours"
LABELS = ("dir01", "dir05")
EQUAL = (*LABELS, "equal", "sites")


def _against(
    key: str, text: str, arm: str, rivals: Mapping[str, str], where: tuple[str, ...], source: str
) -> list[Claim]:
    """Return one claim per rival; the mapping holds what the source reports of it."""
    return [Claim(key, text, arm, rival, where, source, published=said) for rival, said in rivals.items()]


CLAIMS = (
    *_against(
        "a",
        "averaging weights beats the rules for adapters",
        "fedavg",
        {"flexlora": "–", "ffa_lora": "–", "fedit": "–"},
        EQUAL,
        FTG,
    ),
    *_against(
        "b",
        "GaLore in the client and averaged weights beat rules for adapters, on text",
        "fedftg",
        {"flexlora": "–", "ffa_lora": "–"},
        ("equal", "sites"),
        FTG,
    ),
    *_against(
        "c",
        "GaLore in the client and averaged weights beat rules for adapters, on images",
        "fedftg",
        {"flexlora": "–", "ffa_lora": "–"},
        LABELS,
        FTG,
    ),
    *_against(
        "d",
        "GLoRA beats the other rules with equal ranks",
        "glora",
        {"fedit": "–", "ffa_lora": "–", "flexlora": "–", "flora": "–", "fedex_lora": "0.6 to 0.9 (GLUE)"},
        (*EQUAL, "base"),
        GLORA,
    ),
    *_against(
        "e",
        "GLoRA beats the other rules with mixed ranks",
        "glora",
        {"flexlora": "–", "ffa_lora": "–", "raflora": "–", "hetlora": "–", "flora": "–"},
        ("heavy_tail",),
        GLORA,
    ),
    *_against(
        "f",
        "GLoRA beats the other rules when few clients take part",
        "glora",
        {"flexlora": "–", "ffa_lora": "–", "fedex_lora": "–", "fedit": "–"},
        ("sparse",),
        GLORA,
    ),
    *(
        Claim(
            "g", "GLoRA carries over to unseen tasks better", "glora", rival, ("equal", "heavy_tail"), GLORA, "unseen"
        )
        for rival in ("flexlora", "fedex_lora", "flora", "raflora")
    ),
    Claim("d", "GLoRA at FlexLoRA's rate beats it", "glora_at_3e-3", "flexlora", ("sites",), OURS),
    *(
        Claim("h", "GLoRA's lead is larger on the larger base", "glora", rival, ("equal",), GLORA, "larger base")
        for rival in ("fedex_lora", "flexlora", "fedit")
    ),
    *(
        Claim("i", "GLoRA is better at the same traffic", "glora", rival, EQUAL, GLORA, "same traffic")
        for rival in ("fedavg", "fedftg", "fedex_lora", "flora")
    ),
    Claim("j", "GLoRA+ beats GLoRA", "glora_plus", "glora", ("dir05", "equal", "heavy_tail", "sparse"), OURS),
    Claim("j", "a balanced readout beats the root one", "glora", "glora_root", ("dir05", "equal", "heavy_tail"), OURS),
    Claim("j", "under SGD an even readout beats `init`", "glora", "glora_init", ("base", "dir01"), OURS),
    Claim("k", "a shared projector is no worse than FedFTG", "shared_galore", "fedftg", EQUAL, OURS),
    Claim(
        "l", "GLoRA from sums is equivalent to GLoRA", "glora_sums", "glora", ("dir05", "equal", "sparse", "base"), OURS
    ),
    *_against(
        "m",
        "FedSVD beats the other rules under SGD",
        "fedsvd",
        {"fedit": "10.7 (GLUE)", "ffa_lora": "1.6 (GLUE)", "fedex_lora": "23.9 (GLUE)", "flora": "29.1 (GLUE)"},
        ("base", "dir01"),
        "2505.12805",
    ),
    *_against(
        "n",
        "RoLoRA beats averaged factors and frozen A",
        "rolora",
        {"fedit": "15.1 (GLUE)", "ffa_lora": "9.3 (GLUE)"},
        ("base",),
        "2502.01755",
    ),
    Claim("o", "FedMomentum beats averaged factors", "fedmomentum", "fedit", ("base",), "2603.08014"),
)


def rows() -> list[Row]:
    """Return every claim that at least two seeds of both arms have something to say about."""
    runs = {name: found for name in SUITES if (found := final_runs(HERE / name))}
    suites = {name: read(HERE / name / "suite.toml") for name in runs}
    every = [
        (claim, name, condition, pairs)
        for claim in CLAIMS
        for name, lines in runs.items()
        for condition in claim.conditions
        if (pairs := paired(lines, suites[name], claim, condition)) is not None
    ]
    judged = judge(
        [pairs for *_, pairs in every],
        margin=MARGIN * POINT,
        confidence=CONFIDENCE,
        higher_is_better=True,
        point=POINT,
    )
    return [Row(*where, one) for (*where, _), one in zip(every, judged, strict=True)]


def paired(lines: Sequence[Line], suite: Suite, claim: Claim, condition: str) -> Pairs | None:
    """Return a claim's differences under a condition, by seed; None for fewer than two."""
    if claim.kind == "larger base":
        return grown(lines, suite, claim, condition)
    own, others = (by_seed(lines, arm, condition) for arm in (claim.arm, claim.rival))
    if not own or not others:
        return None
    figure = FIGURES[claim.kind]
    ours = {seed: figure(line, line, suite) for seed, line in own.items()}
    theirs = {seed: figure(line, own[seed], suite) for seed, line in others.items() if seed in own}
    count = next(iter(own.values()))["unseen_rows" if claim.kind == "unseen" else "rows"]
    if count is None:
        return None
    found = pair(condition, claim.arm, ours, theirs, count)
    return found if len(found.values) > 1 else None


def by_seed(lines: Sequence[Line], arm: str, condition: str) -> dict[int, Line]:
    """Return an arm's runs under a condition."""
    return {x["seed"]: x for x in lines if (x["arm"], x["condition"]) == (arm, condition)}


def grown(lines: Sequence[Line], suite: Suite, claim: Claim, condition: str) -> Pairs | None:
    """Return by how much the arm's lead over its rival is larger under the condition than on the smaller base."""
    leads = []
    for where in (condition, SMALL):
        own, others = (by_seed(lines, arm, where) for arm in (claim.arm, claim.rival))
        both = own.keys() & others.keys()
        figures = {seed: [suites_figure(x[seed], x[seed], suite) for x in (own, others)] for seed in both}
        leads.append({s: None if a is None or b is None else a - b for s, (a, b) in figures.items()})
    if not all(leads):
        return None
    found = pair(condition, claim.arm, *leads, next(iter(by_seed(lines, claim.arm, condition).values()))["rows"])
    return found if len(found.values) > 1 else None


def suites_figure(line: Line, budget: Line, suite: Suite) -> float | None:
    """Return the figure that the suite fixed."""
    value: float | None = line["figures"][suite.figure]
    return value


def unseen(line: Line, budget: Line, suite: Suite) -> float | None:
    """Return the figure on the unseen data."""
    value: float | None = line["unseen"]
    return value


def at_traffic(line: Line, budget: Line, suite: Suite) -> float | None:
    """Return the last figure of the server's state before a run has sent more than another run in all.

    A run that has not been evaluated by then has the figure of the untouched base.
    """
    if line["figures"]["last"] is None:
        return None
    left = budget["bytes_up"] + budget["bytes_down"]
    value: float | None = line["base"]
    for record in line["rounds"]:
        left -= record["bytes_up"] + record["bytes_down"]
        if left < 0:
            break
        if record.get("eval"):
            value = record["eval"][line["metric"]]
    return value


FIGURES: dict[Kind, Callable[[Line, Line, Suite], float | None]] = {
    "figure": suites_figure,
    "unseen": unseen,
    "same traffic": at_traffic,
}


def table(found: Sequence[Row]) -> list[str]:
    """Return the table of all rows."""
    head = ["", "claim", "source", "rival", "data", "condition", "points", "verdict", "corrected", "seeds", "published"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in found:
        claim = row.claim
        what = claim.text + ("" if claim.kind != "unseen" else " (unseen data)")
        cells = [claim.key, what, claim.source, f"`{claim.rival}`", SUITES[row.suite], CONDITIONS[row.condition]]
        lines.append("| " + " | ".join([*cells, *judgement(row), claim.published]) + " |")
    return lines


def judgement(row: Row) -> list[str]:
    """Return the cells of a difference: points with half their interval, verdict, correction, seeds."""
    found = row.found
    assert found.interval is not None
    half = (found.interval[1] - found.interval[0]) / 2
    verdict = row.verdict if row.verdict == "open" else f"**{row.verdict}**"
    stands = "stands" if row.verdict == found.verdict != "open" else "open"
    points = f"{found.pairs.mean / POINT:+.1f} ± {half / POINT:.1f}"
    return [points, verdict, stands, str(len(found.pairs.values))]


def summary(found: Sequence[Row]) -> list[str]:
    """Return how many rows of each claim have which verdict."""
    order: tuple[Verdict, ...] = ("better", "equivalent", "worse", "open")
    lines = ["| | claim | " + " | ".join(order) + " |", "|" + " --- |" * (len(order) + 2)]
    for key, text in sorted({(row.claim.key, row.claim.text) for row in found}):
        own = [row.verdict for row in found if (row.claim.key, row.claim.text) == (key, text)]
        lines.append(f"| {key} | {text} | " + " | ".join(str(own.count(one) or "–") for one in order) + " |")
    total = [sum(row.verdict == one for row in found) for one in order]
    return [*lines, "| | all rows | " + " | ".join(str(one or "–") for one in total) + " |"]


def decided(found: Sequence[Row]) -> str:
    """Return the sentence that counts the decided rows."""
    count = sum(row.verdict != "open" for row in found)
    stands = sum(row.verdict == row.found.verdict != "open" for row in found)
    return f"{count} of {len(found)} rows are decided, {stands} of them after the correction for all rows."
