"""Attacks on the noise and the ledgers of differential privacy, each of which once succeeded: none does."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites
from run_folders import Stop

pytest.importorskip("dp_accounting")

from fedspan.config import Config
from fedspan.federation import requirements
from fedspan.federation.exchange import Question
from fedspan.methods.base import ServerState
from fedspan.methods.messages import Broadcast, Diagnostics, Request, Update
from fedspan.privacy.client_dp import _ClientDP
from fedspan.privacy.example_dp import PrivateGradients
from fedspan.privacy.ledgers import Ledger
from fedspan.runs import checkpoint
from fedspan.runs.execution import resume, run, serve
from fedspan.server.coordinator import Coordinator
from fedspan.site.site import Site
from fedspan.wire import protocol

DELTA = 1e-5
EQUAL = {"weighting": "equal"}


def truth(releases: Iterable[tuple[float, float, int]]) -> float:
    """ε by the accountant's own library of (z, q, steps), without any of ours."""
    import dp_accounting
    from dp_accounting import pld

    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    for z, q, steps in releases:
        accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z)), steps)
    return float(accountant.get_epsilon(DELTA))


def settings(base: Path, texts: Path, name: str, /, **sections: Any) -> Config:
    """Two clients, both in every round, plain SGD."""
    return tiny.config(
        base,
        texts,
        name,
        federation={"num_clients": 2, "participation": 1.0, "rounds": 1, **sections.pop("federation", {})},
        local={"steps": 1, "batch_size": 1000, "learning_rate": 0.1, "optimizer": "sgd", **sections.pop("local", {})},
        evaluation={"every": 9, "diagnostics": False, "per_rank": False, "base": False},
        engine={"name": "sequential"},
        deployment={"wait": 20, "deadline": 30},
        **sections,
    )


def private(clip: float = 0.5, z: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"dp": "example", "clip": clip, "noise_multiplier": z, "delta": DELTA, **more}


class Served:
    """A federation over sites in memory, with every update that the sites sent."""

    def __init__(self, config: Config, folder: Path, sites: Path) -> None:
        self.sites = make_sites(config, ["client-0", "client-1"], sites)
        self.updates: list[Update] = []
        self.transport = MemoryTransport({f"node-{i}": self._watched(i, x) for i, x in self.sites.items()})
        self.config, self.folder = config, folder

    def _watched(self, client_id: str, site: Site) -> Callable[[bytes], bytes]:
        def answer(content: bytes) -> bytes:
            head, tensors = protocol.decode(sent := site.answer(content))
            if "update" in head:
                self.updates.append(protocol.get_update(head["update"], tensors, client_id))
            return sent

        return answer

    def run(self) -> list[dict[str, Any]]:
        return serve(self.config, self.folder, lambda event: None, self.transport).history

    def vector(self, client_id: str) -> torch.Tensor:
        """What that client sent last, as one vector."""
        update = [u for u in self.updates if u.client_id == client_id][-1]
        return flat(update)


def flat(update: Update) -> torch.Tensor:
    return torch.cat([t.double().flatten() for _, t in sorted(update.named_tensors().items())])


# Finding: noise keyed without z


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


# Finding: several asks of one round over one sample


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
    from fedspan.wire import agreement

    shapes = agreement.shapes(model.modules(), site.loaded.initial)
    clients = server.agree(site.loaded.base, shapes, site.loaded.initial, clients)
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


# Finding: example-level privacy between sites


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_sites_come_to_the_bits_of_one_process(
    bases: dict[str, Path], texts: Path, tmp_path: Path, weighting: str
) -> None:
    """At q = 1 and z = 0 neither coins nor noise matter, and the weights are what they are in one process."""
    federation = {"rounds": 2, "weighting": weighting, "partition": "dirichlet", "dirichlet_alpha": 1.0}
    config = settings(bases["bert"], texts, "fedit", federation=federation, privacy=private(z=0.0))
    run(config, tmp_path / "here")
    served = Served(config, tmp_path / "there", tmp_path / "sites")
    history = served.run()
    assert all(not record["rejected"] for record in history)
    tiny.same(state_of(tmp_path / "there"), state_of(tmp_path / "here"))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return tiny.state_tensors(checkpoint.read(folder / "checkpoint" / "federation.safetensors").state)


# Finding: a crash between the exchanges of a round


@pytest.mark.parametrize("changed", [True, False], ids=["another answer", "the same answers"])
@pytest.mark.parametrize("crash", [1, 2])
def test_a_crash_between_exchanges_is_charged(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int, changed: bool
) -> None:
    """Fed-SB's first round has three exchanges. The run dies after some were released, and comes back to other answers
    (or the same): ε is at least that of everything that was released, and exactly that of an uninterrupted run where
    nothing else was."""
    config = settings(
        bases["bert"],
        texts,
        "fed_sb",
        federation={"num_clients": 4, "participation": 0.5, "rounds": 2, "weighting": "equal"},
        privacy={"dp": "client", "clip": 0.5, "noise_multiplier": 2.0, "delta": DELTA},
    )
    released: dict[int, set[str]] = {}
    count = [0]
    real = _ClientDP.finish

    def watched(self: _ClientDP, state: ServerState, partial: Any) -> tuple[ServerState, Diagnostics]:
        after, diagnostics = real(self, state, partial)
        seen = hashlib.sha256(str(state.exchange).encode())
        for name, t in sorted(tiny.state_tensors(after).items()):
            seen.update(name.encode() + t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        released.setdefault(state.round_num, set()).add(seen.hexdigest())
        count[0] += 1
        if count[0] == crash:
            raise Stop("the power is gone")
        return after, diagnostics

    monkeypatch.setattr(_ClientDP, "finish", watched)
    with pytest.raises(Stop):
        run(config, tmp_path / "run")
    if changed:
        encode = _ClientDP.encode

        def shifted(self: _ClientDP, update: Update, *rest: Any) -> Any:
            answer, kept = encode(self, update, *rest)
            return replace(answer, modules={n: p.map(lambda t: t * 0.9) for n, p in answer.modules.items()}), kept

        monkeypatch.setattr(_ClientDP, "encode", shifted)
    history = resume(tmp_path / "run").history
    true = truth((2.0 / math.sqrt(len(held)), 0.5, 1) for held in released.values())
    assert history[-1]["epsilon"] == pytest.approx(true, abs=0.01)
    if not changed:
        assert [len(held) for held in released.values()] == [3, 1]
