"""The contract of a method: pure functions over frozen state.

A round is a short list of exchanges, for most methods one. An exchange, in the order of the calls:

    server                            site of client k
    ------                            ----------------
    broadcast(state, request) ─────▶  start(broadcast, client_state)
                                      local training, when the exchange trains
    fold.add(partial, update) ◀─────  encode(update, broadcast, client_state)
    finish(state, partial)

Between the exchanges of a round the site keeps its own update. `state.exchange`, which the round loop sets, is the
current exchange for the server's functions; `encode` sees it from the broadcast.

A method is one frozen `Method`, made by a factory whose keyword arguments are its options. Nothing here depends on
a model, a file or a network. Shapes: B (m, r), A (r, n), as in `fedspan.algebra.lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from fedspan.algebra.lowrank import LowRank
from fedspan.methods.folds import Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Request, Template, Tensors, Update
from fedspan.methods.patches import Patch, PatchLog
from fedspan.methods.queries import ContributionOf, QueryProcedure, own_contribution
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """The properties of a method; `fedspan methods` prints them and the law tests check them."""

    name: str
    title: str
    paper: str
    exact: bool
    """The clients receive, at sufficient rank, the ideal update T = Σ p_k s_k B_k A_k."""
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
    """A control that trains on all data in one place."""
    alone: bool = False
    """A control: no client learns anything from another."""
    optimizer: Literal["any", "sgd"] = "any"
    """The local optimizer that the method's claims require."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """Everything that the server keeps: plain tensors and numbers, so that it can be saved, resumed and sent."""

    template: Template
    modules: Mapping[str, Tensors]
    dense: Tensors
    round_num: int = 0
    """Rounds finished."""
    exchange: int = 0
    """The index of the current exchange among the method's."""
    patches: PatchLog | None = None
    extra: Tensors = field(default_factory=dict)
    """Named tensors beside the weights: control variates, a server optimizer's moments."""


@dataclass(frozen=True, slots=True)
class Direct:
    """Access to the global model as one vector in coordinates that all clients share, for a server optimizer."""

    read: Callable[[ServerState], Tensors]
    write: Callable[[ServerState, Tensors], ServerState]
    """Return the state with these values; the names and shapes are those of `read`."""


@dataclass(frozen=True, slots=True)
class ProductSums:
    """A second form of a `finish` whose result is made of Σ p_k s_k B_k A_k itself, for a stream of updates."""

    finish: Callable[[ServerState, Partial], tuple[ServerState, Diagnostics]]
    """Runs on the `product_sums` of all updates."""
    of: Callable[[ServerState, Partial], tuple[ServerState, Diagnostics]]
    """The method's own `finish`: where a wrapper has put another in its place, this is no second form of that."""
    term: Callable[[Update, str], LowRank]
    """s_k B_k A_k by update and module."""
    factors: bool = False
    """Σ n_k s_k B_k and Σ n_k A_k are asked for too, as the sums "b" and "a"."""


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
    """Runs on the fold of all updates; returns the next state and the method's diagnostics."""
    exchanges: tuple[Exchange, ...] = (Exchange(),)
    start: Callable[[Broadcast, ClientState | None], Broadcast] = _as_sent
    """On the site, before training: combine the broadcast with the state that the client kept."""
    encode: Callable[[Update, Broadcast, ClientState | None], tuple[Update, ClientState | None]] = _everything
    """On the site, after training: return the update that leaves it, and the state that stays."""
    finish_by_queries: Callable[[ServerState], QueryProcedure] | None = None
    """The same rule as `finish` through sums alone, for updates that are not held at once; none: a method whose fold
    is a sum needs no second form, and one whose result grows with the clients cannot have it."""
    product_sums: ProductSums | None = None
    """The same rule as `finish` in one pass of running sums, where the result itself grows with the clients, up to the
    size of the matrix."""
    contributions: Callable[[ServerState], ContributionOf] = _own_contributions
    """The X_k that these queries are about, by update and module, for `queries.partial_sums`."""
    lasting: bool = False
    """Clients train the same tensors in every round, in coordinates that no server step changes and from no moments of
    the server's, so that the state of a local optimizer stays true of them."""
    complete: Callable[[Template, Broadcast, Sequence[Mapping[str, Patch]]], Sequence[Tensor]] | None = None
    """(template, weights and subspaces that a client holds, news) -> tensors of its broadcast that it works out from
    these, so that they need not travel; both sides do, and compare digests. None: there are no such tensors. Raises a
    FedspanError where the news are of other shapes."""
    prunes: bool = False
    """A client may give up the last components of its adapter and answer with the leading ones alone."""
    vector: Direct | None = None
    """None where a server optimizer would act on factor pairs, so that its result would depend on their gauge."""

    @property
    def sums_products(self) -> bool:
        """True where a stream of updates is aggregated by running sums of their products."""
        return self.product_sums is not None and self.product_sums.of is self.finish

    @property
    def secure_sum(self) -> bool:
        """True where every exchange is a sum, so that the method runs unchanged where the server may see only sums."""
        return all(exchange.fold.kind == "sum" for exchange in self.exchanges)


def aggregate(method: Method, state: ServerState, updates: list[Update]) -> tuple[ServerState, Diagnostics]:
    """Run the server's side of one exchange: fold the encoded updates in sorted client order, then finish.

    Raises
    ------
    FedspanError
        When the list is empty, two updates carry the same client id, or a client's number of examples is not above 0.
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
        partial = fold.add_in_place(partial, update)
    return method.finish(state, partial)


def advance(state: ServerState, **changes: Any) -> ServerState:
    """Return the state with `changes`, one round later."""
    return replace(state, round_num=state.round_num + 1, exchange=0, **changes)
