"""From settings to the objects in memory that training needs: encoded data, the base with its adapters, a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedspan.config import AdapterConfig, DataConfig, ModelConfig
from fedspan.data import Corpus, Encoded, encode
from fedspan.models import FederatedModel, build, load_processor
from fedspan.models.federated_model import Trains
from fedspan.support.errors import FedspanError


def encoded(name: str, data: DataConfig, corpus: Corpus) -> tuple[Any, dict[str, Encoded]]:
    """Return the tokenizer or image processor of the base called `name`, and the corpus encoded with it.

    The splits are `train`, `test`, and `unseen` where there is any.
    """
    processor = load_processor(name, corpus.kind)
    rows = {"train": corpus.train, "test": corpus.test}
    if corpus.unseen is not None:
        rows["unseen"] = corpus.unseen
    return processor, {split: encode(part, processor, data) for split, part in rows.items()}


def base_model(
    model: ModelConfig,
    adapter: AdapterConfig,
    corpus: Corpus,
    data: Mapping[str, Encoded],
    *,
    trains: Trains,
    max_rank: int,
    device: torch.device,
    seed: int,
) -> FederatedModel:
    """Return the base that the settings name, with the parts that a method trains.

    Parameters
    ----------
    data
        The corpus encoded for this base.
    trains
        As a method's `info.trains` says.
    max_rank
        The largest rank of any client.
    """
    texts = data["train"].texts
    return build(
        model.name,
        corpus.kind,
        trains=trains,
        num_labels=corpus.num_labels,
        target_modules=adapter.target_modules,
        max_rank=max_rank,
        rslora=adapter.rslora,
        dropout=adapter.dropout,
        dtype=model.dtype,
        device=device,
        seed=seed,
        label_names=corpus.label_names,
        regression=corpus.num_labels == 1,
        pad_token_id=texts.pad if texts is not None else None,
        quantise=model.quantise,
    )


def device_of(name: str) -> torch.device:
    """Return the device of this name; `auto` is a GPU where there is one.

    Raises
    ------
    FedspanError
        When this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FedspanError(f"device = {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device
