"""What a configuration asks of its method, checked before any data is read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedspan import methods, partition
from fedspan.config import Config
from fedspan.methods.base import Method
from fedspan.methods.messages import Request, Template
from fedspan.methods.server_optimizers import with_server_optimizer
from fedspan.models import quantised


def chosen(config: Config) -> Method:
    """The method that the configuration names, with its server optimizer where it asks for one.

    Raises
    ------
    ValueError
        When the method, an option of it, or what the rest of the configuration asks of it is not possible; where
        others can do it, they are named.
    """
    method = methods.create(config.method)
    s = config.server
    if s.optimizer != "none":
        _check_vector(method)
        method = with_server_optimizer(method, s.optimizer, s.learning_rate, s.momentum, s.beta2, s.tau)
    _check_ranks(method, set(ranks(config)))
    _check_sums(method, config)
    _check_optimizer(method, config)
    _check_base(method, config)
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
    raise ValueError(
        f"{method.info.name} needs one rank for all clients, but federation.ranks gives {sorted(asked)}; "
        f"methods that take mixed ranks: {_able(lambda m: m.info.hetero_rank)}"
    )


def _check_vector(method: Method) -> None:
    if method.vector is None:
        raise ValueError(
            f"server.optimizer: {method.info.name} keeps no global model as one vector in coordinates that all clients "
            f"share, and on factor pairs the result would depend on their gauge; "
            f"methods that do: {_able(lambda m: m.vector is not None)}"
        )


def _check_sums(method: Method, config: Config) -> None:
    if config.federation.sums_only and not method.secure_sum:
        raise ValueError(
            f"federation.sums_only = true, but the server of {method.info.name} needs every client's own update; "
            f"methods that need sums alone: {_able(lambda m: m.secure_sum)}"
        )


def _check_optimizer(method: Method, config: Config) -> None:
    if method.info.optimizer == "sgd" and config.local.optimizer != "sgd":
        raise ValueError(
            f"local.optimizer = '{config.local.optimizer}': {method.info.name} is correct with local SGD alone; "
            f"set local.optimizer = 'sgd', or ask for the heuristic with method.optimizer = 'adamw'"
        )
    recipe = method.broadcast(method.init(Template({}, 1), {}), Request(None)).recipe
    if recipe.galore is not None and config.local.optimizer != "adamw":
        raise ValueError(
            f"local.optimizer = '{config.local.optimizer}': {method.info.name} has GaLore in its clients, which is an "
            f"AdamW; expected 'adamw'"
        )


def _check_base(method: Method, config: Config) -> None:
    quantised.check(config.model.quantise, method.info.trains)
    if config.model.quantise != "none" and any(exchange.ask == "gradient" for exchange in method.exchanges):
        raise ValueError(
            f"model.quantise = '{config.model.quantise}': {method.info.name} asks for the gradient of the base's "
            f"weights, which codes do not have; expected 'none'"
        )
