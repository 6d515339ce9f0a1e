"""From settings to the objects in memory that training needs: encoded data, the base with its adapters, a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedspan.client.executors import WorkContext
from fedspan.client.training import TrainingSettings
from fedspan.config import Config, DataConfig
from fedspan.data import Corpus, Encoded, encode
from fedspan.models import build, load_processor
from fedspan.models.encoder_decoder import check_loss, decoder_start, is_encoder_decoder
from fedspan.models.federated_model import Trains
from fedspan.support.errors import FedspanError, first_line


def encoded(name: str, data: DataConfig, corpus: Corpus) -> tuple[Any, dict[str, Encoded]]:
    """Return the tokenizer or image processor of the base called `name`, and the corpus encoded with it.

    The splits are `train`, `test`, and `unseen` where there is any.
    """
    processor = load_processor(name, corpus.kind)
    decoder = decoder_start(name, corpus.kind, processor)
    rows = {"train": corpus.train, "test": corpus.test}
    if corpus.unseen is not None:
        rows["unseen"] = corpus.unseen
    return processor, {split: encode(part, processor, data, decoder=decoder) for split, part in rows.items()}


def work_context(
    config: Config,
    corpus: Corpus,
    processor: Any,
    data: Mapping[str, Encoded],
    *,
    trains: Trains,
    max_rank: int,
    device: torch.device,
) -> WorkContext:
    """Return the base that the settings name, with the parts that a method trains, beside the data to train it on.

    Parameters
    ----------
    processor, data
        As `encoded` returns them.
    trains
        As a method's `info.trains` says.
    max_rank
        The largest rank of any client.
    """
    texts, adapter = data["train"].texts, config.adapter
    model = build(
        config.model.name,
        corpus.kind,
        trains=trains,
        num_labels=corpus.num_labels,
        target_modules=adapter.target_modules,
        max_rank=max_rank,
        rslora=adapter.rslora,
        dropout=adapter.dropout,
        dtype=config.model.dtype,
        device=device,
        seed=config.seed,
        label_names=corpus.label_names,
        regression=corpus.num_labels == 1,
        pad_token_id=texts.pad if texts is not None else None,
        quantise=config.model.quantise,
    )
    if corpus.kind == "instruction" and is_encoder_decoder(model.model.config):
        check_loss(model, data["train"])
    training = TrainingSettings.of(config)
    return WorkContext(training, config.evaluation, config.threads, model, data, processor, corpus.metrics)


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
        torch.zeros(1, device=device).item()  # the meta device has no values to give
    except (RuntimeError, AssertionError) as error:
        raise FedspanError(f"device = {name!r} cannot be used here ({first_line(error)})") from None
    return device
