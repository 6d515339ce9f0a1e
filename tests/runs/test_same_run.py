"""A run folder has one run at a time, is resumed only as what it began as, and holds the results of its last round."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from run_folders import Stop, StopAt, same_outcome

from fedspan.config import Config, to_toml
from fedspan.config import load as load_config
from fedspan.runs import identity
from fedspan.runs.execution import new_folder, resume, run
from fedspan.runs.folder_lock import FILES, locked
from fedspan.support.errors import FedspanError

HOLD = """
import sys, time
from pathlib import Path
from fedspan.runs.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def finished(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of a base, data and a finished run of two rounds."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(bases["bert"], folder / "base")
    tiny.write_jsonl(folder / "texts.jsonl", tiny.words())
    run(settings(folder), folder / "run")
    return folder


def settings(folder: Path, rounds: int = 2, **sections: Any) -> Config:
    federation = {"rounds": rounds, **sections.pop("federation", {})}
    return tiny.config(folder / "base", folder / "texts.jsonl", "glora", federation=federation, **sections)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Its own copy for a test; the run's settings name the original's base and data, which are the same."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_of_two_runs_the_second_is_told_of_the_first_and_a_killed_one_is_no_obstacle(copied: Path) -> None:
    out = copied / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        host = os.uname().nodename
        for attempt in (lambda: resume(out), lambda: run(settings(copied), out)):
            with pytest.raises(FedspanError, match=f"in use by a run with process id {process.pid} on {host}"):
                attempt()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (out / ".running").exists()
    resume(out)
    assert not (out / ".running").exists()


def test_two_runs_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(FedspanError, match=f"process id {os.getpid()} "), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    assert new_folder(Config(), tmp_path) == tmp_path  # nothing but the lock's own file is in it
    assert {path.name for path in tmp_path.iterdir()} <= FILES


def test_names_of_one_second_differ() -> None:
    names = {new_folder(Config(), None) for _ in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch(r"runs/glora-\d{8}-\d{6}-[0-9a-f]{6}", str(name)) for name in names)


def changed(folder: Path, **sections: Any) -> None:
    """Edit the run's own settings."""
    file = folder / "run" / "config.toml"
    tree = load_config(file).model_dump()
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    file.write_text(to_toml(Config.model_validate(tree)))


def other_data(folder: Path) -> None:
    rows = tiny.words()
    rows[0]["text"] = "other"
    tiny.write_jsonl(folder / "texts.jsonl", rows)
    changed(folder, data={"train": [str(folder / "texts.jsonl")]})


def other_base(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    tiny.save("bert", folder / "base", initializer_range=0.14)
    changed(folder, model={"name": str(folder / "base")})


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (lambda f: changed(f, local={"steps": 3}), "local.steps is 3, and it began with 2"),
    (lambda f: changed(f, seed=4), "seed is 4, and it began with 3"),
    (lambda f: changed(f, method={"server_rank": 3}), "method.server_rank is 3, and it began with None"),
    (lambda f: changed(f, engine={"autocast": "bfloat16"}), "engine.autocast is 'bfloat16'"),
    (other_data, "the test and train data is not what it began with|the train data is not what it began with"),
    (other_base, "the base .* has other weights than it began with"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_changed_is_named(copied: Path, change: Callable[[Path], None], message: str) -> None:
    change(copied)
    before = (copied / "run" / "checkpoint" / "federation.safetensors").read_bytes()
    with pytest.raises(FedspanError, match=f"cannot be resumed: .*{message}.*; expected what it began with") as caught:
        resume(copied / "run")
    assert "\n" not in str(caught.value)
    assert (copied / "run" / "checkpoint" / "federation.safetensors").read_bytes() == before


def test_a_settings_consequences_are_not_named_beside_it() -> None:
    """Another seed draws another head and other test rows: one cause."""
    began: dict[str, Any] = {"settings": {"seed": 3}, "base": "b", "data": {"train": "t"}, "libraries": {"torch": "1"}}
    now = {**began, "settings": {"seed": 4}, "base": "c", "data": {"train": "u"}}
    with pytest.raises(FedspanError) as caught:
        identity.check_identity("run", began, now)
    assert str(caught.value).startswith("run cannot be resumed: seed is 4, and it began with 3; expected what")
    with pytest.raises(FedspanError, match=r"the base .*; the train data is not"):
        identity.check_identity("run", began, {**now, "settings": {"seed": 3}})


def test_another_library_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = identity.installed_version
    monkeypatch.setattr(identity, "installed_version", lambda name: "9.9+cpu" if name == "torch" else version(name))
    with pytest.raises(FedspanError, match=r"cannot be resumed: torch is '9\.9', and it began with "):
        resume(copied / "run")


def test_what_may_change_may(copied: Path, finished: Path) -> None:
    """The base and the data elsewhere, and how the work is done."""
    (copied / "base").rename(copied / "moved")
    changed(
        copied,
        model={"name": str(copied / "moved")},
        data={"train": [str(copied / "texts.jsonl")]},
        engine={"name": "sequential", "workers": 1},
        evaluation={"batch_size": 3, "every": 2},
        threads=1,
    )
    resume(copied / "run")
    page = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    for key in identity.MAY_CHANGE:
        assert f"`{key}`" in page


def test_an_extended_run_is_a_longer_run(copied: Path, finished: Path, tmp_path: Path) -> None:
    """Even where it was interrupted on the way; its results are of the last round, or set aside."""
    out = copied / "run"
    first = {name: (out / name).read_bytes() for name in ("summary.json", "adapter/adapter_model.safetensors")}
    with pytest.raises(Stop):
        resume(out, StopAt(6), rounds=4)
    assert not (out / "adapter").exists()
    assert not (out / "summary.json").exists()
    for name, content in first.items():
        assert (out / "earlier" / "round-2" / name).read_bytes() == content
    result = resume(out)
    assert result.summary["totals"]["rounds"] == 4
    run(settings(finished, rounds=4), tmp_path / "whole")
    shutil.rmtree(out / "earlier")
    same_outcome(out, tmp_path / "whole")
    with pytest.raises(FedspanError, match="rounds = 3, but 4 are finished: expected at least as many"):
        resume(out, rounds=3)


def test_a_lost_or_spoiled_adapter_is_written_again_and_a_whole_one_is_left_alone(copied: Path) -> None:
    file = copied / "run" / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    (file.parent / "README.md").write_text("mine")
    resume(copied / "run")
    assert (file.parent / "README.md").read_text() == "mine"
    file.write_bytes(content[:-1])
    resume(copied / "run")
    assert file.read_bytes() == content
    shutil.rmtree(file.parent)
    resume(copied / "run")
    assert file.read_bytes() == content
    assert not list((copied / "run").glob(".adapter*"))


def test_a_spoiled_checkpoint_is_refused_in_one_line(copied: Path) -> None:
    """A bit of a tensor, and a figure of the history."""
    file = copied / "run" / "checkpoint" / "federation.safetensors"
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    loss = re.search(rb'train_loss\\": (\d)', content)
    assert loss is not None
    history = bytearray(content)
    history[loss.start(1)] ^= 1
    for spoiled in (flipped, history):
        file.write_bytes(bytes(spoiled))
        with pytest.raises(FedspanError, match=r"federation\.safetensors is damaged .*: expected a checkpoint"):
            resume(copied / "run")


def test_the_identity_is_plain_json(finished: Path) -> None:
    from fedspan.runs import checkpoint

    kept = checkpoint.read(finished / "run" / "checkpoint" / "federation.safetensors").identity
    assert json.loads(json.dumps(kept)) == kept
    assert set(kept) == {"settings", "base", "data", "libraries"}
    assert set(kept["libraries"]) == set(identity.LIBRARIES)
