"""Settings: what TOML and `--set` accept, and what a mistake is answered with."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspan.config import Config, _valid_keys, from_mapping, load, to_toml

texts = st.text(max_size=20)
names = st.lists(texts, max_size=3)
positive = st.integers(1, 2**40)
positive_floats = st.floats(min_value=1e-30, max_value=1e30)
shares = st.floats(min_value=0, max_value=1, exclude_max=True)


def sections(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


CONFIGS = sections(
    seed=st.integers(0, 2**31),
    device=texts,
    threads=positive,
    model=sections(name=texts, dtype=st.sampled_from(["float32", "bfloat16"])),
    adapter=sections(target_modules=names, alpha=positive_floats, rslora=st.booleans(), dropout=shares),
    data=sections(
        kind=st.sampled_from(["instruction", "classification", "image"]),
        train=names,
        field_column=texts,
        template=texts,
        metric=texts,
        max_train=positive,
        client_holdout=shares,
    ),
    federation=sections(
        num_clients=positive,
        participation=st.floats(min_value=0, max_value=1, exclude_min=True),
        ranks=st.one_of(positive, st.lists(positive, max_size=4), st.sampled_from(["uniform", "heavy_tail"])),
        alpha=positive_floats,
        drop_empty=st.booleans(),
    ),
    local=st.one_of(
        sections(steps=positive, clip_norm=positive_floats), sections(epochs=positive, learning_rate=positive_floats)
    ),
    evaluation=sections(max_examples=positive, base=st.booleans()),
    method=st.fixed_dictionaries({"name": texts}, optional={"tolerance": shares, "server_rank": positive}),
)


@given(CONFIGS)
def test_written_settings_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    config = from_mapping(tree)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path) == config


@pytest.mark.parametrize(
    "tree",
    [
        {"local": {"clip_norm": None}},
        {"method": {"name": "fedftg", "galore_rank": None}},
    ],
)
def test_nothing_reads_back_as_nothing(tmp_path: Path, tree: dict[str, Any]) -> None:
    """A value of none must not come back as the default."""
    from fedspan import create_method

    config = from_mapping(tree)
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    again = load(tmp_path / "config.toml")
    assert again.local.clip_norm == config.local.clip_norm
    create_method(**again.method)
    if config.method["name"] == "fedftg":
        assert again.method.get("galore_rank", "left out") in (None, "none")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("federation.rounds=3", lambda c: c.federation.rounds == 3),
        ("federation.ranks=[2, 4]", lambda c: c.federation.ranks == (2, 4)),
        ("federation.ranks=8", lambda c: c.federation.ranks == 8),
        ("federation.ranks=normal", lambda c: c.federation.ranks == "normal"),
        ("data.task=builtin:tasks", lambda c: c.data.task == "builtin:tasks"),
        ('data.task="files"', lambda c: c.data.task == "files"),
        ("data.train=a.jsonl", lambda c: c.data.train == ("a.jsonl",)),
        ("data.train=['a.jsonl', 'b.jsonl']", lambda c: c.data.train == ("a.jsonl", "b.jsonl")),
        ("local.learning_rate=1e-3", lambda c: c.local.learning_rate == 1e-3),
        ("method.server_rank=auto", lambda c: c.method["server_rank"] == "auto"),
        (" seed = 7 ", lambda c: c.seed == 7),
    ],
)
def test_overrides(override: str, read: Any) -> None:
    assert read(load(overrides=["method.name=glora", override]))


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("seed = 1\n[federation]\nrounds = 5\nnum_clients = 3\n")
    config = load(path, ["federation.rounds=6", "federation.rounds=7"])
    assert (config.seed, config.federation.rounds, config.federation.num_clients) == (1, 7, 3)


def test_the_digits_bring_their_own_base_and_partition() -> None:
    config = load(overrides=["data.task=builtin:digits"])
    assert (config.model.name, config.federation.partition) == ("builtin:vit", "dirichlet")
    mine = load(overrides=["data.task=builtin:digits", "federation.partition=iid"])
    assert mine.federation.partition == "iid"


@given(st.sampled_from([key for key in _valid_keys() if "." in key]), st.data())
def test_a_slip_in_a_key_names_a_valid_one(key: str, data: st.DataObject) -> None:
    """One letter lost from any setting's name: the answer suggests a setting, nearly always that one."""
    section, _, name = key.partition(".")
    place = data.draw(st.integers(0, len(name) - 1))
    wrong = f"{section}.{name[:place]}{name[place + 1 :]}"
    if wrong in _valid_keys() or wrong.endswith("."):
        return
    with pytest.raises(ValueError, match=r"unknown key .*; did you mean '[a-z0-9_.]+'\?$") as error:
        load(overrides=[f"{wrong}=1"])
    assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fedration.rounds=3", "unknown key 'fedration'; did you mean 'federation'?"),
        ("federation.round=3", "unknown key 'federation.round'; did you mean 'federation.rounds'?"),
        ("federation.rounds=0", "federation.rounds = 0: input should be greater than or equal to 1"),
        ("federation.participation=1.5", "federation.participation = 1.5: .* less than or equal to 1"),
        ("federation.partition=idd", "federation.partition = 'idd': .*'iid'"),
        ("local.learning_rate=-1", "local.learning_rate = -1: .* greater than 0"),
        ("local.learning_rate=fast", "local.learning_rate = 'fast': .* number"),
        ("local.learning_rate=inf", "local.learning_rate = inf: .* finite"),
        ("local.learning_rate=nan", "local.learning_rate = nan: "),
        ("model.dtype=int8", "model.dtype = 'int8': .*'float32'"),
        ("seed.x=1", "seed"),
        ("rounds", "expected key=value"),
        ("=3", "expected key=value"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        load(overrides=[override])
    assert "\n" not in str(error.value)


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"local\.steps or local\.epochs"):
        load(overrides=["local.steps=1", "local.epochs=1"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the config .*none\.toml"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[federation\n")
    with pytest.raises(ValueError, match=r"bad\.toml is not valid TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.toml is not valid TOML"):
        load(tmp_path / "binary.toml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3


def test_an_option_of_the_default_method_needs_no_name() -> None:
    assert load(overrides=["method.balance=root"]).method == {"name": "glora", "balance": "root"}
    assert load(overrides=["method.name=flora"]).method == {"name": "flora"}
