"""FedAvgM, FedAdagrad, FedAdam and FedYogi: the average step as a pseudo-gradient for an optimizer on the server.

They act on methods whose global model is one vector in coordinates that all clients share (`Method.vector`): dense
weights, or one factor beside another that is common to all clients. On a pair (B, A) they are refused: the effect of
such a rule on two trained factors depends on the gauge in which they are written. GLoRA has a momentum of its own
(`fedspan.methods.momentum`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fedspan.methods.base import Method, MethodInfo, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.full_weights import average_weights
from fedspan.methods.messages import Diagnostics, Recipe, Tensors
from fedspan.support.errors import FedspanError

Kind = Literal["fedavgm", "fedadagrad", "fedadam", "fedyogi"]
Trains = Literal["targets", "all"]

_TITLES = {"fedavgm": "FedAvgM", "fedadagrad": "FedAdagrad", "fedadam": "FedAdam", "fedyogi": "FedYogi"}


@dataclass(frozen=True, slots=True)
class _Rule:
    kind: Kind
    learning_rate: float
    momentum: float
    beta2: float
    tau: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise FedspanError(f"server optimizer {self.kind!r}: expected one of {', '.join(get_args(Kind))}")
        for name in ("learning_rate", "tau"):
            if not getattr(self, name) > 0:
                raise FedspanError(f"{name} = {getattr(self, name)} of the server's optimizer: expected above 0")
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise FedspanError(
                    f"{name} = {getattr(self, name)} of the server's optimizer: expected at least 0 and below 1"
                )

    def step(self, delta: Tensor, before: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the step on x for a pseudo-gradient −Δ, and the new moments; none before: their published start."""
        m = self.momentum * before.get("momentum", torch.zeros_like(delta))
        if self.kind == "fedavgm":
            m = m + delta
            return self.learning_rate * m, {"momentum": m}
        m = m + (1 - self.momentum) * delta
        v, square = before.get("second", torch.full_like(delta, self.tau**2)), delta.square()
        if self.kind == "fedadagrad":
            v = v + square
            return self.learning_rate * m / (v.sqrt() + self.tau), {"momentum": m, "second": v}
        # Adam's v moves by its distance from Δ², Yogi's by Δ² whatever the distance.
        gap = v - square if self.kind == "fedadam" else square * torch.sign(v - square)
        v = v - (1 - self.beta2) * gap
        return self.learning_rate * m / (v.sqrt() + self.tau), {"momentum": m, "second": v}


def with_server_optimizer(
    method: Method,
    kind: Kind,
    learning_rate: float | None = None,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Method:
    """Return the method with an optimizer on its server. With Δ = x̄ − x, the step that the method itself would take:

        FedAvgM     m ← β m + Δ;              x ← x + η m                a heavy ball, no moving average
        FedAdagrad  m ← β₁ m + (1−β₁) Δ;      v ← v + Δ²
        FedAdam     m as FedAdagrad;          v ← v − (1−β₂) (v − Δ²)
        FedYogi     m as FedAdagrad;          v ← v − (1−β₂) Δ² sign(v − Δ²);     all three x ← x + η m / (√v + τ)

    from m = 0 and v = τ². x holds all that the method averages, heads included; m and v stand in `ServerState.extra`
    and are saved with it. FedAvgM with η = 1 and β = 0 is the method itself, to the bit.

    Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification" (1909.06335); Reddi et al. 2021, "Adaptive Federated Optimization" (2003.00295).
    Differences: Δ is the mean by the run's weights, the adaptive paper's a plain one; like theirs, the three
    adaptive rules do not correct for the zero start.

    Parameters
    ----------
    learning_rate
        η; none: 1 for FedAvgM, 0.01 for the adaptive ones, where it is about the largest change of any weight in a
        round.
    momentum
        β, or β₁.
    beta2
        β₂ of FedAdam and FedYogi.
    tau
        τ of the adaptive ones.

    Raises
    ------
    FedspanError
        When the method has no such vector; for an option out of range.
    """
    rate = (1.0 if kind == "fedavgm" else 0.01) if learning_rate is None else learning_rate
    rule = _Rule(kind, rate, momentum, beta2, tau)
    direct = method.vector
    if direct is None:
        raise FedspanError(
            f"server optimizer {kind}: {method.info.title} does not keep its global model as one vector in coordinates "
            f"that all clients share; on factor pairs the result would depend on their gauge"
        )

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        after, diagnostics = method.finish(state, partial)
        if after.round_num == state.round_num:  # the round has more to ask before the model moves
            return after, diagnostics
        old, new = direct.read(state), direct.read(after)
        values: dict[str, Tensor] = {}
        extra = dict(after.extra)
        for name, x in new.items():
            delta = x - old[name]
            keys = {part: f"server/{part}/{name}" for part in ("momentum", "second")}
            held = {part: state.extra[key] for part, key in keys.items() if key in state.extra}
            step, moments = rule.step(delta, held)
            # Not old + step: where the step is Δ, this is x to the bit.
            values[name] = x + (step - delta)
            extra |= {keys[part]: value for part, value in moments.items()}
        return replace(direct.write(after, values), extra=extra), diagnostics

    info = replace(method.info, title=f"{method.info.title} + {_TITLES[kind]}", exact=False)
    # A second optimizer is refused, and the result of a query procedure would not pass through this one.
    return replace(method, info=info, finish=finish, vector=None, finish_by_queries=None)


def fedavgm(learning_rate: float = 1.0, momentum: float = 0.9, trains: Trains = "targets") -> Method:
    """FedAvgM: averaged weights with a heavy ball on the server; see `with_server_optimizer`.

    Source: Hsu et al. 2019 (1909.06335).

    Parameters
    ----------
    learning_rate
        η, the server's step size.
    momentum
        β. A steady drift moves the model by η/(1−β) of the average step.
    trains
        The weights that clients train: those of the target modules, or every weight of the model.
    """
    return _averaging("fedavgm", "1909.06335", trains, learning_rate, momentum)


def fedadagrad(
    learning_rate: float = 0.01, momentum: float = 0.0, tau: float = 1e-3, trains: Trains = "targets"
) -> Method:
    """FedAdagrad: averaged weights with Adagrad on the server; see `with_server_optimizer`.

    v only grows, so the steps on a weight shrink with all that it has moved before: about as 1/√t where Δ stays the
    same.

    Source: Reddi et al. 2021 (2003.00295), whose experiments have no momentum here.

    Parameters
    ----------
    learning_rate
        η, about the largest change of any weight in the first round.
    momentum
        β₁, the decay of the mean of the steps; 0: none.
    tau
        τ, added to the root of the sum of their squares; a larger value makes the rule less adaptive.
    trains
        The weights that clients train: those of the target modules, or every weight of the model.
    """
    return _averaging("fedadagrad", "2003.00295", trains, learning_rate, momentum, 0.0, tau)


def fedadam(
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    trains: Trains = "targets",
) -> Method:
    """FedAdam: averaged weights with Adam on the server; see `with_server_optimizer`.

    Source: Reddi et al. 2021 (2003.00295).

    Parameters
    ----------
    learning_rate
        η, about the largest change of any weight in a round.
    momentum
        β₁, the decay of the mean of the steps.
    beta2
        β₂, the decay of the mean of their squares.
    tau
        τ, added to the root of that mean; a larger value makes the rule less adaptive.
    trains
        The weights that clients train: those of the target modules, or every weight of the model.
    """
    return _averaging("fedadam", "2003.00295", trains, learning_rate, momentum, beta2, tau)


def fedyogi(
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    trains: Trains = "targets",
) -> Method:
    """FedYogi: averaged weights with Yogi on the server; see `with_server_optimizer`.

    Source: Reddi et al. 2021 (2003.00295).

    Parameters
    ----------
    learning_rate
        η, about the largest change of any weight in a round.
    momentum
        β₁, the decay of the mean of the steps.
    beta2
        β₂, the decay of the mean of their squares.
    tau
        τ, added to the root of that mean; a larger value makes the rule less adaptive.
    trains
        The weights that clients train: those of the target modules, or every weight of the model.
    """
    return _averaging("fedyogi", "2003.00295", trains, learning_rate, momentum, beta2, tau)


def _averaging(name: Kind, paper: str, trains: Trains, *options: float) -> Method:
    info = MethodInfo(
        name=name,
        title=_TITLES[name],
        paper=paper,
        exact=False,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="mn",
        traffic_down="mn",
        trains=trains,
    )
    return replace(with_server_optimizer(average_weights(info, Recipe()), name, *options), info=info)
