"""A suite says in one line what is wrong with it, and which changes only extend it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny

from fedspan.comparison import tuning
from fedspan.comparison.plan import Planner, combinations, folder_name
from fedspan.comparison.run_lines import figures
from fedspan.comparison.suite import check_extension, from_mapping, read
from fedspan.comparison.trees import merged
from fedspan.config import load, to_toml
from fedspan.support.errors import FedspanError

SUITE: dict[str, Any] = {
    "name": "s",
    "seeds": [0, 1],
    "baseline": "a",
    "base": {"federation": {"num_clients": 4, "rounds": 6}, "adapter": {"lora_alpha": 8}},
    "arms": [
        {"name": "a", "settings": {"method": {"name": "flexlora"}}},
        {"name": "b", "settings": {"method": {"name": "glora"}}, "grid": {"local": {"learning_rate": [1e-3, 3e-3]}}},
    ],
    "conditions": [{"name": "x"}, {"name": "y", "settings": {"federation": {"ranks": 4}}}],
}


def changed(*path: Any, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(SUITE)
    place: Any = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed("sedes", value=[1]), "unknown key 'sedes'; did you mean 'seeds'?"),
        (changed("arms", 1, "girds", value={}), "unknown key 'arms.2.girds'; did you mean 'grid'?"),
        (changed("tuning", value={"shares": 0.1}), "unknown key 'tuning.shares'; did you mean 'share'?"),
        ({key: value for key, value in SUITE.items() if key != "seeds"}, "seeds is missing"),
        (changed("seeds", value=[]), "seeds = []: expected at least 1"),
        (changed("arms", 1, "conditions", value="x"), "arms.2.conditions = 'x': expected a list"),
        (changed("seeds", value=[1, 1]), "expected every seed once"),
        (changed("seeds", value=[-1]), "seeds.1 = -1"),
        (changed("baseline", value="c"), "baseline = 'c': expected one of a, b"),
        (changed("metric", value="accurate"), "metric = 'accurate': expected one of"),
        (changed("figure", value="first"), "figure = 'first'"),
        (changed("margin", value=-1), "margin = -1"),
        (changed("confidence", value=95), "confidence = 95"),
        (changed("arms", 1, "name", value="A"), "names that differ in more than case"),
        (changed("arms", 1, "name", value="../a"), "arms.2.name = '../a'"),
        (changed("arms", 1, "conditions", value=["z"]), "conditions of the arm b = 'z': expected one of x, y"),
        (changed("tuning", value={"seeds": [1]}), "expected none of the final seeds [1]"),
        (changed("tuning", value={"share": 1.0}), "tuning.share = 1.0"),
        (changed("base", value={"seed": 3}), "base sets seed: expected it in the suite's `seeds`"),
        (changed("arms", 0, "grid", value={"data.metric": ["loss"]}), "the grid of the arm a sets data.metrics"),
        (changed("base", "adapter", "alpha", value=4), "are the same setting"),
        (changed("arms", value=SUITE["arms"][:1]), "arms"),
    ],
)
def test_mistakes_are_one_line(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(FedspanError) as caught:
        from_mapping(tree, "s.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("s.toml: ")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed("arms", 1, "settings", value={"method": {"name": "glorra"}}), "arm b, condition x: "),
        (changed("conditions", 1, "settings", value={"federation": {"rank": "mixed"}}), "condition y: "),
        (changed("arms", 0, "settings", value={"method": {"name": "fedit"}}), "arm a, condition x: "),  # mixed ranks
        (changed("arms", 1, "grid", value={"local.learning_rate": [1e-3, -1]}), "arm b, condition x: local.learning"),
        ({**changed("arms", 0, "settings", value={"method": {"name": "local"}}), "figure": "best"}, "figure = 'last'"),
        ({**SUITE, "figure": "mean_last", "last_rounds": 7}, "last_rounds = 7, but a run evaluates 6 rounds"),
        ({**SUITE, "figure": "mean_last", "tuning": {"rounds": 3}}, "last_rounds = 5, but a run evaluates 3 rounds"),
    ],
)
def test_what_no_run_could_do_is_refused_before_any_runs(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(FedspanError) as caught:
        Planner(from_mapping(tree), None).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_a_run_are_put_together_in_order() -> None:
    planner = Planner(from_mapping(SUITE), None)
    planner.check()
    final = planner.final("y", "b", 1, {"local.learning_rate": 1e-3})
    config = final.config
    assert (config.seed, config.federation_seed, config.data_seed) == (1, 1, 0)
    assert (config.federation.ranks, config.federation.rounds, config.adapter.alpha) == (4, 6, 8)
    assert (config.method, config.local.learning_rate) == ({"name": "glora"}, 1e-3)
    assert final.folder == "runs/y/b/seed-1"
    tried = planner.tuning("y", "b", 1000, {"local.learning_rate": 1e-3})
    assert tried.config.data.test_from_training == 0.2
    assert config.data.test_from_training == 0
    assert tried.folder == "tuning/y/b/local.learning_rate=0.001/seed-1000"


def test_a_named_method_replaces_the_other_with_its_options() -> None:
    base = {"method": {"name": "fedftg", "galore_rank": 4}, "local": {"steps": 2}}
    assert merged(base, {"method": {"name": "glora"}})["method"] == {"name": "glora"}
    assert merged(base, {"method": {"galore_rank": 8}})["method"] == {"name": "fedftg", "galore_rank": 8}
    assert merged(base, {"local": {"epochs": 1}})["local"] == {"steps": 2, "epochs": 1}
    assert base["local"] == {"steps": 2}


def test_every_run_has_a_name_of_its_own_in_trackers() -> None:
    """Their folders are called after the seeds alone, so that all arms would be one run of a tracker."""
    tree = changed("conditions", value=[{"name": "x" * 60}, {"name": "x" * 59 + "y"}])
    suite = from_mapping(tree | {"name": "rules", "base": {**tree["base"], "tracking": {"folder": "logs"}}}, "suite")
    planner = Planner(suite, None)
    runs = [planner.final(c, a, seed, {}) for c in suite.condition_names for a in suite.arm_names for seed in (1, 2)]
    runs += [
        planner.tuning(c, "b", 100, {"local.learning_rate": x}) for c in suite.condition_names for x in (1e-3, 3e-3)
    ]
    names = [run.config.tracking.name for run in runs]
    assert len(set(names)) == len(names) == 12
    assert {run.config.tracking.group for run in runs} == {"rules"}
    assert Planner(from_mapping(SUITE, "suite"), None).final("x", "b", 1, {}).config.tracking.name == "x b seed-1"


def test_only_added_parts_extend_a_comparison() -> None:
    began, more = from_mapping(SUITE), copy.deepcopy(SUITE)
    more["seeds"] = [2, 1, 0]
    more["arms"].insert(0, {"name": "c", "settings": {"method": {"name": "hetlora"}}})
    more["conditions"].append({"name": "z"})
    check_extension(Path("out"), began, from_mapping(more))
    other = copy.deepcopy(more)
    other |= {"margin": 2.0, "seeds": [0, 2], "metric": "rouge_l"}
    other["arms"][2]["grid"] = {}
    other["conditions"] = other["conditions"][1:]
    with pytest.raises(FedspanError) as caught:
        check_extension(Path("out"), began, from_mapping(other))
    named = "metric, margin, seeds (without 1), arm b, condition x"
    assert f"out was begun with another {named}: expected the same suite" in str(caught.value)


def test_an_arm_may_be_given_more_conditions_and_none_less() -> None:
    began = from_mapping(changed("arms", 1, "conditions", value=["y"]))
    for conditions in (["x", "y"], None):
        check_extension(Path("out"), began, from_mapping(changed("arms", 1, "conditions", value=conditions)))
    # What stays with the old conditions when one is added has changed in nothing.
    fixed = changed("arms", 1, "conditions", value=["x", "y"])
    fixed["conditions"].append({"name": "z"})
    check_extension(Path("out"), from_mapping(SUITE), from_mapping(fixed))
    for before, now in ((["y"], ["x"]), (None, ["x"])):
        old, new = (from_mapping(changed("arms", 1, "conditions", value=value)) for value in (before, now))
        with pytest.raises(FedspanError, match=r"begun with another arm b:"):
            check_extension(Path("out"), old, new)


def test_the_base_may_be_a_file_beside_the_suite(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[federation]\nrounds = 3\n")
    arms = '[[arms]]\nname = "a"\n[[arms]]\nname = "b"\nsettings.method.name = "flora"\n'
    (tmp_path / "rules.toml").write_text(f'base = "base.toml"\nseeds = [4]\nbaseline = "a"\n{arms}')
    suite = read(tmp_path / "rules.toml")
    assert suite.base == {"federation": {"rounds": 3}}
    assert suite.name == "rules"
    (tmp_path / "base.toml").write_text("[federation")
    with pytest.raises(FedspanError, match=r"base\.toml is not valid TOML"):
        read(tmp_path / "rules.toml")
    with pytest.raises(FedspanError, match="cannot read"):
        read(tmp_path / "none.toml")


def _suite(folder: Path, base: str, more: str = "") -> Planner:
    arms = '[[arms]]\nname = "a"\n[[arms]]\nname = "b"\nsettings.method.name = "flora"\n'
    (folder / "rules.toml").write_text(f'base = "{base}"\nseeds = [4]\nbaseline = "a"\n{more}\n{arms}')
    planner = Planner(read(folder / "rules.toml"), folder)
    planner.check()
    return planner


def test_the_base_may_be_a_whole_file(tmp_path: Path) -> None:
    """As `fedspan config` prints it: its seed, and what else a comparison sets itself, are nobody's choice."""
    (tmp_path / "base.toml").write_text(to_toml(load(overrides=["federation.rounds=3", "seed=9"])))
    (tmp_path / "part.toml").write_text("[federation]\nrounds = 3\n")
    whole, part = (_suite(tmp_path, name).final("base", "b", 4, {}).config for name in ("base.toml", "part.toml"))
    assert whole == part
    assert (whole.seed, whole.evaluation.base, whole.evaluation.local) == (4, False, False)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("3", "base = 3: expected a table, or the name of a settings file"),
        ('["own.toml"]', "expected a table, or the name of a settings file"),
        ('""', "base = '': expected a table, or the name of a settings file"),
        ('"run"', "base = 'run': expected a table, or the name of a settings file, such as run/config.toml"),
        ('"suite.toml"', "base = 'suite.toml': this is a suite: expected a table"),
        ('"binary.toml"', "binary.toml is not a text file: expected TOML in UTF-8"),
        ('"none.toml"', "base = 'none.toml': cannot read"),
    ],
)
def test_a_base_that_is_none_is_named(base: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text("seed = 1\n")
    (tmp_path / "binary.toml").write_bytes(b"\x90\x00\xff")
    arms = "".join(f'[[arms]]\nname = "{name}"\n' for name in "ab")
    (tmp_path / "suite.toml").write_text(f'seeds = [0]\nbaseline = "a"\nbase = {base}\n{arms}')
    with pytest.raises(FedspanError) as error:
        read(tmp_path / "suite.toml")
    assert str(tmp_path / "suite.toml") in str(error.value)
    assert said in str(error.value)


def test_a_value_that_the_base_cannot_have_is_said_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[local]\nlearning_rate = -1.0\n")
    with pytest.raises(FedspanError, match=r"^base: local\.learning_rate"):
        _suite(tmp_path, "base.toml")
    wrong = {"local": {"steps": 0}}
    with pytest.raises(FedspanError, match=r"^arm b, condition x: local\.steps"):
        Planner(from_mapping(changed("arms", 1, "settings", value=wrong)), None).check()


def test_the_metric_of_a_base_file_is_compared_unless_the_suite_names_one(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[data]\nmetrics = ["rouge_l", "exact_match"]\n')
    assert _suite(tmp_path, "base.toml").final("base", "a", 4, {}).config.data.metrics == ("rouge_l",)
    planner = _suite(tmp_path, "base.toml", 'metric = "exact_match"')
    assert planner.final("base", "a", 4, {}).config.data.metrics == ("exact_match",)
    (tmp_path / "base.toml").write_text("[data]\ntest_from_training = 0.5\n")
    with pytest.raises(FedspanError, match=r"base sets data\.test_from_training: expected it in `tuning\.share`"):
        _suite(tmp_path, "base.toml")


def test_paths_of_a_base_file_are_looked_up_beside_it(tmp_path: Path) -> None:
    (tmp_path / "project/own").mkdir(parents=True)
    (tmp_path / "suites").mkdir()
    (tmp_path / "project/a.jsonl").write_text('{"text": "x", "label": "y"}\n')
    tiny.write_jsonl(tmp_path / "suites" / "b.jsonl", [])
    (tmp_path / "project/config.toml").write_text('[data]\ntrain = ["a.jsonl", "b.jsonl"]\n[model]\nname = "own"\n')
    config = _suite(tmp_path / "suites", "../project/config.toml").final("base", "a", 4, {}).config
    found = [Path(name) for name in (*config.data.train, config.model.name)]
    assert found == [tmp_path / "project/a.jsonl", tmp_path / "suites/b.jsonl", tmp_path / "project/own"]


def test_paths_of_a_base_file_where_the_suites_folder_is_a_link(tmp_path: Path) -> None:
    """`..` of a link is not the folder that it lies in."""
    (tmp_path / "deep/suites").mkdir(parents=True)
    (tmp_path / "project").mkdir()
    (tmp_path / "suites").symlink_to(tmp_path / "deep/suites", target_is_directory=True)
    (tmp_path / "project/a.jsonl").write_text('{"text": "x", "label": "y"}\n')
    (tmp_path / "project/config.toml").write_text('[data]\ntrain = ["a.jsonl"]\n')
    config = _suite(tmp_path / "suites", str(tmp_path / "project/config.toml")).final("base", "a", 4, {}).config
    assert [Path(name).resolve() for name in config.data.train] == [tmp_path / "project/a.jsonl"]


def test_combinations_and_their_folders() -> None:
    assert combinations({}) == [{}]
    found = combinations({"a": [1, 2], "b": [3, 4]})
    assert found == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    names = [folder_name({"method.x": value}) for value in ("a/b", "a:b", "a_b", "..", ["q"] * 90, True, "True")]
    assert len(set(names)) == len(names) - 1, names  # a word and the value that it spells share a name
    assert all("/" not in name and name not in (".", "..") and len(name) <= 100 for name in names)


def test_the_best_values_and_a_wider_grid() -> None:
    tried = [{"lr": 1e-3}, {"lr": 3e-3}, {"lr": 9e-3}]
    assert tuning.choice(tried, [0.5, 0.7, 0.6]) == tuning.Choice({"lr": 3e-3}, at_edge=False)
    assert tuning.choice(tried, [0.7, 0.7, 0.6]) == tuning.Choice({"lr": 1e-3}, at_edge=True)
    assert tuning.beyond_the_edge(tried, [0.5, 0.7, 0.6]) is None
    assert tuning.beyond_the_edge(tried, [0.5, 0.6, 0.7]) == {"lr": 0.027}
    assert tuning.beyond_the_edge(tried, [0.9, 0.6, 0.7]) == {"lr": 3.3e-4}
    assert tuning.beyond_the_edge([{"steps": 5}, {"steps": 10}], [0.1, 0.2]) == {"steps": 20}
    assert tuning.beyond_the_edge([{"steps": 1}, {"steps": 2}], [0.2, 0.1]) is None
    assert tuning.beyond_the_edge([{"name": "x"}, {"name": "y"}], [0.2, 0.1]) is None
    assert tuning.mean_score([0.5, None], True) < tuning.mean_score([0.0, 0.0], True)
    assert tuning.mean_score([0.5, 0.7], False) == pytest.approx(-0.6)


def test_figures_of_a_run() -> None:
    values = [0.1, None, 0.5, 0.3, 0.4]
    records = [{"eval": None if value is None else {"accuracy": value}} for value in values]
    assert figures(0.35, records, "accuracy", True, 3) == pytest.approx({"last": 0.35, "best": 0.5, "mean_last": 0.4})
    assert figures(0.35, records, "accuracy", False, 5) == {"last": 0.35, "best": 0.1, "mean_last": None}
    diverged = [*records, {"eval": {"accuracy": None}}]
    assert figures(None, diverged, "accuracy", True, 3) == {"last": None, "best": 0.5, "mean_last": None}
