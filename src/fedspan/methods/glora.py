"""GLoRA and FlexLoRA: servers that aggregate products in low-rank form and read out adapters of any rank.

State per module: U (m, R) orthonormal and C (R, n), standing for U·C. Unless readouts nest it has the form of its own
SVD, C = Σ Vᵀ, so that a readout of any rank is a slice of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods import spectral, stacked, tall
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Diagnostics, Factors, Request, Template, Tensors, Update
from fedspan.methods.momentum import extrapolated, previous
from fedspan.methods.queries import Contribution, ContributionOf, QueryProcedure, ServerStep, Sums, own_contribution
from fedspan.methods.readout import Balance, fresh_adapter, leading_adapter
from fedspan.methods.spectral import Approximation, ApproximationSpec, ModuleProcedure
from fedspan.support import parallel
from fedspan.support.errors import FedspanError

Algebra = Literal["auto", "exact", "randomized"]
Start = Literal["readout", "state", "split"]
ServerRank = int | Literal["auto", "double"] | None


@dataclass(frozen=True, slots=True)
class _GloraOptions:
    server_rank: ServerRank
    tolerance: float
    basis: Literal["projector", "energy"]
    sides: Literal["left", "both"]
    update: Literal["replace", "innovation"]
    start: Start
    readout: Literal["svd", "nested"]
    algebra: Algebra
    balance: Balance = "auto"
    momentum: float = 0.0


def glora(
    server_rank: ServerRank = None,
    tolerance: float = 0.01,
    basis: Literal["projector", "energy"] = "projector",
    sides: Literal["left", "both"] = "left",
    update: Literal["replace", "innovation"] = "replace",
    start: Start = "readout",
    readout: Literal["svd", "nested"] = "svd",
    balance: Balance = "auto",
    algebra: Algebra = "auto",
    momentum: float = 0.0,
) -> Method:
    """GLoRA: a consensus update subspace, aggregation in its coordinates, adapters of any rank read out.

    P_k = Q_k Q_kᵀ with Q_k an orthonormal basis of col(B_k A_k);  U = top-R eigenvectors of Σ p_k P_k;
    C = Σ p_k s_k (Uᵀ B_k) A_k.  The state U·C stands for U Uᵀ T.

    Source: Chen et al. 2026, "Beyond Factor Aggregation: Gauge-Aware Low-Rank Server Representations for Federated
    LoRA" (2605.06733). The formulas are our reconstruction from its public statements.
    Differences: the basis is that of the product B_k A_k rather than of B_k alone (they differ only where A_k has lost
    rank, and the product's is gauge-invariant to rounding); spare readout directions start fresh, so that they can
    learn; and every option below that is not at its default.

    Parameters
    ----------
    server_rank
        R, the rank of the server's state; `none`: the largest client rank, `double`: twice that, `auto`: module by
        module the smallest rank that discards at most the tolerance, by energy whatever the basis. The aggregate is
        exact once R spans the union of the clients' column spaces, at most min(m, Σ r_k).
    tolerance
        The share of ‖T‖_F that may be discarded with `server_rank = "auto"`. Every round's record then has a
        `certificate`: each module's rank, and the share of its energy ‖T‖_F² that was discarded (with momentum, of T
        and then of the sum with it).
    basis
        `projector`: every client's subspace counts by its weight alone. `energy`: the left singular vectors of the
        aggregate itself, which lose the least energy.
    sides
        `both`: a consensus basis V on the right too, so that the state is U (Uᵀ T V) Vᵀ; for the energy basis the
        two choices are the same.
    update
        `replace`: the new state is built from the whole adapters that came back. `innovation`: each client's adapter
        minus the readout it was sent is added to the state, so that directions that a low-rank client was never sent
        are kept, and so are those learnt by absent clients.
    start
        `readout`: clients continue from the state truncated to their rank. `state`: they receive the whole state as a
        frozen patch and train a fresh adapter on top. `split`: they train the readout of their rank on a frozen patch
        that holds the rest of the state (prior art: Fed-PLoRA, Zhang et al. 2026, 2602.16936, folds what a client does
        not train into its base). The last two add innovations to the state, and send R(m+n) down.
    readout
        `svd`: the best adapter of each rank. `nested`: the first directions of U in the consensus's order, so that
        ranks nest.
    balance
        How the size of a direction is shared between B and A: `init` keeps the rows of A as long as freshly drawn ones,
        `even` gives both factors the same length, `root` gives B the root of the singular value and A that over s;
        `auto` takes `init` where clients train with AdamW and `even` with SGD, under which `init` fails
        (docs/readout.md).
    algebra
        `exact`, `randomized`, or `auto`: chosen by shape, exact while that is cheap.
    momentum
        β of S_t = trunc_R(T̂_t + β (S_{t−1} − S_{t−2})) on the state, which is then kept in the form of its SVD;
        0: S_t = T̂_t. Heads are averaged without it.
    """
    if start != "readout":
        # What comes back is an addition to the state, never a replacement of it.
        update = "innovation"
    if isinstance(server_rank, int) and server_rank < 1:
        raise FedspanError(f"method.server_rank = {server_rank}: expected at least 1, 'auto' or 'double'")
    if not 0 < tolerance < 1:
        raise FedspanError(f"method.tolerance = {tolerance}: expected between 0 and 1")
    if server_rank == "auto" and algebra == "randomized":
        raise FedspanError("method.algebra = 'randomized': expected 'auto' or 'exact' with method.server_rank = 'auto'")
    if not 0 <= momentum < 1:
        raise FedspanError(f"method.momentum = {momentum}: expected at least 0 and below 1")
    options = _GloraOptions(server_rank, tolerance, basis, sides, update, start, readout, algebra, balance, momentum)
    info = MethodInfo(
        name="glora",
        title="GLoRA",
        paper="2605.06733",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="r(m+n)",
        traffic_down="r(m+n)" if start == "readout" else "R(m+n)",
    )
    return _product_server(info, options)


def flexlora(algebra: Algebra = "auto", balance: Balance = "auto") -> Method:
    """FlexLoRA: T = Σ p_k s_k B_k A_k, and each client gets the best rank-r_k approximation of it by SVD.

    Source: Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
    Resources" (2402.11505).
    Differences: the paper forms T densely and decomposes it (m×n); here its leading part comes from the factors, in
    `auto` for many clients from a randomized range finder. The server keeps T at the largest client rank, which is all
    that any client can receive.

    Parameters
    ----------
    algebra, balance
        As in `glora`.
    """
    info = MethodInfo(
        name="flexlora",
        title="FlexLoRA",
        paper="2402.11505",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="r(m+n)",
        traffic_down="r(m+n)",
    )
    return _product_server(
        info, _GloraOptions(None, 0.01, "energy", "left", "replace", "readout", "svd", algebra, balance)
    )


def _product_server(info: MethodInfo, options: _GloraOptions) -> Method:
    def init(template: Template, dense: Tensors) -> ServerState:
        empty: dict[str, Tensors] = {}
        for name, (m, n) in template.modules.items():
            x = lowrank.zeros(m, n)
            empty[name] = {"u": x.b, "c": x.a, **(previous(m, n) if options.momentum else {})}
        return ServerState(template, empty, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        template, held = state.template, _held(state)
        if options.start == "state":
            # A new adapter every round: the last one is in the state.
            adapter = fresh_adapter(template, request.rank or template.rank, state.round_num)
            patch = {name: x for name, x in held.items() if x.rank}
            return Broadcast(adapter, state.dense, patch=patch, news=(patch,), seeded=frozenset({"a", "b"}))

        def read(name: str) -> Factors:
            rank = request.rank or max(held[name].rank, template.rank)
            return leading_adapter(template, name, held[name], rank, state.round_num, options.balance)

        adapter = dict(zip(held, parallel.ordered_map(read, held), strict=True))
        if options.start == "split":
            patch = {name: _rest(x, request.rank) for name, x in held.items() if x.rank > (request.rank or x.rank)}
            return Broadcast(adapter, state.dense, patch=patch, news=(patch,))
        return Broadcast(adapter, state.dense)

    def contributions(state: ServerState) -> ContributionOf:
        return _contributions(state, options)

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        contribution_of = contributions(state)
        weights = partial.shares()

        def sums(name: str) -> Sums:
            return Sums([contribution_of(u, name) for u in partial.collected], weights)

        def together(names: Sequence[str]) -> dict[str, Approximation]:
            return _solve_together(state, partial, names, options)

        device = _device_type(partial)
        approximations = _solve(state, sums, None if device == "cpu" else together, len(weights), options, device)
        step = _with_momentum(state, step_of(approximations, options.server_rank == "auto"), options)
        return advance(state, modules=step.modules, dense=partial.mean_dense()), step.diagnostics

    def finish_by_queries(state: ServerState) -> QueryProcedure:
        if options.algebra == "exact" or options.server_rank == "auto":
            raise FedspanError(f"{info.name} with exact algebra or an automatic rank needs all updates at once")
        return _query_procedure(state, options)

    return Method(
        info=info,
        init=init,
        broadcast=broadcast,
        finish=finish,
        finish_by_queries=finish_by_queries,
        contributions=contributions,
    )


def _held(state: ServerState) -> dict[str, LowRank]:
    return {name: LowRank(t["u"], t["c"]) for name, t in state.modules.items()}


def _rest(x: LowRank, rank: int | None) -> LowRank:
    """Return the part of U·C beyond a readout of that rank."""
    return LowRank(x.b[:, rank:], x.a[rank:])


def _contributions(state: ServerState, options: _GloraOptions) -> ContributionOf:
    """Return the X_k whose mean the next state approximates.

    They are the clients' updates or, where innovations are added to the state, each client's update as if it had been
    sent the whole state.
    """
    if options.update == "replace":
        return own_contribution
    held = _held(state)
    # One object per module and rank: a query multiplies by it once for all the clients that share it.
    rests: dict[tuple[str, int], tuple[LowRank, int]] = {}

    def contribution_of(update: Update, module: str) -> Contribution:
        x, own = held[module], own_contribution(update, module)
        sent = 0 if options.start == "state" else min(own.own.rank, x.rank)
        if sent == x.rank:
            return own
        rest, e = rests.setdefault((module, sent), lowrank.normalised(_rest(x, sent)))
        return Contribution(own.own, own.scaling, rest, math.ldexp(1.0, e))

    return contribution_of


def kept_rank(template: Template, server_rank: int | Literal["double"] | None) -> int:
    """Return R."""
    if isinstance(server_rank, int):
        return server_rank
    return template.rank * (2 if server_rank == "double" else 1)


def _spec(state: ServerState, shape: tuple[int, int], options: _GloraOptions) -> ApproximationSpec:
    if options.server_rank == "auto":
        # With room for all directions the basis of the votes spans T as the energy's does, and what is cut then is cut
        # by energy; but what no client may name, as in a state of more directions than votes, would be lost.
        return ApproximationSpec(max(shape), "energy", tolerance=options.tolerance)
    rank = kept_rank(state.template, options.server_rank)
    # With more directions each, the old state, which all clients hold, would outvote everything new.
    vote = None if options.update == "replace" else rank
    both = options.sides == "both" and options.basis == "projector"
    return ApproximationSpec(rank, options.basis, both, vote, ordered=options.readout == "svd")


def _procedure(state: ServerState, name: str, options: _GloraOptions) -> ModuleProcedure:
    template = state.template
    shape = template.modules[name]
    spec = _spec(state, shape, options)
    return spectral.procedure_for(shape, spec, *_key(state, name))


def _key(state: ServerState, name: str) -> tuple[object, ...]:
    """Return the key of a module's random numbers."""
    return state.template.seed, state.round_num, name, "spectral"


def _query_procedure(state: ServerState, options: _GloraOptions) -> QueryProcedure:
    procedures = {name: _procedure(state, name, options) for name in state.modules}
    return _with_momentum(state, step_of((yield from spectral.run_together(procedures))), options)


def _with_momentum(state: ServerState, step: ServerStep, options: _GloraOptions) -> ServerStep:
    if options.momentum == 0:
        return step

    def limits(name: str) -> tuple[int, float | None]:
        spec = _spec(state, state.template.modules[name], options)
        return spec.rank, spec.tolerance

    return extrapolated(state, step, options.momentum, limits)


def _solve(
    state: ServerState,
    sums: Callable[[str], Sums],
    together: Callable[[Sequence[str]], dict[str, Approximation]] | None,
    num_clients: int,
    options: _GloraOptions,
    device: str,
) -> dict[str, Approximation]:
    """Return U·C of every module by the algebra of its shape; one batch of modules is held at a time.

    Parameters
    ----------
    together
        Solves some of the modules of one shape that it is given, before `sums` looks at their factors one by one.
    """

    def solve(names: Sequence[str]) -> dict[str, Approximation]:
        solved: dict[str, Approximation] = {} if together is None else together(names)
        alike: dict[object, dict[str, Sums]] = {}
        for name in names:
            if name not in solved:
                held = sums(name)
                alike.setdefault((held.ranks, held.dtype), {})[name] = held
        for modules in alike.values():
            solved |= zip(modules, _solve_alike(state, modules, options), strict=True)
        return solved

    batches = _batches(state.template, num_clients, _BATCH.get(device, _LARGE_BATCH))
    by_name = {name: x for solved in parallel.ordered_map(solve, batches) for name, x in solved.items()}
    return {name: by_name[name] for name in state.modules}


def _solve_alike(state: ServerState, modules: Mapping[str, Sums], options: _GloraOptions) -> list[Approximation]:
    """Return U·C of modules of one shape whose clients have the same ranks."""
    name, first = next(iter(modules.items()))
    shape = state.template.modules[name]
    spec = _spec(state, shape, options)
    if options.algebra == "exact" or (
        options.algebra == "auto" and (spec.tolerance or spectral.prefers_exact(shape, first.total_rank, spec.rank))
    ):
        return _solve_exactly(list(modules.values()), shape, spec)
    return [spectral.run_procedure(_procedure(state, name, options), sums) for name, sums in modules.items()]


def _solve_together(
    state: ServerState, partial: Partial, names: Sequence[str], options: _GloraOptions
) -> dict[str, Approximation]:
    """Return U·C of those modules of one shape that are solved in the same calls, on devices other than the CPU."""
    shape, updates = state.template.modules[names[0]], partial.collected
    layers = [[update.factors(name) for update in updates] for name in names]
    spec, total_rank = _spec(state, shape, options), sum(f.rank for f in layers[0])
    if options.update != "replace" or options.algebra == "exact" or not stacked.applies(layers[0], spec):
        return {}
    if options.algebra == "auto" and spectral.prefers_exact(shape, total_rank, spec.rank):
        return {}
    alike = [i for i, layer in enumerate(layers) if stacked.applies(layer, spec) and layer[0].rank == layers[0][0].rank]
    keys = [_key(state, names[i]) for i in alike]
    found = stacked.solve([layers[i] for i in alike], partial.shares(), spec, keys)
    return {names[i]: x for i, x in zip(alike, found, strict=True) if x is not None}


def _solve_exactly(modules: Sequence[Sums], shape: tuple[int, int], spec: ApproximationSpec) -> list[Approximation]:
    found: list[Approximation | None] = [None] * len(modules)
    if tall.applies(modules[0], shape, spec):
        found = tall.solve(modules, spec)
    rest = [sums for sums, x in zip(modules, found, strict=True) if x is None]
    others = iter(spectral.solve_exactly(rest, spec) if rest else [])
    return [next(others) if x is None else x for x in found]


_BATCH = {"cpu": 2**20}
"""Numbers in the stacked factors of a batch: small layers share calls, large ones fill the caches alone."""
_LARGE_BATCH = 2**28
"""The same on other devices, which have no cache to stay in: 1 GiB of float32 factors, and twice that in float64."""


def _device_type(partial: Partial) -> str:
    """Return the type of the device that the updates are on."""
    payloads = (payload for update in partial.collected for payload in update.modules.values())
    first = next(payloads, None)
    return "cpu" if first is None else next(iter(first.tensors().values())).device.type


def _batches(template: Template, num_clients: int, room: int) -> Iterable[list[str]]:
    """Yield modules of one shape, as many at a time as fit `room` if every client has the largest rank."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, shape in template.modules.items():
        groups.setdefault(shape, []).append(name)
    for shape, names in groups.items():
        size = max(1, room // max(num_clients * template.rank * sum(shape), 1))
        yield from (names[i : i + size] for i in range(0, len(names), size))


def step_of(approximations: Mapping[str, Approximation], certified: bool = False) -> ServerStep:
    """Return the modules of the next state, with how much of T is not in them as diagnostics."""
    lost, total = (sum(getattr(x, part) for x in approximations.values()) for part in ("lost_squared", "size_squared"))
    error = (lost / total) ** 0.5 if total > 0 else 0.0
    rank = max(x.state.rank for x in approximations.values())
    diagnostics: dict[str, Any] = {"server_rank": float(rank), "truncation_error": error}
    if certified:
        diagnostics["certificate"] = {
            name: {"rank": x.state.rank, "discarded": _discarded(x)} for name, x in approximations.items()
        }
    if any(x.estimated for x in approximations.values()):
        diagnostics["truncation_error_estimated"] = 1.0
    return ServerStep({name: {"u": x.state.b, "c": x.state.a} for name, x in approximations.items()}, diagnostics)


def _discarded(x: Approximation) -> float:
    """Return ‖T − U·C‖_F² / ‖T‖_F²."""
    return x.lost_squared / x.size_squared if x.size_squared else 0.0
