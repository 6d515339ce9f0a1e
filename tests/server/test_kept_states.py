"""What clients keep between their rounds: the same at sites as in one process, whatever a filter rejects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites
from remote import IDS, Federation, settings, stop_in_round_2
from run_folders import Stop, state_of

from fedspan.client.training import Assignment, LocalResult
from fedspan.config import Config
from fedspan.methods.messages import Factors, Update
from fedspan.runs import checkpoint
from fedspan.runs.execution import resume, run, serve
from fedspan.server import checks
from fedspan.site.storage import SiteStorage

EVERYONE = {"federation": {"participation": 1.0, "num_clients": 5}}
FIVE = [f"client-{k}" for k in range(5)]


def spoilt(assignment: Assignment, result: LocalResult, round_num: int, size: float = 1e4) -> LocalResult:
    """client-1's second update, far too large; in adapters without the last components, which HetLoRA would prune."""
    if (assignment.client_id, round_num) != ("client-1", 1):
        return result
    update = result.update
    modules = {}
    for name in update.modules:
        f = update.factors(name)
        b = f.b * size
        b[:, f.rank // 2 :] = 0.0
        modules[name] = Factors(b, f.a, f.scaling)
    dense = {name: value * size for name, value in update.dense.items()}
    return replace(result, update=replace(update, modules=modules, dense=dense))


def kept_at(sites: Path, folder: Path, ids: list[str]) -> dict[str, Mapping[str, torch.Tensor]]:
    """Every site's state after the round that last counted, from its own disk."""
    counted = checkpoint.read(folder / "checkpoint" / "federation.safetensors").counted
    found = {}
    for client_id in ids:
        (state,) = sites.glob(f"*{client_id}*/state")
        (one_run,) = (path.name for path in state.iterdir() if path.is_dir())
        kept = SiteStorage(state).state(one_run, counted[client_id])
        if kept is not None:
            found[client_id] = kept
    return found


def kept_here(folder: Path) -> dict[str, Mapping[str, torch.Tensor]]:
    return dict(checkpoint.read(folder / "checkpoint" / "federation.safetensors").client_states)


def same_kept(x: Mapping[str, Mapping[str, torch.Tensor]], y: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    assert x.keys() == y.keys()
    for client_id, kept in x.items():
        tiny.same(kept, y[client_id])


def screened(base: Path, texts: Path, name: str, robust: dict[str, Any]) -> Config:
    method = {"name": name, **({"gamma": 0.5} if name == "hetlora" else {})}
    return settings(base, texts, name, robust=robust, method=method, **EVERYONE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "robust", [{"max_norm": 100.0}, {"filter": "multi_krum"}], ids=["rejected by its norm", "not chosen by Multi-Krum"]
)
@pytest.mark.parametrize("name", ["scaffold", "hetlora", "fedsa_lora"])
def test_what_was_not_counted_did_not_happen_at_sites_either(
    bases: dict[str, Path],
    texts: Path,
    tmp_path: Path,
    name: str,
    robust: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server's state and every client's, to the bit; and client-1 goes on from its first state."""
    started: dict[str, list[LocalResult]] = {}

    def change(assignment: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        started.setdefault(assignment.client_id, []).append(result)
        return spoilt(assignment, result, round_num)

    tiny.intercept(monkeypatch, change)
    config = screened(bases["bert"], texts, name, robust)
    here = run(config, tmp_path / "here").history
    sites = make_sites(config, FIVE, tmp_path / "sites")
    transport = MemoryTransport({f"node-{k}": site.answer for k, site in enumerate(sites.values())})
    there = serve(config, tmp_path / "there", lambda event: None, transport).history
    assert [record["rejected"] for record in here] == [record["rejected"] for record in there]
    if "max_norm" in robust:
        assert set(here[1]["rejected"]) == {"client-1"}
    tiny.same(state_of(tmp_path / "here"), state_of(tmp_path / "there"))
    same_kept(kept_here(tmp_path / "here"), kept_at(tmp_path / "sites", tmp_path / "there", FIVE))
    if name == "hetlora":
        # Had its second answer counted, it would have given up half of its rank.
        ranks = [max(f.rank for f in modules_of(result.update).values()) for result in started["client-1"][:3]]
        assert ranks == [4, 4, 4]


def test_a_site_may_prune_its_adapter(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HetLoRA's client that gives up half of its rank is heard, at a site as in one process, and keeps the rest."""

    def change(assignment: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        return spoilt(assignment, result, round_num, 1.0)

    tiny.intercept(monkeypatch, change)
    method = {"name": "hetlora", "gamma": 0.5}
    config = settings(bases["bert"], texts, "hetlora", method=method, federation={"participation": 1.0})
    run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)
    history = fed.serve()
    assert not any(record["rejected"] for record in history)
    tiny.same(fed.state(), state_of(tmp_path / "here"))
    kept = kept_here(tmp_path / "here")
    same_kept(kept_at(tmp_path / "sites", tmp_path / "run", IDS), kept)
    assert int(kept["client-1"]["rank"]) == 2


@pytest.mark.parametrize("shape", [(0, 32), (5, 32), (4,)])
def test_what_is_pruned_is_the_leading_part(shape: tuple[int, ...]) -> None:
    """Neither nothing, nor more than was sent, nor another kind of tensor; and of no other method anything smaller."""
    wanted = {"modules/x/a": (4, 32), "dense/head": (3, 3)}
    assert checks._shape_problem({"modules/x/a": (2, 32), "dense/head": (3, 3)}, wanted, True) is None
    for own, prunes in ((shape, True), ((2, 32), False)):
        problem = checks._shape_problem({"modules/x/a": own, "dense/head": (3, 3)}, wanted, prunes)
        assert problem == f"modules/x/a has shape {own}, expected (4, 32)"
    assert checks._shape_problem({"modules/x/a": (4, 32), "dense/head": (2, 3)}, wanted, True) is not None


def modules_of(update: Update) -> dict[str, Factors]:
    return {name: update.factors(name) for name in update.modules}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedftg", "fedsa_lora"])
def test_a_kept_optimizer_is_the_same_at_sites_and_after_any_interruption(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    """GaLore's state, and AdamW's beside FedSA-LoRA's own: one process, one that was stopped and resumed, and sites
    whose server was stopped within a round and one of whose processes was restarted, all to the bit."""
    config = settings(bases["bert"], texts, name, local={"keep_optimizer": True})
    run(config, tmp_path / "here")
    with pytest.raises(Stop):
        run(config, tmp_path / "resumed", stop_in_round_2)
    resume(tmp_path / "resumed")
    fed = Federation(config, tmp_path)
    with pytest.raises(Stop):
        fed.serve(stop_in_round_2)
    fed.restart("client-1")
    fed.serve()
    for other in (tmp_path / "resumed", tmp_path / "run"):
        tiny.same(state_of(other), state_of(tmp_path / "here"))
    kept = kept_here(tmp_path / "here")
    same_kept(kept_here(tmp_path / "resumed"), kept)
    same_kept(kept_at(tmp_path / "sites", tmp_path / "run", IDS), kept)
    assert any(key.endswith(":exp_avg") for state in kept.values() for key in state)
    run(settings(bases["bert"], texts, name), tmp_path / "anew")
    new, old = state_of(tmp_path / "anew"), state_of(tmp_path / "here")
    assert any(not torch.equal(new[key], old[key]) for key in old)
