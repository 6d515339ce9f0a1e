"""PEFT's LoRA configuration: which options are understood, and the ranks and scalings that it gives to modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from fedspan.support.errors import FedspanError, one_line

CARRIED = ("auto_mapping", "ensure_weight_tying", "revision")
"""Entries that do not affect the update, but that a reader of the folder needs."""

_PATIENCE = 0.3  # seconds of computing
_KNOWN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")
_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA also rescales the base weight",
    "lora_bias": "it also trains a bias on lora_B",
    "use_qalora": "QALoRA pools the layer's input",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "kasa_config": "KaSA truncates the base weight and trains a diagonal between the factors",
    "monteclora_config": "MonteCLoRA samples its weights",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow routes each token to adapters of its own",
    "layer_replication": "it changes the layers of the base",
    "trainable_token_indices": "it also trains rows of the embedding",
    "megatron_config": "its layers are Megatron's",
}


def check_config(where: Path | str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration under which the update is not s·B·A added to an unchanged base.

    Parameters
    ----------
    where
        The folder or the adapter, as messages name it.

    Raises
    ------
    FedspanError
        Naming the entry, its value and what was expected.
    """
    if config.get("peft_type") != "LORA":
        raise FedspanError(f"{where}: peft_type {config.get('peft_type')!r}: expected 'LORA'")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise FedspanError(f"{where}: {key} is set ({reason}): expected a plain LoRA adapter")
    if config.get("bias", "none") != "none":
        raise FedspanError(f"{where}: bias={config['bias']!r} also trains biases of the base: expected 'none'")
    _check_init(where, config.get("init_lora_weights", True))
    _check_numbers(where, config)
    _check_parameters(where, config)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise FedspanError(f"{where}: modules_to_save = {saved!r}: expected a list of names")


def _check_numbers(where: Path | str, config: Mapping[str, Any]) -> None:
    ranks, alphas = (_patterns(where, config, key) for key in ("rank_pattern", "alpha_pattern"))
    for key, value in (("r", config.get("r")), *ranks.items()):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FedspanError(f"{where}: rank {key} = {_short(value)}: expected a whole number of at least 1")
    for key, value in (("lora_alpha", config.get("lora_alpha")), *alphas.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise FedspanError(f"{where}: alpha {key} = {_short(value)}: expected a finite number")


def _check_parameters(where: Path | str, config: Mapping[str, Any]) -> None:
    names = config.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise FedspanError(f"{where}: target_parameters = {_short(names)}: expected a list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        if names and config.get(key):
            raise FedspanError(
                f"{where}: target_parameters and {key} are set, and which parameter a pattern is for "
                "cannot be told without the base: expected one rank and alpha"
            )


def _check_init(where: Path | str, init: Any) -> None:
    if isinstance(init, bool) or init in _KNOWN_INITS:
        return
    problem = f"{where}: init_lora_weights={init!r} changes the base weights, so it fits no other base"
    if isinstance(init, str) and init.startswith(_CONVERTIBLE_INITS):
        raise FedspanError(
            f"{problem}: expected an adapter converted to plain LoRA by PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if init == "loftq":
        raise FedspanError(f"{problem}: expected an adapter trained on the original base")
    known = ", ".join(map(repr, _KNOWN_INITS))
    raise FedspanError(f"{where}: init_lora_weights={init!r}: expected true, false or one of {known}")


def _patterns(where: Path | str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a `rank_pattern` or `alpha_pattern` whose keys are regular expressions."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise FedspanError(f"{where}: {key} = {patterns!r}: expected an object of module patterns")
    for expression in patterns:
        try:
            re.compile(expression)
            regex.compile(expression)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            problem = f"{where}: {key} {_short(expression)} ({one_line(error, 100)})"
            raise FedspanError(f"{problem}: expected a regular expression") from None
    return patterns


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _short(value: object) -> str:
    return one_line(repr(value), 100)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value that PEFT reads from a `rank_pattern` or `alpha_pattern` for this module.

    A pattern is a regular expression for the end of the module's path, from a dot or from its start; the
    first one in the file's order that matches counts.

    Raises
    ------
    FedspanError
        For a pattern that takes over 0.3 seconds: some would take years.
    """
    for pattern, value in patterns.items():
        try:
            # Python's own engine cannot be stopped.
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATIENCE):
                return value
        except TimeoutError:
            raise FedspanError(
                f"the pattern {_short(pattern)} takes over {_PATIENCE:g} s to match {module}: expected a simpler one"
            ) from None
    return default


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Return the module's rank r."""
    return int(pattern_value(config.get("rank_pattern") or {}, module, config["r"]))


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the module's scaling, α/r or (rsLoRA) α/√r."""
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
