"""The requirements of a configuration on its method, checked before any data is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import numpy as np

from fedspan import methods, robust
from fedspan.config import Config, FederationConfig, LocalConfig, PrivacyConfig, RobustConfig
from fedspan.data import partition
from fedspan.federation.sampling import create_sampler
from fedspan.methods.base import Method
from fedspan.methods.kept_optimizer import with_kept_optimizer
from fedspan.methods.messages import Request, Template
from fedspan.methods.server_optimizers import with_server_optimizer
from fedspan.models import quantised
from fedspan.models.placement import device_name
from fedspan.privacy import client_dp, example_dp
from fedspan.privacy.accounting import accountant_named, noise_for
from fedspan.privacy.budget import Account
from fedspan.privacy.ledgers import ClientLedger
from fedspan.robust.dry_run import averages_factors
from fedspan.robust.filters import least
from fedspan.support.errors import FedspanError

Regions = Mapping[str, Sequence[str]]
"""Region -> its clients, as `deployment.regions`."""


def chosen(config: Config, ledger: ClientLedger | None = None) -> Method:
    """Return the method that the configuration names, with the server optimizer and client-level privacy it asks for.

    Parameters
    ----------
    ledger
        The run's, with the server's secret that noise is drawn from; none: at a site, which draws no such noise.

    Raises
    ------
    FedspanError
        When the method, an option of it, or something that the rest of the configuration asks of it is not possible;
        the message names the methods for which it is.
    """
    federation, privacy, server = config.federation, config.privacy, config.server
    method = methods.create(**config.method)
    if server.optimizer != "none":
        _check_vector(method)
        method = with_server_optimizer(
            method, server.optimizer, server.learning_rate, server.momentum, server.beta2, server.tau
        )
    _check_ranks(method, set(ranks(federation, config.federation_seed)))
    _check_sums(method, federation, privacy)
    if config.deployment.regions:
        _check_regions(method, config.deployment.regions, federation, privacy)
    _check_optimizer(method, config.local.optimizer)
    _check_base(method, config.model.quantise)
    _check_privacy(method, privacy)
    _check_patience(method, config)
    if config.local.keep_optimizer:
        _check_kept_optimizer(method, config.local, privacy)
        method = with_kept_optimizer(method)
    _check_checkpointing(config)
    _check_device_map(config)
    if privacy.dp == "client":
        _check_client_bound(federation, config.wire.up, config.deployment.oversample)
        _check_client_budget(method, federation, privacy)
    if config.robust.filter != "none" or config.robust.max_norm is not None:
        mixed = len(set(ranks(federation, config.federation_seed))) > 1
        _check_robust(method, config.robust, federation, privacy, mixed)
    if privacy.dp == "client":
        # Last, around whatever the method has become: what leaves a client is clipped as it leaves.
        expected = _expected_cohort(federation, privacy.dp)
        secret, charge = (None, None) if ledger is None else (ledger.secret, ledger.charge)
        method = client_dp.with_client_dp(method, privacy.clip, privacy.noise_multiplier, expected, secret, charge)
    return method


def check_between_sites(method: Method) -> None:
    """Refuse the controls, for which one process must have all clients' data.

    Raises
    ------
    FedspanError
        For such a method.
    """
    if method.info.pooled or method.info.alone:
        raise FedspanError(f"method.name = '{method.info.name}' is a control for one process: sites share no data")


def least_in_sums(federation: FederationConfig, privacy: PrivacyConfig, num_clients: int | None = None) -> int:
    """Return the fewest clients in a secure sum, which every site insists on: see `privacy.min_clients`.

    The number of clients does not vary between rounds where it is derived: secure sums refuse sampling by coins.

    Parameters
    ----------
    num_clients
        Of the region whose clients the sum is over; None: there are no regions.
    """
    if privacy.min_clients is not None:
        return privacy.min_clients
    share = 1.0 if num_clients is None else num_clients / federation.num_clients
    return max(2, math.ceil(privacy.threshold * _expected_cohort(federation, privacy.dp) * share))


def galore_rank(method: Method) -> int:
    """Return the rank that a method's clients project the gradients of target modules to; 0: they do not."""
    galore = method.broadcast(method.init(Template({}, 1), {}), Request(None)).recipe.galore
    return 0 if galore is None else galore.rank


def ranks(federation: FederationConfig, seed: int) -> list[int]:
    """Return every client's rank, in the clients' order, from the run's seed alone."""
    rng = np.random.default_rng([seed, 2])
    return list(partition.draw_ranks(federation.ranks, federation.rank_values, federation.num_clients, rng))


def largest_rank(federation: FederationConfig) -> int:
    """Return the largest rank that a client can have under these settings, whatever the seed."""
    if isinstance(federation.ranks, int):
        return federation.ranks
    return max(federation.rank_values if isinstance(federation.ranks, str) else federation.ranks)


def _able(can: Callable[[Method], bool]) -> str:
    """Return the names of the methods for which the predicate holds."""
    return ", ".join(name for name, factory in methods.METHODS.items() if can(factory()))


def _expected_cohort(federation: FederationConfig, dp: str) -> float:
    """Return the number of clients that a round has on average."""
    # Sizes do not depend on the seed.
    return create_sampler(federation, 0, dp).expected_size(federation.num_clients)


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


def _sums_asked(federation: FederationConfig, privacy: PrivacyConfig) -> str | None:
    """Return the first setting that hides the clients' own updates from the server; none: nothing does."""
    asked = {
        "privacy.secure_sums": privacy.secure_sums,
        "privacy.fixed_point": privacy.fixed_point,
        "federation.sums_only": federation.sums_only,
    }
    return next((key for key, given in asked.items() if given), None)


def _check_sums(method: Method, federation: FederationConfig, privacy: PrivacyConfig) -> None:
    key = _sums_asked(federation, privacy)
    if key is not None and not method.secure_sum:
        raise FedspanError(
            f"{key} = true, but the server of {method.info.name} needs every client's own update; "
            f"methods that need sums alone: {_able(lambda m: m.secure_sum)}"
        )
    if privacy.server == "malicious":
        _check_malicious_server(privacy)
    if privacy.secure_sums and not (method.info.pooled or method.info.alone):
        _check_secure_sums(federation, privacy)


def _check_regions(method: Method, regions: Regions, federation: FederationConfig, privacy: PrivacyConfig) -> None:
    """Refuse what cannot be summed region by region to the bits of one sum."""
    if not method.secure_sum:
        raise FedspanError(
            f"deployment.regions: a region answers with the sum of its sites, but the server of {method.info.name} "
            "needs every client's own update; methods that need sums alone: "
            + _able(lambda m: m.secure_sum and not (m.info.pooled or m.info.alone))
        )
    if not (privacy.secure_sums or privacy.fixed_point):
        raise FedspanError(
            "deployment.regions: the bits of floating-point sums depend on who is summed first; expected "
            "privacy.secure_sums = true, or privacy.fixed_point = true for sums that are not masked"
        )
    count = sum(map(len, regions.values()))
    if count != federation.num_clients:
        raise FedspanError(
            f"deployment.regions has {count} clients: expected federation.num_clients = {federation.num_clients}, "
            "every client in one region"
        )
    for region, clients in regions.items():
        least = least_in_sums(federation, privacy, len(clients)) if privacy.secure_sums else 1
        if len(clients) < least:
            raise FedspanError(
                f"deployment.regions: {region} has {len(clients)} of the clients; expected at least {least} in every "
                "region, since its secure sum would hide too little (privacy.min_clients)"
            )


def _check_malicious_server(privacy: PrivacyConfig) -> None:
    if not privacy.secure_sums:
        raise FedspanError("privacy.server = 'malicious': it is about secure sums; expected privacy.secure_sums = true")
    # Any n and t = ⌈threshold · n⌉ then have t > 2n/3, the bound of the proof: see `fedspan.privacy.consistency`.
    if 3 * privacy.threshold <= 2:
        raise FedspanError(
            f"privacy.threshold = {privacy.threshold:g} with privacy.server = 'malicious': sites could be told "
            "different things; expected more than 2/3, such as 0.7"
        )


def _check_secure_sums(federation: FederationConfig, privacy: PrivacyConfig) -> None:
    import_module("fedspan.privacy.primitives")  # whose error says what to install where it is missing
    expected = _expected_cohort(federation, privacy.dp)
    if expected < 2:
        raise FedspanError("privacy.secure_sums = true: one client takes part in a round, whose sum hides nothing")
    if privacy.dp == "client" and federation.participation < 1:
        raise FedspanError(
            "privacy.secure_sums = true: the coins of privacy.dp = 'client' may draw one client alone, whose sum hides "
            "nothing; expected federation.participation = 1"
        )
    if privacy.min_clients is not None and privacy.min_clients > expected:
        raise FedspanError(
            f"privacy.min_clients = {privacy.min_clients}: {expected:g} clients take part in a round; expected at most "
            f"as many"
        )


def _check_optimizer(method: Method, optimizer: str) -> None:
    if method.info.optimizer == "sgd" and optimizer != "sgd":
        raise FedspanError(
            f"local.optimizer = '{optimizer}': {method.info.name} is correct with local SGD alone; "
            f"set local.optimizer = 'sgd', or ask for the heuristic with method.optimizer = 'adamw'"
        )
    # The recipe does not depend on the model: a template without modules is enough to ask for it.
    recipe = method.broadcast(method.init(Template({}, 1), {}), Request(None)).recipe
    if recipe.galore is not None and optimizer != "adamw":
        raise FedspanError(
            f"local.optimizer = '{optimizer}': {method.info.name} has GaLore in its clients, which is an "
            f"AdamW; expected 'adamw'"
        )
    if recipe.carries_moments and optimizer != "adamw":
        raise FedspanError(
            f"local.optimizer = '{optimizer}': {method.info.name} carries AdamW's second moments from round to round; "
            f"expected 'adamw'"
        )


def _check_kept_optimizer(method: Method, local: LocalConfig, privacy: PrivacyConfig) -> None:
    first = "local.keep_optimizer = true"
    if local.optimizer == "sgd":
        raise FedspanError(f"{first}: local.optimizer = 'sgd' has no state to keep; expected 'adamw'")
    if privacy.dp != "none":
        # Its state would carry a client's data into later rounds, where neither clipping nor a ledger knows of it.
        raise FedspanError(
            f"{first} with privacy.dp = '{privacy.dp}': nothing is proven here about what a client keeps between its "
            f"rounds; expected false"
        )
    if not method.lasting:
        raise FedspanError(
            f"{first}: {method.info.name} has its clients train other coordinates in every round, or start from "
            f"moments of the server's, of which a kept state is not true; "
            f"methods that can: {_able(lambda m: m.lasting)}"
        )


def _check_patience(method: Method, config: Config) -> None:
    patience = config.evaluation.patience
    if patience is None:
        return
    given = f"evaluation.patience = {patience}"
    if method.info.personalised and config.evaluation.where == "server":
        raise FedspanError(
            f"{given}: the clients of {method.info.name} have models of their own, which the server does not judge "
            "between rounds; expected evaluation.where = 'clients' or 'both'"
        )
    if not config.data.validation and config.evaluation.where == "server":
        raise FedspanError(
            f"{given} needs data.validation, the share of the training data to judge rounds by, or evaluation.where = "
            "'clients'"
        )
    if config.evaluation.every_seconds is not None:
        raise FedspanError(f"{given} with evaluation.every_seconds: a clock would decide where the run ends")


def _check_base(method: Method, quantise: str) -> None:
    quantised.check(quantise, method.info.trains)
    if quantise != "none" and any(exchange.ask == "gradient" for exchange in method.exchanges):
        raise FedspanError(
            f"model.quantise = '{quantise}': {method.info.name} asks for the gradient of the base's "
            f"weights, which codes do not have; expected 'none'"
        )


def _check_robust(
    method: Method, asked: RobustConfig, federation: FederationConfig, privacy: PrivacyConfig, mixed_ranks: bool
) -> None:
    first = f"robust.filter = '{asked.filter}'" if asked.filter != "none" else f"robust.max_norm = {asked.max_norm:g}"
    key = _sums_asked(federation, privacy)
    if key is not None:
        raise FedspanError(
            f"{first}: with {key} = true the server sees no client's update; expected false or no filter"
        )
    if asked.filter != "none" and privacy.dp == "client":
        raise FedspanError(
            f"{first}: what it does with one client's update depends on all others, so that the noise of "
            f"privacy.dp = 'client' would hide no client; expected 'none'"
        )

    def problem(m: Method) -> str | None:
        return robust.refusal(m, asked.filter, asked.max_norm is not None, mixed_ranks and m.info.hetero_rank)

    reason = problem(method)
    if reason is not None:
        able = _able(lambda m: problem(m) is None)
        raise FedspanError(f"{first}: {method.info.name} {reason}; methods that can have it: {able}")
    expected = _expected_cohort(federation, privacy.dp)
    needed = least(asked.filter, asked.attackers, averages_factors(method)) if asked.filter != "none" else 1
    if expected < needed:
        raise FedspanError(
            f"{first}: {expected:g} clients take part in a round, expected at least {needed} with "
            f"robust.attackers = {asked.attackers} for {method.info.name}"
        )


def _check_checkpointing(config: Config) -> None:
    if config.privacy.dp == "example" and config.engine.checkpointing:
        raise FedspanError(
            "engine.checkpointing with privacy.dp = 'example': a pass over single examples keeps all it needs; "
            "expected false, or a larger local.accumulate to save memory"
        )


def _check_device_map(config: Config) -> None:
    """Refuse what a base on several devices cannot have, and settings that name its device a second time."""
    engine = config.engine
    if engine.device_map == "none":
        return
    automatic = engine.device_map == "auto"
    first = "engine.device_map = 'auto'" if automatic else "engine.device_map"
    if engine.compile:
        raise FedspanError(f"engine.compile with {first}: a compiled pass stays on one device; expected false")
    if config.privacy.dp == "example":
        raise FedspanError(
            f"privacy.dp = 'example' with {first}: the gradients of single examples come from one pass over copies of "
            "the adapter on one device; expected 'none'"
        )
    if engine.workers not in ("auto", 1):
        raise FedspanError(
            f"engine.workers = {engine.workers} with {first}: one process leads all devices, which work in turn; "
            "expected 1 or 'auto'"
        )
    if config.device != "auto" and not (automatic and config.device == "cuda"):
        raise FedspanError(f"device = {config.device!r} with {first}, which names the devices; expected 'auto'")
    if not isinstance(engine.device_map, str):
        named = {device_name(device) for device in engine.device_map.values()}
        if len(named) < 2:
            expected = "".join(f", or device = {name!r} without it" for name in named)
            raise FedspanError(f"{first} names {len(named) or 'no'} device: expected two or more{expected}")


def _check_privacy(method: Method, asked: PrivacyConfig) -> None:
    new_accountant = accountant_named(asked.accountant)
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
    new_accountant()  # which names the package to install where it is missing
    if asked.epsilon is not None and asked.noise_multiplier == 0:
        raise FedspanError("privacy.noise_multiplier = 0: no noise stays within any privacy.epsilon; expected above 0")


def _check_client_bound(federation: FederationConfig, up: str, oversample: float) -> None:
    """Refuse settings under which one client could add more to a sum than its clipped update, or change who is asked.

    Parameters
    ----------
    up
        `wire.up`.
    oversample
        `deployment.oversample`.
    """
    equal = "every client's update is bounded by the same number"
    coins = "clients are drawn by independent coins, and nothing may depend on how many came"
    wanted: list[tuple[str, object, object, str]] = [
        ("federation.weighting", federation.weighting, "equal", equal),
        ("wire.up", up, "float32", "rounding what was clipped could make it larger"),
    ]
    if federation.participation < 1:
        wanted += [
            ("federation.min_clients", federation.min_clients, 1, coins),
            ("federation.min_success", federation.min_success, 1, coins),
            ("deployment.oversample", oversample, 0.0, coins),
        ]
    for key, given, expected, why in wanted:
        if given != expected:
            raise FedspanError(f"{key} = {given!r} with privacy.dp = 'client': {why}; expected {expected!r}")


def _check_client_budget(method: Method, federation: FederationConfig, privacy: PrivacyConfig) -> None:
    # With δ ≥ 1/N, publishing one client's data whole would count as private.
    if federation.num_clients > 1 and privacy.delta >= 1 / federation.num_clients:
        raise FedspanError(
            f"privacy.delta = {privacy.delta:g}: with {federation.num_clients} clients it would allow one of them to "
            f"be published whole; expected well below {1 / federation.num_clients:g}"
        )
    account = client_account(method, privacy, federation.participation)
    if not account.allows(0):
        limit, rounds = privacy.epsilon or math.inf, federation.rounds
        new_accountant = accountant_named(privacy.accountant)
        noise = noise_for(limit, federation.participation, rounds, privacy.delta, new_accountant)
        raise FedspanError(
            f"privacy.epsilon = {limit:g}: the first round alone spends {account.spent(1):.4g}; for "
            f"{rounds} rounds expected a privacy.noise_multiplier of {noise:.3g} or more"
        )


def client_account(method: Method, privacy: PrivacyConfig, participation: float) -> Account:
    """Return the account of what a run spends of its clients' privacy, round by round."""
    return Account(
        method.exchanges,
        privacy.noise_multiplier,
        participation,
        privacy.delta,
        privacy.epsilon,
        accountant_named(privacy.accountant),
    )
