"""A configuration that its method cannot serve is refused as it is read, with the names of methods that can."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedspan import config as settings
from fedspan.federation.requirements import chosen, ranks
from fedspan.methods import METHODS
from fedspan.methods.base import Method

ONE_RANK = {"federation": {"ranks": 8}}


def asked(name: str, **sections: dict[str, Any]) -> Method:
    options = sections.pop("method", {})
    return chosen(settings.from_mapping({"method": {"name": name, **options}, **sections}))


def named(message: str, before: str) -> set[str]:
    found = re.search(rf"{before}: ([\w, ]+)$", message)
    assert found is not None, message
    return set(found[1].split(", "))


DEMANDS = [
    (
        {"federation": {"ranks": "uniform"}},
        lambda m: m.info.hetero_rank or m.info.pooled,
        "methods that take mixed ranks",
        lambda m: m.info.hetero_rank,
    ),
    (
        {"federation": {"ranks": 8, "sums_only": True}},
        lambda m: m.secure_sum,
        "methods that need sums alone",
        lambda m: m.secure_sum,
    ),
    (
        {"federation": {"ranks": 8}, "server": {"optimizer": "fedadam"}},
        lambda m: m.vector is not None,
        "methods that do",
        lambda m: m.vector is not None,
    ),
]


@pytest.mark.parametrize(("sections", "can", "before", "able"), DEMANDS, ids=["ranks", "sums", "server optimizer"])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_does_it_or_says_who_does(name: str, sections: Any, can: Any, before: str, able: Any) -> None:
    local = {"local": {"optimizer": "sgd"}} if METHODS[name]().info.optimizer == "sgd" else {}
    if can(METHODS[name]()):
        asked(name, **sections, **local)
        return
    with pytest.raises(ValueError, match=name) as refused:
        asked(name, **sections, **local)
    assert "\n" not in str(refused.value)
    assert named(str(refused.value), before) == {n for n, factory in METHODS.items() if able(factory())}


def test_scaffold_wants_sgd_or_to_be_asked_by_name_for_the_heuristic() -> None:
    with pytest.raises(
        ValueError, match=r"local\.optimizer = 'adamw'.*set local\.optimizer = 'sgd'.*method\.optimizer"
    ):
        asked("scaffold", **ONE_RANK)
    assert asked("scaffold", **ONE_RANK, local={"optimizer": "sgd"}).info.optimizer == "sgd"
    assert asked("scaffold", **ONE_RANK, method={"optimizer": "adamw"}).info.name == "scaffold"


def test_fedadamw_is_an_adamw() -> None:
    with pytest.raises(ValueError, match=r"local\.optimizer = 'sgd': fedadamw carries AdamW's .*expected 'adamw'"):
        asked("fedadamw", local={"optimizer": "sgd"})


@pytest.mark.parametrize("name", ["fedftg", "fedgalore"])
def test_galore_is_an_adamw(name: str) -> None:
    with pytest.raises(ValueError, match=rf"local\.optimizer = 'sgd': {name} has GaLore.*expected 'adamw'"):
        asked(name, **ONE_RANK, local={"optimizer": "sgd"})


def test_a_server_optimizer_is_put_around_the_method_with_its_settings() -> None:
    plain = asked("ffa_lora", **ONE_RANK)
    pushed = asked("ffa_lora", **ONE_RANK, server={"optimizer": "fedavgm", "momentum": 0.5})
    assert (plain.info.title, pushed.info.title) == ("FFA-LoRA", "FFA-LoRA + FedAvgM")
    assert pushed.secure_sum
    with pytest.raises(ValueError, match=r"server\.optimizer"):  # one is enough
        asked("fedavgm", **ONE_RANK, server={"optimizer": "fedadam"})
    with pytest.raises(ValueError, match=r"server\.tau"):
        asked("ffa_lora", **ONE_RANK, server={"optimizer": "fedadam", "tau": 0.0})


def test_ranks_are_known_before_the_data() -> None:
    config = settings.from_mapping({"federation": {"ranks": "heavy_tail", "num_clients": 40}, "seed": 5})
    drawn = ranks(config.federation, config.seed)
    assert len(drawn) == 40
    assert set(drawn) <= {2, 4, 8, 16}
    assert drawn == ranks(config.federation, config.seed)
    assert drawn != ranks(config.federation, 6)


def test_there_are_at_least_22_methods_and_each_has_a_name_title_and_source() -> None:
    infos = [factory().info for factory in METHODS.values()]
    assert len(infos) >= 22
    assert [info.name for info in infos] == list(METHODS)
    assert len({info.title for info in infos}) == len(infos)
    for info in infos:
        assert re.search(r"\d{4}\.\d{5}", info.paper) or info.paper == "control", info.name
        doc = METHODS[info.name].__doc__ or ""
        assert info.paper == "control" or "Source" in doc, info.name
