"""Clients that are called after their files, in one process, at a site and in a run's summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from fedspan.config import Config, from_mapping
from fedspan.data import Corpus, load
from fedspan.data.files import names_of
from fedspan.federation.client_names import names_of_sites
from fedspan.federation.clients import make_clients, site_test_rows
from fedspan.runs.application import evaluate
from fedspan.runs.execution import run
from fedspan.site.loading import client_of
from fedspan.site.settings import SiteSettings
from fedspan.support.errors import FedspanError

SITES = {"ucl": 12, "charite": 30, "Mayo_2": 20}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A file for each site, in an order that is not that of their names."""
    folder = tmp_path_factory.mktemp("sites")
    rows = tiny.words(sum(SITES.values()))
    ends = np.cumsum(list(SITES.values()))
    return [
        str(tiny.write_jsonl(folder / f"{name}.jsonl", rows[end - size : end]))
        for (name, size), end in zip(SITES.items(), ends, strict=True)
    ]


def settings(files: list[str], base: Path | None = None, **sections: Any) -> Config:
    tree = {"data": {"train": files, "holdout": 0.25}, "federation": {"ranks": [1, 2, 4]}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return from_mapping(tree | ({"model": {"name": str(base)}} if base else {}))


def corpus_of(config: Config) -> Corpus:
    return load(config.data, config.seed)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/charite.csv", "b/mayo.jsonl.gz", "UCL.NPZ"], ("charite", "mayo", "UCL")),
        (["charite/train.csv", "mayo/train.csv"], ("charite", "mayo")),
        (["charite/train.csv", "mayo/test.csv"], ("train", "test")),
        (["a.2024.csv", "a.2025.csv"], ("a.2024", "a.2025")),
        (["scans/charite/", "scans/mayo"], ("charite", "mayo")),
        (["x/a.csv", "x/a.tsv"], ("x", "x")),
    ],
)
def test_files_have_names(paths: list[str], names: tuple[str, ...]) -> None:
    assert names_of(paths) == names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["charité", "mayo"], "data.train: .* = 'charité': expected at most 64 of the letters a to z"),
        (["a b", "c"], "'a b'"),
        (["", "c"], "= ''"),
        ([".hidden", "c"], "first no '.' or '-'"),
        (["x" * 65, "c"], "at most 64"),
        (["mayo", "Mayo"], "two files, or their folders, are called 'Mayo' where case does not count"),
        (["mayo", "mayo"], "two files, or their folders, are called 'mayo'"),
    ],
)
def test_names_that_no_client_can_have_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(FedspanError, match=message) as caught:
        names_of_sites(names)
    assert "\n" not in str(caught.value)


def test_clients_are_called_after_their_files_and_sorted(files: list[str]) -> None:
    """Each has its own file's rows, and the rank in its file's place."""
    config = settings(files)
    corpus = corpus_of(config)
    clients = make_clients(corpus, config.federation, config.seed, 0.0)
    assert [(client.client_id, client.rank) for client in clients] == [("Mayo_2", 4), ("charite", 2), ("ucl", 1)]
    assert corpus.client_files is not None
    tests = site_test_rows(corpus, config.federation)
    assert list(tests) == ["Mayo_2", "charite", "ucl"]
    for client in clients:
        place = list(SITES).index(client.client_id)
        np.testing.assert_array_equal(client.indices, corpus.client_files[place])
        assert len(client.indices) + len(tests[client.client_id]) == SITES[client.client_id]
    assert sum(map(len, tests.values())) == len(corpus.test)
    iid = settings(files, federation={"partition": "iid", "ranks": 2}).federation
    numbered = make_clients(corpus, iid, 0, 0.0)
    assert [client.client_id for client in numbered][:2] == ["client-0", "client-1"]
    assert site_test_rows(corpus, iid) == {}


def test_a_site_of_a_deployment_finds_its_own_file(files: list[str]) -> None:
    config = settings(files)
    corpus = corpus_of(config)
    for client in make_clients(corpus, config.federation, config.seed, 0.0):
        found = client_of(SiteSettings(config, client.client_id), corpus)
        assert (found.client_id, found.rank) == (client.client_id, client.rank)
        np.testing.assert_array_equal(found.indices, client.indices)
    with pytest.raises(FedspanError, match="client_id = 'client-0': expected one of Mayo_2, charite, ucl"):
        client_of(SiteSettings(config, "client-0"), corpus)


def test_test_files_of_the_same_names_belong_to_their_sites(files: list[str]) -> None:
    order = [files[2], files[0]]
    for limits in ({}, {"max_test": 9, "max_train": 11}):
        config = settings(files, data={"test": order, **limits})
        corpus = corpus_of(config)
        tests = site_test_rows(corpus, config.federation)
        assert list(tests) == ["Mayo_2", "ucl"]
        every = corpus_of(settings(files, data={"test": order})).test
        split = {"Mayo_2": every.inputs[:20], "ucl": every.inputs[20:]}
        for name, rows in tests.items():
            assert {corpus.test.inputs[i] for i in rows} <= set(split[name])
        assert sum(map(len, tests.values())) == (9 if limits else 32)
    other = settings(files, data={"test": [*order, __file__]})
    assert names_of(other.data.test)[2] not in SITES
    alone = settings(files, data={"test": files[0].replace("ucl", "charite"), "train": files[::2]})
    assert site_test_rows(corpus_of(alone), alone.federation) == {}


def test_a_summary_has_every_sites_figures(files: list[str], bases: dict[str, Path], tmp_path: Path) -> None:
    """Weighted by their rows they are the server's own, since all receive its whole state at one rank."""
    config = settings(
        files,
        bases["bert"],
        federation={"ranks": 2, "rounds": 1},
        local={"steps": 1},
        evaluation={"local": False, "base": False},
    )
    summary = run(config, tmp_path / "run").summary
    corpus = corpus_of(config)
    tests = site_test_rows(corpus, config.federation)
    figures = summary["metrics"]["per_client"]
    assert list(figures) == ["Mayo_2", "charite", "ucl"] == [client["client_id"] for client in summary["clients"]]
    for metric in ("loss", "accuracy"):
        mean = sum(figures[name][metric] * len(rows) for name, rows in tests.items()) / len(corpus.test)
        assert mean == pytest.approx(summary["metrics"]["server"][metric], rel=1e-5)
    assert figures["charite"] != figures["Mayo_2"]
    assert summary["data"] == corpus.describe()
    assert summary["data"]["rows"] == {"train": len(corpus.train), "test": len(corpus.test)}


def test_personal_models_are_judged_on_the_test_data_of_their_own_sites(
    files: list[str], bases: dict[str, Path], tmp_path: Path
) -> None:
    """The figures of a site are those of its own adapter on its own file, as `fedspan evaluate` reads both."""
    config = settings(
        files,
        bases["bert"],
        data={"test": files},
        federation={"ranks": 2, "rounds": 1, "participation": 1.0},
        local={"steps": 2},
        evaluation={"local": False, "base": False},
        method={"name": "fedsa_lora"},
    )
    summary = run(config, tmp_path / "run").summary
    figures = summary["metrics"]["per_client"]
    assert list(figures) == ["Mayo_2", "charite", "ucl"]
    assert summary["rows"]["per_client"] == sum(SITES.values())
    for path in files:
        name = Path(path).stem
        alone = evaluate(tmp_path / "run" / "adapters" / name, [path], base=str(bases["bert"]))
        assert alone.metrics["loss"] == pytest.approx(figures[name]["loss"], rel=1e-4)
        assert alone.metrics["accuracy"] == figures[name]["accuracy"]
    assert summary["worst_client"]["data"] == "own"
