"""The real digits between seven sites, some of which have every label wrong: a whole run, as a user would start it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import fedspan
from fedspan import config as settings
from fedspan.data.builtin import digits


def write(folder: Path, num_clients: int = 7, num_bad: int = 1) -> tuple[list[str], str]:
    """One file for each client, the first ones with the label y + 1 for y; and the test data."""
    held = digits.load(0)
    order = np.arange(len(held.train_labels))
    files = []
    for k in range(num_clients):
        rows = order[k::num_clients]
        labels = held.train_labels[rows]
        path = folder / f"site-{k}.npz"
        np.savez(path, x=held.train_images[rows], y=(labels + 1) % 10 if k < num_bad else labels)
        files.append(str(path))
    np.savez(folder / "test.npz", x=held.test_images, y=held.test_labels)
    return files, str(folder / "test.npz")


def accuracy(folder: Path, method: str, filter: str, num_bad: int, rounds: int = 3, **robust: Any) -> float:
    """The final accuracy; data are written where they are not yet."""
    files, test = write(folder, num_bad=num_bad)
    out = folder / f"{method}-{filter}-{num_bad}"
    config = settings.from_mapping(
        {
            "model": {"name": "builtin:vit"},
            "data": {
                "task": "files",
                "kind": "image",
                "image_column": "x",
                "label_column": "y",
                "train": files,
                "test": [test],
            },
            "federation": {"num_clients": 7, "participation": 1.0, "rounds": rounds, "ranks": 4, "partition": "files"},
            "evaluation": {"base": False, "local": False, "every": rounds, "per_rank": False, "diagnostics": False},
            "engine": {"workers": 1},
            "method": {"name": method},
            "robust": {"filter": filter, **robust},
        }
    )
    result = fedspan.run(config, out)
    return float(result.summary["federated"])
