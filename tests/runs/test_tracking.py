"""Experiment trackers: their real files, a failure that ends no run, nothing secret, and the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from run_folders import same_outcome

from fedspan.cli.main import main
from fedspan.config import Config, from_mapping, load, to_toml
from fedspan.config.loading import with_absolute_paths
from fedspan.runs import tracking
from fedspan.runs.check import check
from fedspan.runs.events import Event
from fedspan.runs.execution import Result, resume, run
from fedspan.runs.tracking import public_settings, without_secrets
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement


@pytest.fixture(scope="module")
def settings(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    data = tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "patients-of-ward-7.jsonl", tiny.words())

    def make(rounds: int = 2, **of_tracking: Any) -> Config:
        return from_mapping(
            {
                "model": {"name": str(bases["bert"])},
                "data": {"task": "files", "train": [str(data)], "max_train": 40, "max_test": 12},
                "federation": {"num_clients": 2, "rounds": rounds, "partition": "iid", "ranks": 2},
                "local": {"steps": 1, "batch_size": 4},
                "evaluation": {"local": False, "base": False},
                "tracking": of_tracking,
            }
        )

    return make


@pytest.fixture(scope="module")
def plain(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a tracker."""
    return run(settings(), tmp_path_factory.mktemp("plain") / "run").out


class Fake:
    """A tracker of accelerate's kind that fails at one of its calls."""

    fails_at: str = ""
    seen: list[tuple[str, Any]]

    def __init__(self, **arguments: Any) -> None:
        self._note("init", arguments)

    def start(self) -> None:
        self._note("start", None)

    def store_init_configuration(self, values: Any) -> None:
        self._note("settings", values)

    def log(self, values: Any, step: int) -> None:
        self._note("log", (step, values))

    def finish(self) -> None:
        self._note("finish", None)

    def _note(self, kind: str, value: Any) -> None:
        type(self).seen.append((kind, value))
        if kind == type(self).fails_at:
            raise ConnectionError("no answer from https://ann:hunter2@tracker.example/api with s3cr3t-t0ken\nbye")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    class Own(Fake):
        seen: list[tuple[str, Any]] = []  # noqa: RUF012

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "aim", Own)
    monkeypatch.setattr(tracking, "_is_installed", lambda distribution: True)
    monkeypatch.setenv("TRACKER_API_KEY", "s3cr3t-t0ken")
    return Own


def test_every_round_is_logged_and_no_bit_changes(
    settings: Callable[..., Config], plain: Path, tmp_path: Path, fake: type[Fake]
) -> None:
    result = run(settings(**{"with": "aim", "project": "wards"}), tmp_path / "run")
    kinds = [kind for kind, _ in fake.seen]
    assert kinds == ["init", "start", "settings", "log", "log", "log", "finish"]
    for (step, values), record in zip([v for k, v in fake.seen if k == "log"][:2], result.history, strict=True):
        assert step == record["round_num"]
        assert values["train/loss"] == record["train_loss"]
        assert values["eval/accuracy"] == record["eval"]["accuracy"]
        assert values["traffic/bytes_up"] == record["bytes_up"]
        assert values["seconds/server"] == record["server_seconds"]
    assert fake.seen[-2][1][1]["final/federated"] == result.summary["federated"]
    told = json.dumps(fake.seen, default=str)
    assert "ward-7" not in told.replace(str(tmp_path), "")
    # The settings name the tracker; everything else is the same.
    text = (result.out / "config.toml").read_text()
    (result.out / "config.toml").write_text(text.replace('with = ["aim"]', "with = []").replace('"wards"', '"fedspan"'))
    same_outcome(result.out, plain)


@pytest.mark.parametrize("at", ["init", "start", "settings", "log", "finish"])
def test_a_tracker_that_fails_ends_no_run(
    settings: Callable[..., Config], tmp_path: Path, fake: type[Fake], at: str
) -> None:
    fake.fails_at = at
    lines: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "note":
            lines.append(event.data["line"])

    result = run(settings(rounds=1, **{"with": ["aim", "aim"]}), tmp_path / "run", listen)
    assert len(result.history) == 1
    failures = [line for line in lines if line.startswith("the tracker aim is left out: ConnectionError: no answer")]
    assert len(failures) == 1
    assert "https://***@tracker.example/api with *** bye" in failures[0]
    assert "hunter2" not in "".join(lines)


def test_an_interrupted_run_lets_its_tracker_finish(
    settings: Callable[..., Config], tmp_path: Path, fake: type[Fake]
) -> None:
    def stop(event: Event) -> None:
        if event.kind == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings(**{"with": "aim"}), tmp_path / "run", stop)
    assert fake.seen[-1][0] == "finish"


def test_trackers_are_no_part_of_what_sites_agree_on_nor_of_a_runs_identity(settings: Callable[..., Config]) -> None:
    from fedspan.runs.identity import identity

    without, tracked = settings(), settings(**{"with": "mlflow", "project": "p", "group": "g", "folder": "logs"})
    assert agreement.terms(without) == agreement.terms(tracked)
    assert identity(without, "base", {}) == identity(tracked, "base", {})


def test_paths_and_secrets_stay_here(settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(**{"with": "mlflow", "folder": "logs"})
    told = public_settings(config)
    assert not {"data.train", "data.test", "model.adapter", "tracking.folder"} & told.keys()
    assert told["model.name"] == "bert"
    assert "ward-7" not in json.dumps(told)
    assert told["federation.ranks"] == 2
    monkeypatch.setenv("WANDB_API_KEY", "abcd1234")
    assert without_secrets(OSError("key abcd1234 at postgres://u:p@h/db")) == "OSError: key *** at postgres://***@h/db"


def test_settings_are_read_written_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(overrides=["tracking.with=tensorboard", "tracking.group=a b", "tracking.folder=logs"])
    assert config.tracking.trackers == ("tensorboard",)
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load(tmp_path / "c.toml") == config
    assert Path(with_absolute_paths(config).tracking.folder or "").is_absolute()
    for item, expected in (
        ('tracking.with=["tensorbord"]', "tracking.with"),
        ("tracking.project=../up", "tracking.project"),
        ("tracking.group=a'b", "tracking.group"),
        ("tracking.wit=aim", "tracking.with"),
    ):
        assert main(["config", "--set", item]) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("attempt", [run, check])
def test_a_tracker_that_is_not_installed_is_refused_before_anything(
    attempt: Callable[..., object], settings: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_is_installed", lambda distribution: False)
    with pytest.raises(
        FedspanError, match=r"tracking\.with names 'mlflow', which is not installed: pip install mlflow"
    ):
        attempt(settings(**{"with": "mlflow"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def tracked_and_resumed(settings: Callable[..., Config], out: Path, name: str) -> Result:
    """Two rounds, then a third."""
    run(settings(**{"with": name, "project": "wards", "group": "g", "folder": str(out.parent / "logs")}), out)
    return resume(out, rounds=3)


def test_tensorboard_files_hold_the_figures(settings: Callable[..., Config], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tracked_and_resumed(settings, tmp_path / "run", "tensorboard")
    folders = {file.parent for file in (tmp_path / "logs").rglob("events.*")}
    assert folders == {tmp_path / "logs" / "wards" / "g" / "run"}
    events = EventAccumulator(str(folders.pop()))
    events.Reload()
    for key, value in (("train/loss", lambda r: r["train_loss"]), ("eval/accuracy", lambda r: r["eval"]["accuracy"])):
        read = [(event.step, event.value) for event in events.Scalars(key)]
        assert read == [(r["round_num"], pytest.approx(value(r))) for r in result.history]
    assert len(events.Tags()["tensors"]) == 1  # the settings, once


@pytest.mark.slow
def test_mlflow_files_hold_the_figures(
    settings: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    result = tracked_and_resumed(settings, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("wards")
    (only,) = client.search_runs([experiment.experiment_id])
    assert (only.info.run_name, only.info.status, only.data.tags["group"]) == ("run", "FINISHED", "g")
    assert only.data.params["local.steps"] == "1"
    read = [(m.step, m.value) for m in client.get_metric_history(only.info.run_id, "train/loss")]
    assert read == [(r["round_num"], pytest.approx(r["train_loss"])) for r in result.history]
    assert "ward-7" not in json.dumps(only.to_dictionary())
