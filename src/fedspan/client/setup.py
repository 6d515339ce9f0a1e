"""From a configuration to what training needs in memory: encoded data and the base with its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedspan.config import Config
from fedspan.data import Corpus, Encoded, encode
from fedspan.methods.base import Method
from fedspan.models import FederatedModel, build, load_processor
from fedspan.support.errors import FedspanError


def encoded(config: Config, corpus: Corpus) -> tuple[Any, dict[str, Encoded]]:
    """The base's tokenizer or image processor, and the corpus by it: `train`, `test`, `unseen` where there is any."""
    processor = load_processor(config.model.name, corpus.kind)
    rows = {"train": corpus.train, "test": corpus.test}
    if corpus.unseen is not None:
        rows["unseen"] = corpus.unseen
    return processor, {split: encode(part, processor, config.data) for split, part in rows.items()}


def base_model(
    config: Config,
    method: Method,
    corpus: Corpus,
    data: Mapping[str, Encoded],
    *,
    max_rank: int,
    device: torch.device,
) -> FederatedModel:
    """The base as the configuration asks for it, with what the method trains."""
    texts = data["train"].texts
    return build(
        config.model.name,
        corpus.kind,
        trains=method.info.trains,
        num_labels=corpus.num_labels,
        target_modules=config.adapter.target_modules,
        max_rank=max_rank,
        rslora=config.adapter.rslora,
        dropout=config.adapter.dropout,
        dtype=config.model.dtype,
        device=device,
        seed=config.seed,
        label_names=corpus.label_names,
        regression=corpus.num_labels == 1,
        pad_token_id=texts.pad if texts is not None else None,
        quantise=config.model.quantise,
    )


def device_of(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FedspanError(f"device = {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device
