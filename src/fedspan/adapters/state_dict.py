"""PEFT's LoRA state dicts: names and tensors in, factor pairs and whole weights out, and back.

Shapes: lora_A (r, n), lora_B (m, r), scaling α/r or α/√r. PEFT keeps this orientation on every layer:
on `nn.Linear` ΔW = s·B·A; on GPT-2's `Conv1D` (`fan_in_fan_out`) and on an embedding the weight is stored
transposed and ΔW = (s·B·A)ᵀ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspan.adapters import experts
from fedspan.adapters.lora_config import check_config, rank_of, scaling_of
from fedspan.methods.messages import Factors
from fedspan.support.errors import FedspanError

PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?")
_SIDE = re.compile(r"\.lora_(?:[AB](?:\.(?P<linear>[^.]+))?\.weight|embedding_[AB](?:\.(?P<embedding>[^.]+))?)$")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out"})


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter. Module names are paths inside the base model, without PEFT's prefixes."""

    factors: Mapping[str, Factors]
    """ΔW = scaling·B·A per module, `rank_pattern`, `alpha_pattern` and `use_rslora` resolved."""
    dense: Mapping[str, Tensor]
    """Trained whole weights (`modules_to_save`: heads), by parameter name."""
    config: Mapping[str, Any]
    """PEFT's LoraConfig, as adapter_config.json has it."""
    embeddings: frozenset[str] = frozenset()
    """The modules that are embeddings: A (r, num_embeddings), B (embedding_dim, r), ΔW = (s·B·A)ᵀ."""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights of the base that PEFT saves beside an adapted or resized embedding; never trained."""
    stacks: Mapping[str, int] = field(default_factory=dict)
    """PEFT's path of each adapted parameter -> its number of experts, whose modules are `path.0`, `path.1`, …"""

    @property
    def base_model(self) -> str | None:
        """`base_model_name_or_path`; none for a base built from a config."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Name endings of the modules that are trained and saved whole."""
        return tuple(self.config.get("modules_to_save") or ())


def adapter_of(where: Path | str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter that these tensors hold, strictly: every tensor is understood, or all are refused.

    Parameters
    ----------
    where
        The folder or the client, as messages name it.
    config
        PEFT's LoraConfig, already checked by `check_config`.
    tensors
        Named as by `peft.get_peft_model_state_dict`.

    Raises
    ------
    FedspanError
        For a factor without its partner; shapes that do not fit each other or the config's rank; a value that is
        NaN or infinite; a tensor that belongs to nothing.
    """
    check_finite(where, tensors)
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise FedspanError(f"{where}: tensor {key!r}: expected names that start with {PREFIX!r}")
        name = key.removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        # PEFT keeps embedding factors as bare parameters and the others as weights of linear layers.
        if match is None or bool(match["embedding"]) == bool(match["weight"]):
            rest[name] = tensor
            continue
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
        if match["embedding"]:
            embeddings.add(match["module"])
    if not pairs:
        raise FedspanError(f"{where} holds no lora_A and lora_B: expected a LoRA adapter")
    own, stacks = experts.split(where, config, pairs)
    factors = {module: _factors(f"{where}: {module}", config, module, pair) for module, pair in own.items()}
    dense, frozen = _sort_rest(where, config, rest)
    if config.get("ensure_weight_tying") and embeddings:
        raise FedspanError(f"{where}: ensure_weight_tying and adapters on embeddings: expected one of them")
    return Adapter(factors, dense, config, frozenset(embeddings), frozen, stacks)


def tensors_of(
    factors: Mapping[str, Factors], whole: Mapping[str, Tensor], embeddings: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the state dict of these pairs and whole weights, as copies on the CPU. Scalings are the config's affair.

    `peft.set_peft_model_state_dict` takes it.
    """
    tensors = {PREFIX + name: _copy(tensor) for name, tensor in whole.items()}
    for module, f in factors.items():
        form = "lora_embedding_{}" if module in embeddings else "lora_{}.weight"
        tensors[f"{PREFIX}{module}.{form.format('A')}"] = _copy(f.a)
        tensors[f"{PREFIX}{module}.{form.format('B')}"] = _copy(f.b)
    return tensors


def adapter_names(tensors: Collection[str]) -> list[str]:
    """Return the adapters' names in keys such as `….lora_A.default.weight`, as a model's own state dict has them.

    There are none where some factor has no such name.
    """
    keys = [match for key in tensors if (match := _SIDE.search(key))]
    names = {match["linear"] or match["embedding"] for match in keys}
    return [] if None in names else sorted(names)


def without_adapter_name(tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors named as by `get_peft_model_state_dict`, where names hold the adapter's as in a model."""
    name = re.escape(adapter_name)
    factor, saved = re.compile(rf"(\.lora_\w+)\.{name}(?=\.|$)"), re.compile(rf"\.modules_to_save\.{name}\.")
    return {saved.sub(".", factor.sub(r"\1", key)): tensor for key, tensor in tensors.items()}


def adapter_of_model(model: Any, adapter_name: str = "default") -> Adapter:
    """Return the adapter that a `peft.PeftModel` holds, as copies on the CPU.

    Raises
    ------
    FedspanError
        When the object is no PEFT model with an adapter of that name, or as `adapter_of`.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or adapter_name not in configs:
        given = f"adapters {sorted(configs)}" if isinstance(configs, Mapping) else f"a {type(model).__name__}"
        raise FedspanError(f"base = {given}: expected a PEFT model with an adapter named {adapter_name!r}")
    config = configs[adapter_name].to_dict()
    if config.get("target_parameters"):
        config["target_parameters"] = sorted(config["target_parameters"])
    where = f"adapter {adapter_name!r} of the model"
    check_config(where, config)
    # All that belongs to this adapter has its name behind `lora_…` or `modules_to_save`.
    own = re.compile(rf"\.(lora_\w+|modules_to_save)\.{re.escape(adapter_name)}(\.|$)")
    tensors = {key: _copy(tensor) for key, tensor in model.state_dict().items() if own.search(key)}
    return adapter_of(where, config, without_adapter_name(tensors, adapter_name))


def check_finite(where: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that holds NaN or infinity, and floats of a type that nothing can be computed in."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            raise FedspanError(f"{where}: tensor {name!r} is {tensor.dtype}: expected 16 to 64 bit floats")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FedspanError(f"{where}: tensor {name!r} holds NaN or infinite values: expected finite ones")


def is_saved(name: str, modules_to_save: Sequence[str]) -> bool:
    """Return whether the parameter lies in a module whose path ends with an entry (PEFT's rule)."""
    parts = name.split(".")
    return any(".".join(parts[:i]).endswith(tuple(modules_to_save)) for i in range(1, len(parts)))


def is_embedding(name: str) -> bool:
    """Return whether PEFT may have saved this base parameter beside an adapted or resized embedding."""
    parts = name.split(".")[:-1]
    return bool(parts) and (parts[-2:-1] if parts[-1] == "base_layer" else parts[-1:])[0] in _EMBEDDINGS


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _factors(where: str, config: Mapping[str, Any], module: str, pair: Mapping[str, Tensor]) -> Factors:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in pair:
            raise FedspanError(f"{where} has lora_{other} without lora_{side}: expected both")
        _check_factor(where, side, pair[side])
    a, b = pair["A"], pair["B"]
    shapes = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
    rank = rank_of(config, module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise FedspanError(f"{where}: {shapes}: expected ({rank}, in) and (out, {rank}), the config's rank")
    if 0 in a.shape or 0 in b.shape:
        raise FedspanError(f"{where}: {shapes}: expected no empty side")
    factors = Factors(b, a, scaling_of(config, module, rank))
    _check_size(where, factors)
    return factors


def _check_size(where: str, factors: Factors) -> None:
    """Refuse factors whose product float32 cannot hold, although it holds each of them."""
    b, a = factors.b.double(), factors.a.double()
    norm = abs(factors.scaling) * math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))
    if not norm < torch.finfo(torch.float32).max:
        raise FedspanError(
            f"{where}: the change of the weight has norm {norm:.3g}, with scaling {factors.scaling:g}: expected one "
            "that float32 can hold, below 3.4e38"
        )


def _check_factor(where: str, side: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise FedspanError(
            f"{where}: lora_{side} has shape {tuple(tensor.shape)}: expected a matrix "
            "(adapters on convolutions and stacked experts are not supported)"
        )
    if tensor.dtype not in _FLOATS:
        raise FedspanError(f"{where}: lora_{side} is {tensor.dtype}: expected 16 to 64 bit floats")


def _sort_rest(
    where: Path | str, config: Mapping[str, Any], rest: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors that are no factors, as (trained heads, frozen embeddings)."""
    saved = tuple(config.get("modules_to_save") or ())
    dense: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, tensor in rest.items():
        if ".lora_" not in name and is_saved(name, saved):
            dense[name] = tensor
        elif ".lora_" not in name and is_embedding(name):
            frozen[name] = tensor
        else:
            raise FedspanError(
                f"{where}: tensor {PREFIX + name!r} is none that this adapter should hold: "
                "expected lora_A, lora_B and modules_to_save weights"
            )
    if saved and not dense:
        raise FedspanError(f"{where}: modules_to_save = {list(saved)}: expected weights of these modules")
    return dense, frozen
