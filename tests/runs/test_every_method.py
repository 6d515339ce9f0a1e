"""Every method through whole runs on tiny real models: equal and mixed ranks, partial participation, a client that was
away and comes back, interruption and resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from run_folders import NAMES, Stop, StopAt, check_folder, of_each_kind, same_outcome, strict, trains
from safetensors.torch import load_file

from fedspan.algebra.galore import state_numel_of
from fedspan.client.training import Assignment, LocalResult
from fedspan.config import Config
from fedspan.diagnostics.measure import FIGURES
from fedspan.federation.requirements import chosen
from fedspan.federation.sampling import create_sampler
from fedspan.methods import METHODS
from fedspan.methods.messages import Broadcast
from fedspan.runs import checkpoint
from fedspan.runs.execution import resume, run

MIXED = [name for name in NAMES if METHODS[name]().info.hetero_rank and not METHODS[name]().info.pooled]
KEEPS = {"local", "fedsa_lora", "hetlora", "scaffold"}
"""Methods whose clients keep something of their own between their rounds."""


def equal(base: Path, texts: Path, name: str, **sections: Any) -> Config:
    """Four clients of rank 4, half of them in each of four rounds."""
    federation = {"rounds": 4, "participation": 0.5, "num_clients": 4, "ranks": 4}
    return tiny.config(
        base, texts, name, **{"federation": federation, "evaluation": {"every": 4, "diagnostics": True}, **sections}
    )


def back_after_absence(config: Config) -> list[tuple[int, int, str]]:
    """(round, round of its last part, client) of every client that missed at least one round in between."""
    clients = [*range(config.federation.num_clients)]
    sampler = create_sampler(config.federation, config.seed, "none")
    drawn = [{clients[i] for i in sampler.draw(len(clients), r)} for r in range(config.federation.rounds)]
    found = []
    for k in clients:
        rounds = [r for r, who in enumerate(drawn) if k in who]
        found += [(b, a, f"client-{k}") for a, b in pairwise(rounds) if b > a + 1]
    return found


@pytest.mark.parametrize("name", of_each_kind(NAMES))
def test_equal_ranks_partial_participation_and_coming_back(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = equal(bases["bert"], texts, name)
    broadcasts: dict[tuple[int, str], Broadcast] = {}
    learnt: dict[tuple[int, str], LocalResult] = {}

    def note(assignment: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        if not assignment.broadcast.recipe.gradient:
            broadcasts[round_num, assignment.client_id] = assignment.broadcast
            learnt[round_num, assignment.client_id] = result
        return result

    tiny.intercept(monkeypatch, note)
    result = run(config, tmp_path / "run")
    check_folder(result, config)
    for record in result.history:
        assert record["optimizer_bytes"] > 0 or config.local.optimizer == "sgd"
        assert set(record["diagnostics"]) >= set(FIGURES)
    info = chosen(config).info
    if info.pooled:
        assert {client for _, client in broadcasts} == {"all"}
        return
    returned = back_after_absence(config)
    assert returned, "the schedule holds no client that was away: choose another seed"
    for now, last, client in returned:
        others = [c for r, c in broadcasts if r == now and c != client]
        mine, (other,) = broadcasts[now, client], others
        if name not in KEEPS:
            # Whoever was away starts from the very same place as whoever was not.
            same_start(mine, broadcasts[now, other])
        elif name in ("local", "fedsa_lora"):
            own = learnt[last, client].update
            for module, f in mine.adapter.items():
                assert torch.equal(f.b, own.factors(module).b), "what it kept is lost"
                assert name != "local" or torch.equal(f.a, own.factors(module).a)


def same_start(x: Broadcast, y: Broadcast) -> None:
    tiny.same_adapter(x.adapter, y.adapter)
    tiny.same(x.dense, y.dense)
    tiny.same(x.moments, y.moments)
    assert x.patch.keys() == y.patch.keys()
    assert x.recipe == y.recipe
    tiny.same({n: s.basis for n, s in x.subspaces.items()}, {n: s.basis for n, s in y.subspaces.items()})


@pytest.mark.parametrize("name", of_each_kind(MIXED))
def test_mixed_ranks(bases: dict[str, Path], instructions: Path, tmp_path: Path, name: str) -> None:
    """And says what unseen tasks, each rank and the clients' own data get out of it."""
    config = tiny.config(
        bases["llama"],
        instructions,
        name,
        data={"field_column": "task", "unseen_values": ["cross"], "client_holdout": 0.2},
        federation={"ranks": [1, 8, 2, 4], "partition": "by_field"},
    )
    result = run(config, tmp_path / "run")
    check_folder(result, config)
    summary = result.summary
    assert summary["metric"] == "rouge_l"
    if METHODS[name]().info.personalised:
        assert summary["local"] == summary["federated"] or not METHODS[name]().info.alone
        return
    assert set(summary["metrics"]["unseen"]) == {"loss", "rouge_l", "exact_match"}
    assert set(summary["metrics"]["own_data"]) == {"loss", "rouge_l", "exact_match"}
    if trains(name) == "adapter":
        assert set(summary["per_rank"]) == {"1", "2", "4", "8"}
        per_rank = summary["metrics"]["per_rank"]
        mean = sum(per_rank[r]["loss"] for r in ("1", "8", "2", "4")) / 4
        assert summary["metrics"]["clients"]["loss"] == pytest.approx(mean)
        if name not in ("flora", "florist", "glora_plus", "fed_plora"):  # whose clients all receive everything
            assert len({figures["loss"] for figures in per_rank.values()}) > 1
    else:
        assert summary["metrics"]["clients"] == summary["metrics"]["server"]


@pytest.mark.parametrize("name", of_each_kind(NAMES))
def test_interrupted_and_resumed_is_uninterrupted(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    config = equal(bases["bert"], texts, name, federation={"rounds": 3}, adapter={"dropout": 0.2})
    run(config, tmp_path / "whole")
    out = tmp_path / "stopped"
    with pytest.raises(Stop, match=r"client|round"):
        run(config, out, StopAt(6))
    resume(out)
    same_outcome(tmp_path / "whole", out)
    records = [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["round_num"] for record in records] == [1, 2, 3]


def test_personal_adapters_are_saved_client_by_client(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """One A for all, a B of each client's own, as PEFT folders."""
    result = run(equal(bases["bert"], texts, "fedsa_lora"), tmp_path / "run")
    folders = sorted((result.out / "adapters").iterdir())
    assert [folder.name for folder in folders] == [f"client-{k}" for k in range(4)]
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        same = all(torch.equal(value, other[name]) for other in adapters[1:])
        assert same == ("lora_B" not in name), name


@pytest.mark.parametrize("options", [{"galore_rank": 4}, {"galore_rank": 4, "side": "left"}, {"galore_rank": "none"}])
def test_the_local_optimizer_holds_what_its_formula_says(
    bases: dict[str, Path], texts: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """GaLore: r numbers a row and 2r a column of every target weight; heads and plain AdamW: two for each."""
    config = equal(bases["bert"], texts, "fedftg", method=options, federation={"rounds": 1})
    result = run(config, tmp_path / "run")
    state = checkpoint.read(result.out / "checkpoint" / "federation.safetensors").state
    rank = None if options["galore_rank"] == "none" else 4
    numbers = 0
    for name, weight in state.dense.items():
        target = name in state.template.modules
        numbers += state_numel_of(weight.shape, rank if target else None, options.get("side", "auto"))
    assert result.summary["totals"]["optimizer_bytes"] == result.history[0]["optimizer_bytes"] == 4 * numbers
