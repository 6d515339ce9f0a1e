"""Another accountant is one class and one entry, by which every ε of a run is then computed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch

from fedspan import config as settings
from fedspan.federation.requirements import chosen, client_account
from fedspan.methods import METHODS
from fedspan.methods.messages import Update
from fedspan.privacy import accounting
from fedspan.privacy.accountant import Accountant, DPEvent
from fedspan.privacy.accounting import ACCOUNTANTS, accountant_named, epsilon, noise_for
from fedspan.privacy.asks import Ask
from fedspan.privacy.budget import Account, Budget
from fedspan.privacy.ledgers import ExampleLedgers
from fedspan.runs.execution import run
from fedspan.wire import agreement


class ZCDPAccountant:
    """Zero-concentrated DP without amplification by sampling: ρ = k/(2z²) and ε = ρ + 2·√(ρ·ln(1/δ)).

    Source: Bun and Steinke 2016 (1605.02065), propositions 1.3 and 1.6.
    """

    def __init__(self) -> None:
        self.rho = 0.0

    def compose(self, event: DPEvent) -> None:
        self.rho += event.count / (2 * event.noise_multiplier**2)

    def epsilon(self, delta: float) -> float:
        return self.rho + 2 * math.sqrt(self.rho * math.log(1 / delta))


def zcdp(rho: float, delta: float = 1e-5) -> float:
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "ACCOUNTANTS", {**ACCOUNTANTS, "zcdp": ZCDPAccountant})


def test_epsilon_and_noise_are_the_accountants() -> None:
    """ε from its own formula, whatever the sample rate; nothing released spends 0 and no noise ∞ under any of them."""
    assert epsilon(2.0, 0.1, 6, 1e-5, ZCDPAccountant) == zcdp(6 / 8)
    assert epsilon(2.0, 0.1, 0, 1e-5, ZCDPAccountant) == 0.0
    assert epsilon(0.0, 0.1, 1, 1e-5, ZCDPAccountant) == math.inf
    z = noise_for(3.0, 0.1, 6, 1e-5, ZCDPAccountant)
    assert zcdp(6 / (2 * z**2)) <= 3.0 < zcdp(6 / (2 * (z * 0.998) ** 2))


def test_budgets_and_accounts_spend_by_it() -> None:
    budget = Budget(1e-5, 4.0, accountant=ZCDPAccountant).plus(DPEvent(2.0, 0.3)).plus(DPEvent(4.0, 1.0, 2))
    assert budget.spent == pytest.approx(zcdp(1 / 8 + 2 / 32), rel=1e-12)
    assert budget.allows(DPEvent(10.0, 1.0))
    assert not budget.allows(DPEvent(0.5, 1.0))
    account = Account(METHODS["fed_sb"]().exchanges, 2.0, 0.2, 1e-5, accountant=ZCDPAccountant)
    # Three exchanges in the first round and one later, of z = 2 each: ρ = k/8.
    assert account.spent(5) == pytest.approx(zcdp(7 / 8), rel=1e-12)


@pytest.mark.usefixtures("registered")
def test_a_federation_reports_its_epsilon(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Two rounds under client-level privacy: the ε of every round, and the message of a budget that is too small."""
    config = tiny.config(
        bases["bert"],
        texts,
        "ffa_lora",
        federation={"weighting": "equal"},
        privacy={"dp": "client", "noise_multiplier": 4.0, "accountant": "zcdp"},
    )
    result = run(config, tmp_path / "run")
    reported = [record["epsilon"] for record in result.history]
    assert reported == [zcdp(1 / 32), zcdp(2 / 32)]
    small = config.model_copy(update={"privacy": config.privacy.model_copy(update={"epsilon": 0.5})})
    with pytest.raises(ValueError, match=rf"the first round alone spends {zcdp(1 / 32):.4g}; .*noise_multiplier of"):
        chosen(small)
    assert client_account(chosen(config), config.privacy, config.federation.participation).accountant is ZCDPAccountant


@pytest.mark.usefixtures("registered")
def test_ledgers_of_examples_spend_by_it(tmp_path: Path) -> None:
    """And a ledger's file depends on no accountant: another one counts the same releases its own way."""
    privacy = settings.PrivacyConfig(dp="example", noise_multiplier=3.0, epsilon=7.0, accountant="zcdp")
    ledgers, update = ExampleLedgers(privacy, 4, tmp_path, "settings"), Update("a", 1.0, {}, {"x": torch.ones(3)})
    ledgers.charge(Ask("run", "a", 0, 7, 40, "first"), update)
    assert ledgers.spent() == zcdp(7 / 18)
    ledgers.charge(Ask("run", "a", 1, 7, 40, "second"), update)
    assert not ledgers.allows("a", "run", 2, 40, 7)
    pytest.importorskip("dp_accounting")
    tight = ExampleLedgers(privacy.model_copy(update={"accountant": "pld"}), 4, tmp_path, "settings")
    assert tight.allows("a", "run", 2, 40, 7)
    assert tight.spent() == epsilon(3.0, 0.1, 14, 1e-5)


@pytest.mark.parametrize("dp", ["none", "client", "example"])
def test_an_unknown_accountant_names_the_nearest(dp: str) -> None:
    tree = {"privacy": {"dp": dp, "accountant": "pdl"}, "federation": {"weighting": "equal"}}
    with pytest.raises(ValueError, match=r"^privacy.accountant = 'pdl'; did you mean 'pld'\?$"):
        chosen(settings.from_mapping({"method": {"name": "ffa_lora"}, **tree}))


@pytest.mark.usefixtures("registered")
def test_server_and_site_must_name_the_same() -> None:
    server, site = (settings.from_mapping({"privacy": {"accountant": name}}) for name in ("pld", "zcdp"))
    assert agreement.difference(agreement.terms(server), agreement.terms(site)) == (
        "privacy.accountant is 'zcdp' on the site and 'pld' on the server: expected one value"
    )


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_every_accountant_keeps_the_contract(name: str) -> None:
    """ε ≥ 0 grows with every release and shrinks with δ; accountants that were made apart share nothing."""
    pytest.importorskip("dp_accounting")
    accountant: Accountant = accountant_named(name)()
    spent = []
    for event in (DPEvent(3.0, 0.2, 5), DPEvent(2.0, 1.0), DPEvent(3.0, 0.2)):
        accountant.compose(event)
        spent.append(accountant.epsilon(1e-5))
    assert 0 < spent[0] < spent[1] < spent[2] < accountant.epsilon(1e-7)
    fresh = accountant_named(name)()
    fresh.compose(DPEvent(3.0, 0.2, 5))
    assert fresh.epsilon(1e-5) == spent[0]
