"""A PEFT adapter that a run starts from: part of its base while it lasts, and part of the adapter that it saves.

The base becomes W + s·B·A in float32, whatever the method and the adapter's rank. All that the run's method computes is
relative to that base. A saved adapter is for the untouched base again: [s·B, s'·B'] and [A; A'] side by side, of rank
r + r', which is the sum of the two changes to the bit of its factors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspan.adapters.peft_folder import load
from fedspan.adapters.state_dict import Adapter
from fedspan.methods.messages import Factors
from fedspan.models.experts import Expert, renamed, stacks_of
from fedspan.models.federated_model import FederatedModel
from fedspan.models.layers import base_layer, is_conv1d, shape_of
from fedspan.support.errors import FedspanError


def start_from(model: FederatedModel, folder: str) -> None:
    """Make the model start from the adapter in a PEFT folder, before anything else is loaded into it.

    Heads of the adapter become the model's own, from which it trains on; so do the statistics of batch normalisation
    in them, which no run trains.

    Raises
    ------
    FedspanError
        For a folder that `fedspan.adapters.peft_folder.load` refuses, an adapter that does not fit the base, adapted
        embeddings, whole weights that are no heads of this run, and a base that is not held in float32.
    """
    adapter = load(Path(folder).expanduser())
    where = f"model.adapter = {folder!r}"
    adapter = _with_own_names(where, model, adapter)
    _check(where, model, adapter)
    with torch.no_grad():
        for name, factors in adapter.factors.items():
            if isinstance(expert := model.layers.get(name), Expert):
                _add_to_expert(expert, factors)
                continue
            layer = base_layer(model.model.get_submodule(name))
            delta = factors.delta().dense().float().to(layer.weight.device)
            # Not in place: the weight may be a file that is mapped into memory.
            layer.weight.data = layer.weight.data + (delta.T if is_conv1d(layer) else delta)
        buffers = dict(model.model.named_buffers())
        for name, value in adapter.dense.items():
            if name in model.dense_parameters:
                model.dense_parameters[name].copy_(value)
            elif name in buffers:
                buffers[name].data = value.to(buffers[name])
    # A head that has factors too is trained and saved whole.
    model.start = {name: f for name, f in adapter.factors.items() if f"{name}.weight" not in model.dense_parameters}


def _with_own_names(where: str, model: FederatedModel, adapter: Adapter) -> Adapter:
    """Return the adapter with the experts named as the run names them.

    Raises
    ------
    FedspanError
        When it adapts experts that this run does not, which the run's adapter could not hold.
    """
    if not adapter.stacks:
        return adapter
    own = {stack: parameter.shape[0] for stack, parameter in stacks_of(model.experts).items()}
    if own != dict(adapter.stacks):
        names = list(adapter.config["target_parameters"])
        raise FedspanError(f"{where} adapts experts: expected adapter.target_parameters = {names!r}, as it has them")
    return replace(adapter, factors=renamed(adapter.factors, stacks_of(model.experts), back=True))


def _add_to_expert(expert: Expert, factors: Factors) -> None:
    """Add the change to the expert's part of a copy of the parameter: it may be a file that is mapped into memory."""
    total = expert.whole.data.clone()
    expert.own(total).add_(factors.delta().dense().float().to(total.device))
    expert.whole.data = total


def _check(where: str, model: FederatedModel, adapter: Adapter) -> None:
    if adapter.embeddings or adapter.frozen:
        name = next(iter(sorted(adapter.embeddings or adapter.frozen)))
        raise FedspanError(
            f"{where} adapts or resizes the embedding {name}: expected adapters on linear layers, or a base into which "
            "`fedspan merge --full` has merged it"
        )
    for name, factors in adapter.factors.items():
        _check_layer(where, model, name, factors)
    trained = {id(parameter): name for name, parameter in model.dense_parameters.items()}
    held = model.model.state_dict(keep_vars=True)
    for name, value in adapter.dense.items():
        own = held.get(name)
        if own is None or not _is_known(model, adapter, name, own, trained.get(id(own))):
            raise FedspanError(f"{where} holds {name}, which this run does not train: expected heads alone")
        if value.shape != own.shape:
            expected = tuple(own.shape)
            raise FedspanError(f"{where}: {name} has shape {tuple(value.shape)}: expected {expected}, as in this run")


def _is_known(model: FederatedModel, adapter: Adapter, name: str, own: Tensor, trained: str | None) -> bool:
    """Return whether a whole weight of the adapter is one that the run trains, or one that it has as it is.

    PEFT saves more than what was trained: other names of the same weight, buffers, and modules of the body whose names
    end like a head's.
    """
    value = adapter.dense[name]
    if trained is not None:
        return name == trained or torch.equal(value, adapter.dense.get(trained, torch.empty(0)))
    return name in dict(model.model.named_buffers()) or torch.equal(value.float(), own.detach().cpu().float())


def _check_layer(where: str, model: FederatedModel, name: str, factors: Factors) -> None:
    held = model.layers.get(name)
    try:
        layer: Any = held if isinstance(held, Expert) else base_layer(model.model.get_submodule(name))
    except AttributeError:
        raise FedspanError(f"{where} adapts {name}, which this base does not have: expected its base") from None
    if not (isinstance(layer, torch.nn.Linear | Expert) or is_conv1d(layer)):
        raise FedspanError(f"{where} adapts {name}, a {type(layer).__name__}: expected a linear layer")
    shape = (factors.b.shape[0], factors.a.shape[1])
    if shape != shape_of(layer):
        m, n = shape_of(layer)
        raise FedspanError(f"{where} adapts {name} as {shape[0]}×{shape[1]}, and it is {m}×{n}: expected its base")
    if layer.weight.dtype != torch.float32:
        raise FedspanError(
            f"{where}: the base is held as {layer.weight.dtype}, in which the sum would be rounded: "
            "expected model.dtype = 'float32' and model.quantise = 'none'"
        )
