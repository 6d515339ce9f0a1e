"""From a base's name to a `FederatedModel`: heads, target layers, and PEFT's adapters on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from fedspan.data.rows import Kind
from fedspan.models import quantised
from fedspan.models.base_checks import check_causal
from fedspan.models.federated_model import FederatedModel, Trains
from fedspan.models.layers import in_float32, is_conv1d, shape_of
from fedspan.models.loading import head_names, load_base, seeded, without
from fedspan.support.errors import FedspanError


def build(
    name: str,
    kind: Kind,
    *,
    trains: Trains,
    num_labels: int,
    target_modules: tuple[str, ...],
    max_rank: int,
    rslora: bool,
    dropout: float,
    dtype: str,
    device: torch.device,
    seed: int,
    label_names: tuple[str, ...] | None = None,
    regression: bool = False,
    pad_token_id: int | None = None,
    quantise: str = "none",
    new_head: str | None = None,
) -> FederatedModel:
    """Load the base and prepare the parts that `trains` names for training.

    Parameters
    ----------
    trains
        `adapter`: adapters on the target modules; `targets`: the target modules' weights; `all`: every weight. Heads
        are always trained.
    target_modules
        Name endings of the target modules; `all-linear` for every linear layer beside the heads.
    max_rank
        The largest rank of any client.
    pad_token_id
        The token that the batches are padded with; None as the base's own configuration says.
    quantise
        The type of the base's linear layers: `int8`, `nf4`, or `none` for `dtype` as everything else.
    new_head
        The reason to draw the layer that gives the classes anew, although the base may have one of the same size.

    Raises
    ------
    FedspanError
        When the base cannot be read or not be quantised, is not finite or, for instruction data, no causal model; when
        no layer matches `target_modules`, or a rank exceeds a layer's size.
    """
    quantised.check(quantise, trains)
    kept = dtype if trains == "adapter" else "float32"
    base, new, replaced = load_base(
        name, kind, num_labels, kept, seed, label_names, regression, pad_token_id, quantise, new_head is not None
    )
    base.to(device)
    if kind == "instruction":
        check_causal(base, name)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    own = dict(base.named_parameters())
    heads = _heads(base, kind, name, new & own.keys())
    targets = _targets(base, target_modules, heads)
    weights = {f"{layer_name}.weight" for layer_name in targets}
    dense = _dense(own, heads, weights, trains)
    if kept != "float32":
        for head in heads:
            base.get_submodule(head).register_forward_pre_hook(in_float32)
    model: nn.Module = base
    layers: Mapping[str, Any] = targets
    if trains == "adapter":
        _check_rank(targets, max_rank)
        with seeded(seed, "adapter"):
            model, layers = _attach(base, targets, max_rank, rslora, dropout)
    projected = frozenset(weights & dense.keys())
    return FederatedModel(name, kind, trains, model, layers, dense, projected, heads, device, replaced_head=replaced)


def _dense(
    own: Mapping[str, nn.Parameter], heads: Collection[str], weights: Collection[str], trains: Trains
) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained as they are, in float32 whatever the base's type."""
    in_heads = {name for name in own if _within(name, heads)}
    chosen = {"adapter": in_heads, "targets": in_heads | set(weights), "all": set(own)}[trains]
    dense = {name: own[name] for name in own if name in chosen}
    for parameter in dense.values():
        parameter.data = parameter.data.float()
    return dense


def _check_rank(targets: Mapping[str, nn.Module], max_rank: int) -> None:
    for name, layer in targets.items():
        m, n = shape_of(layer)
        if max_rank > min(m, n):
            raise FedspanError(f"rank {max_rank} is above what {name} ({m}×{n}) can hold: expected at most {min(m, n)}")


def _heads(base: Any, kind: Kind, name: str, new: Collection[str]) -> tuple[str, ...]:
    """Return the modules to train whole: all beside the body of a classifier, and a pooler that the files lack.

    Raises
    ------
    FedspanError
        When the files lack anything else: it would be random, and nothing would show that.
    """
    heads = head_names(base, kind)
    lacking = sorted(n for n in new if not _within(n, heads))
    for parameter in lacking:
        if kind == "instruction" or "pooler" not in parameter.split("."):
            raise FedspanError(
                f"model.name = {name!r}: its files lack {len(lacking)} of the model's weights, such as {parameter}; "
                f"expected a complete base"
            )
    return heads + tuple(sorted({parameter.rpartition(".")[0] for parameter in lacking}))


def _within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _targets(base: nn.Module, wanted: tuple[str, ...], heads: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the linear layers whose names end in one of `wanted`, in the model's order."""
    if not wanted:
        raise FedspanError("adapter.target_modules is empty: expected name endings, or all-linear")
    linear = _linear_layers(base, heads)
    if tuple(wanted) == ("all-linear",):
        if not linear:
            raise FedspanError("adapter.target_modules: this model has no linear layer beside its head")
        return linear
    for end in wanted:
        if not any(_ends_in(name, end) for name in linear):
            endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise FedspanError(
                f"adapter.target_modules: {end!r} matches no linear layer; this model has {', '.join(endings)}"
            )
    return {name: layer for name, layer in linear.items() if any(_ends_in(name, end) for end in wanted)}


def _linear_layers(base: nn.Module, heads: tuple[str, ...]) -> dict[str, nn.Module]:
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None  # type: ignore[operator]
    return {
        name: layer
        for name, layer in base.named_modules()
        if (isinstance(layer, nn.Linear) or is_conv1d(layer)) and layer is not output and not _within(name, heads)
    }


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _attach(
    base: nn.Module, targets: Mapping[str, nn.Module], rank: int, rslora: bool, dropout: float
) -> tuple[nn.Module, dict[str, Any]]:
    with without("bitsandbytes"):
        # PEFT would import it, for layers that are not used here: that takes a second and prints a line.
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(targets),
            lora_dropout=dropout,
            use_rslora=rslora,
            fan_in_fan_out=any(is_conv1d(layer) for layer in targets.values()),
        )
        model = inject_adapter_in_model(config, base)
    return model, {name: model.get_submodule(name) for name in targets}
