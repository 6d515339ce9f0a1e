"""The versions in the agreement between a server and its sites."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_transport import MemoryTransport

from fedspan import methods
from fedspan.config import Config, load
from fedspan.server.registry import SiteRegistry
from fedspan.support import versions
from fedspan.wire import agreement, protocol

TERMS = agreement.terms(Config())


def greeted(folder: Path, terms: dict[str, object], *settings: str) -> tuple[SiteRegistry, list[str]]:
    """A registry that one site with these terms has introduced itself to, and what it reported."""
    config, lines = load(overrides=("federation.ranks=4", *settings)), list[str]()
    greeting = {
        "client_id": "clinic",
        "rank": 4,
        "holds": [],
        "num_examples": 9,
        "terms": terms,
        "shapes": {},
        "base": "b",
        "labels": "c",
    }
    content = protocol.encode(greeting, protocol.MessageTensors())
    transport = MemoryTransport({"n": lambda message: content})
    method = methods.create("fedit")
    sites = SiteRegistry(
        transport, config.federation, config.deployment, TERMS, method, folder / "sites.json", lines.append
    )
    sites.greet()
    return sites, lines


def test_the_versions_that_count_are_in_the_agreement() -> None:
    for name in ("torch", "transformers", "peft", "flwr"):
        assert TERMS[f"version.library.{name}"] == versions.installed_version(name)
    assert TERMS["version.fedspan"] == versions.installed_version("fedspan")


def test_another_fedspan_is_refused(tmp_path: Path) -> None:
    sites, lines = greeted(tmp_path, {**TERMS, "version.fedspan": "0.0.9"})
    assert sites.members == {}
    assert "clinic: version.fedspan is '0.0.9' on the site" in lines[0]


def test_another_torch_is_reported_or_refused_as_the_settings_say(tmp_path: Path) -> None:
    other = {**TERMS, "version.library.torch": "1.0", "version.library.peft": "0.1"}
    assert agreement.digest(other) == agreement.digest(TERMS)
    sites, lines = greeted(tmp_path, other)
    assert list(sites.members) == ["clinic"]
    assert f"peft 0.1 (server: {TERMS['version.library.peft']}), torch 1.0 (server: " in lines[1]
    sites, lines = greeted(tmp_path, other, "deployment.same_libraries=true")
    assert sites.members == {}
    assert lines[0].endswith("deployment.same_libraries forbids it")
    assert greeted(tmp_path, dict(TERMS), "deployment.same_libraries=true")[1] == ["clinic is here, rank 4"]


def test_the_agreement_notices_every_shared_setting() -> None:
    assert agreement.difference(TERMS, agreement.terms(load(overrides=["seed=1"]))) is not None
    assert agreement.difference(TERMS, TERMS) is None


@pytest.mark.parametrize("missing", ["version.fedspan", "seed"])
def test_a_site_that_leaves_a_setting_out_is_refused(tmp_path: Path, missing: str) -> None:
    sites, lines = greeted(tmp_path, {key: value for key, value in TERMS.items() if key != missing})
    assert sites.members == {}
    assert missing in lines[0]
