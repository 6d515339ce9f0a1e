"""Timing: arms take turns after a warm-up, figures are medians, a calibration shows whether the machine was busy."""

from __future__ import annotations

import gc
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedspan.bench import machine
from fedspan.bench.machine import Machine
from fedspan.support.errors import FedspanError

CaseKey = Mapping[str, int | str]
_SHORTEST = 0.005
"""Shortest timing in seconds: shorter work is repeated within one timing."""
DRIFT = 0.15
"""Share by which the calibration may exceed its fastest before a case counts as unreliable."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Output of an arm that measured its time itself, such as one that runs in other processes."""

    seconds: float
    output: Any


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of doing a case's work."""

    name: str
    run: Callable[[], Any]
    """The work; returns its output, or `Timed`."""
    per: float = 1.0
    """Divisor of the measured seconds, such as the client-steps or the rounds in a call."""
    prepare: Callable[[], object] | None = None
    """Untimed preparation, called once."""
    after: Callable[[], None] | None = None
    """Untimed function that undoes the work, called after each timing."""
    expected: float = 0.0
    """Least expected seconds of a call; above the budget the arm is skipped."""
    details: Callable[[Any], Mapping[str, Any]] | None = None
    """Function from the first output to further figures (memory, bytes, a loss), called after the timing."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least work that any implementation of a case must do: bytes read once, floating point operations."""

    num_bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `fedspan bench`."""

    out: Path
    quick: bool = False
    threads: int = 1
    repeat: int = 5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget: float = 60.0
    """Longest time for one arm of one case, in seconds."""
    redo: bool = False
    """Measure again the cases during which the machine was busy."""
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Case key -> values to measure; cases without the key are measured too."""
    processes: int = 2
    peers: Path = Path("benchmarks/speed/peers")
    flower_python: Path | None = None
    nvflare_python: Path | None = None


class Bench:
    """The measurements of one folder, each taken only once."""

    def __init__(self, options: Options, notify: Callable[[str], None]) -> None:
        self.options, self.notify = options, notify
        self.machine: Machine = machine.measure(options.device, options.threads, options.quick)
        self.path = options.out / "results.jsonl"
        self.records = read_results(self.path)
        kept = [r for r in self.records if self._same_setting(r) and not (options.redo and r.get("reliable") is False)]
        self._offered: list[CaseKey] = []
        self._done = {self._key(r["suite"], r["case"], r["arm"]): r for r in kept}

    def known(self, suite: str, case: CaseKey, arm: str) -> float | None:
        """Return the median of an existing measurement; none if there is none, or the arm was skipped."""
        record = self._done.get(self._key(suite, case, arm))
        return None if record is None else record["median"]

    def missing(self, suite: str, case: CaseKey, arms: Sequence[str]) -> list[str]:
        """Return the arms of a case that are still to be measured; without any, the case need not be prepared."""
        if not self.chosen(case):
            return []
        return [arm for arm in arms if self.known(suite, case, arm) is None]

    def chosen(self, case: CaseKey) -> bool:
        """Return whether `Options.only` selects the case."""
        self._offered.append(case)
        return self._selects(case)

    def check_choice(self) -> None:
        """Refuse an `Options.only` that selects none of the cases that came up.

        Raises
        ------
        FedspanError
            With the values that there are.
        """
        if any(map(self._selects, self._offered)):
            return
        for key, values in self.options.only.items():
            known = dict.fromkeys(str(case[key]) for case in self._offered if key in case)
            if known and not values & set(known):
                given = f"--only {key}={','.join(sorted(values))}"
                raise FedspanError(f"{given}: no case has this value; expected one of {', '.join(known)}")
        if self.options.only:
            given = " ".join(f"--only {key}={','.join(sorted(values))}" for key, values in self.options.only.items())
            raise FedspanError(f"{given}: no case has all of these values together")

    def _selects(self, case: CaseKey) -> bool:
        return all(str(case[key]) in values for key, values in self.options.only.items() if key in case)

    def skip(self, suite: str, case: CaseKey, arm: str, reason: str) -> None:
        """Report and record the reason why an arm is not measured."""
        self.notify(f"  {arm}: skipped, {reason}")
        key = self._key(suite, case, arm)
        if key not in self._done or self._done[key].get("skipped") != reason:
            self._write([self._record(suite, case, arm, {"median": None, "skipped": reason})])

    def fits(self, num_bytes: float) -> bool:
        """Return whether a case of that many bytes fits into this machine's free memory."""
        return num_bytes <= machine.memory_limit(self.options.device)

    def measure(
        self,
        suite: str,
        case: CaseKey,
        arms: Sequence[Arm],
        *,
        floor: Floor | None = None,
        check: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, float]]] | None = None,
        calibrate: Callable[[], float] | None = None,
        warm_up: bool = True,
    ) -> None:
        """Time the arms of one case that are not in the file yet, in turn (A B A B …).

        Parameters
        ----------
        check
            Function from the arms' outputs to figures of their agreement, which are recorded with the timings;
            `agrees` is false for an arm with another result than it should have.
        calibrate
            Function that returns the seconds of a fixed piece of work where the arms run; by default in this process.
        warm_up
            Leave out the first call of every arm, unless it took most of the budget.
        """
        if not self.chosen(case):
            return
        self.notify(f"{suite}  {describe(case)}")
        due = self._due(suite, case, arms)
        if not due:
            return
        where = "process" if calibrate is None else "processes"
        calibrate = calibrate or partial(machine.calibration, self.options.device)
        _prepare(due)
        before = calibrate()
        outputs, first = self._first_calls(due)
        agreement = check(outputs) if check is not None else {}
        # Outputs that are not needed any more must not take memory while the arms are timed.
        outputs = {arm.name: outputs[arm.name] for arm in due if arm.details is not None}
        times = self._repeat(due, first, warm_up)
        common = {**self._floor(floor), **self._drift(where, before, calibrate())}
        records = []
        for arm in due:
            figures = summarise([t / arm.per for t in times[arm.name]]) | common
            details = _details(arm, outputs.get(arm.name)) | dict(agreement.get(arm.name, {}))
            records.append(self._record(suite, case, arm.name, figures, details))
            self.notify(f"  {arm.name}: {_line(records[-1])}")
        self._write(records)

    def _due(self, suite: str, case: CaseKey, arms: Sequence[Arm]) -> list[Arm]:
        """Return the arms that are not measured yet and fit into the budget; record why the others are skipped."""
        due = []
        for arm in arms:
            if self.known(suite, case, arm.name) is not None:
                continue
            if arm.expected > self.options.budget:
                limit = f"the budget is {self.options.budget:.0f} s"
                self.skip(suite, case, arm.name, f"it would take about {arm.expected:.0f} s and {limit}")
            else:
                due.append(arm)
        return due

    def _first_calls(self, arms: Sequence[Arm]) -> tuple[dict[str, Any], dict[str, float]]:
        """Call every arm once; return the outputs and the seconds by arm."""
        first = {arm.name: self._once(arm) for arm in arms}
        return {name: t.output for name, t in first.items()}, {name: t.seconds for name, t in first.items()}

    def _once(self, arm: Arm, number: int = 1) -> Timed:
        """Call an arm `number` times; return the seconds per call, and the output of the first."""
        # An arm must not pay for collecting the garbage of the one before, thousands of objects in some libraries.
        gc.collect()
        gc.disable()
        try:
            began = machine.now(self.options.device)
            output = arm.run()
            for _ in range(number - 1):
                arm.run()
            seconds = (machine.now(self.options.device) - began) / number
        finally:
            gc.enable()
        if arm.after is not None:
            arm.after()
        return output if isinstance(output, Timed) else Timed(seconds, output)

    def _repeat(self, arms: Sequence[Arm], first: Mapping[str, float], warm_up: bool) -> dict[str, list[float]]:
        """Time every arm as often as its budget allows; return the seconds by arm."""
        most = self.options.repeat - (0 if warm_up else 1)
        allowed = {n: min(most, int(self.options.budget / max(s, 1e-9)) - 1) for n, s in first.items()}
        times: dict[str, list[float]] = {n: [] if warm_up else [s] for n, s in first.items()}
        for k in range(max(allowed.values(), default=0)):
            for arm in arms:
                if k < allowed[arm.name]:
                    times[arm.name].append(self._once(arm, _calls_per_timing(arm, first[arm.name])).seconds)
        return {name: timings or [first[name]] for name, timings in times.items()}

    def _drift(self, where: str, before: float, after: float) -> dict[str, Any]:
        """Return the share by which the calibration exceeded its fastest on this machine, and its seconds."""
        earlier = [r["calibration"] for r in self.records if self._same_setting(r) and "calibration" in r]
        fastest = min([before, after, *(c["seconds"][0] for c in earlier if c["where"] == where)])
        drift = max(before, after) / fastest - 1
        calibration = {"where": where, "seconds": [min(before, after), max(before, after)]}
        return {"calibration": calibration, "drift": drift, "reliable": drift <= DRIFT}

    def _floor(self, floor: Floor | None) -> dict[str, float]:
        if floor is None:
            return {}
        return {
            "floor_bytes": floor.num_bytes,
            "floor_flops": floor.flops,
            "floor_seconds": self.machine.seconds(floor.num_bytes, floor.flops),
        }

    def _record(
        self,
        suite: str,
        case: CaseKey,
        arm: str,
        figures: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            "suite": suite,
            "case": dict(case),
            "arm": arm,
            **figures,
            "details": dict(details or {}),
            "quick": self.options.quick,
            "fedspan": version("fedspan"),
            "machine": self.machine.record(),
        }

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append records, those of a case together, so that an interruption never leaves part of a case."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.records += lines
        self._done |= {self._key(r["suite"], r["case"], r["arm"]): r for r in lines}

    def _same_setting(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record was measured on this kind of machine, with as many threads and the same sizes."""
        names = ("cpu", "cores", "device", "threads", "dtype", "torch")
        own = self.machine.record()
        return record["quick"] == self.options.quick and all(record["machine"][n] == own[n] for n in names)

    @staticmethod
    def _key(suite: str, case: CaseKey, arm: str) -> str:
        return json.dumps([suite, dict(case), arm], sort_keys=True)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the measurements of a file; remove an incomplete last line, which a killed process left.

    Raises
    ------
    FedspanError
        For any other damaged line.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            path.write_text(complete, encoding="utf-8")
        return [json.loads(line) for line in complete.splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FedspanError(f"{path} is damaged ({error}): expected one JSON object per line") from None


def summarise(times: Sequence[float]) -> dict[str, Any]:
    """Return median, extremes (in seconds) and number of the timings."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "repeats": len(times)}


def _prepare(arms: Sequence[Arm]) -> None:
    for arm in arms:
        if arm.prepare is not None:
            arm.prepare()


def _details(arm: Arm, output: Any) -> dict[str, Any]:
    return {} if arm.details is None else dict(arm.details(output))


def _calls_per_timing(arm: Arm, seconds: float) -> int:
    # Work that has to be undone cannot be repeated within one timing.
    return 1 if arm.after else min(100, math.ceil(_SHORTEST / max(seconds, 1e-6)))


def _line(record: Mapping[str, Any]) -> str:
    """Return a measurement in one line, shown while the suites run."""
    parts = [duration(record["median"])]
    if "distance" in record["details"]:
        parts.append(f"distance {record['details']['distance']:.1e}")
    if record["details"].get("agrees") is False:
        parts.append("DISAGREES with the other arms")
    return ", ".join(parts) + ("" if record["reliable"] else "  (busy machine)")


def describe(case: CaseKey) -> str:
    """Return a case as text, such as `d=768 K=10 r=4`."""
    return " ".join(f"{name}={value}" for name, value in case.items())


def duration(seconds: float) -> str:
    """Return a duration with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"
