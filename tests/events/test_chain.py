"""A log of events: every line follows the one before, on the disk before anything happens, whatever interrupts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedspan.events import chain
from fedspan.events.chain import Head
from fedspan.events.log import EventLog
from fedspan.events.show import lines
from fedspan.events.verify import verify
from fedspan.support.errors import FedspanError


def a_log(folder: Path, count: int = 4) -> Path:
    """A log of a beginning and that many entries."""
    log = EventLog(folder / chain.FILE, {"node": "client-0", "config": "c0"})
    for k in range(count):
        log.append({"event": "received", "from": "server", "digest": f"{k:064x}"})
    return log.path


def test_every_line_holds_the_digest_of_the_line_before(tmp_path: Path) -> None:
    raw = a_log(tmp_path).read_bytes().split(b"\n")
    assert raw.pop() == b""
    entries = [json.loads(line) for line in raw]
    assert entries[0]["event"] == "begin"
    assert (entries[0]["node"], entries[0]["config"], entries[0]["previous"]) == ("client-0", "c0", "0" * 64)
    for number, (entry, line) in enumerate(zip(entries[1:], raw, strict=False), 1):
        assert entry["number"] == number
        assert entry["previous"] == chain.digest_of(line)
        assert entry["time"].endswith("Z")
    read = chain.read(tmp_path / chain.FILE)
    assert read.head == Head(4, chain.digest_of(raw[-1]), chain.digest_of(raw[0]))
    assert not read.faults
    assert (tmp_path / chain.FILE).stat().st_mode & 0o077 == 0


def edited(raw: list[bytes], at: int) -> None:
    raw[at] = raw[at].replace(b'"time":"2', b'"time":"3')


def cut(raw: list[bytes], at: int) -> None:
    del raw[at]


def moved(raw: list[bytes], at: int) -> None:
    raw[at], raw[at + 1] = raw[at + 1], raw[at]


def inserted(raw: list[bytes], at: int) -> None:
    raw.insert(at, raw[at])


def blanked(raw: list[bytes], at: int) -> None:
    raw[at] = b"no JSON" if at % 2 else b"[[1]]"


def emptied(raw: list[bytes], at: int) -> None:
    raw[at] = b""


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("change", [edited, cut, moved, inserted, blanked, emptied])
def test_a_line_that_was_changed_is_found(tmp_path: Path, change: Callable[[list[bytes], int], None], at: int) -> None:
    """Wherever it is but at the end, where only the other side's log tells; and nobody writes behind it."""
    path = a_log(tmp_path)
    raw = path.read_bytes().splitlines()
    change(raw, at)
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    assert chain.read(path).faults
    assert verify([chain.read(path)]).findings
    list(lines(chain.read(path)))
    with pytest.raises(FedspanError, match=r"expected an unbroken chain") as caught:
        EventLog(path, {"node": "client-0"})
    assert "\n" not in str(caught.value)


def test_a_beginning_that_was_cut_or_is_of_another_format_is_found(tmp_path: Path) -> None:
    path = a_log(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(b"")
    assert "holds no line" in verify([chain.read(path)]).findings[0]
    path.write_bytes(raw.replace(b'"format":1', b'"format":2'))
    assert "no beginning of a log of format 1" in chain.read(path).faults[0]


@pytest.mark.parametrize("lost", [1, 30])
def test_a_line_that_kill_interrupted_is_healed_with_an_event_that_says_so(tmp_path: Path, lost: int) -> None:
    """Even the line without its last byte, which is whole JSON."""
    path = a_log(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    read = chain.read(path)
    assert read.torn
    assert not read.faults
    assert "was interrupted" in verify([read]).notes[0]
    assert path.read_bytes() == whole[:-lost]  # a reader changes nothing

    log = EventLog(path, {"node": "client-0", "config": "c0"})
    log.append({"event": "received"})
    read = chain.read(path)
    assert not read.faults
    assert not read.torn
    assert [entry["event"] for entry in read.entries] == ["begin", *3 * ["received"], "opened", "healed", "received"]
    (healed,) = (entry for entry in read.entries if entry["event"] == "healed")
    torn = whole[whole[:-1].rindex(b"\n") + 1 : -lost]
    assert (healed["bytes"], healed["digest"]) == (len(torn), chain.digest_of(torn))
    assert any("interrupted line" in note for note in verify([read]).notes)


def test_a_full_disk_leaves_a_log_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_log(tmp_path)
    log = EventLog(path, {"node": "client-0"})

    def full(handle: int) -> None:
        path.write_bytes(path.read_bytes()[:-3])  # the last bytes found no room
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            log.append({"event": "received"})
    log.append({"event": "received"})
    read = chain.read(path)
    assert not read.faults
    assert read.head == log.head
    assert read.entries[-1]["event"] == "received"
    assert any(entry["event"] == "healed" for entry in read.entries)


def test_two_writers_never_continue_one_line(tmp_path: Path) -> None:
    """A site's command and its worker, or two starts of one run."""
    one = EventLog(tmp_path / chain.FILE, {"node": "client-0"})
    two = EventLog(tmp_path / chain.FILE, {"node": "client-0"})
    for log in (one, two, one, one, two):
        log.append({"event": "received"})
    read = chain.read(one.path)
    assert not read.faults
    assert [entry["number"] for entry in read.entries] == list(range(7))
    assert read.head == two.head


def test_a_log_that_is_cut_while_it_is_written_is_refused(tmp_path: Path) -> None:
    log = EventLog(a_log(tmp_path), {"node": "client-0"})
    log.append({"event": "received"})
    raw = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(raw[:-2]))
    with pytest.raises(FedspanError, match=r"has lost lines while it was in use: expected it only to grow"):
        log.append({"event": "received"})


def test_another_log_that_goes_back_is_noted_even_after_a_restart(tmp_path: Path) -> None:
    path, heads = tmp_path / chain.FILE, (4, 9, 9, 6)
    for number in heads:
        shown = {"event": "received", "from": "client-1", "run": "r", "peer": [number, f"{number:064x}", "ab" * 32]}
        (entry,) = EventLog(path, {"node": "server"}).append(shown)
        assert entry.get("rolled_back") == (9 if number == 6 else None)
    (finding,) = verify([chain.read(path)]).findings
    assert "client-1's log had lost lines: it had shown line 9 before" in finding


def test_a_log_is_shown_in_one_printable_line_for_each_entry(tmp_path: Path) -> None:
    log = EventLog(tmp_path / chain.FILE, {"node": "server", "keys": {"ca.crt": "ab" * 32}})
    log.append({"event": "decision", "line": "left\x1b[2J out\nround 9", "\x07key": ["x" * 500]})
    shown = list(lines(chain.read(log.path)))
    assert len(shown) == 2
    assert all(line.isprintable() for line in shown)
    assert "keys {ca.crt: abababababab…}" in shown[0]
    assert "previous" not in shown[1]
