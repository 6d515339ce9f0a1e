"""The contract of a method: pure functions over frozen state.

A round is a short list of exchanges, for most methods one. An exchange, in the order of the calls:

    server                            site of client k
    ------                            ----------------
    broadcast(state, request) ─────▶  start(broadcast, client_state)
                                      local training, when the exchange trains
    fold.add(partial, update) ◀─────  encode(update, broadcast, client_state)
    finish(state, partial)

Between the exchanges of a round the site keeps its own update. `state.exchange`, which the round loop sets, tells the
server's functions which exchange they are in, and what is broadcast tells `encode`.

A method is one frozen `Method`, made by a factory whose keyword arguments are its options. Nothing here knows
a model, a file or a network. Shapes: B (m, r), A (r, n), as in `fedspan.algebra.lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedspan.methods.folds import Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Request, Template, Tensors, Update
from fedspan.methods.patches import PatchLog
from fedspan.methods.queries import ContributionOf, QueryProcedure, own_contribution
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """What is true of a method; `fedspan methods` prints it and the law tests check it."""

    name: str
    title: str
    paper: str
    exact: bool
    """What the clients receive, at sufficient rank, is the ideal update T = Σ p_k s_k B_k A_k."""
    gauge_invariant: bool
    """Re-factoring any client's (B, A) as (B G, G⁻¹ A) does not change the result."""
    hetero_rank: bool
    """Clients may train adapters of different ranks."""
    traffic_up: str
    traffic_down: str
    trains: Literal["adapter", "targets", "all"] = "adapter"
    """LoRA factors, the weights of the target modules, or every weight of the model."""
    personalised: bool = False
    """Each client ends with a model of its own; figures are averages over the clients' models."""
    pooled: bool = False
    """A control that trains on everybody's data in one place."""
    alone: bool = False
    """A control: no client learns anything from another."""
    optimizer: Literal["any", "sgd"] = "any"
    """What the local optimizer must be for the method to be what it claims."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that the server keeps: plain tensors and numbers, so that it can be saved, resumed and sent."""

    template: Template
    modules: Mapping[str, Tensors]
    dense: Tensors
    round_num: int = 0
    """Rounds finished."""
    exchange: int = 0
    """Which of the method's exchanges the round is in."""
    patches: PatchLog | None = None
    extra: Tensors = field(default_factory=dict)
    """Named tensors beside the weights: control variates, a server optimizer's moments."""


@dataclass(frozen=True, slots=True)
class Direct:
    """The global model as one vector in coordinates that all clients share: what a server optimizer may act on."""

    read: Callable[[ServerState], Tensors]
    write: Callable[[ServerState, Tensors], ServerState]
    """The state with these values instead; the names and shapes are those of `read`."""


def _as_sent(broadcast: Broadcast, client_state: ClientState | None) -> Broadcast:
    return broadcast


def _everything(update: Update, broadcast: Broadcast, state: ClientState | None) -> tuple[Update, ClientState | None]:
    return replace(update, moments={}, rate_sum=0.0), state


def _own_contributions(state: ServerState) -> ContributionOf:
    return own_contribution


@dataclass(frozen=True, slots=True)
class Method:
    """One federated method. The exchanges and the two site functions have defaults that most methods keep."""

    info: MethodInfo
    init: Callable[[Template, Tensors], ServerState]
    """(template, dense weights of the base) -> the state before the first round."""
    broadcast: Callable[[ServerState, Request], Broadcast]
    finish: Callable[[ServerState, Partial], tuple[ServerState, Diagnostics]]
    """Runs on the fold of all updates; returns the next state and what the method measured of itself."""
    exchanges: tuple[Exchange, ...] = (Exchange(),)
    start: Callable[[Broadcast, ClientState | None], Broadcast] = _as_sent
    """On the site, before training: combine what was sent with what the client kept."""
    encode: Callable[[Update, Broadcast, ClientState | None], tuple[Update, ClientState | None]] = _everything
    """On the site, after training: what leaves it, and what stays."""
    finish_by_queries: Callable[[ServerState], QueryProcedure] | None = None
    """The same rule as `finish` through sums alone, for updates that are not held at once; none: a method whose fold
    is a sum needs no second form, and one whose result grows with the clients cannot have it."""
    contributions: Callable[[ServerState], ContributionOf] = _own_contributions
    """The X_k that these queries are about, by update and module, for `queries.partial_sums`."""
    vector: Direct | None = None
    """None: a server optimizer would act on factor pairs, and its result would depend on their gauge."""

    @property
    def secure_sum(self) -> bool:
        """Every exchange is a sum, so the method runs as it is where the server may see only sums."""
        return all(exchange.fold.kind == "sum" for exchange in self.exchanges)


def aggregate(method: Method, state: ServerState, updates: list[Update]) -> tuple[ServerState, Diagnostics]:
    """The server's side of one exchange: fold the encoded updates in sorted client order, then finish.

    Raises
    ------
    ValueError
        When the list is empty, two updates carry the same client id, or a client counts for nothing.
    """
    if not updates:
        raise FedspanError("no update to aggregate: expected at least one client")
    ids = [update.client_id for update in updates]
    if len(set(ids)) != len(ids):
        raise FedspanError(f"two updates of one client among {sorted(ids)}: expected one each")
    for update in updates:
        if not (math.isfinite(update.num_examples) and update.num_examples > 0):
            raise FedspanError(f"{update.client_id} has {update.num_examples} examples: expected more than 0")
    fold = method.exchanges[state.exchange].fold
    partial = Partial()
    for update in sorted(updates, key=lambda u: u.client_id):
        partial = fold.add(partial, update)
    return method.finish(state, partial)


def advance(state: ServerState, **changes: Any) -> ServerState:
    """The state with `changes`, one round later."""
    return replace(state, round_num=state.round_num + 1, exchange=0, **changes)
