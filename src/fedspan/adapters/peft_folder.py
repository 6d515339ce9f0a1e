"""PEFT LoRA adapter folders, read and written without PEFT: a JSON config beside a safetensors file.

Only safetensors and JSON are read; nothing is unpickled. Shapes as in `fedspan.adapters.state_dict`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedspan.adapters import experts
from fedspan.adapters.lora_config import CARRIED, check_config
from fedspan.adapters.state_dict import (
    Adapter,
    adapter_names,
    adapter_of,
    check_finite,
    is_embedding,
    is_saved,
    tensors_of,
    without_adapter_name,
)
from fedspan.methods.messages import Factors
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.files import flush
from fedspan.support.paths import lacks

CONFIG_NAME = "adapter_config.json"
_INNER = ("adapter", "default")
"""Folders that hold the adapter in a run's folder, and in one that PEFT saved for an adapter of that name."""
WEIGHTS_NAME = "adapter_model.safetensors"
LABELS_NAME = "labels.json"
"""The label names of a classifier, as entries of a configuration of transformers; PEFT does not read it."""


def load(path: Path) -> Adapter:
    """Read a PEFT LoRA folder, strictly: every tensor in it is understood, or it is refused.

    Returns
    -------
    Adapter
        Tensors on the CPU, in the dtype of the file.

    Raises
    ------
    FedspanError
        One line naming the folder or file, what is wrong in it and what was expected: a missing, corrupt or
        truncated file; pickled weights; a PEFT type or option under which the update is not s·B·A on an
        unchanged base; and what `adapter_of` refuses.
    """
    config = _read_config(path)
    check_config(path, config)
    tensors = _read_tensors(path)
    names = adapter_names(tensors)
    if len(names) > 1:
        raise FedspanError(f"{path} holds the adapters {', '.join(names)}: expected one")
    return adapter_of(path, config, without_adapter_name(tensors, names[0]) if names else tensors)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        inner = next((name for name in _INNER if (path / name / CONFIG_NAME).is_file()), None)
        hint = f", such as {path / inner}" if inner else ""
        raise FedspanError(f"{lacks(path, CONFIG_NAME)}: expected a PEFT adapter folder{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a decoding error is a ValueError too
        raise FedspanError(f"{file} is not valid JSON ({one_line(error, 200)}): expected a PEFT config") from None
    if not isinstance(config, dict):
        raise FedspanError(f"{file} holds a JSON {type(config).__name__}: expected an object")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS_NAME
    if not file.is_file():
        if (path / "adapter_model.bin").exists():
            raise FedspanError(
                f"{path} holds adapter_model.bin, a pickle, which is never opened: "
                f"expected {WEIGHTS_NAME}, as save_pretrained(..., safe_serialization=True) writes it "
                "(docs/merging.md shows how to convert it)"
            )
        raise FedspanError(f"{path} holds no {WEIGHTS_NAME}: expected a PEFT adapter folder")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise FedspanError(f"{file} cannot be read ({error}): expected a whole safetensors file") from None


def save(
    path: Path,
    factors: Mapping[str, Factors],
    *,
    base_model: str | None,
    task_type: str | None,
    dense: Mapping[str, Tensor] | None = None,
    modules_to_save: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    embeddings: Collection[str] = (),
    frozen: Mapping[str, Tensor] | None = None,
    carried: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    stacks: Mapping[str, int] | None = None,
    target_parameters: Sequence[str] = (),
    labels: bytes | None = None,
) -> None:
    """Write a PEFT LoRA folder that `PeftModel.from_pretrained` loads as it is: whole, or not at all.

    Every scaling is folded into its B, so that the file has lora_alpha = r, and all modules get the largest
    rank r, padded with zeros: PEFT's per-module patterns depend on the order in which JSON was written.

    Parameters
    ----------
    factors
        ΔW per module, by its path inside the base model; a module of rank 0 is written as zeros.
    base_model
        The value of `base_model_name_or_path`.
    task_type
        PEFT's: "CAUSAL_LM", "SEQ_CLS" and so on; none for any other model.
    dense, modules_to_save
        Trained whole weights by parameter name, and the name endings of their modules.
    fan_in_fan_out
        The adapted layers store their weight transposed (GPT-2's Conv1D).
    embeddings, frozen
        As in `Adapter`.
    carried
        Other config entries to pass on, of those in `CARRIED`.
    dtype
        Type of the written floats; none: as they are.
    stacks, target_parameters
        As in `Adapter`, and the names of these parameters for PEFT.
    labels
        Content of the file of label names, if any.

    Raises
    ------
    FedspanError
        The folder exists and is not empty, a value is not finite, or a module has factors and is saved whole.
    ValueError
        The parts do not fit each other.
    OSError
        When writing fails; nothing is left behind.
    """
    check_free(path)
    whole = {**(dense or {}), **(frozen or {})}
    _check_parts(path, factors, whole, modules_to_save, embeddings, carried or {})
    rank = max(1, *(f.rank for f in factors.values()))
    pairs = experts.join({module: _padded(f, rank) for module, f in factors.items()}, stacks or {})
    tensors = tensors_of(pairs, whole, embeddings)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()} if dtype else tensors
    check_finite(path, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "target_modules": experts.plain_modules(sorted(factors), stacks or {}),
        "modules_to_save": list(modules_to_save) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        **({"target_parameters": sorted(target_parameters)} if stacks else {}),
        **(carried or {}),
    }
    _write(path, config, tensors, labels)


def check_free(path: Path) -> None:
    """Refuse an output path that is a file or a folder with something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FedspanError(f"{path} exists already: expected a new or empty folder")


def _check_parts(
    path: Path,
    factors: Mapping[str, Factors],
    whole: Mapping[str, Tensor],
    modules_to_save: Sequence[str],
    embeddings: Collection[str],
    carried: Mapping[str, Any],
) -> None:
    if not factors:
        raise ValueError(f"{path}: no module to write: expected at least one factor pair")
    for module, f in factors.items():
        _check_pair(f"{path}: {module}", f)
        if is_saved(f"{module}.weight", modules_to_save):
            # PEFT would not adapt it, and leave its factors unread.
            raise FedspanError(f"{path}: {module} has factors and is in modules_to_save: expected one of the two")
    strangers = [name for name in whole if not is_saved(name, modules_to_save) and not is_embedding(name)]
    if strangers:
        raise ValueError(f"{path}: weight {strangers[0]!r}: expected one in modules_to_save {list(modules_to_save)}")
    if unknown := sorted(set(embeddings) - factors.keys()):
        raise ValueError(f"{path}: embedding {unknown[0]!r} has no factors: expected a module with factors")
    if unknown := sorted(carried.keys() - set(CARRIED)):
        raise ValueError(f"{path}: config entry {unknown[0]!r}: expected one of {', '.join(CARRIED)}")


def _check_pair(where: str, f: Factors) -> None:
    if f.b.ndim != 2 or f.a.ndim != 2 or f.b.shape[1] != f.a.shape[0]:
        raise ValueError(f"{where}: factors {tuple(f.b.shape)} and {tuple(f.a.shape)}: expected (m, r) and (r, n)")


def _padded(f: Factors, rank: int) -> Factors:
    """Return (s·B, A) at the given rank, spare rows and columns zero."""
    delta = f.delta()
    m, n = delta.shape
    a, b = delta.a.new_zeros((rank, n), device="cpu"), delta.b.new_zeros((m, rank), device="cpu")
    a[: f.rank], b[:, : f.rank] = delta.a.detach(), delta.b.detach()
    return Factors(b, a, 1.0)


def _write(path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], labels: bytes | None) -> None:
    """Write a temporary folder beside the target, flush it to disk, then rename it: there is never half an adapter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        try:
            # "format" is what PEFT and transformers look for in the header.
            save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:  # its errors of the disk are no OSErrors
            raise FedspanError(f"{path} cannot be written ({one_line(error)}): expected a disk with room") from None
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        if labels is not None:
            (folder / LABELS_NAME).write_bytes(labels)
        for file in folder.iterdir():
            flush(file)
        flush(folder)
        if path.exists():
            path.rmdir()  # empty, or this fails; not every system renames over an empty folder
        folder.rename(path)
    flush(path.parent)
