"""The width of a pass that was measured on a GPU is part of a run: kept in its folder and used when it is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from fedspan.client import grouping
from fedspan.runs import checkpoint, loop
from fedspan.runs.execution import resume, run
from fedspan.support.files import StrPath


class _Stop(Exception):
    pass


def _notes(folder: StrPath) -> dict[str, object]:
    return dict(checkpoint.read(Path(folder) / "checkpoint" / "federation.safetensors").notes)


def test_a_width_is_measured_once_and_kept(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if on a GPU: three clients a pass, in the resumed half too, whatever would be measured then."""
    sizes: list[int] = []
    plan = grouping.plan

    def noted(*arguments: object) -> list[list[int]]:
        groups = plan(*arguments)  # type: ignore[arg-type]
        sizes.extend(map(len, groups))
        return groups

    def stop(event: object) -> None:
        if getattr(event, "kind", None) == "round":
            raise _Stop

    monkeypatch.setattr(grouping, "plan", noted)
    monkeypatch.setattr(loop, "measured_cohort_size", lambda *_: 3)
    config = tiny.config(bases["bert"], texts, federation={"participation": 1.0, "num_clients": 6})
    with pytest.raises(_Stop):
        run(config, tmp_path / "run", stop)
    assert _notes(tmp_path / "run")["cohort_size"] == 3
    monkeypatch.setattr(loop, "measured_cohort_size", lambda *_: 1)
    result = resume(tmp_path / "run")
    assert set(sizes) == {3}
    assert _notes(result.out)["cohort_size"] == 3
    assert "base" in _notes(result.out)


def test_nothing_is_measured_on_a_cpu(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    result = run(tiny.config(bases["bert"], texts, federation={"rounds": 1}), tmp_path / "run")
    assert set(_notes(result.out)) == {"base"}
