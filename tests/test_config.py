"""Settings: what TOML and `--set` accept, and what a mistake is answered with."""

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.comparison.suite import read as read_suite
from fedspan.comparison.trees import merged
from fedspan.config import ALIASES, Config, from_mapping, json_schema, load, to_toml, valid_keys
from fedspan.config.aliases import RENAMED

ROOT = Path(__file__).parents[1]

texts = st.text(max_size=20)
names = st.lists(texts, max_size=3)
# None of a folder that is everywhere, such as "..", which would be found beside the file.
paths = texts.filter(lambda text: bool(set(text) - set("./~")))
positive = st.integers(1, 2**40)
positive_floats = st.floats(min_value=1e-30, max_value=1e30)
shares = st.floats(min_value=0, max_value=1, exclude_max=True)


def sections(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


CONFIGS = sections(
    seed=st.integers(0, 2**31),
    device=texts,
    threads=st.integers(1, 1024),
    model=sections(name=paths, dtype=st.sampled_from(["float32", "bfloat16"])),
    adapter=sections(target_modules=names, alpha=positive_floats, rslora=st.booleans(), dropout=shares),
    data=sections(
        kind=st.sampled_from(["instruction", "classification", "image"]),
        train=st.lists(paths, max_size=3),
        field_column=texts,
        template=texts,
        metrics=st.lists(texts, max_size=3),
        max_train=positive,
        client_holdout=shares,
    ),
    federation=sections(
        num_clients=st.integers(1, 1_000_000),
        participation=st.floats(min_value=0, max_value=1, exclude_min=True),
        ranks=st.one_of(positive, st.lists(positive, max_size=4), st.sampled_from(["uniform", "heavy_tail"])),
        dirichlet_alpha=positive_floats,
        drop_empty=st.booleans(),
    ),
    local=st.one_of(
        sections(steps=positive, clip_norm=positive_floats), sections(epochs=positive, learning_rate=positive_floats)
    ),
    evaluation=sections(max_examples=positive, base=st.booleans()),
    method=st.fixed_dictionaries({"name": texts}, optional={"tolerance": shares, "server_rank": positive}),
)


@pytest.fixture(scope="module")
def schema_check() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator(json_schema())


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.toml"


@given(CONFIGS)
@settings(max_examples=60, deadline=None)
def test_written_settings_read_back_the_same(config_file: Path, schema_check: Any, tree: dict[str, Any]) -> None:
    config = from_mapping(tree)
    text = to_toml(config)
    config_file.write_text(text, encoding="utf-8")
    assert load(config_file) == config
    schema_check.validate(tomllib.loads(text))


def suites() -> list[dict[str, Any]]:
    """The settings of every benchmark under each of its conditions."""
    read = map(read_suite, sorted(ROOT.glob("benchmarks/*/suite.toml")))
    return [merged(suite.base, condition.settings) for suite in read for condition in suite.conditions]


@pytest.mark.parametrize("tree", [{}, tomllib.loads((ROOT / "examples/own_data/config.toml").read_text()), *suites()])
def test_every_setting_is_written_and_reads_back_the_same(tree: dict[str, Any]) -> None:
    """One line for each, commented out where it is unset, below its explanation."""
    config = from_mapping(tree)
    text = to_toml(config)
    assert from_mapping(tomllib.loads(text)) == config
    assert max(map(len, text.splitlines())) <= 100
    section, written = "", []
    lines = text.splitlines()
    for above, line in pairwise(lines):
        if line.startswith("["):
            section = line.strip("[]") + "."
            written.append(section[:-1])
        elif " = " in line and not line.startswith("# "):
            written.append(section + line.removeprefix("#").partition(" = ")[0])
        else:
            continue
        assert above.startswith("# ") or section == "method.", line
    assert [key for key in written if not key.startswith("method.")] == list(section_first(valid_keys()))


def section_first(keys: list[str]) -> list[str]:
    """A section ahead of its settings, as in a file."""
    return sorted(keys, key=lambda key: (keys.index(key.partition(".")[0]), "." in key))


def test_the_schema_is_one_and_explains_every_setting(schema_check: Any) -> None:
    schema, check = json_schema(), schema_check
    check.check_schema(schema)
    for part in (schema, *schema["$defs"].values()):
        for name, entry in part["properties"].items():
            assert "$ref" in entry or entry["description"].rstrip().endswith("."), name
    assert check.is_valid({"local": {"max_steps": 5, "clip_norm": "none"}, "data": {"train": "one.jsonl"}})
    for wrong in ({"local": {"step": 5}}, {"local": {"steps": 0}}, {"federation": {"alpha": 0.5}}):
        assert not check.is_valid(wrong)


# A value of each setting that has an alias, other than its default.
VALUES: dict[str, Any] = {
    "adapter.layers": [0, 2],
    "adapter.alpha": 3.0,
    "adapter.dropout": 0.25,
    "adapter.rslora": True,
    "data.metrics": ["auroc"],
    "data.max_length": 77,
    "data.max_test": 77,
    "data.max_train": 77,
    "data.subset": "x",
    "data.test": "x.jsonl",
    "data.train": "x.jsonl",
    "engine.checkpointing": True,
    "evaluation.batch_size": 3,
    "federation.min_clients": 3,
    "federation.num_clients": 3,
    "federation.participation": 0.25,
    "federation.ranks": 3,
    "federation.rounds": 3,
    "local.batch_size": 3,
    "local.clip_norm": 3.0,
    "local.epochs": 3,
    "local.head_learning_rate": 0.25,
    "local.lora_plus_ratio": 3.0,
    "local.schedule": "linear",
    "local.steps": 3,
    "local.warmup": 0.25,
    "model.dtype": "float16",
    "model.name": "x",
    "privacy.clip": 3.0,
    "robust.attackers": 3,
    "server.beta2": 0.25,
    "server.learning_rate": 0.25,
    "server.momentum": 0.25,
}


def nested(key: str, value: object) -> dict[str, Any]:
    section, _, name = key.partition(".")
    return {section: {name: value}}


@pytest.mark.parametrize("alias", ALIASES)
def test_other_libraries_names_are_read_and_written_back_in_ours(alias: str, tmp_path: Path) -> None:
    """In files and in `--set`; both names at once are refused, but an override replaces what the file says."""
    ours = ALIASES[alias]
    assert ours in valid_keys()
    assert alias not in valid_keys()
    value = VALUES[ours]
    section, _, name = alias.partition(".")
    path = tmp_path / "c.toml"
    path.write_text(f"[{section}]\n{name} = {str(value).lower() if value is True else repr(value)}\n")
    config = from_mapping(nested(ours, value))
    assert config != Config()
    assert load(path) == load(overrides=[f"{alias}={value}"]) == config
    assert load(overrides=[f"{section}={{{name} = {str(value).lower() if value is True else repr(value)}}}"]) == config
    assert tomllib.loads(to_toml(config)) == tomllib.loads(to_toml(load(path)))
    assert name not in tomllib.loads(to_toml(config)).get(section, {})
    assert load(path, [f"{ours}={value}"]) == config
    both = {section: {name: value}}
    both.setdefault(ours.partition(".")[0], {})[ours.partition(".")[2]] = value
    with pytest.raises(ValueError, match=r"are the same setting: give only one of them$"):
        from_mapping(both)
    with pytest.raises(ValueError, match=f"^{ours} and {alias} are the same setting"):
        load(overrides=[f"{ours}={value}", f"{alias}={value}"])


@pytest.mark.parametrize("former", RENAMED)
def test_a_former_name_is_refused_with_the_present_one(former: str) -> None:
    now = RENAMED[former]
    assert now in valid_keys()
    message = f"^{former} is now called {now}$"
    with pytest.raises(ValueError, match=message):
        load(overrides=[f"{former}=0.5"])
    with pytest.raises(ValueError, match=message):
        from_mapping(nested(former, 0.5))


def test_an_alias_of_another_section_needs_a_section_there() -> None:
    assert from_mapping({"adapter": {"r": 8, "lora_alpha": 32}}).federation.ranks == 8
    for wrong in ({"adapter": {"r": 8}, "federation": 3}, {"adapter": 3}):
        with pytest.raises(ValueError, match=r"(federation|adapter) = 3: "):
            from_mapping(wrong)


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


@given(st.sampled_from([key for key in valid_keys() if "." in key]), st.data())
def test_a_slip_in_a_key_names_a_valid_one(key: str, data: st.DataObject) -> None:
    """One letter lost from any setting's name: the answer suggests a setting, nearly always that one."""
    section, _, name = key.partition(".")
    place = data.draw(st.integers(0, len(name) - 1))
    wrong = f"{section}.{name[:place]}{name[place + 1 :]}"
    if wrong in valid_keys() or wrong in ALIASES or wrong.endswith("."):
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
        ("local.batch-size=3", "unknown key 'local.batch-size'; did you mean 'local.batch_size'?"),
        ("federation.ranks=uni", "federation.ranks = 'uni': input should be a valid integer, or a valid list, or 'u"),
        ("engine.workers=0", "^engine.workers = 0: input should be greater than or equal to 1, or 'auto'$"),
        ("evaluation.diagnostics=x", "^evaluation.diagnostics = 'x': input should be a valid boolean, or 'auto'$"),
        ("federation=3", r"^federation = 3: expected a section, \[federation\]$"),
        ("method=glora", r"^method = 'glora': expected a section, \[method\]$"),
        ("batch_size=3", "unknown key 'batch_size'; did you mean 'local.batch_size' or 'evaluation.batch_size'?"),
        ("server_rank=3", r"unknown key 'server_rank'; .* \(an option of the method is 'method.server_rank'\)"),
        ("rounds", "expected key=value"),
        ("=3", "expected key=value"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        load(overrides=[override])
    assert "\n" not in str(error.value)


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^give local\.steps or local\.epochs, not both$"):
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


def test_a_mark_at_the_start_of_the_file_is_no_mistake(tmp_path: Path) -> None:
    """Editors on Windows write a byte-order mark."""
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbfseed = 3\r\n")
    assert load(tmp_path / "marked.toml").seed == 3


def test_an_unset_setting_has_an_example_to_uncomment() -> None:
    lines = to_toml(Config()).splitlines()
    unset = 0
    for i, line in enumerate(lines):
        if line.startswith("#") and not line.startswith("# "):
            text = "\n".join([*lines[:i], line.removeprefix("#"), *lines[i + 1 :]])
            assert from_mapping(tomllib.loads(text)) != Config(), line
            unset += 1
    assert unset == 26


def test_paths_and_numbers_of_other_libraries_are_settings_too(tmp_path: Path) -> None:
    mine = from_mapping(
        {
            "model": {"name": tmp_path},
            "data": {"task": "files", "train": [tmp_path / "a.csv", "b.csv"], "test": tmp_path / "c.csv"},
            "method": {"name": "glora", "server_rank": np.int64(8)},
        }
    )
    assert mine.model.name == str(tmp_path)
    assert mine.data.train == (str(tmp_path / "a.csv"), "b.csv")
    assert mine.data.test == (str(tmp_path / "c.csv"),)
    assert type(mine.method["server_rank"]) is int
    assert load(overrides="seed=5").seed == 5


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3


def test_an_option_of_the_default_method_needs_no_name() -> None:
    assert load(overrides=["method.balance=root"]).method == {"name": "glora", "balance": "root"}
    assert load(overrides=["method.name=flora"]).method == {"name": "flora"}
