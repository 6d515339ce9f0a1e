"""A site's choice of precision: made on its own processor, said, kept on its disk, and used after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from fedspan import methods
from fedspan.client import precision as measured
from fedspan.client.training import TrainingSettings
from fedspan.data import load as load_data
from fedspan.site import precision
from fedspan.site.loading import Loaded
from fedspan.support.errors import FedspanError


def test_a_site_keeps_what_it_chose(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same base; what cannot be read is refused, and not chosen anew in silence."""
    config = tiny.config(bases["bert"], texts, engine={"precision": "auto"})
    loaded = Loaded.of(config, methods.create("glora"), load_data(config.data, config.seed), 4)
    lines: list[str] = []

    def settled(ratio: float, site: Loaded = loaded) -> str:
        site.context.training = TrainingSettings.of(config)
        monkeypatch.setattr(measured, "bfloat16_to_float32", lambda model, rows: ratio)
        precision.settle(config, site, tmp_path / "state", lines.append)
        return site.context.training.engine.precision

    assert settled(0.4) == "bfloat16"
    assert settled(9.0) == "bfloat16"
    assert lines == ["trains with products in bfloat16: 2.5 times as fast as float32 here"] * 2
    assert settled(9.0, replace(loaded, base="another")) == "float32"
    assert lines[-1] == "trains with products in float32: bfloat16 takes 9.0 times as long here"
    (tmp_path / "state" / "precision.json").write_text("{}")
    with pytest.raises(FedspanError, match=r"precision\.json is damaged"):
        settled(0.4)


def test_a_site_with_a_fixed_precision_keeps_nothing(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = tiny.config(bases["bert"], texts)
    loaded = Loaded.of(config, methods.create("glora"), load_data(config.data, config.seed), 4)
    precision.settle(config, loaded, tmp_path / "state", lambda line: pytest.fail(line))
    assert not (tmp_path / "state").exists()
