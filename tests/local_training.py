"""Local training of one client on tiny data, for the tests that compare ways of doing it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from fedspan.client.training import Assignment, LocalResult, TrainingSettings, train
from fedspan.config import DataConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel

LOCAL = LocalConfig(learning_rate=1e-2, batch_size=4)


@pytest.fixture(scope="module")
def texts() -> Encoded:
    rows = tiny.words(24)
    data = Rows(
        "classification",
        [(r["text"],) for r in rows],
        ["xyz".index(r["label"]) for r in rows],
        [r["site"] for r in rows],
    )
    return encode(data, tiny.tokenizer(), DataConfig())


@pytest.fixture(scope="module")
def tasks() -> Encoded:
    rows = tiny.questions(24)
    pairs = [(r["instruction"], r["input"]) for r in rows]
    return encode(Rows("instruction", pairs, [r["output"] for r in rows], [""] * 24), tiny.tokenizer(), DataConfig())


def work(
    model: FederatedModel,
    sent: Broadcast,
    data: Encoded,
    config: LocalConfig = LOCAL,
    steps: int = 3,
    client: str = "client-0",
    key: tuple[int, int] = (0, 0),
) -> LocalResult:
    seed, round_num = key
    assignment = Assignment(client, sent, np.arange(len(data)), steps, 1.0)
    return train(model, assignment, data, TrainingSettings(seed=seed, local=config), round_num)


def tensors(result: LocalResult) -> dict[str, Tensor]:
    factors = {name: result.update.factors(name) for name in result.update.modules}
    return {**tiny.flat(factors), **result.update.dense}


def differ(x: dict[str, Tensor], y: dict[str, Tensor]) -> set[str]:
    assert x.keys() == y.keys()
    return {name for name in x if not torch.equal(x[name], y[name])}


def start_of(sent: Broadcast) -> dict[str, Tensor]:
    return {**tiny.flat(sent.adapter), **sent.dense}
