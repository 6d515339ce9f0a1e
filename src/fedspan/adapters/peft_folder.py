"""PEFT LoRA adapter folders, read and written without PEFT: a JSON config beside a safetensors file.

Shapes: lora_A (r, n), lora_B (m, r), scaling α/r or α/√r. PEFT keeps this orientation on every layer:
on `nn.Linear` ΔW = s·B·A; on GPT-2's `Conv1D` (`fan_in_fan_out`) and on an embedding the weight is stored
transposed and ΔW = (s·B·A)ᵀ. Only safetensors and JSON are read; nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedspan.methods.messages import Factors
from fedspan.support.errors import FedspanError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out"})

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
    "target_parameters": "it adapts parameters that belong to no linear or embedding module",
    "trainable_token_indices": "it also trains rows of the embedding",
    "megatron_config": "its layers are Megatron's",
}
CARRIED = ("auto_mapping", "ensure_weight_tying", "revision")
"""Config entries that say nothing of the update but that the folder's reader needs."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter folder. Module names are paths inside the base model, without PEFT's prefixes."""

    factors: Mapping[str, Factors]
    """ΔW = scaling·B·A per module, `rank_pattern`, `alpha_pattern` and `use_rslora` resolved."""
    dense: Mapping[str, Tensor]
    """Trained whole weights (`modules_to_save`: heads), by parameter name."""
    config: Mapping[str, Any]
    """adapter_config.json as read."""
    embeddings: frozenset[str] = frozenset()
    """The modules that are embeddings: A (r, num_embeddings), B (embedding_dim, r), ΔW = (s·B·A)ᵀ."""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the base that PEFT saves beside an adapted or resized embedding; never trained."""

    @property
    def base_model(self) -> str | None:
        """`base_model_name_or_path`; none for a base built from a config."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Name endings of the modules that are trained and saved whole."""
        return tuple(self.config.get("modules_to_save") or ())


def load(path: Path) -> Adapter:
    """Read a PEFT LoRA folder, strictly: every tensor in it is understood, or it is refused.

    Returns
    -------
    Adapter
        Tensors on the CPU, in the dtype of the file.

    Raises
    ------
    ValueError
        One line naming the folder or file, what is wrong in it and what was expected: a missing, corrupt or
        truncated file; pickled weights; a PEFT type or option under which the update is not s·B·A on an
        unchanged base; a factor without its partner; shapes that do not fit each other or the config's rank;
        a value that is NaN or infinite; a tensor that belongs to nothing.
    """
    path = Path(path)
    config = _read_config(path)
    tensors = _read_tensors(path)
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise FedspanError(f"{path}: tensor {key!r}: expected names that start with {_PREFIX!r}")
        name = key.removeprefix(_PREFIX)
        found = _LORA.fullmatch(name)
        # PEFT keeps embedding factors as bare parameters and the others as weights of linear layers.
        if found is None or bool(found["embedding"]) == bool(found["weight"]):
            rest[name] = tensor
            continue
        sides.setdefault(found["module"], {})[found["side"]] = tensor
        if found["embedding"]:
            embeddings.add(found["module"])
    if not sides:
        raise FedspanError(f"{path / WEIGHTS_NAME} holds no lora_A and lora_B: expected a LoRA adapter")
    factors = {module: _factors(path, config, module, pair) for module, pair in sides.items()}
    dense, frozen = _sort_rest(path, config, factors, rest)
    if config.get("ensure_weight_tying") and embeddings:
        raise FedspanError(f"{path}: ensure_weight_tying and adapters on embeddings: expected one of them")
    return Adapter(factors, dense, config, frozenset(embeddings), frozen)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FedspanError(f"{path} is no folder: expected a PEFT adapter folder")
    file = path / CONFIG_NAME
    if not file.is_file():
        raise FedspanError(f"{path} holds no {CONFIG_NAME}: expected a PEFT adapter folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # a decoding error is one too
        raise FedspanError(f"{file} is not valid JSON ({error}): expected a PEFT config") from None
    if not isinstance(config, dict):
        raise FedspanError(f"{file} holds a JSON {type(config).__name__}: expected an object")
    _check_kind(path, config)
    _check_numbers(path, config)
    return config


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse every option under which the update is not s·B·A added to an unchanged base."""
    if config.get("peft_type") != "LORA":
        raise FedspanError(f"{path}: peft_type {config.get('peft_type')!r}: expected 'LORA'")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise FedspanError(f"{path}: {key} is set ({reason}): expected a plain LoRA adapter")
    if config.get("bias", "none") != "none":
        raise FedspanError(f"{path}: bias={config['bias']!r} also trains biases of the base: expected 'none'")
    init = config.get("init_lora_weights", True)
    if isinstance(init, bool) or init in _KNOWN_INITS:
        return
    problem = f"{path}: init_lora_weights={init!r} changes the base weights, so it fits no other base"
    if isinstance(init, str) and init.startswith(_CONVERTIBLE_INITS):
        raise FedspanError(
            f"{problem}: expected an adapter converted to plain LoRA by PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if init == "loftq":
        raise FedspanError(f"{problem}: expected an adapter trained on the original base")
    known = ", ".join(map(repr, _KNOWN_INITS))
    raise FedspanError(f"{path}: init_lora_weights={init!r}: expected true, false or one of {known}")


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for key, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict):
            raise FedspanError(f"{path}: {key} = {pattern!r}: expected an object of module patterns")
        for expression in pattern:
            try:
                re.compile(expression)
            except re.error as error:
                problem = f"{path}: {key} {expression!r} ({error})"
                raise FedspanError(f"{problem}: expected a regular expression") from None
    for key, value in (("r", config.get("r")), *ranks.items()):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FedspanError(f"{path}: rank {key} = {value!r}: expected a whole number of at least 1")
    for key, value in (("lora_alpha", config.get("lora_alpha")), *alphas.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FedspanError(f"{path}: alpha {key} = {value!r}: expected a finite number")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise FedspanError(f"{path}: modules_to_save = {saved!r}: expected a list of names")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS_NAME
    if not file.is_file():
        if (path / "adapter_model.bin").exists():
            raise FedspanError(
                f"{path} holds adapter_model.bin, a pickle, which is never opened: "
                f"expected {WEIGHTS_NAME}, as save_pretrained(..., safe_serialization=True) writes it"
            )
        raise FedspanError(f"{path} holds no {WEIGHTS_NAME}: expected a PEFT adapter folder")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise FedspanError(f"{file} cannot be read ({error}): expected a whole safetensors file") from None
    _check_finite(path, tensors)
    return tensors


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FedspanError(f"{path}: tensor {name!r} holds NaN or infinite values: expected finite ones")


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """What PEFT reads from a `rank_pattern` or `alpha_pattern` for this module.

    A pattern is a regular expression for the end of the module's path, from a dot or from its start; the
    first one in the file's order that matches counts.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _factors(path: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, Tensor]) -> Factors:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair:
            raise FedspanError(f"{path}: {module} has lora_{other} without lora_{side}: expected both")
    for side, tensor in pair.items():
        if tensor.ndim != 2:
            raise FedspanError(
                f"{path}: {module}: lora_{side} has shape {tuple(tensor.shape)}: expected a matrix "
                "(adapters on convolutions and stacked experts are not supported)"
            )
        if tensor.dtype not in _FLOATS:
            raise FedspanError(f"{path}: {module}: lora_{side} is {tensor.dtype}: expected 16 to 64 bit floats")
    a, b = pair["A"], pair["B"]
    rank = pattern_value(config.get("rank_pattern") or {}, module, config["r"])
    if a.shape[0] != rank or b.shape[1] != rank:
        raise FedspanError(
            f"{path}: {module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: "
            f"expected ({rank}, in) and (out, {rank}), the config's rank"
        )
    if 0 in a.shape or 0 in b.shape:
        shapes = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
        raise FedspanError(f"{path}: {module}: {shapes}: expected no empty side")
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return Factors(b, a, float(alpha / (rank**0.5 if config.get("use_rslora") else rank)))


def _is_saved(name: str, modules_to_save: Sequence[str]) -> bool:
    """Whether the parameter lies in a module whose path ends with an entry (PEFT's rule)."""
    parts = name.split(".")
    return any(".".join(parts[:i]).endswith(tuple(modules_to_save)) for i in range(1, len(parts)))


def _is_embedding(name: str) -> bool:
    """Whether PEFT may have saved this base parameter beside an adapted or resized embedding."""
    parts = name.split(".")[:-1]
    return bool(parts) and (parts[-2:-1] if parts[-1] == "base_layer" else parts[-1:])[0] in _EMBEDDINGS


def _sort_rest(
    path: Path, config: Mapping[str, Any], factors: Collection[str], rest: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that are no factors, as (trained heads, frozen embeddings)."""
    saved = tuple(config.get("modules_to_save") or ())
    dense: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, tensor in rest.items():
        if ".lora_" not in name and _is_saved(name, saved):
            dense[name] = tensor
        elif ".lora_" not in name and _is_embedding(name):
            frozen[name] = tensor
        else:
            raise FedspanError(
                f"{path}: tensor {_PREFIX + name!r} is none that this adapter should hold: "
                "expected lora_A, lora_B and modules_to_save weights"
            )
    if saved and not dense:
        raise FedspanError(f"{path}: modules_to_save = {list(saved)}: expected weights of theirs in {WEIGHTS_NAME}")
    return dense, frozen


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
) -> None:
    """Write a PEFT LoRA folder that `PeftModel.from_pretrained` loads with no help: whole, or not at all.

    Every scaling is folded into its B, so that the file has lora_alpha = r, and all modules get the largest
    rank r, padded with zeros: PEFT's per-module patterns depend on the order in which JSON was written.

    Parameters
    ----------
    factors
        ΔW per module, by its path inside the base model; a module of rank 0 is written as zeros.
    base_model
        What `base_model_name_or_path` shall say.
    task_type
        PEFT's: "CAUSAL_LM", "SEQ_CLS" and so on; none for any other model.
    dense, modules_to_save
        Trained whole weights by parameter name, and the name endings of the modules that they belong to.
    fan_in_fan_out
        The adapted layers store their weight transposed (GPT-2's Conv1D).
    embeddings, frozen
        As in `Adapter`.
    carried
        Other config entries to pass on, of those in `CARRIED`.

    Raises
    ------
    ValueError
        The folder exists and is not empty, or the parts do not fit each other, or a value is not finite.
    OSError
        When writing fails; nothing is left behind.
    """
    path = Path(path)
    check_free(path)
    whole = {**(dense or {}), **(frozen or {})}
    _check_parts(path, factors, whole, modules_to_save, embeddings, carried or {})
    rank = max(1, *(f.rank for f in factors.values()))
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in whole.items()}
    for module, f in factors.items():
        a, b = _padded(f, rank)
        form = "lora_embedding_{}" if module in embeddings else "lora_{}.weight"
        tensors[f"{_PREFIX}{module}.{form.format('A')}"] = a
        tensors[f"{_PREFIX}{module}.{form.format('B')}"] = b
    _check_finite(path, tensors)
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
        "target_modules": sorted(factors),
        "modules_to_save": list(modules_to_save) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        **(carried or {}),
    }
    _write(path, config, tensors)


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
        raise FedspanError(f"{path}: no module to write: expected at least one factor pair")
    for module, f in factors.items():
        if f.b.ndim != 2 or f.a.ndim != 2 or f.b.shape[1] != f.a.shape[0]:
            shapes = f"{tuple(f.b.shape)} and {tuple(f.a.shape)}"
            raise FedspanError(f"{path}: {module}: factors {shapes}: expected (m, r) and (r, n)")
        if _is_saved(f"{module}.weight", modules_to_save):
            # PEFT would not adapt it, and leave its factors unread.
            raise FedspanError(f"{path}: {module} has factors and is in modules_to_save: expected one of the two")
    for module in embeddings:
        if module not in factors:
            raise FedspanError(f"{path}: embedding {module!r} has no factors: expected a module with factors")
    for name in whole:
        if not _is_saved(name, modules_to_save) and not _is_embedding(name):
            raise FedspanError(f"{path}: weight {name!r}: expected one in modules_to_save {list(modules_to_save)}")
    for key in carried:
        if key not in CARRIED:
            raise FedspanError(f"{path}: config entry {key!r}: expected one of {', '.join(CARRIED)}")


def _padded(f: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """(A, s·B) at the given rank, spare rows and columns zero."""
    delta = f.delta()
    m, n = delta.shape
    a, b = delta.a.new_zeros((rank, n), device="cpu"), delta.b.new_zeros((m, rank), device="cpu")
    a[: f.rank], b[:, : f.rank] = delta.a.detach(), delta.b.detach()
    return a, b


def _write(path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """A temporary folder beside the target, flushed to disk, then renamed: there is never half an adapter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        # "format" is what PEFT and transformers look for in the header.
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        for file in folder.iterdir():
            _flush(file)
        _flush(folder)
        if path.exists():
            path.rmdir()  # empty, or this fails; not every system renames over an empty folder
        folder.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
