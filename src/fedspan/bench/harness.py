"""Timing: arms in turn, warm-up, medians, a calibration around every case, one JSON object per measurement."""

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
"""Seconds that one timing should last: shorter work is done several times in it."""
DRIFT = 0.15
"""Share by which the calibration may be above its fastest before a case counts as unreliable."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What an arm returns that kept the time itself: a child process's work, say."""

    seconds: float
    output: Any


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of doing a case's work."""

    name: str
    run: Callable[[], Any]
    """Does the work; returns its output, or `Timed`."""
    per: float = 1.0
    """The measured seconds are divided by it (client-steps in a call, rounds)."""
    prepare: Callable[[], object] | None = None
    """Makes what the work needs, once and untimed."""
    after: Callable[[], None] | None = None
    """Undoes the work, untimed."""
    expected: float = 0.0
    """Seconds that a call is expected to take at least; above the budget the arm is skipped."""
    details: Callable[[Any], Mapping[str, Any]] | None = None
    """Further figures of the first output (memory, bytes, a loss), asked for after the timing."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that the work of a case takes on any code: bytes read once, floating point operations."""

    num_bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for."""

    out: Path
    quick: bool = False
    threads: int = 1
    repeat: int = 5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget: float = 60.0
    """Seconds that one arm of one case may take in all."""
    redo: bool = False
    """Measure again what was measured while the machine was busy."""
    only: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Case key -> the values that are measured; cases without the key are measured too."""
    processes: int = 2
    peers: Path = Path("benchmarks/speed/peers")
    flower_python: Path | None = None
    nvflare_python: Path | None = None


class Bench:
    """The measurements of one folder: what is there already is not measured again."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.machine: Machine = machine.measure(options.device, options.threads, options.quick)
        self.path = options.out / "results.jsonl"
        self.records = read_results(self.path)
        mine = [r for r in self.records if self._same_setting(r) and not (options.redo and r.get("reliable") is False)]
        self._done = {self._key(r["suite"], r["case"], r["arm"]): r for r in mine}

    def known(self, suite: str, case: CaseKey, arm: str) -> float | None:
        """The median of a measurement that is there already."""
        record = self._done.get(self._key(suite, case, arm))
        return None if record is None else record["median"]

    def missing(self, suite: str, case: CaseKey, arms: Sequence[str]) -> list[str]:
        """The arms of a case that are still to be measured: where there are none, the case need not be prepared."""
        if not self.chosen(case):
            return []
        return [arm for arm in arms if self.known(suite, case, arm) is None]

    def chosen(self, case: CaseKey) -> bool:
        """Whether the case is among those that were asked for."""
        return all(str(case[key]) in values for key, values in self.options.only.items() if key in case)

    def skip(self, suite: str, case: CaseKey, arm: str, reason: str) -> None:
        """Say and write down why an arm is not measured."""
        self.say(f"  {arm}: skipped, {reason}")
        key = self._key(suite, case, arm)
        if key not in self._done or self._done[key].get("skipped") != reason:
            self._write([self._record(suite, case, arm, {"median": None, "skipped": reason})])

    def fits(self, num_bytes: float) -> bool:
        """Whether a case of so many bytes may be tried here."""
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
            From the arms' outputs to figures of how well each agrees with the others, written down with its timings;
            `agrees` false marks an arm that does other work than it should.
        calibrate
            Seconds of a fixed piece of work where the arms run; none: in this process.
        warm_up
            The first call of every arm does not count, unless it took most of the budget.
        """
        if not self.chosen(case):
            return
        where = "process" if calibrate is None else "processes"
        calibrate = calibrate or partial(machine.calibration, self.options.device)
        due: list[Arm] = []
        self.say(f"{suite}  {describe(case)}")
        for arm in arms:
            if self.known(suite, case, arm.name) is not None:
                continue
            if arm.expected > self.options.budget:
                limit = f"the budget is {self.options.budget:.0f} s"
                self.skip(suite, case, arm.name, f"it would take about {arm.expected:.0f} s and {limit}")
            else:
                due.append(arm)
        if not due:
            return
        for arm in due:
            if arm.prepare is not None:
                arm.prepare()
        before = calibrate()
        first = {arm.name: self._once(arm) for arm in due}
        outputs = {name: timed.output for name, timed in first.items()}
        agreement = check(outputs) if check is not None else {}
        # What nothing is asked of any more should not stand in memory while the arms are timed.
        outputs = {arm.name: outputs[arm.name] for arm in due if arm.details is not None}
        first = {name: Timed(timed.seconds, None) for name, timed in first.items()}
        times = self._repeat(due, {name: timed.seconds for name, timed in first.items()}, warm_up)
        drift = self._drift(where, before, calibrate())
        lines = []
        for arm in due:
            figures = summarise([t / arm.per for t in times[arm.name]])
            figures |= {**self._floor(floor), **drift}
            details = {} if arm.details is None else dict(arm.details(outputs[arm.name]))
            lines.append(self._record(suite, case, arm.name, figures, details | dict(agreement.get(arm.name, {}))))
            self.say(f"  {arm.name}: {_line(lines[-1])}")
        self._write(lines)

    def _once(self, arm: Arm, number: int = 1) -> Timed:
        """Seconds of one call, and its output."""
        # The garbage of an arm before, thousands of objects in some libraries, is not this one's to collect.
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
        """The timings of every arm, as many as fit into the budget."""
        most = self.options.repeat - (0 if warm_up else 1)
        allowed = {n: min(most, int(self.options.budget / max(s, 1e-9)) - 1) for n, s in first.items()}
        times: dict[str, list[float]] = {n: [] if warm_up else [s] for n, s in first.items()}
        for k in range(max(allowed.values(), default=0)):
            for arm in arms:
                if k < allowed[arm.name]:
                    # What has to be undone cannot be done twice.
                    often = 1 if arm.after else min(100, math.ceil(_SHORTEST / max(first[arm.name], 1e-6)))
                    times[arm.name].append(self._once(arm, often).seconds)
        return {name: found or [first[name]] for name, found in times.items()}

    def _drift(self, where: str, before: float, after: float) -> dict[str, Any]:
        """How far the calibration was above its fastest on this machine."""
        held = [r["calibration"] for r in self.records if self._same_setting(r) and "calibration" in r]
        fastest = min([before, after, *(c["seconds"][0] for c in held if c["where"] == where)])
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
        """Append whole lines: a case's measurements are written together."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.records += lines
        self._done |= {self._key(r["suite"], r["case"], r["arm"]): r for r in lines}

    def _same_setting(self, record: Mapping[str, Any]) -> bool:
        """Whether a line was measured on this kind of machine, with as many threads, at this effort."""
        names = ("cpu", "cores", "device", "threads", "dtype", "torch")
        mine = self.machine.record()
        return record["quick"] == self.options.quick and all(record["machine"][n] == mine[n] for n in names)

    @staticmethod
    def _key(suite: str, case: CaseKey, arm: str) -> str:
        return json.dumps([suite, dict(case), arm], sort_keys=True)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file; a line cut off by a kill is dropped from the file.

    Raises
    ------
    ValueError
        For a damaged line in the middle.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise FedspanError(f"{path} is damaged ({error}): expected one JSON object a line") from None


def summarise(times: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and number of the timings, in seconds."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "repeats": len(times)}


def _line(record: Mapping[str, Any]) -> str:
    """A measurement as it is shown while the suites run."""
    parts = [duration(record["median"])]
    if "distance" in record["details"]:
        parts.append(f"distance {record['details']['distance']:.1e}")
    if record["details"].get("agrees") is False:
        parts.append("which is NOT the same")
    return ", ".join(parts) + ("" if record["reliable"] else "  (busy machine)")


def describe(case: CaseKey) -> str:
    """`d=768 K=10 r=4`."""
    return " ".join(f"{name}={value}" for name, value in case.items())


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"
