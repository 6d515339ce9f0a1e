"""From settings to the objects in memory that training needs: encoded data, the base with its adapters, a device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fedspan.client import precision
from fedspan.client.executors import WorkContext
from fedspan.client.length_parts import worth_a_part
from fedspan.client.training import TrainingSettings
from fedspan.config import Config, DataConfig, EngineConfig
from fedspan.data import Corpus, Encoded, encode
from fedspan.data.base_facts import BaseFacts
from fedspan.data.label_names import match_labels
from fedspan.models import FederatedModel, build, frozen_prefix, load_processor, packed_rows
from fedspan.models.base_checks import check_pixels, check_tokens
from fedspan.models.base_facts import read_facts
from fedspan.models.blocks import NotApplicable
from fedspan.models.encoder_decoder import check_loss, decoder_start, is_encoder_decoder
from fedspan.models.federated_model import Trains
from fedspan.models.placement import usable_device
from fedspan.models.selection import Selection
from fedspan.models.starting_adapter import start_from
from fedspan.privacy.example_dp import check_layers
from fedspan.support.activity import report
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Prepared:
    """A corpus as one base reads it."""

    corpus: Corpus
    """With the base's label ids, where its labels are the data's."""
    processor: Any
    """The base's tokenizer or image processor."""
    data: Mapping[str, Encoded]
    """`train`, `test`, and `unseen` where there is any."""
    base: BaseFacts
    config: DataConfig
    """With the maximum length that was used."""
    new_head: str | None
    """The reason to draw a new head although the base may have one."""
    notes: tuple[str, ...]
    """Lines on how base and data were read where that may surprise."""


def prepare(name: str, config: DataConfig, corpus: Corpus, *, stand_ins: Collection[str] = ()) -> Prepared:
    """Encode a corpus with the tokenizer or image processor of the base called `name`.

    Parameters
    ----------
    stand_ins
        Splits whose rows only stand for data that is not there: no note is about them.

    Raises
    ------
    FedspanError
        When tokenizer or processor cannot be read, or the data does not fit them.
    """
    report(f"loading the {'image processor' if corpus.kind == 'image' else 'tokenizer'} of {name}")
    processor, base = load_processor(name, corpus.kind), read_facts(name)
    notes: list[str] = []
    decoder = decoder_start(name, corpus.kind, processor)
    config = _within_context(name, config, corpus, base, notes)
    matched = match_labels(corpus, base)
    corpus = matched.corpus
    rows = {"train": corpus.train, "test": corpus.test}
    if corpus.unseen is not None:
        rows["unseen"] = corpus.unseen
    if corpus.validation is not None:
        rows["validation"] = corpus.validation
    data = {}
    for split, part in rows.items():
        report(f"encoding {len(part):,} {split} rows")
        data[split] = encode(part, processor, config, base, decoder=decoder)
    notes += [matched.note] if matched.note is not None else []
    notes += _notes_of_splits({split: part for split, part in data.items() if split not in stand_ins})
    return Prepared(corpus, processor, data, base, config, matched.new_head, tuple(notes))


def _notes_of_splits(data: Mapping[str, Encoded]) -> list[str]:
    """Return every note once, with the splits that it is about where these are not all."""
    notes: dict[str, list[str]] = {}
    for split, part in data.items():
        for note in part.notes:
            notes.setdefault(note, []).append(split)
    return [note if len(splits) == len(data) else f"{', '.join(splits)}: {note}" for note, splits in notes.items()]


def _within_context(name: str, config: DataConfig, corpus: Corpus, base: BaseFacts, notes: list[str]) -> DataConfig:
    """Return the settings with the default maximum length lowered to what the base takes."""
    limit = base.num_positions
    # A file of settings states the default too, so a number that is the default's counts as one.
    default = DataConfig.model_fields["max_length"].default
    if corpus.kind == "image" or limit is None or config.max_length != default or limit >= default:
        return config
    notes.append(f"data.max_length is lowered from {default} to {limit}, the number of positions of {name}")
    return config.model_copy(update={"max_length": limit})


def work_context(
    config: Config,
    prepared: Prepared,
    *,
    trains: Trains,
    max_rank: int,
    device: torch.device,
    galore_rank: int = 0,
    training: bool = True,
) -> WorkContext:
    """Return the base that the settings name, with the parts that a method trains, beside the data to train it on.

    Parameters
    ----------
    trains
        As a method's `info.trains` says.
    max_rank
        The largest rank of any client.
    galore_rank
        The rank that gradients of the target modules' weights are projected to; 0: they are not.
    training
        Clients are trained in it where it lies; False: it is evaluated alone, or copied to other devices, so that
        faster ways of training are not tried.

    Raises
    ------
    FedspanError
        When the base cannot be read, or does not fit the data, the settings or this machine's devices.
    """
    corpus, data, adapter = prepared.corpus, prepared.data, config.adapter
    texts = data["train"].texts
    report(f"loading the base {config.model.name}")
    model = build(
        config.model.name,
        corpus.kind,
        trains=trains,
        num_labels=corpus.num_labels,
        selection=Selection(
            adapter.target_modules,
            adapter.exclude_modules,
            adapter.layers,
            adapter.modules_to_save,
            adapter.target_parameters,
        ),
        min_rank=None if trains == "adapter" else galore_rank,
        example=data["train"].batch([0]),
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
        new_head=prepared.new_head,
        base_dropout=config.model.dropout,
        check=partial(_check_data, config.model.name, data),
        device_map=config.engine.device_map,
    )
    precision.check(model, config.engine)
    precision.prepare(model, config.engine)
    if config.engine.checkpointing and not getattr(model.model, "supports_gradient_checkpointing", False):
        raise FedspanError(f"engine.checkpointing: {type(model.model).__name__} does not support it; expected false")
    if corpus.kind == "instruction" and is_encoder_decoder(model.model.config):
        check_loss(model, data["train"])
    if config.privacy.dp == "example":
        check_layers(model, data["train"])
    if config.model.adapter is not None:
        start_from(model, config.model.adapter)
    if training:
        # Nobody who did not leave the lowest layers out expects anything of them.
        find_prefix(model, data["train"], config.engine, expected=adapter.layers is not None)
        find_packed(model, data["train"], config.engine, config.local.batch_size)
    settings = TrainingSettings.of(config)
    return WorkContext(settings, config.evaluation, config.threads, model, data, prepared.processor, corpus.metrics)


def find_prefix(model: FederatedModel, data: Encoded, engine: EngineConfig, *, expected: bool = True) -> None:
    """Let the lowest layers be computed once for each example, where nothing is trained in them.

    Parameters
    ----------
    expected
        Note the reason where they must be computed in every step.
    """
    if engine.compile or engine.checkpointing:
        return
    try:
        model.prefix = frozen_prefix.find(model, data.batch([0, len(data) - 1]), engine.prefix_cache)
    except NotApplicable as reason:
        if not expected:
            return
        model.notes = (*model.notes, f"the layers below the adapters are computed in every step: {reason}")
    if model.prefix is not None:
        count = len(model.prefix.below)
        lowest = "lowest layer is" if count == 1 else f"{count} lowest layers are"
        model.notes = (*model.notes, f"the {lowest} computed once for each example")


def find_packed(model: FederatedModel, data: Encoded, engine: EngineConfig, batch_size: int) -> None:
    """Let the rows of a wide client's batch lie end to end in the blocks, or note the reason why they cannot.

    Parameters
    ----------
    batch_size
        That of the clients: where no batch is wide, nothing is tried.
    """
    if engine.compile or engine.checkpointing or worth_a_part(model, data, batch_size) is None:
        return
    report("trying rows end to end in the base's blocks")
    try:
        model.packed = packed_rows.find(model, data)
    except NotApplicable as reason:
        model.notes = (*model.notes, f"batches are padded in the base's blocks, in parts of similar lengths: {reason}")


def _check_data(name: str, data: Mapping[str, Encoded], base: nn.Module) -> None:
    """Refuse data that the base cannot read."""
    if data["train"].texts is None:
        check_pixels(base, name, data["train"].batch([0])["pixel_values"].to(next(base.parameters()).device))
        return
    for part in data.values():
        check_tokens(base, name, *part.extent())


def notes_of(prepared: Prepared, model: FederatedModel) -> tuple[str, ...]:
    """Return lines on how base and data were read where that may surprise."""
    notes = (*prepared.notes, *model.notes)
    if prepared.new_head is None or not model.replaced_head:
        return notes
    return (*notes, f"a new head is drawn in place of the base's: {prepared.new_head}")


def device_of(name: str) -> torch.device:
    """Return the device of this name; `auto` is a GPU where there is one.

    Raises
    ------
    FedspanError
        When this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device("device", name)
