"""The logs of a whole federation: they agree, hold no data, and show whatever is changed at one end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites, remote_config

from fedspan.cli.main import main
from fedspan.config import Config
from fedspan.events import chain, places
from fedspan.events.log import EventLog
from fedspan.events.verify import Report, verify
from fedspan.runs.execution import serve
from fedspan.site.site import Site
from fedspan.wire import protocol
from fedspan.wire.envelope import opened

IDS = ["client-0", "client-1", "client-2"]


def settings(base: Path, texts: Path, /, rounds: int = 2, **sections: Any) -> Config:
    return remote_config(
        base,
        texts,
        "ffa_lora",
        federation={"num_clients": 3, "rounds": rounds, "participation": 1.0, "ranks": 4},
        **sections,
    )


class Logged:
    """A server and three sites in memory, with everything that they told each other."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.sites = make_sites(config, IDS, folder / "sites")
        self.transport = MemoryTransport({f"node-{k}": self.answering(name) for k, name in enumerate(IDS)})
        self.said: list[bytes] = []

    def answering(self, name: str) -> Callable[[bytes], bytes]:
        def answer(content: bytes) -> bytes:
            reply = self.sites[name].answer(content)
            self.said += [content, reply]
            return reply

        return answer

    def restart(self, name: str) -> None:
        old = self.sites[name]
        self.sites[name] = Site(old.settings, old.folder, old.loaded)

    def serve(self) -> None:
        serve(self.config, self.folder / "server" / "runs" / "trial", lambda event: None, self.transport)


@pytest.fixture(scope="module")
def secure(bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """A finished run under secure sums."""
    config = settings(bases["bert"], texts, privacy={"secure_sums": True, "min_clients": 3})
    fed = Logged(config, tmp_path_factory.mktemp("logged"))
    fed.serve()
    return fed


@pytest.fixture
def copy(secure: Logged, tmp_path: Path) -> Path:
    """The logs of that run, to be changed."""
    for path in places.logs_in(secure.folder):
        target = tmp_path / path.relative_to(secure.folder)
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    return tmp_path


def report_on(folder: Path) -> Report:
    return verify([chain.read(path) for path in places.logs_in(folder)])


def log_of(folder: Path, side: str) -> Path:
    return folder / "server/runs/trial" / chain.FILE if side == "server" else folder / "sites" / side / chain.FILE


def rewritten(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change a log's entries and make the whole chain anew, as somebody would who knows how it is made."""
    entries = [dict(entry) for entry in chain.read(path).entries]
    change(entries)
    content, previous = b"", chain.GENESIS
    for number, entry in enumerate(entries):
        line = chain.line_of({**entry, "number": number, "previous": previous})
        previous = chain.digest_of(line[:-1])
        content += line
    path.write_bytes(content)


def test_the_logs_of_a_run_agree(secure: Logged, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_on(secure.folder)
    assert (report.findings, report.notes) == ([], [])
    assert len(report.checked) == 4 + 3
    # Keys, shares, their delivery, and for each of two rounds a vector and the unmasking.
    assert "client-1: 7 of 7 messages received as they were sent, 7 of 7 answers arrived" in report.checked[5]
    assert main(["log", "verify", str(secure.folder)]) == 0
    assert capsys.readouterr().out.splitlines() == report.checked
    assert main(["log", "show", str(secure.folder), "--last", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 * 3


def test_a_log_says_who_did_what_when_and_the_result(secure: Logged) -> None:
    server = chain.read(log_of(secure.folder, "server")).entries
    assert (server[0]["node"], server[0]["run_name"]) == ("server", "trial")
    assert server[0]["config"] == chain.read(log_of(secure.folder, "client-2")).entries[0]["config"]
    kinds = [entry["kind"] for entry in server if entry["event"] == "sent" and entry["to"] == "client-0"]
    masked = ["question", "question to unmask"]
    # Nobody has a name before its introduction.
    assert kinds == ["question for keys", "question for shares", "shares", *masked, *masked]
    assert [entry["kind"] for entry in server if entry["event"] == "sent"][:3] == 3 * ["greeting"]
    (unmasking, *_) = (entry for entry in server if entry.get("kind") == "question to unmask")
    assert unmasking["survivors"] == IDS
    assert [entry["round"] for entry in server if entry["event"] == "round"] == [1, 2]
    results = server[-1]["results"]
    assert server[-1]["event"] == "end"
    summary = (secure.folder / "server/runs/trial/summary.json").read_bytes()
    assert results["summary.json"] == chain.digest_of(summary)
    assert any(name.startswith("adapter/") for name in results)
    assert any("client-0 is here" in entry["line"] for entry in server if entry["event"] == "decision")


def numbers_in(value: Any, key: str = "") -> set[tuple[str, Any]]:
    """Every number of an entry, with the name of its field."""
    if isinstance(value, dict):
        return {pair for name, each in value.items() for pair in numbers_in(each, name)}
    if isinstance(value, list):
        return {pair for each in value for pair in numbers_in(each, key)}
    return {(key, value)} if isinstance(value, int | float) else set()


COUNTS = {"number", "format", "round", "exchange", "size", "question", "peer", "rank", "sum", "threshold", "num_sums"}
COUNTS |= {"num_clients", "wire_up", "wire_down"}


@pytest.mark.parametrize("masked", [True, False], ids=["secure sums", "in the open"])
def test_no_number_of_an_update_and_no_text_of_a_row_is_in_a_log(
    bases: dict[str, Path], texts: Path, secure: Logged, tmp_path: Path, masked: bool
) -> None:
    """Of numbers there are whole ones only, each a count of a named kind; and no word of the data stands anywhere."""
    fed = secure
    if not masked:
        fed = Logged(settings(bases["bert"], texts, rounds=1), tmp_path)
        fed.serve()
    words = {word for row in tiny.words() for word in str(row["text"]).split() if len(word) > 3}
    assert len(words) > 3
    tensors = [t for content in fed.said for t in protocol.decode(opened(content)[1])[1] if t.is_floating_point()]
    values = torch.cat([t.flatten().double() for t in tensors]).unique().tolist()
    assert len(values) > 100
    shown = {f"{value:.{digits}g}" for value in values for digits in (5, 7, 9) if abs(value) > 1e-3 and value % 1}
    for path in places.logs_in(fed.folder):
        text = re.sub(r'"(time|version)":"[^"]*"', "", path.read_text())
        for entry in chain.read(path).entries:
            assert {type(number) for _, number in numbers_in(entry)} <= {int}
            assert {key for key, _ in numbers_in(entry)} <= COUNTS
        assert not {word for word in words if word in text}
        assert not {value for value in shown if value in text}


@pytest.mark.parametrize("side", ["server", "client-1"])
@pytest.mark.parametrize("where", [0, 1, 7, -3, -2])
@pytest.mark.parametrize("how", ["edit", "cut", "move", "insert"])
def test_a_line_that_was_changed_is_found(copy: Path, side: str, where: int, how: str) -> None:
    path = log_of(copy, side)
    raw = path.read_bytes().splitlines()
    if how == "edit":
        raw[where] = raw[where].replace(b'"event":"', b'"event":"x', 1)
    elif how == "cut":
        del raw[where]
    elif how == "move":
        raw[where], raw[where + 1] = raw[where + 1], raw[where]
    else:
        raw.insert(where, raw[where])
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    assert any(str(path) in finding for finding in report_on(copy).findings)


def change_digest(entries: list[dict[str, Any]]) -> None:
    next(entry for entry in entries if entry.get("kind") == "question")["digest"] = "ab" * 32


def drop_an_answer(entries: list[dict[str, Any]]) -> None:
    answers = [entry for entry in entries if entry["event"] in ("answered", "received") and "round" in entry]
    entries.remove(answers[3])


def swap_times(entries: list[dict[str, Any]]) -> None:
    entries[4]["time"], entries[9]["time"] = entries[9]["time"], entries[4]["time"]


def begin_elsewhere(entries: list[dict[str, Any]]) -> None:
    entries[0]["config"] = "another"


@pytest.mark.parametrize("side", ["server", "client-1"])
@pytest.mark.parametrize("change", [change_digest, drop_an_answer, swap_times, begin_elsewhere])
def test_a_chain_that_was_made_anew_is_found_by_the_other_sides_log(
    copy: Path, side: str, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    """By itself it is whole, and nothing but the heads that the other side was shown tell."""
    path = log_of(copy, side)
    rewritten(path, change)
    assert not chain.read(path).faults
    assert not verify([chain.read(path)]).findings
    assert any(str(path) in finding and "made anew" in finding for finding in report_on(copy).findings)


@pytest.mark.parametrize("side", ["server", "client-1"])
def test_a_log_whose_end_was_cut_is_found_up_to_the_last_contact(copy: Path, side: str) -> None:
    """And only up to there, as the documentation says: what nobody else has seen can be cut."""
    path = log_of(copy, side)
    raw = path.read_bytes().splitlines(keepends=True)
    events = [json.loads(line)["event"] for line in raw]
    # The site's last answer has shown its own line; of the server's, the last message has.
    last = len(raw) if side != "server" else len(events) - events[::-1].index("sent")
    for kept in (last, last - 1, last - 5, 5):
        path.write_bytes(b"".join(raw[:kept]))
        found = [finding for finding in report_on(copy).findings if str(path) in finding]
        assert bool(found) == (kept < last), kept
        assert not chain.read(path).faults


def test_lines_of_any_form_end_in_findings_and_never_in_an_error(copy: Path) -> None:
    for side in ("server", "client-1"):
        path = log_of(copy, side)

        def odd(entries: list[dict[str, Any]]) -> None:
            for number, entry in enumerate(entries[1:]):
                for key in list(entry)[3:]:
                    entry[key] = ([], {"a": [1]}, None, 1e9, "\x1b[2J", -5, True)[number % 7]
            entries.append({"event": "received", "peer": {"a": 1}, "from": ["x"], "run": {}, "question": 10**30})

        rewritten(path, odd)
    report = report_on(copy)
    assert len(report.notes) > 1  # of runs that neither side seems to know any more
    assert all(line.isprintable() for line in (*report.checked, *report.notes, *report.findings))


def test_the_command_fails_on_a_finding_and_names_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log_of(copy, "client-1")
    path.write_bytes(path.read_bytes().replace(b'"kind":"keys"', b'"kind":"Keys"', 1))
    assert main(["log", "verify", str(copy / "server"), str(copy / "sites" / "client-1")]) == 2
    done = capsys.readouterr()
    assert "FOUND: " in done.out
    assert "client-0 was not given" in done.out
    assert done.err.startswith("fedspan: ")
    assert "expected logs that are whole and agree" in done.err
    assert main(["log", "verify", str(copy / "sites" / "nobody")]) == 2
    assert "nobody does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["to the site", "to the server"])
def test_a_message_that_was_changed_on_the_way_is_found(
    bases: dict[str, Path], texts: Path, tmp_path: Path, way: str
) -> None:
    """By somebody in the middle who keeps to every form, so that both sides take it for good."""
    fed = Logged(settings(bases["bert"], texts, rounds=1), tmp_path)
    honest = fed.transport.handlers["node-1"]

    def changed(content: bytes) -> bytes:
        head, tensors = protocol.decode(content)
        outgoing = protocol.MessageTensors()
        for tensor in tensors:
            outgoing.put(tensor * 0.5 if tensor.dtype == torch.float32 else tensor)
        return protocol.encode(head, outgoing)

    def between(content: bytes) -> bytes:
        is_question = protocol.decode(content)[0]["kind"] == "ask"
        if is_question and way == "to the site":
            head, tensors = protocol.decode(content)
            outgoing = protocol.MessageTensors()
            for tensor in tensors:
                outgoing.put(tensor)
            return honest(protocol.encode({**head, "keep": not head["keep"]}, outgoing))
        return changed(honest(content)) if is_question else honest(content)

    fed.transport.handlers["node-1"] = between
    fed.serve()
    report = report_on(tmp_path)
    assert any("client-1" in finding and "digest" in finding for finding in report.findings)
    assert not any("client-0" in finding or "client-2" in finding for finding in report.findings)


def test_lost_answers_restarts_and_a_resumed_run_are_no_findings(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """Of each there is an entry; one site's log is put back to an older copy meanwhile, and both sides say so."""
    fed = Logged(settings(bases["bert"], texts, rounds=3), tmp_path)
    old: dict[str, bytes] = {}

    def mishap(node: str, head: dict[str, Any], content: bytes) -> str | None:
        if head.get("round") == 0 and node == "node-0":
            return "the node is not connected"
        if head.get("round") == 1 and node == "node-1":
            fed.restart("client-1")
        if head.get("round") == 1 and node == "node-2":
            fed.sites["client-2"].answer(content)
            return ""  # the answer is lost on its way
        return None

    fed.transport.mishap = mishap
    fed.serve()
    report = report_on(tmp_path)
    assert report.findings == []
    server = chain.read(log_of(tmp_path, "server")).entries
    assert [entry["reason"] for entry in server if entry["event"] == "unanswered"] == [
        "the node is not connected",
        "not waited for any longer",
    ]
    assert any(entry["event"] == "opened" for entry in chain.read(log_of(tmp_path, "client-1")).entries)
    assert [sorted(entry["rejected"]) for entry in server if entry["event"] == "round"] == [
        ["client-0"],
        ["client-2"],
        [],
    ]
    old["client-0"] = log_of(tmp_path, "client-0").read_bytes()

    lines: list[str] = []
    more = fed.config.model_copy(update={"federation": fed.config.federation.model_copy(update={"rounds": 5})})
    out = tmp_path / "server/runs/trial"
    path = out / "config.toml"
    path.write_text(path.read_text().replace("rounds = 3", "rounds = 5", 1))
    cut = b"".join(old["client-0"].splitlines(keepends=True)[:1])
    log_of(tmp_path, "client-0").write_bytes(cut)
    fed.restart("client-0")
    serve(more, out, lambda e: lines.append(e.data["line"]) if e.kind == "site" else None, fed.transport)
    assert any("the log of client-0 ends at line" in line and "were cut" in line for line in lines)
    report = report_on(tmp_path)
    assert any("client-0's log had lost lines" in finding for finding in report.findings)
    assert any(str(log_of(tmp_path, "client-0")) in finding for finding in report.findings)
    assert not any("client-1" in finding for finding in report.findings)


def test_what_cannot_be_written_down_is_not_done(
    secure: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site whose disk is full answers with a refusal, and nothing is trained."""
    site, worked = secure.sites["client-0"], []
    monkeypatch.setattr(EventLog, "append", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    monkeypatch.setattr(site, "_reply", worked.append)
    content = next(content for content in secure.said if content[:4] == b"FSPE")
    head, _ = protocol.decode(site.answer(content))
    assert head["code"] == "failed"
    assert not worked
