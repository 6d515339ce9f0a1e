"""The requirements of differential privacy on the rest of the configuration, checked before any data is read."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("dp_accounting")

from fedspan import config as settings
from fedspan.federation.requirements import chosen, client_account
from fedspan.methods import METHODS
from fedspan.methods.base import Method
from fedspan.privacy import client_dp, example_dp

CLIENT = {"dp": "client", "noise_multiplier": 5.0}


def asked(name: str = "ffa_lora", privacy: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Method:
    federation = {"ranks": 8, "weighting": "equal", **sections.pop("federation", {})}
    tree = {"method": {"name": name}, "privacy": CLIENT if privacy is None else privacy, "federation": federation}
    return chosen(settings.from_mapping({**tree, **sections}))


@pytest.mark.parametrize("dp", ["client", "example"])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_does_it_or_says_who_does(name: str, dp: str) -> None:
    refusal = {"client": client_dp.refusal, "example": example_dp.refusal}[dp]
    local = {"local": {"optimizer": "sgd"}} if METHODS[name]().info.optimizer == "sgd" else {}
    if refusal(METHODS[name]()) is None:
        assert asked(name, {"dp": dp}, **local).info.name == name
        return
    with pytest.raises(ValueError, match=f"privacy.dp = '{dp}': {name}: ") as refused:
        asked(name, {"dp": dp}, **local)
    able = {n for n, factory in METHODS.items() if refusal(factory()) is None}
    assert set(str(refused.value).rpartition("methods that can: ")[2].split(", ")) == able
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"federation": {"weighting": "examples"}}, "federation.weighting = 'examples' with privacy.dp = 'client'"),
        ({"federation": {"min_clients": 2}}, "federation.min_clients = 2 .* independent coins"),
        ({"federation": {"min_success": 2}}, "federation.min_success = 2 .* independent coins"),
        ({"deployment": {"oversample": 0.5}}, "deployment.oversample = 0.5 .* independent coins"),
        ({"wire": {"up": "int8"}}, "wire.up = 'int8' .*; expected 'float32'"),
        ({"privacy": {**CLIENT, "delta": 0.2}}, "privacy.delta = 0.2: with 8 clients .* expected well below 0.125"),
        ({"privacy": {**CLIENT, "noise_multiplier": 0, "epsilon": 1.0}}, "privacy.noise_multiplier = 0"),
        ({"privacy": {"dp": "example", "noise_multiplier": 0, "epsilon": 1.0}}, "privacy.noise_multiplier = 0"),
        ({"privacy": {"epsilon": 1.0}}, "privacy.epsilon = 1 with privacy.dp = 'none': expected client or example"),
        ({"server": {"optimizer": "fedavgm"}, "robust": {"filter": "krum"}}, "robust.filter = 'krum'"),
    ],
)
def test_what_does_not_fit_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        asked(**sections)
    assert "\n" not in str(refused.value)


def test_with_everybody_in_every_round_no_coin_is_thrown() -> None:
    asked(federation={"participation": 1.0, "min_clients": 2, "min_success": 3}, deployment={"oversample": 0.5})


def test_a_budget_too_small_for_one_round_says_what_noise_would_do() -> None:
    with pytest.raises(
        ValueError, match=r"the first round alone spends .*noise_multiplier of [\d.]+ or more"
    ) as caught:
        asked(privacy={"dp": "client", "noise_multiplier": 1.0, "epsilon": 2.0})
    z = float(str(caught.value).split("noise_multiplier of ")[1].split()[0])
    config = settings.from_mapping(
        {
            "method": {"name": "ffa_lora"},
            "federation": {"ranks": 8, "weighting": "equal"},
            "privacy": {"dp": "client", "noise_multiplier": z * 1.01, "epsilon": 2.0},
        }
    )
    account = client_account(chosen(config), config.privacy, config.federation.participation)
    assert account.sample_rate == config.federation.participation
    assert account.allows(config.federation.rounds - 1)
