"""A PEFT adapter that a run starts from: part of its base while it lasts, and part of the adapter that it saves.

The base becomes W + s·B·A in float32, whatever the method and the adapter's rank. All that the run's method computes is
relative to that base. A saved adapter is for the untouched base again: [s·B, s'·B'] and [A; A'] side by side, of rank
r + r', which is the sum of the two changes to the bit of its factors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fedspan.adapters.peft_folder import load
from fedspan.adapters.state_dict import Adapter
from fedspan.methods.messages import Factors
from fedspan.models.federated_model import FederatedModel
from fedspan.models.layers import base_layer, is_conv1d, shape_of
from fedspan.support.errors import FedspanError


def start_from(model: FederatedModel, folder: str) -> None:
    """Make the model start from the adapter in a PEFT folder, before anything else is loaded into it.

    Heads of the adapter become the model's own, from which it trains on.

    Raises
    ------
    FedspanError
        For a folder that `fedspan.adapters.peft_folder.load` refuses, an adapter that does not fit the base, adapted
        embeddings, whole weights that are no heads of this run, and a base that is not held in float32.
    """
    adapter = load(Path(folder).expanduser())
    where = f"model.adapter = {folder!r}"
    _check(where, model, adapter)
    with torch.no_grad():
        for name, factors in adapter.factors.items():
            layer = base_layer(model.model.get_submodule(name))
            delta = factors.delta().dense().float().to(layer.weight.device)
            # Not in place: the weight may be a file that is mapped into memory.
            layer.weight.data = layer.weight.data + (delta.T if is_conv1d(layer) else delta)
        for name, value in adapter.dense.items():
            model.dense_parameters[name].copy_(value)
    # A head that has factors too is trained and saved whole.
    model.start = {name: f for name, f in adapter.factors.items() if f"{name}.weight" not in model.dense_parameters}


def _check(where: str, model: FederatedModel, adapter: Adapter) -> None:
    if adapter.embeddings or adapter.frozen:
        name = next(iter(sorted(adapter.embeddings or adapter.frozen)))
        raise FedspanError(
            f"{where} adapts or resizes the embedding {name}: expected adapters on linear layers, or a base into which "
            "`fedspan merge --full` has merged it"
        )
    for name, factors in adapter.factors.items():
        _check_layer(where, model, name, factors)
    for name, value in adapter.dense.items():
        if name not in model.dense_parameters:
            raise FedspanError(f"{where} holds {name}, which this run does not train: expected heads alone")
        expected = tuple(model.dense_parameters[name].shape)
        if tuple(value.shape) != expected:
            raise FedspanError(f"{where}: {name} has shape {tuple(value.shape)}: expected {expected}, as in this run")


def _check_layer(where: str, model: FederatedModel, name: str, factors: Factors) -> None:
    try:
        layer = base_layer(model.model.get_submodule(name))
    except AttributeError:
        raise FedspanError(f"{where} adapts {name}, which this base does not have: expected its base") from None
    if not (isinstance(layer, torch.nn.Linear) or is_conv1d(layer)):
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
