"""The state of a deployment as its folders show it: rounds, answers, refusals, the last event, certificates.

Everything is read from the logs of events and the certificates; nothing is asked of a process, and nothing is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedspan.events import chain, places
from fedspan.events.chain import FILE, Entry
from fedspan.flower import expiry
from fedspan.flower.expiry import Validity
from fedspan.support.errors import FedspanError, one_line

_COUNTED = ("sent", "received", "answered", "unanswered", "decision", "healed")
_MAX_REFUSALS = 5


@dataclass(slots=True)
class Figures:
    """The figures of one log, which is read on from where it was read last."""

    path: Path
    node: str = "?"
    run: str = ""
    """Name of the run's folder; empty for a site."""
    num_lines: int = 0
    fault: str | None = None
    """The first place where the log is no chain."""
    events: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    """By code of the refusal."""
    bytes_in: int = 0
    bytes_out: int = 0
    round_num: int = 0
    """The last finished round; at a site, the last one in which it answered."""
    answered: set[str] = field(default_factory=set)
    """The clients whose answers were used in that round."""
    rejected: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    last: tuple[str, str] = ("", "")
    """Time and kind of the last entry."""
    _offset: int = 0
    _previous: str = chain.GENESIS
    _current: set[str] = field(default_factory=set)

    def read(self) -> Figures:
        """Read the lines that were added, and return these figures."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError as error:
            raise FedspanError(f"{self.path} cannot be read ({error.strerror}): expected a log of events") from None
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.split(b"\n")[:-1]:
            entry, fault = chain.entry_of(line, self.num_lines, self._previous)
            self.fault = self.fault or fault
            self._previous = chain.digest_of(line)
            self.num_lines += 1
            self._add(entry)
        self._offset += len(whole)
        return self

    def _add(self, entry: Entry) -> None:
        event = str(entry.get("event", "?"))
        self.last = str(entry.get("time", "")), event
        self.events[event if event in _COUNTED else "other"] += 1
        if event in ("begin", "opened"):
            self.node, self.finished = one_line(entry.get("node", "?"), 80), False
            self.run = one_line(entry["run_name"], 80) if "run_name" in entry else ""
        elif event in ("sent", "received", "answered"):
            self._add_message(event, entry)
        elif event == "round":
            self._finish(entry)
        self.finished = self.finished or event == "end"

    def _add_message(self, event: str, entry: Entry) -> None:
        size = entry["size"] if type(entry.get("size")) is int else 0
        self.bytes_in += size if event == "received" else 0
        self.bytes_out += size if event != "received" else 0
        if "code" in entry:
            self.refusals[one_line(entry["code"], 40)] += 1
        elif event != "sent" and type(entry.get("round")) is int:
            self._current.add(str(entry.get("from", self.node)))
            if event == "answered":
                self.round_num = max(self.round_num, entry["round"])

    def _finish(self, entry: Entry) -> None:
        self.round_num = entry["round"] if type(entry.get("round")) is int else self.round_num
        rejected = entry.get("rejected")
        self.rejected = {str(k): str(v) for k, v in rejected.items()} if isinstance(rejected, dict) else {}
        self.answered, self._current = self._current - self.rejected.keys(), set()

    @property
    def title(self) -> str:
        """Return the name of the side, and of the run."""
        return f"{self.node} ({self.run})" if self.run else self.node


class Status:
    """The state of a deployment, a server or a site, read anew with each `update`.

    Raises
    ------
    FedspanError
        When the folder holds neither a log nor a certificate.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs: dict[Path, Figures] = {}
        self.update()
        if not self.logs and not self.certificates:
            raise FedspanError(
                f"{folder} holds neither {FILE} nor certificates: expected a folder made by `fedspan flower init`, its "
                "server's, or a site's"
            )

    def update(self) -> None:
        """Read what is new."""
        try:
            paths = places.logs_in(self.folder)
        except FedspanError:
            paths = []
        self.logs = {path: self.logs.get(path, Figures(path)).read() for path in paths}
        sides = [self.folder, self.folder / "server", *sorted((self.folder / "sites").glob("*"))]
        self.certificates: list[Validity] = [each for side in sides for each in expiry.of_folder(side)]

    def problems(self, now: datetime | None = None) -> list[str]:
        """Return why the deployment is not healthy, one line each; none where it is."""
        at = datetime.now(UTC) if now is None else now
        expired = [line for each in self.certificates if (line := each.problem(at)) is not None]
        broken = [f"{figures.path}: {figures.fault}" for figures in self.logs.values() if figures.fault]
        return expired + broken

    def warnings(self, now: datetime | None = None) -> list[str]:
        """Return the lines about certificates that expire within 30 days, and have not yet."""
        at = datetime.now(UTC) if now is None else now
        usable = [each for each in self.certificates if each.problem(at) is None]
        return [line for each in usable if (line := each.warning(at)) is not None]

    def lines(self, now: datetime | None = None) -> Iterator[str]:
        """Yield the state for people."""
        for figures in self.logs.values():
            yield from _of_log(figures)
        if not self.logs:
            yield "no message yet"
        ends = {f"{each.path.name} until {each.until:%Y-%m-%d}" for each in self.certificates}
        if ends:
            yield f"certificates  {', '.join(sorted(ends))}"
        yield from (f"warning: {line}" for line in self.warnings(now))
        yield from (f"PROBLEM: {line}" for line in self.problems(now))

    def as_json(self) -> dict[str, Any]:
        """Return the state for programs."""
        return {
            "healthy": not self.problems(),
            "problems": self.problems(),
            "warnings": self.warnings(),
            "certificates": {str(each.path): each.until.isoformat() for each in self.certificates},
            "logs": [_as_json(figures) for figures in self.logs.values()],
        }


def _of_log(figures: Figures) -> Iterator[str]:
    state = "finished" if figures.finished else f"after round {figures.round_num}" if figures.round_num else "begun"
    time, event = figures.last
    yield f"{figures.title}  {state}, last event {event} at {one_line(time, 40)}"
    if figures.answered or figures.rejected:
        yield f"  answered in round {figures.round_num}: {_named(sorted(figures.answered))}"
    yield from (f"  left out in it: {one_line(who, 80)}: {one_line(why, 200)}" for who, why in figures.rejected.items())
    counts = ", ".join(f"{figures.events[event]} {event}" for event in _COUNTED[:4] if figures.events[event])
    yield f"  {counts or 'no messages'}; {figures.bytes_in:,} bytes in, {figures.bytes_out:,} out"
    if figures.refusals:
        most = figures.refusals.most_common(_MAX_REFUSALS)
        yield f"  refusals: {', '.join(f'{count} {code}' for code, count in most)}"


def _named(names: Sequence[str]) -> str:
    return ", ".join(one_line(name, 80) for name in names) or "nobody"


def _as_json(figures: Figures) -> dict[str, Any]:
    return {
        "path": str(figures.path),
        "node": figures.node,
        "run": figures.run or None,
        "lines": figures.num_lines,
        "fault": figures.fault,
        "round": figures.round_num,
        "answered": sorted(figures.answered),
        "rejected": figures.rejected,
        "finished": figures.finished,
        "last_event": figures.last[1],
        "last_time": figures.last[0],
        "events": dict(figures.events),
        "refusals": dict(figures.refusals),
        "bytes_in": figures.bytes_in,
        "bytes_out": figures.bytes_out,
    }
