"""Other libraries' names for our settings, and our own former names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedspan.support.errors import FedspanError

ALIASES: Mapping[str, str] = {
    # PEFT
    "adapter.lora_alpha": "adapter.alpha",
    "adapter.lora_dropout": "adapter.dropout",
    "adapter.use_rslora": "adapter.rslora",
    "adapter.r": "federation.ranks",
    "adapter.layers_to_transform": "adapter.layers",
    "federation.rank": "federation.ranks",
    # One metric, and the section in which some look for it
    "data.metric": "data.metrics",
    "evaluation.metric": "data.metrics",
    "evaluation.metrics": "data.metrics",
    # Transformers (TrainingArguments and the example scripts) and TRL
    "model.model_name_or_path": "model.name",
    "model.torch_dtype": "model.dtype",
    "data.dataset_config_name": "data.subset",
    "data.train_file": "data.train",
    "data.test_file": "data.test",
    "data.max_seq_length": "data.max_length",
    "data.max_train_samples": "data.max_train",
    "data.max_eval_samples": "data.max_test",
    "local.max_grad_norm": "local.clip_norm",
    "local.max_steps": "local.steps",
    "local.num_train_epochs": "local.epochs",
    "local.per_device_train_batch_size": "local.batch_size",
    "local.warmup_ratio": "local.warmup",
    "local.lr_scheduler_type": "local.schedule",
    "local.head_lr": "local.head_learning_rate",
    "local.loraplus_lr_ratio": "local.lora_plus_ratio",
    "evaluation.per_device_eval_batch_size": "evaluation.batch_size",
    "engine.gradient_checkpointing": "engine.checkpointing",
    # Flower
    "federation.fraction_fit": "federation.participation",
    "federation.fraction_train": "federation.participation",
    "federation.min_fit_clients": "federation.min_clients",
    "federation.min_train_nodes": "federation.min_clients",
    "federation.num_partitions": "federation.num_clients",
    "federation.num_rounds": "federation.rounds",
    "federation.num_server_rounds": "federation.rounds",
    "federation.num_supernodes": "federation.num_clients",
    "server.beta_1": "server.momentum",
    "server.beta_2": "server.beta2",
    "server.eta": "server.learning_rate",
    "server.server_learning_rate": "server.learning_rate",
    "server.server_momentum": "server.momentum",
    "privacy.clipping_norm": "privacy.clip",
    "robust.num_malicious_nodes": "robust.attackers",
}
"""Keys that are accepted in place of ours, only where they mean the same. Settings are written in our names."""

RENAMED: Mapping[str, str] = {"federation.alpha": "federation.dirichlet_alpha"}
"""Former names, refused with the present one."""


def canonical_key(key: str) -> str:
    """Return our name of a setting that may be given under an alias.

    Raises
    ------
    FedspanError
        For a former name.
    """
    if key in RENAMED:
        raise FedspanError(f"{key} is now called {RENAMED[key]}")
    return ALIASES.get(key, key)


def canonical(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested settings with aliases replaced by our names; the input is left as it is.

    Raises
    ------
    FedspanError
        When one setting is given under two names, or under a former one.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    given: dict[str, str] = {}
    for section, values in tree.items():
        if not isinstance(values, Mapping):
            continue
        for name in values:
            key = f"{section}.{name}"
            ours = canonical_key(key)
            refuse_second_name(given, ours, key)
            if ours != key:
                our_section, _, our_name = ours.partition(".")
                place = result.setdefault(our_section, {})
                value = result[section].pop(name)
                # What is no section is refused later, when the whole is validated.
                if isinstance(place, dict):
                    place[our_name] = value
    return result


def refuse_second_name(given: dict[str, str], ours: str, key: str) -> None:
    """Note in `given` that a setting was given as `key`.

    Raises
    ------
    FedspanError
        When it was given under another name before.
    """
    first = given.setdefault(ours, key)
    if first != key:
        raise FedspanError(f"{first} and {key} are the same setting: give only one of them")
