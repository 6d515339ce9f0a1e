"""The finished runs of a comparison, one line of JSON each in `runs.jsonl`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fedspan.comparison.plan import Planned, digest
from fedspan.data.metrics import METRICS
from fedspan.runs import checkpoint
from fedspan.runs.summary import versions
from fedspan.support import standard_json
from fedspan.support.errors import FedspanError
from fedspan.support.files import flush, write_bytes

FILE = "runs.jsonl"
Key = tuple[str, str, str, int, str]


def key_of(run: Planned) -> Key:
    """Return what tells a run from all others of a comparison."""
    return run.stage, run.condition, run.arm, run.seed, json.dumps(dict(run.settings), sort_keys=True)


class RunLines:
    """The lines of a comparison's folder: read once, then appended to.

    A line that was cut off by a crash is the last one, and is dropped: its run has its summary, and ends at once when
    it is resumed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: dict[Key, dict[str, Any]] = {}
        path = folder / FILE
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_bytes(path, whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise FedspanError(f"{path}, line {number}: expected the JSON of a finished run") from None

    def _add(self, line: dict[str, Any]) -> None:
        settings = json.dumps(line["settings"], sort_keys=True)
        self._lines[line["stage"], line["condition"], line["arm"], line["seed"], settings] = line

    def of(self, run: Planned) -> dict[str, Any] | None:
        """Return the line of a run; None where it has not finished.

        Raises
        ------
        FedspanError
            When it finished with other settings.
        """
        line = self._lines.get(key_of(run))
        if line is not None and line["config_digest"] != digest(run.config):
            raise FedspanError(
                f"{self._folder / run.folder} ran with other settings than the suite now gives it, such as other "
                "defaults of another fedspan: expected another folder (--out)"
            )
        return line

    def num_final(self) -> int:
        """Return the number of final runs that have finished."""
        return sum(line["stage"] == "final" for line in self._lines.values())

    def has_base(self, seed: int, model_and_data: str) -> bool:
        """Return whether some final run of this seed has measured the untouched base on these data."""
        return any(
            line["stage"] == "final" and line["seed"] == seed and line["base_key"] == model_and_data
            for line in self._lines.values()
            if line["base"] is not None
        )

    def append(self, line: dict[str, Any]) -> None:
        """Add a finished run, on the disk before this returns."""
        path = self._folder / FILE
        with open(path, "ab", buffering=0) as file:
            file.write((standard_json.dumps(line) + "\n").encode())
            os.fsync(file.fileno())
        flush(path.parent)
        self._add(json.loads(standard_json.dumps(line)))


def line_of(run: Planned, folder: Path, summary: Mapping[str, Any], last_rounds: int) -> dict[str, Any]:
    """Return the line of a run that has just finished, or diverged, in `folder` (the comparison's)."""
    # The rounds before one that failed would stand for a model that the run does not end with.
    records = _records(folder / run.folder) if summary.get("ended", True) else []
    metric, totals = summary["metric"], summary["totals"]
    return {
        "stage": run.stage,
        "condition": run.condition,
        "arm": run.arm,
        "seed": run.seed,
        "settings": dict(run.settings),
        "folder": run.folder,
        "metric": metric,
        "higher_is_better": summary["higher_is_better"],
        "figures": figures(summary["federated"], records, metric, summary["higher_is_better"], last_rounds),
        "unseen": summary["unseen"],
        "base": summary["base"],
        "base_key": base_key(run),
        "rows": summary["data"]["rows"]["test"],
        "config_digest": digest(run.config),
        "versions": summary["versions"],
        "revision": revision(),
        "seconds": round(totals["client_seconds"] + totals["server_seconds"], 3),
        "bytes_up": totals["bytes_up"],
        "bytes_down": totals["bytes_down"],
    }


def summary_of_diverged(folder: Path, start: Mapping[str, Any]) -> dict[str, Any]:
    """Return what there is of the summary of a run whose training diverged in some round.

    Parameters
    ----------
    folder
        The run's.
    start
        The data of its `start` event.
    """
    kept = folder / "checkpoint" / "federation.safetensors"
    base = checkpoint.read(kept).notes.get("base") if kept.exists() else None
    metric, records = start["metric"], _records(folder)
    totals = ("client_seconds", "server_seconds", "bytes_up", "bytes_down")
    return {
        "ended": False,
        "metric": metric,
        "higher_is_better": METRICS[metric].higher_is_better,
        "federated": None,
        "unseen": None,
        "base": None if base is None else base[metric],
        "data": start["data"],
        "totals": {key: sum(record[key] for record in records) for key in totals},
        "versions": versions(),
    }


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figures(
    last: float | None, records: list[dict[str, Any]], metric: str, higher_is_better: bool, last_rounds: int
) -> dict[str, float | None]:
    """Return the figures of a run; None for one that was not measured, or was no number.

    Parameters
    ----------
    last
        The mean over the clients of what each ends with.
    records
        The rounds; those that were evaluated hold the figures of the server's state.
    """
    evaluated = [record["eval"][metric] for record in records if record["eval"] is not None]
    numbers = [value for value in evaluated if value is not None]
    window = evaluated[-last_rounds:]
    known = len(window) == last_rounds and None not in window
    return {
        "last": last,
        "best": (max(numbers) if higher_is_better else min(numbers)) if numbers else None,
        "mean_last": sum(window) / last_rounds if known else None,
    }


def base_key(run: Planned) -> str:
    """Return a digest of what the figure of the untouched base depends on, besides the seed of a new head."""
    config = run.config
    parts = [config.model.model_dump(mode="json"), config.data.model_dump(mode="json"), config.data_seed]
    return digest_of([*parts, config.evaluation.max_new_tokens, config.adapter.modules_to_save])


def digest_of(value: object) -> str:
    """Return a short digest of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@cache
def revision() -> str | None:
    """Return the commit that this package is a checkout of, marked `-dirty` where it differs; None where it is none."""
    # The folder of an installed package may lie in a repository that is another project's.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--dirty", "--exclude=*")


def _git(*words: str) -> str | None:
    """Return what a command of git prints about this folder; None where it fails or there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
