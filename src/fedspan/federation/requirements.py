"""What a configuration asks of its method, checked before any data is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import numpy as np

from fedspan import methods, robust
from fedspan.config import Config
from fedspan.data import partition
from fedspan.federation.sampling import create_sampler
from fedspan.methods.base import Method
from fedspan.methods.messages import Request, Template
from fedspan.methods.server_optimizers import with_server_optimizer
from fedspan.models import quantised
from fedspan.privacy import accountant, client_dp, example_dp
from fedspan.robust.filters import least
from fedspan.robust.rehearsal import averages_factors
from fedspan.support.errors import FedspanError


def chosen(config: Config, secret: Callable[[], int] | None = None) -> Method:
    """The method that the configuration names, with a server optimizer and client-level privacy where asked for.

    Parameters
    ----------
    secret
        Tells the server's secret, which noise is drawn from; none: at a site, which has no noise to draw.

    Raises
    ------
    ValueError
        When the method, an option of it, or what the rest of the configuration asks of it is not possible; where
        others can do it, they are named.
    """
    method = methods.create(**config.method)
    s = config.server
    if s.optimizer != "none":
        _check_vector(method)
        method = with_server_optimizer(method, s.optimizer, s.learning_rate, s.momentum, s.beta2, s.tau)
    _check_ranks(method, set(ranks(config)))
    _check_sums(method, config)
    _check_optimizer(method, config)
    _check_base(method, config)
    _check_privacy(method, config)
    _check_robust(method, config)
    if config.privacy.dp == "client":
        f, p = config.federation, config.privacy
        expected = create_sampler(f, config.seed, p.dp).expected_size(f.num_clients)
        method = client_dp.with_client_dp(method, p.clip, p.noise_multiplier, expected, secret)
    return method


def ranks(config: Config) -> list[int]:
    """Every client's rank, in the clients' order, from the run's seed alone."""
    f = config.federation
    return list(partition.draw_ranks(f.ranks, f.rank_values, f.num_clients, np.random.default_rng([config.seed, 2])))


def _able(can: Callable[[Method], bool]) -> str:
    """The names of the methods of which that is true."""
    return ", ".join(name for name, factory in methods.METHODS.items() if can(factory()))


def _check_ranks(method: Method, asked: set[int]) -> None:
    if method.info.hetero_rank or method.info.pooled or len(asked) == 1:
        return
    raise FedspanError(
        f"{method.info.name} needs one rank for all clients, but federation.ranks gives {sorted(asked)}; "
        f"methods that take mixed ranks: {_able(lambda m: m.info.hetero_rank)}"
    )


def _check_vector(method: Method) -> None:
    if method.vector is None:
        raise FedspanError(
            f"server.optimizer: {method.info.name} keeps no global model as one vector in coordinates that all clients "
            f"share, and on factor pairs the result would depend on their gauge; "
            f"methods that do: {_able(lambda m: m.vector is not None)}"
        )


def _check_sums(method: Method, config: Config) -> None:
    f, p = config.federation, config.privacy
    asked = {
        "federation.sums_only": f.sums_only,
        "privacy.secure_sums": p.secure_sums,
        "privacy.fixed_point": p.fixed_point,
    }
    for key in (key for key, given in asked.items() if given):
        if not method.secure_sum:
            raise FedspanError(
                f"{key} = true, but the server of {method.info.name} needs every client's own update; "
                f"methods that need sums alone: {_able(lambda m: m.secure_sum)}"
            )
    if not p.secure_sums or method.info.pooled or method.info.alone:
        return
    import_module("fedspan.privacy.primitives")  # which says what to install where that is missing
    if create_sampler(f, config.seed, p.dp).expected_size(f.num_clients) < 2:
        raise FedspanError("privacy.secure_sums = true: one client takes part in a round, whose sum hides nothing")
    if p.dp == "client" and f.participation < 1:
        raise FedspanError(
            "privacy.secure_sums = true: the coins of privacy.dp = 'client' may draw one client alone, whose sum hides "
            "nothing; expected federation.participation = 1"
        )


def _check_optimizer(method: Method, config: Config) -> None:
    if method.info.optimizer == "sgd" and config.local.optimizer != "sgd":
        raise FedspanError(
            f"local.optimizer = '{config.local.optimizer}': {method.info.name} is correct with local SGD alone; "
            f"set local.optimizer = 'sgd', or ask for the heuristic with method.optimizer = 'adamw'"
        )
    recipe = method.broadcast(method.init(Template({}, 1), {}), Request(None)).recipe
    if recipe.galore is not None and config.local.optimizer != "adamw":
        raise FedspanError(
            f"local.optimizer = '{config.local.optimizer}': {method.info.name} has GaLore in its clients, which is an "
            f"AdamW; expected 'adamw'"
        )


def _check_base(method: Method, config: Config) -> None:
    quantised.check(config.model.quantise, method.info.trains)
    if config.model.quantise != "none" and any(exchange.ask == "gradient" for exchange in method.exchanges):
        raise FedspanError(
            f"model.quantise = '{config.model.quantise}': {method.info.name} asks for the gradient of the base's "
            f"weights, which codes do not have; expected 'none'"
        )


def _check_robust(method: Method, config: Config) -> None:
    asked, f = config.robust, config.federation
    if asked.filter == "none" and asked.max_norm is None:
        return
    first = f"robust.filter = '{asked.filter}'" if asked.filter != "none" else f"robust.max_norm = {asked.max_norm:g}"
    hidden = {
        "privacy.secure_sums": config.privacy.secure_sums,
        "privacy.fixed_point": config.privacy.fixed_point,
        "federation.sums_only": f.sums_only,
    }
    for key in (key for key, given in hidden.items() if given):
        raise FedspanError(
            f"{first}: with {key} = true the server sees no client's update; expected false or no filter"
        )
    if asked.filter != "none" and config.privacy.dp == "client":
        raise FedspanError(
            f"{first}: what it does with one client's update depends on all others, so that the noise of "
            f"privacy.dp = 'client' would hide no client; expected 'none'"
        )
    mixed = len(set(ranks(config))) > 1
    kind, limited = asked.filter, asked.max_norm is not None

    def problem(m: Method) -> str | None:
        return robust.refusal(m, kind, limited, mixed and m.info.hetero_rank)

    reason = problem(method)
    if reason is not None:
        able = _able(lambda m: problem(m) is None)
        raise FedspanError(f"{first}: {method.info.name} {reason}; methods that can have it: {able}")
    cohort = create_sampler(f, config.seed, config.privacy.dp).expected_size(f.num_clients)
    needed = least(asked.filter, asked.attackers, averages_factors(method)) if asked.filter != "none" else 1
    if cohort < needed:
        raise FedspanError(
            f"{first}: {cohort:g} clients take part in a round, expected at least {needed} with "
            f"robust.attackers = {asked.attackers} for {method.info.name}"
        )


def _check_privacy(method: Method, config: Config) -> None:
    asked = config.privacy
    if asked.dp == "none":
        if asked.epsilon is not None:
            raise FedspanError(
                f"privacy.epsilon = {asked.epsilon:g} with privacy.dp = 'none': expected client or example"
            )
        return
    refusal = {"client": client_dp.refusal, "example": example_dp.refusal}[asked.dp]
    reason = refusal(method)
    if reason is not None:
        raise FedspanError(
            f"privacy.dp = '{asked.dp}': {method.info.name}: {reason}; "
            f"methods that can: {_able(lambda m: refusal(m) is None)}"
        )
    accountant.require()
    if asked.epsilon is not None and asked.noise_multiplier == 0:
        raise FedspanError("privacy.noise_multiplier = 0: no noise stays within any privacy.epsilon; expected above 0")
    if asked.dp == "client":
        _check_client_privacy(method, config)


def _check_client_privacy(method: Method, config: Config) -> None:
    asked, f = config.privacy, config.federation
    equal = "every client's update is bounded by the same number"
    coins = "clients are drawn by independent coins, of which nothing may depend"
    wanted: list[tuple[str, object, object, str]] = [
        ("federation.weighting", f.weighting, "equal", equal),
        ("wire.up", config.wire.up, "float32", "rounding what was clipped could make it larger"),
    ]
    if f.participation < 1:
        wanted += [
            ("federation.min_clients", f.min_clients, 1, coins),
            ("federation.min_success", f.min_success, 1, coins),
            ("deployment.oversample", config.deployment.oversample, 0.0, coins),
        ]
    for key, given, expected, why in wanted:
        if given != expected:
            raise FedspanError(f"{key} = {given!r} with privacy.dp = 'client': {why}; expected {expected!r}")
    if f.num_clients > 1 and asked.delta >= 1 / f.num_clients:
        raise FedspanError(
            f"privacy.delta = {asked.delta:g}: at {f.num_clients} clients it allows to publish one of them whole; "
            f"expected well below {1 / f.num_clients:g}"
        )
    account = client_account(method, config)
    if not account.allows(0):
        z = accountant.noise_for(asked.epsilon or math.inf, f.participation, f.rounds, asked.delta)
        raise FedspanError(
            f"privacy.epsilon = {asked.epsilon:g}: the first round alone spends {account.spent(1):.4g}; for "
            f"{f.rounds} rounds expected a privacy.noise_multiplier of {z:.3g} or more"
        )


def client_account(method: Method, config: Config) -> accountant.Account:
    """What the run spends of its clients' privacy, round by round."""
    p = config.privacy
    return accountant.Account(method.exchanges, p.noise_multiplier, config.federation.participation, p.delta, p.epsilon)
