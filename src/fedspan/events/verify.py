"""The comparison of the logs of a server and its sites: each by itself, and each with what the others say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedspan.events.chain import Chain, Entry
from fedspan.support.errors import one_line

SERVER = "server"
_MAX_NAMED = 5
"""Findings of one kind between two logs that are named; the rest is counted."""


@dataclass(slots=True)
class Report:
    """The outcome of a verification."""

    checked: list[str] = field(default_factory=list)
    """Agreements, in one line for each log and each pair of logs."""
    notes: list[str] = field(default_factory=list)
    """Differences that a crash or a lost message explains, and logs that could not be compared."""
    findings: list[str] = field(default_factory=list)
    """Differences that neither explains: a log was changed, or a message was."""


def verify(chains: Sequence[Chain]) -> Report:
    """Check every chain, and compare those of servers' runs with those of their sites.

    A line that was edited, cut, moved or added is found in the chain itself, unless it is the last one or everything
    after it was made anew; that is found where the other side has written down the head of this log since then, or
    the message that the line is about. Lines after the last contact have no other witness.
    """
    report = Report()
    for chain in chains:
        _check_alone(chain, report)
    servers = [chain for chain in chains if chain.node == SERVER]
    sites = [chain for chain in chains if chain.node != SERVER]
    _check_names(sites, report)
    for server in servers:
        for site in sites:
            _compare(server, site, report)
    _name_missing(servers, sites, report)
    return report


def _check_alone(chain: Chain, report: Report) -> None:
    report.findings += [f"{chain.path}: {fault}" for fault in chain.faults]
    head = chain.head
    if head is None:
        report.findings.append(f"{chain.path} holds no line: expected at least the beginning of a log")
    elif not chain.faults:
        report.checked.append(
            f"{chain.path}  {chain.node}: {len(chain.entries)} lines, unbroken, head {head.number} {head.digest}"
        )
    if chain.torn:
        report.notes.append(
            f"{chain.path}: the last line was interrupted while it was written ({len(chain.torn)} bytes); the next "
            "process that writes removes it and says so"
        )
    for entry in chain.entries:
        if entry.get("event") == "healed":
            report.notes.append(
                f"{chain.path}: line {entry.get('number')} says that an interrupted line of {entry.get('bytes')} bytes "
                "was removed"
            )
        if "rolled_back" in entry:
            report.findings.append(
                f"{chain.path}: line {entry.get('number')} says that {_shown(entry.get('from'))}'s log had lost lines: "
                f"it had shown line {entry.get('rolled_back')} before"
            )


def _check_names(sites: Sequence[Chain], report: Report) -> None:
    counts = Counter(chain.node for chain in sites)
    report.findings += [
        f"{count} logs are those of {node}: expected one for each site" for node, count in counts.items() if count > 1
    ]


def _compare(server: Chain, site: Chain, report: Report) -> None:
    """Compare the messages of one run at both ends, and the heads that each end has shown the other."""
    runs = _runs(server) | _witnessed(server, site)
    problems = [
        *_heads(server, site, runs),
        *_heads(site, server, runs),
        *_messages(server, site, runs),
        *_answers(server, site, runs),
    ]
    shown = problems[:_MAX_NAMED]
    report.findings += shown
    if len(problems) > len(shown):
        report.findings.append(f"{server.path} and {site.path}: {len(problems) - len(shown)} more differences")
    if problems or not runs:
        return
    sent = [entry for entry in _of(server, "sent", runs) if entry.get("to") == site.node]
    received = _of(site, "received", runs)
    answered, arrived = _of(site, "answered", runs), _from(server, site.node, runs)
    report.checked.append(
        f"{_name(server)} and {site.node}: {len(received)} of {len(sent)} messages received as they were sent, "
        f"{len(arrived)} of {len(answered)} answers arrived as they were given"
    )


def _heads(shower: Chain, witness: Chain, runs: set[str]) -> Iterator[str]:
    """Yield the heads that a log has shown and that are not in it any more, as the other side's log testifies."""
    for entry in _of(witness, "received", runs):
        if entry.get("from") != shower.node or "peer" not in entry:
            continue
        number, digest, _ = _peer(entry)
        there = shower.digests[number] if 0 <= number < len(shower.digests) else None
        if there != digest:
            state = "has no such line" if there is None else "has another line there"
            yield (
                f"{shower.path} {state}: {witness.node} was shown line {number} with the digest {digest} "
                f"(line {entry.get('number')} of {witness.path}); lines were cut or made anew"
            )
            return  # every later head differs too


def _messages(server: Chain, site: Chain, runs: set[str]) -> Iterator[str]:
    """Yield the messages that a site received and the server did not send to it, or not as often."""
    sent = Counter(_digest(entry) for entry in _of(server, "sent", runs) if entry.get("to") == site.node)
    for entry in _of(site, "received", runs):
        digest = _digest(entry)
        if not sent[digest]:
            yield (
                f"{site.node} received a message ({_place(entry)}) with the digest {digest} (line "
                f"{entry.get('number')} of {site.path}) that {server.path} does not have as sent to it, or not as often"
            )
        else:
            sent[digest] -= 1
    received = Counter(_digest(entry) for entry in _of(site, "received", runs))
    for entry in _from(server, site.node, runs):
        question = _at(server, entry.get("question"))
        digest = _digest(question)
        if not received[digest]:
            yield (
                f"{server.path} has an answer of {site.node} (line {entry.get('number')}) to a message that "
                f"{site.path} does not have ({_place(question)})"
            )
        else:
            received[digest] -= 1


def _answers(server: Chain, site: Chain, runs: set[str]) -> Iterator[str]:
    """Yield the answers that the server received and the site did not give."""
    given = Counter(_digest(entry) for entry in _of(site, "answered", runs))
    for entry in _from(server, site.node, runs):
        digest = _digest(entry)
        if not given[digest]:
            yield (
                f"{server.path} has an answer of {site.node} ({_place(entry)}) with the digest {digest} (line "
                f"{entry.get('number')}) that {site.path} does not have as given, or not as often"
            )
        else:
            given[digest] -= 1


def _name_missing(servers: Sequence[Chain], sites: Sequence[Chain], report: Report) -> None:
    """Note the sides whose logs were not given."""
    known = {chain.node for chain in sites}
    for server in servers:
        named = {str(entry["to"]) for entry in _of(server, "sent", _runs(server)) if entry.get("to") is not None}
        for name in sorted(named - known):
            report.notes.append(f"{_name(server)}: the log of {_shown(name)} was not given")
    runs = set[str]().union(*map(_runs, servers))
    for site in sites:
        others = {str(entry["run"]) for entry in site.entries if "run" in entry} - runs
        if others:
            shown = ", ".join(_shown(run) for run in sorted(others)[:_MAX_NAMED])
            report.notes.append(f"{site.node}: the server's log of the run {shown} was not given")


def _runs(server: Chain) -> set[str]:
    """Return the names of a server's run in its messages."""
    return {str(entry["run"]) for entry in server.entries if entry.get("event") == "sent" and "run" in entry}


def _witnessed(server: Chain, site: Chain) -> set[str]:
    """Return the runs in which a site was shown lines of this log: the log itself may have lost them."""
    return {
        str(entry["run"])
        for entry in site.entries
        if "run" in entry and "peer" in entry and server.digests and _peer(entry)[2] == server.digests[0]
    }


def _of(chain: Chain, event: str, runs: set[str]) -> list[Entry]:
    return [entry for entry in chain.entries if entry.get("event") == event and _run_of(chain, entry) in runs]


def _digest(entry: Entry) -> str:
    return str(entry.get("digest"))


def _run_of(chain: Chain, entry: Entry) -> str:
    """Return the run of an entry; an answer without one, such as a refusal, belongs to that of its question."""
    return str(entry["run"] if "run" in entry else _at(chain, entry.get("question")).get("run"))


def _from(server: Chain, client: str, runs: set[str]) -> list[Entry]:
    return [entry for entry in _of(server, "received", runs) if entry.get("from") == client]


def _at(chain: Chain, number: Any) -> Entry:
    there = type(number) is int and 0 <= number < len(chain.entries)
    return chain.entries[number] if there else {}


def _peer(entry: Entry) -> tuple[int, str, str]:
    """Return the head that an entry testifies to; one that cannot be where it is of another form."""
    peer = entry["peer"]
    if isinstance(peer, list) and len(peer) == 3 and type(peer[0]) is int:
        return peer[0], one_line(peer[1], 80), str(peer[2])
    return -1, one_line(repr(peer), 80), ""


def _place(entry: Entry) -> str:
    parts = [_shown(entry.get("kind", "?"))]
    if "round" in entry:
        parts.append(f"round {_shown(entry['round'])}")
    return ", ".join(parts)


def _name(server: Chain) -> str:
    return f"server ({_shown(server.entries[0].get('run_name', '?'))})"


def _shown(value: object) -> str:
    return one_line(value, 80)
