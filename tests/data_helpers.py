"""Files to read and corpora to look at, for the tests of data."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedspan.config import DataConfig
from fedspan.data import Corpus, Rows, load
from fedspan.support.errors import FedspanError

REVIEWS = [{"text": f"text, {i}\n“{i}”", "label": i % 2, "site": f"s{i % 3}"} for i in range(30)]
ANSWERS = [
    {"task": f"t{i % 4}", "instruction": f"do {i % 4}", "input": f"in {i}", "output": f"out {i}"} for i in range(40)
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """`rows` as a file of the type that its name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    elif name.endswith(".json"):
        content = json.dumps(rows, ensure_ascii=False).encode("utf-8-sig")
    elif name.endswith((".csv", ".tsv")):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if name.endswith("csv") else "\t")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    else:
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        content = buffer.getvalue()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return str(path)


def read(seed: int = 0, **settings: Any) -> Corpus:
    return load(DataConfig(**{"task": "files", **settings}), seed)


def everything(corpus: Corpus) -> list[tuple[Any, Any, str]]:
    """All rows of a corpus, sorted."""
    parts = [corpus.train, corpus.test, *([corpus.unseen] if corpus.unseen else [])]
    return sorted(row for part in parts for row in zip(part.inputs, part.targets, part.fields, strict=True))


def fails(message: str, **settings: Any) -> str:
    """Loading raises a `FedspanError` of one line that says `message`."""
    with pytest.raises(FedspanError, match=message) as caught:
        read(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(num: int = 20, size: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (num, size, size, channels) if channels else (num, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def check_same_images(rows: Rows, pictures: np.ndarray, labels: np.ndarray) -> None:
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in rows.inputs]), pictures)
    assert list(rows.targets) == labels.tolist()


LABELS = np.arange(20) % 4


def labelled(tmp_path: Path, labels: list[Any], name: str = "l.jsonl") -> str:
    return write_jsonl(tmp_path / name, [{"text": f"x{i}", "label": label} for i, label in enumerate(labels)])
