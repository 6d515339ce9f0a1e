"""Label names beside adapters: carried into what is merged, or refused where they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from test_unlike import trained

from fedspan.adapters.peft_folder import LABELS_NAME
from fedspan.data.label_names import label_entries
from fedspan.merging.one_shot import merge
from fedspan.support.errors import FedspanError

NAMES = ["benign", "malignant", "unclear"]


@pytest.fixture(scope="module")
def pair(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base and two adapters of it, with heads of three classes."""
    root = tmp_path_factory.mktemp("labels")
    for k in range(2):
        trained(bases["llama"], root / str(k), k, "classification")
    return bases["llama"], root / "0", root / "1"


def label(folder: Path, content: object) -> None:
    file = folder / LABELS_NAME
    file.unlink(missing_ok=True)
    if isinstance(content, list):
        content = json.dumps(label_entries(len(content), content))
    if content is not None:
        file.write_text(str(content))


@pytest.mark.parametrize("second", [NAMES, None, ["LABEL_0", "LABEL_1", "LABEL_2"]], ids=["same", "none", "made up"])
def test_the_names_are_those_of_the_adapters(pair: tuple[Path, Path, Path], tmp_path: Path, second: Any) -> None:
    base, *folders = pair
    for folder, names in zip(folders, (NAMES, second), strict=True):
        label(folder, names)
    merge(folders, "glora", out=tmp_path / "merged")
    entries = json.loads((tmp_path / "merged" / LABELS_NAME).read_text())
    assert entries == label_entries(3, NAMES)
    merge(folders[::-1], "fedit", out=tmp_path / "full", full=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "full"))
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: i for i, name in enumerate(NAMES)}
    # As the printed loading line does, with the merged folder's own file.
    loaded = transformers.AutoConfig.from_pretrained(str(base), **entries)
    assert loaded.num_labels == 3


def test_adapters_without_names_make_none(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for folder in pair[1:]:
        label(folder, None)
    merge(pair[1:], "glora", out=tmp_path / "merged")
    assert not (tmp_path / "merged" / LABELS_NAME).exists()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            NAMES[::-1],
            r"labels are unclear, malignant, benign: expected benign, malignant, unclear, as in .*0,",
        ),
        (NAMES[:2], "labels are benign, malignant: expected benign, malignant, unclear"),
        (["LABEL_0", "LABEL_1"], "labels are LABEL_0, LABEL_1: expected benign"),
        ("[1]", r"labels\.json holds no labels .*expected id2label with the ids 0, 1"),
        ("{", r"labels\.json holds no labels"),
        ('{"id2label": {"0": 3}}', r"labels\.json holds no labels \(\[3\]\): expected id2label with names"),
        ('{"id2label": {"1": "a"}}', r"labels\.json holds no labels"),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_other_names_are_not_averaged(
    pair: tuple[Path, Path, Path], tmp_path: Path, second: Any, message: str, full: bool
) -> None:
    _, *folders = pair
    for folder, content in zip(folders, (NAMES, second), strict=True):
        label(folder, content)
    with pytest.raises(FedspanError, match=message) as caught:
        merge(folders, "glora", out=tmp_path / "merged", full=full)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_model_of_another_number_of_labels_is_refused(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for folder in pair[1:]:
        label(folder, [*NAMES, "other"])
    with pytest.raises(FedspanError, match="name 4 labels, and the model has 3: expected as many"):
        merge(pair[1:], "glora", out=tmp_path / "full", full=True)
