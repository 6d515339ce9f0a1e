"""`fedspan plot`: pictures for papers, with bands over seeds, that replace no file of somebody else's."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedspan.cli.main import main
from fedspan.config import from_mapping, to_toml
from fedspan.display import curves
from fedspan.display.curves import plot
from fedspan.support.errors import FedspanError

pytest.importorskip("matplotlib")


def run_folder(path: Path, seed: int = 0, values: tuple[float, ...] = (0.25, 0.5, 0.75), **settings: Any) -> Path:
    """A run folder with these accuracies by round, and a megabyte a round."""
    path.mkdir(parents=True)
    method = settings.pop("method", "glora")
    config = from_mapping({"seed": seed, "method": {"name": method}, **settings})
    (path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    lines = [
        {
            "round_num": n,
            "method": method,
            "bytes_up": 6e5,
            "bytes_down": 4e5,
            "eval": {"accuracy": value},
            "diagnostics": None,
        }
        for n, value in enumerate(values, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def texts(picture: Path) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", picture.read_text(encoding="utf-8"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved."""
    figures: list[Any] = []
    original = curves.save_figure

    def save(figure: Any, out: Path) -> Path:
        figures.append(figure)
        return original(figure, out)

    monkeypatch.setattr(curves, "save_figure", save)
    return figures


def test_other_seeds_are_one_curve_with_a_band(tmp_path: Path, drawn: list[Any]) -> None:
    values = [(0.1, 0.2, 0.6), (0.3, 0.4, 0.8), (0.2, 0.6, 0.7)]
    folders = [run_folder(tmp_path / f"s{k}", k, own) for k, own in enumerate(values)]
    plot(folders, tmp_path / "c.svg")
    axes = drawn[0].axes[0]
    assert len(axes.lines) == 1
    assert axes.lines[0].get_ydata() == pytest.approx([statistics.fmean(v) for v in zip(*values, strict=True)])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    means, deviations = zip(
        *((statistics.fmean(v), statistics.stdev(v)) for v in zip(*values, strict=True)), strict=True
    )
    assert heights.max() == pytest.approx(max(m + d for m, d in zip(means, deviations, strict=True)))
    assert heights.min() == pytest.approx(min(m - d for m, d in zip(means, deviations, strict=True)))
    assert "glora (3 seeds, mean ± sd)" in texts(tmp_path / "c.svg")
    assert drawn[0].axes[1].lines[0].get_xdata() == pytest.approx([1.0, 2.0, 3.0])


def test_other_settings_are_other_curves_unless_asked_for(tmp_path: Path, drawn: list[Any]) -> None:
    local = [{"local": {"steps": steps}} for steps in (1, 2)]
    folders = [run_folder(tmp_path / f"s{k}", k, **own) for k, own in enumerate(local)]
    folders.append(run_folder(tmp_path / "seed", 7, **local[0]))
    for band, count in ((None, 2), (True, 1), (False, 3)):
        plot(folders, tmp_path / "c.svg", band=band)
        assert len(drawn[-1].axes[0].lines) == count
    plot(folders, tmp_path / "c.svg")
    assert texts(tmp_path / "c.svg")[-2:] == ["GLoRA, steps=1 (2 seeds, mean ± sd)", "GLoRA, steps=2"]


def test_many_runs_are_told_apart(tmp_path: Path, drawn: list[Any]) -> None:
    folders = [run_folder(tmp_path / f"r{k}", local={"steps": k + 1}) for k in range(30)]
    plot(folders, tmp_path / "c.pdf")
    lines = drawn[0].axes[0].lines
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in lines}
    assert len(looks) == len(lines) == 30


@pytest.mark.parametrize(("x", "panels"), [("both", 2), ("round", 1), ("megabytes", 1)])
def test_rounds_are_whole_on_the_axis(tmp_path: Path, drawn: list[Any], x: str, panels: int) -> None:
    plot([run_folder(tmp_path / "r")], tmp_path / "c.png", x=x)
    assert len(drawn[0].axes) == panels
    if x != "megabytes":
        assert all(float(tick).is_integer() for tick in drawn[0].axes[0].get_xticks())
    assert [axes.get_xlabel() for axes in drawn[0].axes][-1] == ("round" if x == "round" else "sent up and down, MB")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_replaces_its_own_kind_alone(tmp_path: Path, ending: str) -> None:
    folder, out = run_folder(tmp_path / "r"), tmp_path / f"c.{ending}"
    assert plot([folder], out) == out
    first = out.read_bytes()
    plot([folder], out, x="round")
    assert out.read_bytes() != first
    out.write_bytes(b"someone's own picture, made by fedspan they say")
    with pytest.raises(FedspanError, match="exists and was not made by fedspan"):
        plot([folder], out)
    assert out.read_bytes().startswith(b"someone's own")
    out.unlink()
    out.mkdir()
    with pytest.raises(FedspanError, match="was not made by fedspan"):
        plot([folder], out)


def test_names_are_no_formulas(tmp_path: Path) -> None:
    """A dollar sign in a folder's name begins none, and an underscore keeps no run out of the legend."""
    folders = [
        run_folder(tmp_path / name, k, seed_free)
        for k, (name, seed_free) in enumerate(((("_$a^{"), (0.1, 0.2)), ("$b_\\x", (0.2, 0.3))))
    ]
    plot(folders, tmp_path / "c.svg", band=False)
    assert {"$a^{", "$b_\\x"} <= set(texts(tmp_path / "c.svg"))


def test_seeds_without_a_common_round_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_folder(tmp_path / f"s{k}", k) for k in range(2)]
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines()
    (folders[1] / "metrics.jsonl").write_text(lines[0].replace('"round_num": 1', '"round_num": 9') + "\n")
    assert main(["plot", *map(str, folders), "--out", str(tmp_path / "c.png")]) == 2
    assert "expected --no-band" in capsys.readouterr().err
    assert main(["plot", *map(str, folders), "--no-band", "--out", str(tmp_path / "c.png")]) == 0
    capsys.readouterr()
    assert main(["plot", str(folders[0]), "--x", "time", "--out", str(tmp_path / "c.png")]) == 2
    assert "--x 'time': expected both, round or megabytes" in capsys.readouterr().err


def test_the_folder_of_a_comparison_is_named(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(FedspanError, match=r"is a comparison: `fedspan report .*` draws it"):
        plot([tmp_path], tmp_path / "x.png")
