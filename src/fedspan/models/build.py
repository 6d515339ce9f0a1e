"""From a base's name to a `FederatedModel`: heads, target layers, and PEFT's adapters on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.data.rows import Kind
from fedspan.models import experts, quantised
from fedspan.models.base_checks import check_causal
from fedspan.models.experts import ExpertParameter
from fedspan.models.federated_model import BatchNorm, FederatedModel, Trains
from fedspan.models.layers import base_layer, in_float32, inputs_in, is_conv1d, output_in, shape_of
from fedspan.models.loading import head_names, load_base, seeded, without
from fedspan.models.placement import DeviceMap, Places, bring_inputs, described, place, places_for
from fedspan.models.selection import (
    ALL_LINEAR,
    Selection,
    Targets,
    Wanted,
    left_out_line,
    linear_layers,
    saved_modules,
    select,
    unused_line,
    within,
)
from fedspan.models.trial import Trial, try_row
from fedspan.support.errors import FedspanError


def build(
    name: str,
    kind: Kind,
    *,
    trains: Trains,
    num_labels: int,
    target_modules: Wanted = (ALL_LINEAR,),
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
    selection: Selection | None = None,
    min_rank: int | None = None,
    example: Mapping[str, Tensor] | None = None,
    check: Callable[[nn.Module], None] | None = None,
    base_dropout: bool = True,
    device_map: DeviceMap = "none",
) -> FederatedModel:
    """Load the base and prepare the parts that `trains` names for training.

    Parameters
    ----------
    trains
        `adapter`: adapters on the target modules; `targets`: the target modules' weights; `all`: every weight. Heads
        are always trained.
    target_modules
        Name endings of the target modules, a regular expression that matches whole names, or `all-linear` for every
        linear layer beside the heads that can be adapted.
    max_rank
        The largest rank of any client.
    pad_token_id
        The token that the batches are padded with; None as the base's own configuration says.
    quantise
        The type of the base's linear layers: `int8`, `nf4`, or `none` for `dtype` as everything else.
    new_head
        The reason to draw the layer that gives the classes anew, although the base may have one of the same size.
    selection
        All the settings that choose layers, in place of `target_modules` alone.
    min_rank
        The rank that target modules must be able to hold; None: `max_rank` for adapters, any for weights.
    example
        A batch of a row or two of the data, with which it is tried whether the base can be computed and how it uses
        its layers; None: that is not tried.
    check
        Refuses data that does not fit the base, before that is tried.
    base_dropout
        Keep the dropout that the base's configuration names.
    device_map
        The devices of its parts, as `engine.device_map` has them; where it lies on several, `device` is not used.

    Raises
    ------
    FedspanError
        When the base cannot be read or not be quantised, is not finite or, for instruction data, no causal model; when
        no layer matches `target_modules`, a rank exceeds a layer's size, or `device_map` does not fit the base.
    """
    quantised.check(quantise, trains)
    selection = selection or Selection(target_modules)
    kept = dtype if trains == "adapter" else "float32"
    base, new, replaced = load_base(
        name,
        kind,
        num_labels,
        kept,
        seed,
        label_names,
        regression,
        pad_token_id,
        quantise,
        new_head is not None,
        base_dropout,
    )
    places = places_for(base, device_map)
    if places:
        device = place(base, places)
    else:
        base.to(device)
    if kind == "instruction":
        check_causal(base, name)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    own = dict(base.named_parameters())
    heads = _heads(base, kind, name, new & own.keys())
    saved = saved_modules(base, selection.modules_to_save)
    heads += tuple(module for module in saved if not within(module, heads))
    _convert_types(base, kind, heads, saved, getattr(torch, kept))
    if check is not None:
        check(base)
    least = min_rank if min_rank is not None else max_rank if trains == "adapter" else 0
    linear = linear_layers(base, heads)
    trial = Trial()
    if example is not None:
        trial = try_row(name, kind, base, linear, _on(example, device), pad_token_id or 0)
    targets = _targets(base, linear, selection, heads, least, trains, trial)
    chosen = _experts(base, selection.target_parameters, heads, max_rank, trains, dropout)
    weights = {f"{layer_name}.weight" for layer_name in targets.layers}
    dense = _dense(own, heads, weights, trains)
    notes = (*_notes(base, targets, chosen, heads, trains, trial), *_places_line(base, device_map, places, device))
    model: nn.Module = base
    layers: Mapping[str, Any] = targets.layers
    if trains == "adapter":
        with seeded(seed, "adapter"):
            model, layers = attach(base, targets.layers, max_rank, rslora, dropout)
        layers = {**layers, **experts.attach(base, chosen, max_rank)}
    if places:
        for layer in layers.values():  # an adapter is given what its layer is given
            bring_inputs(layer, base_layer(layer).weight.device)
    return FederatedModel(
        name,
        kind,
        trains,
        model,
        layers,
        dense,
        frozenset(weights & dense.keys()),
        heads,
        device,
        places,
        notes=notes,
        padding_matters=trial.padding_matters,
        prompt_padding_matters=trial.prompt_padding_matters,
        replaced_head=replaced,
        experts=tuple(chosen),
    )


def _experts(
    base: nn.Module, wanted: tuple[str, ...], heads: Collection[str], rank: int, trains: Trains, dropout: float
) -> list[ExpertParameter]:
    """Return the parameters whose experts get adapters."""
    if not wanted:
        return []
    if trains != "adapter":
        raise FedspanError("adapter.target_parameters: this method trains weights; expected a method with adapters")
    if dropout:
        # PEFT changes the weight itself, which has no input to drop; its saved adapter could not be trained on.
        raise FedspanError(f"adapter.dropout = {dropout:g} with adapter.target_parameters: expected 0")
    return experts.choose(base, wanted, heads, rank)


def _targets(
    base: nn.Module,
    linear: Mapping[str, nn.Module],
    selection: Selection,
    heads: Collection[str],
    least: int,
    trains: Trains,
    trial: Trial,
) -> Targets:
    """Return the layers that the settings choose, for adapters or for training their weights."""
    if trains == "adapter":
        return select(base, selection, heads, least, {**_taken_for_experts(base, linear), **trial.read_as_weights})
    if all(least > min(shape_of(layer)) for layer in linear.values()):
        least = 0  # the recipe's own check names the method's option
    return select(base, selection, heads, least, {})


def _on(example: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in example.items()}


def _convert_types(base: Any, kind: Kind, heads: Collection[str], saved: Collection[str], dtype: torch.dtype) -> None:
    """Let parts that are trained in float32, and images, meet a body in half precision, by hooks."""
    if dtype == torch.float32:
        return
    for head in heads:
        base.get_submodule(head).float().register_forward_pre_hook(in_float32)
    for module in saved:
        # Inside the body, unlike a head: what follows takes the body's own type.
        base.get_submodule(module).register_forward_hook(output_in(dtype))
    if kind == "image":
        base.register_forward_pre_hook(inputs_in(dtype), with_kwargs=True)


def _notes(
    base: nn.Module,
    targets: Targets,
    chosen: Collection[ExpertParameter],
    heads: Collection[str],
    trains: Trains,
    trial: Trial,
) -> tuple[str, ...]:
    """Return what the user should know of the base's layers before the first round, one line each."""
    notes = [left_out_line(targets.left_out)] if targets.left_out else []
    if unused := [name for name in targets.layers if name in trial.unused]:
        notes.append(unused_line(unused))
    adapted = {parameter.path for parameter in chosen}
    left = {name: shape for name, shape in experts.fused_experts(base, heads).items() if name not in adapted}
    if trains != "all" and left:
        notes.append(experts.experts_line(left))
    if count := sum(isinstance(layer, BatchNorm) for layer in base.modules()):
        notes.append(f"batch normalisation keeps the base's running statistics in training ({count} layers)")
    if trial.padding_matters:
        notes.append("padding changes this model's results: only rows of equal length are computed together")
    elif trial.prompt_padding_matters:
        notes.append("padding before a prompt changes this model's answers: only prompts of equal length go together")
    return tuple(notes)


def _places_line(base: nn.Module, device_map: DeviceMap, places: Places, device: torch.device) -> list[str]:
    """Return a line on where the base's layers lie, where the settings leave it open or spread them."""
    if places:
        return [f"the base's layers lie on several devices, which work in turn: {described(base, places)}"]
    if device_map == "auto":
        count = torch.cuda.device_count()
        return [f"engine.device_map = 'auto': the whole base lies on {device} (GPUs here: {count})"]
    return []


def _dense(
    own: Mapping[str, nn.Parameter], heads: Collection[str], weights: Collection[str], trains: Trains
) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained as they are, in float32 whatever the base's type."""
    in_heads = {name for name in own if within(name, heads)}
    chosen = {"adapter": in_heads, "targets": in_heads | set(weights), "all": set(own)}[trains]
    dense = {name: own[name] for name in own if name in chosen}
    for parameter in dense.values():
        parameter.data = parameter.data.float()
    return dense


def _heads(base: Any, kind: Kind, name: str, new: Collection[str]) -> tuple[str, ...]:
    """Return the modules to train whole: all beside the body of a classifier, and a pooler that the files lack.

    Raises
    ------
    FedspanError
        When the files lack anything else: it would be random, and nothing would show that.
    """
    heads = head_names(base, kind)
    lacking = sorted(n for n in new if not within(n, heads))
    for parameter in lacking:
        if kind == "instruction" or "pooler" not in parameter.split("."):
            raise FedspanError(
                f"model.name = {name!r}: its files lack {len(lacking)} of the model's weights, such as {parameter}; "
                f"expected a complete base"
            )
    return heads + tuple(sorted({parameter.rpartition(".")[0] for parameter in lacking}))


def _taken_for_experts(base: nn.Module, linear: Collection[str]) -> dict[str, str]:
    """Return the layers that PEFT does not adapt because their names are those of a former version's experts.

    Where the experts of an architecture were layers once, it takes every target of such a name for the experts' present
    parameters: those of dense layers and of shared experts too.
    """
    if not hasattr(getattr(base, "config", None), "model_type"):
        return {}
    with without("bitsandbytes"):
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        taken = set()
        for ending in {name.rpartition(".")[2] for name in linear}:
            config = LoraConfig(target_modules=[ending])
            try:
                convert_peft_config_for_transformers(config, base, None)
            except ValueError:  # one of two names that only make sense together
                taken.add(ending)
            if ending not in (config.target_modules or ()):
                taken.add(ending)
    return {n: "has a name that PEFT takes for the experts'" for n in linear if n.rpartition(".")[2] in taken}


def attach(
    base: nn.Module, targets: Mapping[str, nn.Module], rank: int, rslora: bool, dropout: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the base with PEFT's adapters on these layers, and the adapted layers by name."""
    if not targets:
        return base, {}
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
