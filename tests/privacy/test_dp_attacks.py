"""Attacks on example-level privacy, each of which once succeeded: none does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites
from privacy.dp_runs import DELTA, EQUAL, Served, flat, private, settings, truth
from run_folders import state_of

pytest.importorskip("dp_accounting")

from fedspan.config import Config, PrivacyConfig
from fedspan.federation import requirements
from fedspan.federation.exchange import Question
from fedspan.methods import METHODS
from fedspan.methods.base import ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Request, Template
from fedspan.privacy.client_dp import with_client_dp
from fedspan.privacy.example_dp import PrivateGradients, private_gradients
from fedspan.privacy.ledgers import Ledger
from fedspan.runs.execution import run
from fedspan.server.coordinator import Coordinator
from fedspan.site.site import Site
from fedspan.wire import agreement

# One noise under two settings


@pytest.mark.parametrize(
    ("first", "second", "mix"),
    [
        pytest.param({"noise_multiplier": 1.0}, {"noise_multiplier": 2.0}, (2.0, -1.0), id="z"),
        pytest.param({"clip": 100.0}, {"clip": 200.0}, (2.0, -1.0), id="C"),
    ],
)
def test_one_folder_under_two_settings_gives_no_gradient_away(
    bases: dict[str, Path],
    texts: Path,
    tmp_path: Path,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    mix: tuple[float, float],
) -> None:
    """The same site asked at z and at 2z (or at C and 2C, both above every norm): with one noise N under both, twice
    the first answer less the second is the sum of clipped gradients. What is left of the noise is its whole size."""
    answers = []
    for number, changes in enumerate((first, second)):
        config = settings(bases["bert"], texts, "fedit", federation=EQUAL, privacy=private(100.0) | dict(changes))
        served = Served(config, tmp_path / f"run-{number}", tmp_path / "sites")
        served.run()
        answers.append((config, served.vector("client-0")))
    bare = settings(bases["bert"], texts, "fedit", federation=EQUAL, privacy=private(100.0, 0.0))
    plain = Served(bare, tmp_path / "bare", tmp_path / "other")
    plain.run()
    sites = plain.sites["client-0"]
    exact = plain.vector("client-0")
    n = sites.client.num_examples
    spreads = [m * c.privacy.clip * c.privacy.noise_multiplier for m, (c, _) in zip(mix, answers, strict=True)]
    noise = 0.1 / n * math.hypot(*spreads)
    mixed = torch.stack([m * x for m, (_, x) in zip(mix, answers, strict=True)]).sum(dim=0)
    left = mixed - sum(mix) * exact
    spread = float(left.square().mean().sqrt())
    assert spread == pytest.approx(noise, rel=0.1), (spread, noise)


def test_dropout_cannot_be_drawn_by_anyone_but_the_site(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """An example's mask depends on its place in the batch. Were the masks those of the run's seed, as they once were,
    then one example more would shift the masks of all that follow, and move the sum by up to 2·C for each of them."""
    config = settings(
        bases["bert"], texts, "ffa_lora", federation=EQUAL, adapter={"dropout": 0.5}, privacy=private(100.0, 0.0)
    )
    answers = []
    for name in "ab":
        served = Served(config, tmp_path / name, tmp_path / f"sites-{name}")
        served.run()
        answers.append(served.vector("client-0"))
    # All examples are drawn, and there is no noise: only the masks can differ.
    assert not torch.allclose(*answers, rtol=1e-3)


# Several asks of one round


def test_a_round_that_is_asked_five_times_is_charged_five_times(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server asks one round again and again, with other frozen factors. The ledger's ε is at least that of what the
    site really did: releases over one draw of the coins are one of noise z/√k."""
    config = settings(
        bases["bert"], texts, "ffa_lora", federation=EQUAL, local={"batch_size": 4}, privacy=private(z=1.0)
    )
    site, asks = ask_again(config, tmp_path, monkeypatch, [1.0, 1.1, 1.2, 1.3, 1.4])
    assert len(asks) == 5
    q = 4 / site.client.num_examples
    shared = Counter(tuple(coins[0]) for coins in asks)
    true = truth((1.0 / math.sqrt(k), q, 1) for k in shared.values())
    assert spent(tmp_path / "sites") >= true - 0.01
    assert spent(tmp_path / "sites") <= truth([(1.0, q, 5)]) + 0.05  # and not more than five draws of their own


def spent(folder: Path) -> float:
    return Ledger(folder / "client-0" / "privacy" / "ledger-client-0.json", DELTA).spent


def ask_again(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, scales: Iterable[float]
) -> tuple[Site, list[list[list[int]]]]:
    """Ask client-0 the first round, once for every number that the frozen factors are multiplied with.

    Returns the site, and for every ask the examples of each step.
    """
    asks: list[list[list[int]]] = []
    real = PrivateGradients.chosen

    def watched(self: PrivateGradients, *arguments: Any, **named: Any) -> list[int]:
        asks[-1].append(drawn := real(self, *arguments, **named))
        return drawn

    monkeypatch.setattr(PrivateGradients, "chosen", watched)
    sites = make_sites(config, ["client-0"], folder / "sites")
    site = sites["client-0"]
    method = requirements.chosen(config)
    single = config.model_copy(update={"federation": config.federation.model_copy(update={"num_clients": 1})})
    transport = MemoryTransport({"node-0": site.answer})
    server = Coordinator(transport, single, method, folder / "server", lambda line: None)
    model = site.loaded.context.model
    clients = server.gather()
    shapes = agreement.shapes(model.modules(), site.loaded.initial)
    clients = server.agree(site.loaded.base, site.loaded.labels, shapes, site.loaded.initial, clients)
    server.enrol()
    template = model.template(4, config.adapter.alpha, config.adapter.rslora, config.seed, 1)
    state: ServerState = method.init(template, site.loaded.initial)
    server.draw(clients, clients, 0)
    for scale in scales:
        sent: Broadcast = method.broadcast(state, Request(4))
        adapter = {name: replace(f, a=f.a * scale) for name, f in sent.adapter.items()}
        evil = replace(sent, adapter=adapter, seeded=frozenset())
        asks.append([])
        question = Question(template, 0, 0, method.exchanges[0], (0, 1), False)
        (answer,) = server.ask(question, clients, lambda client, evil=evil: evil)  # type: ignore[misc]
        assert answer.problem is None, answer.problem
    return site, asks


# Between sites


def without_dropout(folder: Path) -> Path:
    return tiny.save("bert", folder / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_sites_come_to_the_bits_of_one_process(texts: Path, tmp_path: Path, weighting: str) -> None:
    """At q = 1 and z = 0 neither coins nor noise matter, and the weights are what they are in one process.

    The base has no dropout: its masks come from the secret of each folder, like coins and noise.
    """
    federation = {"rounds": 2, "weighting": weighting, "partition": "dirichlet", "dirichlet_alpha": 1.0}
    config = settings(without_dropout(tmp_path), texts, "fedit", federation=federation, privacy=private(z=0.0))
    run(config, tmp_path / "here")
    served = Served(config, tmp_path / "there", tmp_path / "sites")
    history = served.run()
    assert all(not record["rejected"] for record in history)
    tiny.same(state_of(tmp_path / "there"), state_of(tmp_path / "here"))


@pytest.mark.parametrize("hiding", [{}, {"fixed_point": True}, {"secure_sums": True}], ids=["plain", "words", "masked"])
@pytest.mark.parametrize(
    ("dp", "weighting"), [("none", "examples"), ("example", "examples"), ("example", "equal"), ("client", "equal")]
)
def test_every_privacy_works_between_sites(
    bases: dict[str, Path], texts: Path, tmp_path: Path, dp: str, weighting: str, hiding: dict[str, bool]
) -> None:
    """What a site says of itself, the weight of its update and a loss that is not reported fit together in every
    combination, and the result is that of one process to the bit (without dropout, whose masks are secret too)."""
    federation = {"weighting": weighting, "partition": "dirichlet", "dirichlet_alpha": 1.0}
    privacy = {"dp": dp, "clip": 0.5, "noise_multiplier": 0.0 if dp != "none" else 1.0, "delta": DELTA, **hiding}
    if hiding.get("secure_sums"):
        pytest.importorskip("cryptography")
    base = without_dropout(tmp_path) if dp == "example" else bases["bert"]
    config = settings(base, texts, "ffa_lora", federation=federation, privacy=privacy)
    here = run(config, tmp_path / "here").history
    there = Served(config, tmp_path / "there", tmp_path / "sites").run()
    assert all(not record["rejected"] for record in there)
    tiny.same(state_of(tmp_path / "there"), state_of(tmp_path / "here"))
    assert math.isnan(there[0]["train_loss"]) == math.isnan(here[0]["train_loss"]) == (dp == "example")


# Repetitions


def test_an_exact_repetition_is_the_same_to_the_bit_and_free(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost answer is asked for again, in the end by a site that was restarted and whose ledger was lost: the same
    coins, the same answer, and one release in the ledger."""
    local = {"batch_size": 4, "steps": 3}
    config = settings(bases["bert"], texts, "ffa_lora", federation=EQUAL, local=local, privacy=private())
    answers: list[torch.Tensor] = []
    real = Coordinator.ask

    def kept(self: Coordinator, *arguments: Any) -> Any:
        for answer in real(self, *arguments):
            answers.append(flat(answer.update))
            yield answer

    monkeypatch.setattr(Coordinator, "ask", kept)
    site, asks = ask_again(config, tmp_path, monkeypatch, [1.0, 1.0, 1.0])
    q = 4 / site.client.num_examples
    assert asks[0] == asks[1] == asks[2]
    assert len(asks[0]) == 3
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert spent(tmp_path / "sites") == pytest.approx(truth([(1.0, q, 3)]), abs=0.01)


# The size of the noise


def test_the_noise_has_its_size_to_two_percent(bases: dict[str, Path], texts: Path) -> None:
    """z·C on every coordinate of a sum, over more than 50 000 draws, for examples and for clients."""
    model = tiny.load(bases["bert"], "classification")
    asked = PrivacyConfig(dp="example", clip=0.3, noise_multiplier=1.7)
    sent = tiny.broadcast(model)
    with private_gradients(model, sent, asked, 0x5EC12E7, 1) as examples:
        nothing = torch.zeros(examples.size)
        drawn = [examples.noised(nothing, nothing, str(step), 1.0) for step in range(1 + 50_000 // examples.size)]
    assert float(torch.cat(drawn).double().square().mean().sqrt()) == pytest.approx(1.7 * 0.3, rel=0.02)
    method = with_client_dp(METHODS["fedavg"](), 0.3, 1.7, 1.0, lambda: 0x5EC12E7)
    state = method.init(Template({"x": (240, 240)}, 4, num_clients=4), {"x": torch.zeros(240, 240)})
    after, _ = method.finish(state, Partial())
    step = after.dense["x"] - state.dense["x"]
    assert float(step.double().square().mean().sqrt()) == pytest.approx(1.7 * 0.3, rel=0.02)
