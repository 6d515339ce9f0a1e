"""The answers of clients to a server in a loop of one's own, checked: counts, and adapters against what was sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.methods.messages import Broadcast, Factors, Subspace, Update, Vector
from fedspan.support.errors import FedspanError
from fedspan.support.scalars import plain

_HALF = (torch.bfloat16, torch.float16)


def counts_of(state_dicts: Mapping[str, Any], num_examples: Mapping[str, float]) -> dict[str, float]:
    """Return client id -> number of examples, in the order of the ids."""
    for name, given in (("state_dicts", state_dicts), ("num_examples", num_examples)):
        if not isinstance(given, Mapping):
            raise FedspanError(f"{name} is a {type(given).__name__}: expected a mapping from client ids")
        for client_id in given:
            checked_id(client_id)
    if missing := sorted(state_dicts.keys() - num_examples.keys()):
        raise FedspanError(f"client {missing[0]} has no num_examples: expected a number for each client")
    if unknown := sorted(num_examples.keys() - state_dicts.keys()):
        raise FedspanError(f"num_examples names client {unknown[0]}, which sent no state dict")
    counts = {client_id: _count(client_id, num_examples[client_id]) for client_id in sorted(state_dicts)}
    if not math.isfinite(sum(counts.values())):
        raise FedspanError("num_examples add up to infinity: expected numbers with a finite sum")
    return counts


def checked_id(given: object) -> str:
    """Return the id of a client; a saved server could not tell 1 from "1"."""
    if not isinstance(given, str):
        raise FedspanError(f"client id {given!r}: expected a string")
    return given


def gradient_update(client_id: str, gradient: Mapping[str, Tensor], count: float) -> Update:
    """Return a client's gradients, (m, n) by module, as the update that they are."""
    return Update(client_id, count, {name: Vector({"gradient": grad}) for name, grad in gradient.items()}, {})


def trained_update(
    client_id: str, factors: Mapping[str, Factors], dense: Mapping[str, Tensor], sent: Broadcast, count: float, by: str
) -> Update:
    """Return a client's adapter as the update that it is, checked against what the client was sent.

    Parameters
    ----------
    by
        The round and its method, as messages name them.

    Raises
    ------
    FedspanError
        For a component that was pruned, a frozen factor that was changed, or a confined one outside its subspace.
    """
    modules = {}
    for name, start in sent.adapter.items():
        f, where = factors[name], f"client {client_id}: {name}"
        if f.b[:, start.rank :].any():
            raise FedspanError(f"{where}: lora_B has components beyond {start.rank}, which were pruned: expected 0")
        modules[name] = f = Factors(f.b[:, : start.rank], f.a[: start.rank], f.scaling)
        for side, now in f.tensors().items():
            then, label = start.tensors()[side], f"{where}: lora_{side.upper()}"
            free = sent.recipe.train_a if side == "a" else sent.recipe.train_b
            if not free and not _same_in_some_precision(now, then):
                trains = "lora_A" if sent.recipe.train_a else "lora_B"
                raise FedspanError(f"{label} was changed, but {by} trains {trains} alone: expected it as it was sent")
            if free and (space := sent.subspaces.get(f"{name}/{side}")) is not None:
                _check_confined(label, now, then, space, by)
    return Update(client_id, count, modules, dense)


def _check_confined(label: str, now: Tensor, then: Tensor, space: Subspace, by: str) -> None:
    """Refuse a tensor that has left its subspace: the server would lose what was learnt outside of it."""
    step, basis = now.double() - then.double(), space.basis.double()
    # The basis need not be orthonormal, and may have empty columns.
    u, s, _ = torch.linalg.svd(basis, full_matrices=False)
    inside = Subspace(u[:, lowrank.above_rounding(s)], space.side)
    outside = float((step - inside.expand(inside.coordinates(step))).norm())
    # X₀, its step and their sum are rounded once each; each number of the step is a sum of q products in float32.
    rounding = 4 * (_precision(now) + basis.shape[1] ** 0.5 * torch.finfo(torch.float32).eps)
    if outside > rounding * (float(now.double().norm()) + float(then.double().norm())):
        raise FedspanError(
            f"{label} has moved {outside:.3g} out of the subspace that {by} trains in, of {float(step.norm()):.3g} in "
            "all: expected 0, as of training inside `server.training(model)`"
        )


def _count(client_id: str, given: object) -> float:
    try:
        count = plain(given)
        if not isinstance(count, bool) and isinstance(count, int | float) and math.isfinite(count) and count > 0:
            return float(count)
    except OverflowError:  # a whole number beyond all floats
        pass
    raise FedspanError(f"client {client_id}: num_examples = {given!r}: expected a finite number above 0")


def _same_in_some_precision(x: Tensor, sent: Tensor) -> bool:
    """Return whether x is what was sent, perhaps rounded by a model in half precision."""
    return any(torch.equal(x, sent.to(kind).to(x.dtype)) for kind in (x.dtype, *_HALF))


def _precision(x: Tensor) -> float:
    """Return the eps of the coarsest type that holds x as it is."""
    held = (kind for kind in (*_HALF, x.dtype) if torch.equal(x, x.to(kind).to(x.dtype)))
    return torch.finfo(next(held)).eps
