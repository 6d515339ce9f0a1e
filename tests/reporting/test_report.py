"""`fedspan report`: what the page says, that it stands alone, and that nothing from a file becomes markup."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedspan import reporting
from fedspan.cli.main import main
from fedspan.cli.report import diagnostics_in_words
from fedspan.config import from_mapping, to_toml
from fedspan.display.progress import number
from fedspan.reporting.comparison import Comparison
from fedspan.reporting.forest import forest
from fedspan.support.errors import FedspanError

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """The tags of a page with their attributes, its texts, and its table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, *begin: str) -> list[str]:
        """The first row that begins with these cells."""
        return next(row for row in self.rows if [cell.strip() for cell in row[: len(begin)]] == list(begin))


def seed_folder(suite: Path, seed: int = 0) -> Path:
    return suite / "runs" / "all clients" / "glora" / f"seed-{seed}"


def render(*folders: Path) -> str:
    return reporting.render(reporting.read(folders), diagnostics_in_words)


def test_a_comparison_is_one_page_that_loads_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    found = Page(text)
    assert not re.search(
        r"(?:src|href|action|url)\s*[=(]\s*[\"']?(?!data:|#)[a-z/]",
        re.sub(r"<script>.*?</script>", "", text, flags=re.S),
    )
    assert {tag for tag, _ in found.tags} & {"script", "style", "svg", "table"} == {"script", "style", "svg", "table"}
    assert not {tag for tag, _ in found.tags} & {"iframe", "object", "embed", "img", "form", "base"}


def test_a_comparison_gives_its_means_and_verdicts(suite: Path, page: Path) -> None:
    found = Page(page.read_text(encoding="utf-8"))
    comparison = json.loads((suite / "comparison.json").read_text())
    for cell in comparison["cells"]:
        row = found.row(cell["condition"], cell["arm"], "2")
        assert row[3:5] == [number(cell["mean"]), number(cell["std"])]
    assert found.row("all clients", "flora")[3:] == ["+0.050 [+0.030, +0.070]", "0.030", "▲ better than glora"]
    assert found.row("half of them", "ffa_lora")[-1] == "? open: a difference of one point would need 40 seeds"
    assert any("95% intervals" in text and "2 seeds, against glora" in text for text in found.texts)
    assert sum(tag == "svg" and attrs.get("class") == "chart" for tag, attrs in found.tags) == 4
    assert any("bands are one standard deviation" in text for text in found.texts)


def test_places_on_the_scale_are_those_of_the_figures() -> None:
    difference = {"condition": "c", "arm": "a", "baseline": "b", "mean": 0.0, "low": -0.1, "high": 0.3}
    given: dict[str, Any] = {
        "name": "n", "metric": "accuracy", "figure": "last", "margin": 0.1, "confidence": 0.9, "baseline": "b",
        "seeds": [1], "cells": [], "differences": [{**difference, "verdict": "equivalent"}],
    }  # fmt: skip
    drawn = forest(Comparison(**given))
    assert drawn is not None
    bar = drawn.bars[0]
    assert (bar.low, bar.at, bar.high) == (4.0, 27.0, 96.0)
    assert drawn.zero == 27.0
    assert drawn.margin == (4.0, 50.0)
    assert [text for _, text in drawn.ticks] == ["−0.1", "0", "+0.1", "+0.2", "+0.3"]
    assert bar.verdict == "equivalent to b within ±0.100"
    none = {**difference, "mean": None, "low": None, "high": None, "verdict": "open"}
    drawn = forest(Comparison(**{**given, "margin": None, "differences": [none]}))
    assert drawn is not None
    assert (drawn.bars[0].at, drawn.bars[0].figures, drawn.margin) == (None, "–", None)
    assert forest(Comparison(**{**given, "differences": []})) is None


def test_one_run_says_what_was_run_on_what(suite: Path) -> None:
    folder = seed_folder(suite)
    found = Page(render(folder))
    summary = json.loads((folder / "summary.json").read_text())
    table = found.row("federation (GLoRA)")
    assert table[1:] == [number(summary["metrics"]["clients"][name]) for name in ("accuracy", "loss")]
    for rank, figures in summary["metrics"]["per_rank"].items():
        assert found.row(rank)[1] == number(figures["accuracy"])
    assert found.row("local.steps") == ["local.steps", "1", "none"]
    assert [row[0] for row in found.rows].count("local.optimizer") == 0
    assert f"torch {summary['versions']['torch']}" in "".join(found.texts)
    assert "What the server steps did" in found.texts
    assert any(text.startswith("Re-factoring the clients' adapters") for text in found.texts)
    rows = summary["data"]["rows"]["test"]
    assert f"accuracy ↑ on {rows} rows" in found.texts


def test_seeds_of_one_method_are_averaged(suite: Path) -> None:
    folders = [seed_folder(suite, seed) for seed in (0, 1)]
    values = [json.loads((folder / "summary.json").read_text())["federated"] for folder in folders]
    row = Page(render(*folders)).row("GLoRA")
    assert row[1] == "2"
    assert row[2].startswith(number(sum(values) / 2) + " ± ")


def test_an_unfinished_run_is_shown_as_such(suite: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(seed_folder(suite), folder)
    (folder / "summary.json").unlink()
    texts = "".join(Page(render(folder)).texts)
    assert "One run, unfinished." in texts
    (folder / ".running").write_text(json.dumps({"pid": 2**22 + 12345, "host": "elsewhere", "since": "now"}))
    assert "One run, running." in "".join(Page(render(folder)).texts)
    (folder / "metrics.jsonl").unlink()
    assert "No round is finished yet." in "".join(Page(render(folder)).texts)


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202e$x_'


def hostile_folder(suite: Path, folder: Path) -> Path:
    """A run in whose files every text is markup."""
    shutil.copytree(seed_folder(suite), folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["metric"] = HOSTILE
    for figures in (summary["metrics"]["clients"], summary["metrics"]["base"]):
        figures[HOSTILE] = 0.5
    summary["metrics"]["per_client"] = {HOSTILE: {HOSTILE: 0.1}, "b": {HOSTILE: HOSTILE}, "c": {HOSTILE: 0.9}}
    summary["metrics"]["per_rank"] = {HOSTILE: {HOSTILE: 0.1}, "2": {HOSTILE: 0.2}}
    summary["clients"] = [{"client_id": HOSTILE, "rank": HOSTILE, "num_examples": HOSTILE}]
    summary["notes"], summary["versions"] = [HOSTILE], {HOSTILE: HOSTILE}
    summary["data"] = {"kind": HOSTILE, "rows": {HOSTILE: 3, "test": 4}, "num_classes": 2, "label_names": [HOSTILE]}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        record["eval"] = {HOSTILE: 0.25, "loss": HOSTILE}
        record["rejected"] = {HOSTILE: HOSTILE}
        record["diagnostics"]["worst"] = {"distance_from_ideal": {"module": HOSTILE, "value": 0.5}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = {"method": {"name": "glora"}, "data": {"task": "files", "train": [HOSTILE]}, "model": {"name": HOSTILE}}
    (folder / "config.toml").write_text(to_toml(from_mapping(config)), encoding="utf-8")
    return folder


def test_nothing_from_a_file_becomes_markup(suite: Path, tmp_path: Path) -> None:
    text = render(hostile_folder(suite, tmp_path / "bad"), hostile_folder(suite, tmp_path / "<b>worse$"))
    found = Page(text)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in found.tags}
    assert "b" not in {tag for tag, _ in found.tags}
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") for name in attrs)]
    assert "\u202e" not in text
    assert any("<script>alert(1)</script>" in t for t in found.texts)


def test_a_hostile_comparison_is_text_too(suite: Path, tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    shutil.copytree(suite, folder)
    content = json.loads((suite / "comparison.json").read_text())
    content["name"] = content["baseline"] = HOSTILE
    for entry in (*content["cells"], *content["differences"]):
        entry["condition"] = entry["arm"] = HOSTILE
    content["cells"][0]["settings"] = {HOSTILE: HOSTILE}
    (folder / "comparison.json").write_text(json.dumps(content), encoding="utf-8")
    found = Page(render(folder))
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in found.tags}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"name": 3}', "\xff"])
def test_a_damaged_comparison_is_refused_in_one_line(suite: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "suite"
    run = folder / "runs" / "c" / "glora" / "seed-0"
    shutil.copytree(seed_folder(suite), run)
    (folder / "suite.toml").write_text("")
    (folder / "comparison.json").write_text(content, encoding="latin-1")
    with pytest.raises(FedspanError, match=r"comparison\.json is damaged") as caught:
        reporting.read([folder])
    assert "\n" not in str(caught.value)


def test_a_comparison_under_way_shows_its_runs(suite: Path, tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    shutil.copytree(seed_folder(suite), folder / "runs" / "c" / "glora" / "seed-0")
    (folder / "suite.toml").write_text("")
    assert "c / glora / seed-0" in render(folder)
    shutil.rmtree(folder / "runs")
    with pytest.raises(FedspanError, match="no run of the comparison has begun yet"):
        reporting.read([folder])


def test_the_command_writes_its_own_file_and_no_other(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "deep" / "r.html", str(seed_folder(suite))
    assert main(["report", folder, "--out", str(out)]) == 0
    assert main(["report", folder, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n{out}\n"
    out.write_text("<html>my notes</html>")
    assert main(["report", folder, "--out", str(out)]) == 2
    assert "was not made by fedspan" in capsys.readouterr().err
    assert out.read_text() == "<html>my notes</html>"
    lacks = {tmp_path / "none": "does not exist", out: "is a file", tmp_path: "holds no config.toml"}
    for what, how in lacks.items():
        assert main(["report", str(what), "--out", str(tmp_path / "new.html")]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"fedspan: {what} {how}: expected the folder of a `fedspan run`")
        assert said.count("\n") == 1
    assert main(["report", folder, str(suite), "--out", str(tmp_path / "new.html")]) == 2
    assert "is a comparison: expected it alone" in capsys.readouterr().err
    assert not (tmp_path / "new.html").exists()
