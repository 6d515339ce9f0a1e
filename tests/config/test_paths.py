"""Relative paths in a config, and the settings that follow from training files by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedspan.config import from_mapping, load, with_absolute_paths
from fedspan.support.errors import FedspanError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in a folder of its own, with files beside it and in the working folder."""
    (tmp_path / "conf" / "base").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    for place in ("conf/both.csv", "conf/beside.csv", "here/both.csv", "here/working.csv"):
        (tmp_path / place).write_text("")
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "conf" / "my.toml"
    names = '["both.csv", "beside.csv", "working.csv"]'
    path.write_text(f'[model]\nname = "base"\n[data]\ntask = "files"\ntrain = {names}\ntest = "working.csv"\n')
    return path


def resolved(path: Path, *overrides: str) -> list[str]:
    root = path.parents[1]
    data = with_absolute_paths(load(path, overrides, must_exist=True)).data
    return [str(Path(name).relative_to(root)) for name in (*data.train, *data.test, *data.unseen)]


def test_files_of_a_glue_task_are_looked_up_like_others(config: Path) -> None:
    """And names of splits stay as they are."""
    config.write_text('[data]\ntask = "glue/sst2"\ntrain = "beside.csv"\ntest = "validation"\n')
    data = with_absolute_paths(load(config, must_exist=True)).data
    assert (data.train, data.test) == ((str(config.parent / "beside.csv"),), ("validation",))


def test_a_starting_adapter_is_looked_up_like_the_base(config: Path) -> None:
    (config.parent / "earlier").mkdir()
    config.write_text(config.read_text().replace('name = "base"', 'name = "base"\nadapter = "earlier"'))
    loaded = load(config, must_exist=True)
    assert (loaded.model.name, loaded.model.adapter) == (str(config.parent / "base"), str(config.parent / "earlier"))


def test_a_path_is_looked_up_beside_the_config_first(config: Path) -> None:
    assert resolved(config) == ["conf/both.csv", "conf/beside.csv", "here/working.csv", "here/working.csv"]
    assert load("../conf/my.toml").data.train == ("../conf/both.csv", "../conf/beside.csv", "working.csv")
    assert load(config).model.name == str(config.parent / "base")
    assert load(config, ["model.name=builtin:vit"]).model.name == "builtin:vit"


def test_a_path_on_the_command_line_begins_in_the_working_folder(config: Path) -> None:
    found = resolved(config, "data.train=both.csv", 'data.unseen=["beside.csv"]')
    assert found == ["here/both.csv", "here/working.csv", "conf/beside.csv"]


def test_a_path_that_leads_nowhere_says_where_it_was_looked_for(config: Path) -> None:
    beside, here = config.parent, Path.cwd()
    config.write_text('[data]\ntrain = "none.csv"\n')
    assert load(config).data.train == ("none.csv",), "`fedspan config` shows it all the same"
    message = rf"^data.train: none.csv does not exist: looked in {beside} and in {here}$"
    with pytest.raises(FedspanError, match=message):
        load(config, must_exist=True)
    with pytest.raises(FedspanError, match=rf"^data.test: no.csv does not exist: looked in {here} and in {beside}$"):
        load(config, ["data.train=working.csv", "data.test=no.csv"], must_exist=True)
    for wrong in ("/none.csv", "~/none.csv"):
        with pytest.raises(FedspanError, match=r"none.csv does not exist$"):
            load(config, [f"data.train={wrong}"], must_exist=True)
    with pytest.raises(FedspanError, match=r"^data.train = '': string should have at least 1 character$"):
        load(None, ["data.task=files", 'data.train=""'], must_exist=True)
    with pytest.raises(FedspanError, match=rf"looked in {here}$"):
        load(None, ["data.train=none.csv"], must_exist=True)


def federation(**sections: Any) -> tuple[str, str, int]:
    made = from_mapping(sections)
    return made.data.task, made.federation.partition, made.federation.num_clients


def test_several_training_files_are_a_client_each_unless_the_settings_say_otherwise() -> None:
    three = ["a.csv", "b.csv", "c.csv"]
    assert federation(data={"train": three}) == ("files", "files", 3)
    assert federation(data={"train_file": tuple(three)}, federation={"num_clients": 3}) == ("files", "files", 3)
    assert federation(data={"train": three}, federation={"partition": "files"}) == ("files", "files", 3)
    assert federation(data={"train": three}, federation={"partition": "iid"}) == ("files", "iid", 8)
    assert federation(data={"train": three}, federation={"num_clients": 5}) == ("files", "auto", 5)
    assert federation(data={"train": three, "field_column": "x"}) == ("files", "auto", 8)
    assert federation(data={"train": "a.csv"}) == ("files", "auto", 8)
    assert federation(data={"train": ["a.csv"]}, federation={"partition": "files"}) == ("files", "files", 1)
    assert federation(data={"train": []}) == ("builtin:tasks", "auto", 8)
    assert federation(data={"train": ["a", "b"], "task": "hub:x"}) == ("hub:x", "auto", 8)
    for wrong in ({"data": 3}, {"data": {"train": three}, "federation": 3}, {"data": {"train": 3}}):
        with pytest.raises(FedspanError):
            from_mapping(wrong)
