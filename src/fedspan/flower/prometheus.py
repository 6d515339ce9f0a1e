"""The state of a deployment in the text format of Prometheus, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from fedspan.flower.status import Figures, Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Samples = list[tuple[Mapping[str, str], float]]


def metrics(status: Status) -> str:
    """Return every figure, with its help and type."""
    return "".join(f"{line}\n" for line in _lines(status))


def _lines(status: Status) -> Iterator[str]:
    healthy = float(not status.problems())
    yield from _metric("healthy", "gauge", "1 where certificates are valid and logs whole.", [({}, healthy)])
    ends: _Samples = [
        ({"file": each.path.relative_to(status.folder).as_posix()}, each.until.timestamp())
        for each in status.certificates
    ]
    yield from _metric("certificate_expiry_timestamp_seconds", "gauge", "End of a certificate's validity.", ends)
    logs = [({"node": figures.node, "run": figures.run}, figures) for figures in status.logs.values()]
    for name, kind, text, of in _OF_LOGS:
        yield from _metric(name, kind, text, [(labels, float(of(figures))) for labels, figures in logs])
    events: _Samples = [
        ({**labels, "event": event}, float(count))
        for labels, figures in logs
        for event, count in sorted(figures.events.items())
    ]
    yield from _metric("events_total", "counter", "Entries of a log by kind.", events)
    refusals: _Samples = [
        ({**labels, "code": code}, float(count))
        for labels, figures in logs
        for code, count in sorted(figures.refusals.items())
    ]
    yield from _metric("refusals_total", "counter", "Refusals by code.", refusals)


def _seconds(figures: Figures) -> float:
    try:
        return datetime.strptime(figures.last[0], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0


_OF_LOGS = (
    ("log_lines", "gauge", "Lines of a log.", lambda figures: figures.num_lines),
    ("log_broken", "gauge", "1 where a log is no unbroken chain.", lambda figures: figures.fault is not None),
    ("round", "gauge", "The last finished round.", lambda figures: figures.round_num),
    ("round_sites", "gauge", "Sites whose answers were used in it.", lambda figures: len(figures.answered)),
    ("run_finished", "gauge", "1 where the run has a result.", lambda figures: figures.finished),
    ("received_bytes_total", "counter", "Bytes of messages that came.", lambda figures: figures.bytes_in),
    ("sent_bytes_total", "counter", "Bytes of messages that went.", lambda figures: figures.bytes_out),
    ("last_event_timestamp_seconds", "gauge", "Time of the last entry.", _seconds),
)


def _metric(name: str, kind: str, text: str, samples: _Samples) -> Iterator[str]:
    if not samples:
        return
    yield f"# HELP fedspan_{name} {text}"
    yield f"# TYPE fedspan_{name} {kind}"
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(each)}"' for key, each in labels.items() if each)
        yield f"fedspan_{name}{{{inner}}} {value!r}" if inner else f"fedspan_{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
