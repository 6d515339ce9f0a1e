"""With f bad clients of n, the filters keep the aggregate near that of the honest ones; without, it is not.

Honest clients are i.i.d. around a common update; `spread` is the largest distance of one of them from their aggregate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import attacks
import flipped
import numpy as np
import pytest
import tiny
import torch

from fedspan import config as settings
from fedspan import robust
from fedspan.client.training import LocalResult
from fedspan.federation import rounds
from fedspan.federation.clients import Client
from fedspan.federation.simulated import SimulatedClients
from fedspan.methods import METHODS
from fedspan.methods.messages import Broadcast, Factors, Request, Update
from fedspan.robust.distances import Cohort

NUM, BAD = 9, (1, 5)
METHODS_TRIED = ("fedit", "flexlora", "glora", "ffa_lora", "fedavg")
ON_DISTANCES = ("krum", "multi_krum", "geometric_median")
ON_COORDINATES = ("median", "trimmed_mean")
RUINOUS = ("sign flip", "×100", "×−100", "collusion")
CAN = [(m, f) for m in METHODS_TRIED for f in (*ON_DISTANCES, *(ON_COORDINATES if m in METHODS_TRIED[3:] else ()))]


def screen_of(name: str, filter: str, **options: Any) -> robust.Screen:
    config = settings.from_mapping(
        {"method": {"name": name}, "robust": {"filter": filter, "attackers": len(BAD), **options}}
    )
    found = robust.screen(config.robust, METHODS[name]())
    assert found is not None
    return found


def honest(stage: attacks.Stage) -> tuple[dict[str, torch.Tensor], float]:
    """What the honest clients' aggregate delivers, and their spread, relative to it."""
    good = [u for k, u in enumerate(stage.updates) if k not in BAD]
    centre = stage.delivered(good)
    return centre, max(attacks.distance(stage.delivered([u]), centre) for u in good)


def allowed(filter: str, spread: float) -> float:
    """How far the result may be from the honest mean, from the filters' own arguments.

    Krum chooses no update whose n − f − 2 nearest others, an honest one among them, are farther than those of an honest
    update: 1 + 2√(n − f − 2) spreads. Geometric median: 2(n − f)/(n − 2f) spreads (Minsker 2015, 1308.1334). A
    coordinate's median, or its trimmed mean, lies between honest values: √(n − f) spreads in all.
    """
    n, f = NUM, len(BAD)
    if filter in ("krum", "multi_krum"):
        return (1 + 2 * math.sqrt(n - f - 2)) * spread
    if filter == "geometric_median":
        return 2 * (n - f) / (n - 2 * f) * spread
    return math.sqrt(n - f) * spread


@pytest.fixture(scope="module")
def stages() -> dict[str, attacks.Stage]:
    return {name: attacks.stage(METHODS[name](), NUM) for name in METHODS_TRIED}


@pytest.mark.parametrize("attack", RUINOUS)
@pytest.mark.parametrize("name", METHODS_TRIED)
def test_without_a_filter_two_of_nine_ruin_the_aggregate(
    stages: dict[str, attacks.Stage], name: str, attack: str
) -> None:
    stage = stages[name]
    centre, spread = honest(stage)
    updates = attacks.mixed(stage, BAD, attacks.ATTACKS[attack])
    assert attacks.distance(stage.delivered(updates), centre) > 3 * spread


@pytest.mark.parametrize("attack", attacks.ATTACKS)
@pytest.mark.parametrize(("name", "filter"), CAN)
def test_with_a_filter_they_do_not(stages: dict[str, attacks.Stage], name: str, filter: str, attack: str) -> None:
    stage = stages[name]
    centre, spread = honest(stage)
    updates = attacks.mixed(stage, BAD, attacks.ATTACKS[attack])
    found = screen_of(name, filter)(updates, stage.sent)
    error = attacks.distance(stage.delivered(found.updates), centre)
    assert error <= allowed(filter, spread)
    # Far better than the bound: no farther than an honest client.
    assert error <= 1.2 * spread


@pytest.mark.parametrize("attack", RUINOUS)
@pytest.mark.parametrize("name", METHODS_TRIED)
def test_multi_krum_leaves_out_just_the_bad_ones(stages: dict[str, attacks.Stage], name: str, attack: str) -> None:
    stage = stages[name]
    found = screen_of(name, "multi_krum")(attacks.mixed(stage, BAD, attacks.ATTACKS[attack]), stage.sent)
    assert found.diagnostics["robust"]["set_aside"] == [stage.updates[k].client_id for k in BAD]
    assert found.rejected == {}  # not chosen is not wrong


@pytest.mark.parametrize("attack", ["gauge 1e4", "rotation"])
@pytest.mark.parametrize("filter", ON_DISTANCES)
def test_a_gauge_ruins_averaged_factors_and_is_seen_there(filter: str, attack: str) -> None:
    """The product is an honest one, so that distances of products alone let it pass; how factors cross does not."""
    stage = attacks.stage(METHODS["fedit"](), NUM)
    centre, spread = honest(stage)
    updates = attacks.mixed(stage, BAD, attacks.ATTACKS[attack])
    assert attacks.distance(stage.delivered(updates), centre) > 3 * spread
    products = Cohort.of(stage.method, updates, stage.sent, "train", averages_factors=False).distances()
    assert float(products.max()) < 3 * float(products[products > 0].min())
    found = screen_of("fedit", filter)(updates, stage.sent)
    assert attacks.distance(stage.delivered(found.updates), centre) <= spread


@pytest.mark.parametrize("name", ["flexlora", "glora"])
def test_a_gauge_is_nothing_to_a_server_of_products(stages: dict[str, attacks.Stage], name: str) -> None:
    stage = stages[name]
    updates = attacks.mixed(stage, BAD, attacks.regauged(1e4))
    assert attacks.distance(stage.delivered(updates), stage.delivered(stage.updates)) < 1e-6


def test_a_gauge_that_spoils_only_the_next_start_is_seen() -> None:
    """FedEx-LoRA delivers the same product in every gauge, and starts the next round from averaged factors."""
    stage = attacks.stage(METHODS["fedex_lora"](), NUM)
    updates = attacks.mixed(stage, BAD, attacks.regauged(1e4))

    def largest(given: Sequence[Update]) -> float:
        state, _ = attacks.aggregate(stage.method, stage.state, list(given))
        return max(float(f.b.norm()) for f in stage.method.broadcast(state, Request(None)).adapter.values())

    assert largest(updates) > 100 * largest(stage.updates)
    for filter in ON_DISTANCES:
        assert largest(screen_of("fedex_lora", filter)(updates, stage.sent).updates) < 1.1 * largest(stage.updates)


@pytest.mark.parametrize("name", METHODS_TRIED)
def test_a_limit_of_norms(stages: dict[str, attacks.Stage], name: str) -> None:
    """It is one of the change since what was sent; where factors are averaged a gauge has a norm too."""
    stage = stages[name]
    sizes = Cohort.of(stage.method, stage.updates, stage.sent, "train", False)
    most = 3 * max(sizes.size(k) for k in range(NUM))
    for attack in ("×100", "×−100", *(["gauge 1e4"] if name == "fedit" else [])):
        found = screen_of(name, "none", max_norm=most)(attacks.mixed(stage, BAD, attacks.ATTACKS[attack]), stage.sent)
        assert sorted(found.rejected) == [stage.updates[k].client_id for k in BAD]
        assert all("robust.max_norm" in reason for reason in found.rejected.values())
        assert attacks.distance(stage.delivered(found.updates), honest(stage)[0]) < 1e-12


@pytest.mark.parametrize("filter", ON_DISTANCES)
def test_mixed_ranks_are_no_attack(filter: str) -> None:
    """A bad client among five ranks is found, and small ranks are not taken for bad ones."""
    stage = attacks.stage(METHODS["glora"](), 10, ranks=(2, 4, 4, 8, 8), rounds=2)
    updates = attacks.mixed(stage, (4,), attacks.scaled(-3.0))
    found = screen_of("glora", filter, attackers=1)(updates, stage.sent)
    about = found.diagnostics["robust"]
    if filter == "geometric_median":
        weights = about["weights"]
        assert weights["client-04"] < 0.3 * min(w for client, w in weights.items() if client != "client-04")
    else:
        assert "client-04" in about["set_aside"]


@pytest.mark.parametrize("filter", [*ON_DISTANCES, *ON_COORDINATES])
def test_an_answer_of_an_earlier_round_is_filtered(filter: str) -> None:
    """Replayed as it was, it is far from today's answers to the state of today."""
    early, late = (attacks.stage(METHODS["fedavg"](), NUM, rounds=r) for r in (0, 3))
    centre, spread = honest(late)
    updates = attacks.mixed(late, BAD, attacks.stale(early))
    assert attacks.distance(late.delivered(updates), centre) > 2 * spread
    found = screen_of("fedavg", filter)(updates, late.sent)
    assert attacks.distance(late.delivered(found.updates), centre) <= spread


@pytest.mark.parametrize("filter", [*ON_DISTANCES, *ON_COORDINATES])
def test_a_claim_of_many_examples_buys_nothing(filter: str) -> None:
    """Without a filter one client with a large claim is the aggregate."""
    stage = attacks.stage(METHODS["fedavg"](), NUM)
    centre, spread = honest(stage)
    updates = attacks.mixed(stage, BAD, attacks.claiming(attacks.scaled(-1.0), 1e9))
    assert attacks.distance(stage.delivered(updates), centre) == pytest.approx(2, rel=0.1)
    found = screen_of("fedavg", filter)(updates, stage.sent)
    assert attacks.distance(stage.delivered(found.updates), centre) <= spread


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("filter", ["krum", "geometric_median"])
def test_numbers_that_are_none_never_reach_a_filter(value: float, filter: str) -> None:
    """The round rejects them, and then needs no more honest clients than the filter asked for."""

    def bad(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        result = tiny.fake_work(client, sent, round_num)
        if client.client_id != "client-3":
            return result
        f = result.update.factors("one")
        spoilt = {**result.update.modules, "one": Factors(torch.full_like(f.b, value), f.a, f.scaling)}
        return replace(result, update=replace(result.update, modules=spoilt))

    method = METHODS["glora"]()
    clients = tiny.clients(4, 4, 4, 4, 4)

    def work(window: Sequence[tuple[Client, Broadcast]], round_num: int) -> Iterator[tuple[LocalResult, float]]:
        return ((bad(client, sent, round_num), 0.0) for client, sent in window)

    here = SimulatedClients(method, work, {})
    run_state, record = rounds.conduct(
        method, tiny.run_state(method, 4), clients, here, screen=screen_of("glora", filter, attackers=1)
    )
    assert sorted(record["rejected"]) == ["client-3"]
    assert run_state.state.round_num == 1
    assert all(bool(t.isfinite().all()) for t in tiny.state_tensors(run_state.state).values())


@pytest.mark.slow
def test_flipped_labels_in_a_whole_run(tmp_path: Path) -> None:
    """Two of seven hospitals label every digit as the next one: a real run, its data in files."""
    accuracy = {
        "unfiltered": flipped.accuracy(tmp_path, "glora", "none", 2, rounds=2),
        "filtered": flipped.accuracy(tmp_path, "glora", "multi_krum", 2, rounds=2, attackers=2),
    }
    assert accuracy["filtered"] > accuracy["unfiltered"] + 0.02, accuracy
    assert np.isfinite(list(accuracy.values())).all()
