"""No process of a tree outlives the one that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedspan.flower.process_tree import ProcessTree, marked

# One that starts another in a session of its own, and one whose environment is empty and that may ignore SIGTERM.
PARENT = """
import sys, time
from pathlib import Path
from fedspan.flower.process_tree import ProcessTree
with ProcessTree(Path(sys.argv[1])) as tree:
    tree.start("detaching", ["sh", "-c", "setsid sleep 1000 & echo $!; echo $$; sleep 1000"], Path("."), {})
    stubborn = sys.argv[3] + "echo $$; while :; do sleep 0.1; done"
    tree.start("hidden", ["env", "-i", "sh", "-c", stubborn], Path("."), {})
    print(tree._mark, flush=True)
    time.sleep(1000 if sys.argv[2] == "stay" else 0.5)
"""


def is_alive(pid: int) -> bool:
    """Zombies are dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def started_pids(logs: Path) -> list[int]:
    """Return the ids that all three processes have printed."""
    for _ in range(200):
        words = [path.read_text().split() for path in (logs / "detaching.log", logs / "hidden.log") if path.exists()]
        if [len(lines) for lines in words] == [2, 1]:
            return [int(pid) for lines in words for pid in lines]
        time.sleep(0.05)
    raise AssertionError("the processes did not start")


def test_nothing_survives_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path), "stay", "trap '' TERM;"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert parent.stdout is not None
        mark = parent.stdout.readline().strip()
        pids = started_pids(tmp_path)
        assert all(is_alive(pid) for pid in pids)
        assert len(marked(mark)) >= 3  # the two that carry the mark, and the first one's child
        os.killpg(parent.pid, signal.SIGKILL)  # with whatever is in its group
        parent.wait(10)
        assert gone_within(pids, 15)
        assert marked(mark) == []
    finally:
        parent.kill()
        parent.wait()


def test_leaving_ends_everything(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PARENT, str(tmp_path), "leave", ""], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not any(is_alive(pid) for pid in started_pids(tmp_path))


def test_an_error_ends_everything_and_is_told_with_the_last_line(tmp_path: Path) -> None:
    def fail() -> None:
        with ProcessTree(tmp_path) as tree:
            tree.start("long", ["sh", "-c", "echo $$; sleep 1000"], tmp_path, {})
            tree.wait("long", lambda: (tmp_path / "long.log").read_text() != "", 10)
            tree.start("short", ["sh", "-c", "echo hello; echo and this went wrong; exit 3"], tmp_path, {})
            tree.wait("short", lambda: False, 10)

    with pytest.raises(ValueError, match=r"^short ended \(exit status 3\): and this went wrong; all of it is in"):
        fail()
    assert not is_alive(int((tmp_path / "long.log").read_text()))


def test_processes_end_in_reverse_order(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with ProcessTree(tmp_path / "logs") as tree:
        for name in ("first", "second"):
            script = f"trap 'echo {name} >>{said}; exit 0' TERM; touch {tmp_path / name}; while :; do sleep 0.05; done"
            tree.start(name, ["sh", "-c", script], tmp_path, {})
            tree.wait(name, (tmp_path / name).exists, 10)
    assert said.read_text().split() == ["second", "first"]


def test_a_process_is_told_from_another_with_its_number() -> None:
    from fedspan.flower.process_tree import _start_time

    assert _start_time(os.getpid()) == _start_time(os.getpid()) != _start_time(1)
    assert _start_time(2**22 + 1) == "unknown"  # above the largest number that there can be
