"""results.jsonl -> table.md: every figure and ratio is computed from the measurements in the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.bench.harness import duration

Record = Mapping[str, Any]
Value = Callable[[Record], float | None]


@dataclass(frozen=True, slots=True)
class Detail:
    """A figure other than the time, with a table of its own."""

    key: str
    """Name in a measurement's details."""
    title: str
    unit: str
    """`s`, `bytes`, or empty for a plain number."""
    compare: bool = False
    """True where ratios to the baseline are shown."""


@dataclass(frozen=True, slots=True)
class SectionFormat:
    """Title, baselines and further tables of a suite's section."""

    title: str
    baselines: tuple[str, ...]
    """Arms that ratios refer to: the first of them that was measured in the case."""
    details: tuple[Detail, ...] = ()


SECTIONS: Mapping[str, SectionFormat] = {
    "server": SectionFormat(
        "Server: one step over K clients' factors of one d×d layer",
        ("dense_svd",),
        (
            Detail("distance", "Relative distance from the result that it should equal", ""),
            Detail(
                "excess", "Share by which the distance of the rank-r product from the mean exceeds the best one's", ""
            ),
        ),
    ),
    "clients": SectionFormat(
        "Clients: seconds per client-step",
        ("sequential x2", "sequential"),
        (Detail("distance", "Largest relative difference of a client's training loss from the sequential one", ""),),
    ),
    "rounds": SectionFormat(
        "Rounds: a whole experiment, start-up included",
        ("flower x2", "flower x1", "plain loop x2", "fedspan sequential x1"),
        (
            Detail("rounds_seconds", "The rounds alone, without start-up", "s", True),
            Detail("round_seconds", "The median round", "s", True),
            Detail("peak_rss_bytes", "Peak memory of all processes", "bytes"),
            Detail("train_loss", "Loss of the final adapter on all training data", ""),
            Detail(
                "distance",
                "Difference of that loss from the first column's, as a share of the improvement by training",
                "",
            ),
        ),
    ),
    "scaling": SectionFormat(
        "Scaling: a server step as clients and layers grow",
        ("flexlora held",),
        (
            Detail("peak_bytes", "Peak memory of the step, its updates included", "bytes"),
            Detail("distance", "Relative distance of the streamed product from the held one", ""),
        ),
    ),
    "galore": SectionFormat(
        "GaLore: an optimizer step on one m×n weight, and a refresh of its projector",
        ("adamw", "exact"),
        (
            Detail("state_bytes", "Bytes of the optimizer's state", "bytes", True),
            Detail("energy", "Share of the gradient's energy that the projector keeps", ""),
        ),
    ),
}


def render(records: Sequence[Record]) -> str:
    """Return all measurements as Markdown: one part per machine and choice of sizes, one section per suite."""
    parts: list[str] = ["# fedspan bench"]
    for setting in _settings(records):
        group = [r for r in records if _setting(r) == setting]
        parts.append(f"{machine_line(group[-1]['machine'])}{' Quick sizes.' if group[-1]['quick'] else ''}")
        parts.append(
            "A cell is the median time; in brackets, how many times faster it is than the column marked (1×). `~` "
            "marks a case during which the machine was busy (its calibration drifted by more than 15 %), `≠` an arm "
            "whose result differs from the one that it should equal."
        )
        for suite, section in SECTIONS.items():
            own = latest([r for r in group if r["suite"] == suite])
            if own:
                parts += _section(section, own)
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return a machine's description in one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['device']}, "
        f"{machine['threads']} thread(s) per process; {machine['bandwidth'] / 1e9:.1f} GB/s read, "
        f"{machine['gemm'] / 1e9:.0f} GFLOP/s {machine['dtype']}; torch {machine['torch']}, Python {machine['python']}."
    )


def latest(records: Sequence[Record]) -> list[Record]:
    """Return the newest record of every measurement, in the order of the first ones."""
    newest: dict[str, Record] = {}
    for record in records:
        newest[f"{record['case']}/{record['arm']}"] = record
    return list(newest.values())


def ratio(record: Record, case: Sequence[Record], baselines: Sequence[str], value: Value) -> float | None:
    """Return the baseline's figure divided by the arm's in the same case; none without a baseline."""
    named = {r["arm"]: value(r) for r in case}
    base = next((named[name] for name in baselines if named.get(name) is not None), None)
    own = value(record)
    return base / own if base is not None and own else None


def _setting(record: Record) -> tuple[Any, ...]:
    m = record["machine"]
    return (record["quick"], *(m[name] for name in ("cpu", "cores", "device", "threads", "dtype", "torch")))


def _settings(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(_setting(record) for record in records))


def _section(section: SectionFormat, records: Sequence[Record]) -> list[str]:
    parts = [f"## {section.title}"]
    for phase in dict.fromkeys(r["case"].get("phase", "") for r in records):
        parts += [f"### {phase}"] if phase else []
        parts += _phase(section, [r for r in records if r["case"].get("phase", "") == phase])
    return parts


def _phase(section: SectionFormat, records: Sequence[Record]) -> list[str]:
    parts = []
    if any(r["median"] is not None for r in records):
        parts.append(_pivot(records, lambda r: r["median"], "s", section.baselines, floor=True))
    for detail in section.details:
        having = [r for r in records if detail.key in r.get("details", {})]
        if having:
            baselines = section.baselines if detail.compare else ()
            parts += [f"{detail.title}:", _pivot(having, _value_of(detail.key), detail.unit, baselines, floor=False)]
    return parts + _skipped(records)


def _skipped(records: Sequence[Record]) -> list[str]:
    lines = [f"- {_case(r)}, {r['arm']}: {r['skipped']}" for r in records if r.get("skipped")]
    return ["Skipped:", "\n".join(lines)] if lines else []


def _value_of(key: str) -> Value:
    return lambda record: record["details"].get(key)


def _case(record: Record) -> str:
    return " ".join(f"{name}={value}" for name, value in record["case"].items() if name != "phase")


def _pivot(records: Sequence[Record], value: Value, unit: str, baselines: Sequence[str], *, floor: bool) -> str:
    """Return a table with one row per case and one column per arm."""
    arms = list(dict.fromkeys(r["arm"] for r in records if value(r) is not None))
    floor = floor and any("floor_seconds" in r for r in records)
    head = ["case", *arms, *(["floor"] if floor else [])]
    rows = [head, ["---"] * len(head)]
    for name, case in _by_case(records).items():
        cells = {r["arm"]: _cell(r, ratio(r, case, baselines, value), value, unit) for r in case}
        rows.append([name, *(cells.get(arm, "") for arm in arms), *([_floor_cell(case)] if floor else [])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(_case(record), []).append(record)
    return cases


def _floor_cell(case: Sequence[Record]) -> str:
    return next((duration(r["floor_seconds"]) for r in case if "floor_seconds" in r), "")


def _cell(record: Record, times: float | None, value: Value, unit: str) -> str:
    number = value(record)
    if number is None:
        return "–"
    text = duration(number) if unit == "s" else _size(number) if unit == "bytes" else f"{number:.3g}"
    busy = "~" if unit == "s" and not record.get("reliable", True) else ""
    other = "≠" if record.get("details", {}).get("agrees") is False else ""
    return f"{busy}{other}{text}" + (f" ({times:.3g}×)" if times is not None else "")


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
