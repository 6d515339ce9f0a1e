"""results.jsonl -> table.md: every figure and every ratio is computed from the measurements in the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.bench.harness import duration

Record = Mapping[str, Any]
Value = Callable[[Record], float | None]


@dataclass(frozen=True, slots=True)
class Figure:
    """Something that a suite's tables show beside the times."""

    key: str
    """Its name among a measurement's details."""
    title: str
    unit: str
    """`s`, `bytes` or none."""
    compare: bool = False
    """Show ratios to the baseline."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a suite is shown."""

    title: str
    baselines: tuple[str, ...]
    """What ratios are taken to: the first of these arms that was measured in the case."""
    figures: tuple[Figure, ...] = ()


LAYOUTS: Mapping[str, Layout] = {
    "server": Layout(
        "Server: one step over K clients' factors of one d×d layer",
        ("dense_svd",),
        (
            Figure("distance", "Relative distance from what it should be the same as", ""),
            Figure("excess", "By how much the product of rank r misses the mean more than the best one", ""),
        ),
    ),
    "clients": Layout(
        "Clients: seconds per client-step",
        ("sequential x2", "sequential"),
        (Figure("distance", "Largest relative difference of a client's training loss from the sequential one", ""),),
    ),
    "rounds": Layout(
        "Rounds: a whole experiment, start-up included",
        ("flower x2", "flower x1", "plain loop x2", "fedspan sequential x1"),
        (
            Figure("rounds_seconds", "The rounds alone, without start-up", "s", True),
            Figure("round_seconds", "The median round", "s", True),
            Figure("peak_rss_bytes", "Peak memory of all processes", "bytes"),
            Figure("train_loss", "Loss on all training data with the final adapter", ""),
            Figure("distance", "Its difference from the first column's, as a share of what was learnt", ""),
        ),
    ),
    "scaling": Layout(
        "Scaling: a server step as clients and layers grow",
        ("flexlora held",),
        (
            Figure("peak_bytes", "Peak memory of the step, its updates included", "bytes"),
            Figure("distance", "Relative distance of the streamed product from the held one", ""),
        ),
    ),
    "galore": Layout(
        "GaLore: an optimizer step on one m×n weight, and a refresh of its projector",
        ("adamw", "exact"),
        (
            Figure("state_bytes", "Bytes of the optimizer's state", "bytes", True),
            Figure("energy", "Share of the gradient's energy that the projector keeps", ""),
        ),
    ),
}


def render(records: Sequence[Record]) -> str:
    """All measurements as Markdown: one part per machine and effort, one section per suite."""
    parts: list[str] = ["# fedspan bench"]
    for setting in _settings(records):
        mine = [r for r in records if _setting(r) == setting]
        parts.append(f"{machine_line(mine[-1]['machine'])}{' Quick sizes.' if mine[-1]['quick'] else ''}")
        parts.append(
            "A cell is the median time; in brackets, how many times faster than the column whose bracket is 1×. "
            "`~` marks a case during which the machine was busy (its calibration drifted by more than 15 %), `≠` an "
            "arm whose result is not what it should be the same as."
        )
        for suite, layout in LAYOUTS.items():
            own = latest([r for r in mine if r["suite"] == suite])
            if own:
                parts += _section(layout, own)
    return "\n\n".join(parts) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['device']}, "
        f"{machine['threads']} thread(s) a process; {machine['bandwidth'] / 1e9:.1f} GB/s read, "
        f"{machine['gemm'] / 1e9:.0f} GFLOP/s {machine['dtype']}; torch {machine['torch']}, Python {machine['python']}."
    )


def latest(records: Sequence[Record]) -> list[Record]:
    """The newest line of every measurement, in the order of the first."""
    found: dict[str, Record] = {}
    for record in records:
        found[f"{record['case']}/{record['arm']}"] = record
    return list(found.values())


def ratio(record: Record, case: Sequence[Record], baselines: Sequence[str], value: Value) -> float | None:
    """How many times smaller an arm's figure is than the baseline's in the same case."""
    named = {r["arm"]: value(r) for r in case}
    base = next((named[name] for name in baselines if named.get(name) is not None), None)
    own = value(record)
    return base / own if base is not None and own else None


def _setting(record: Record) -> tuple[Any, ...]:
    m = record["machine"]
    return (record["quick"], *(m[name] for name in ("cpu", "cores", "device", "threads", "dtype", "torch")))


def _settings(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(_setting(record) for record in records))


def _section(layout: Layout, records: Sequence[Record]) -> list[str]:
    parts = [f"## {layout.title}"]
    phases = list(dict.fromkeys(r["case"].get("phase", "") for r in records))
    for phase in phases:
        some = [r for r in records if r["case"].get("phase", "") == phase]
        parts += [f"### {phase}"] if phase else []
        if any(r["median"] is not None for r in some):
            parts.append(_pivot(some, layout, lambda r: r["median"], "s", compare=True, floor=True))
        for figure in layout.figures:
            with_it = [r for r in some if figure.key in r.get("details", {})]
            if with_it:
                parts.append(f"{figure.title}:")
                value = _detail(figure.key)
                parts.append(_pivot(with_it, layout, value, figure.unit, compare=figure.compare, floor=False))
        lines = [f"- {_case(r)}, {r['arm']}: {r['skipped']}" for r in some if r.get("skipped")]
        parts += ["Skipped:", "\n".join(lines)] if lines else []
    return parts


def _detail(key: str) -> Value:
    return lambda record: record["details"].get(key)


def _case(record: Record) -> str:
    return " ".join(f"{name}={value}" for name, value in record["case"].items() if name != "phase")


def _pivot(records: Sequence[Record], layout: Layout, value: Value, unit: str, *, compare: bool, floor: bool) -> str:
    """One row per case, one column per arm."""
    arms = list(dict.fromkeys(r["arm"] for r in records if value(r) is not None))
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(_case(record), []).append(record)
    floor = floor and any("floor_seconds" in r for r in records)
    head = ["case", *arms, *(["floor"] if floor else [])]
    rows = [head, ["---"] * len(head)]
    for name, case in cases.items():
        baselines = layout.baselines if compare else ()
        cells = {r["arm"]: _cell(r, ratio(r, case, baselines, value), value, unit) for r in case}
        least = next((duration(r["floor_seconds"]) for r in case if "floor_seconds" in r), "")
        rows.append([name, *(cells.get(arm, "") for arm in arms), *([least] if floor else [])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
