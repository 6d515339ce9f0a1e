"""Mistakes found in public code for federated fine-tuning, on the engine's side: each must stay impossible here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fedspan.client.training import Assignment, LocalResult
from fedspan.federation.clients import Client
from fedspan.methods import METHODS
from fedspan.methods.base import ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Diagnostics, Factors, Update
from fedspan.runs import checkpoint
from fedspan.runs.execution import Result, resume, run


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Broadcast, Update]]:
    """Return what every training of a run started from, and its result."""
    seen: list[tuple[Broadcast, Update]] = []

    def look(assignment: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        seen.append((assignment.broadcast, result.update))
        return result

    tiny.intercept(monkeypatch, look)
    return seen


@pytest.mark.parametrize("name", ["fedit", "glora", "ffa_lora", "fedftg"])
def test_heads_and_new_poolers_are_averaged_and_sent_back(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Classification heads that never leave the clients (FedLLM-Factory)."""
    seen = watched(monkeypatch)
    run(tiny.config(bases["bert"], texts, name), tmp_path / "run")
    (_, one), (_, two), (second, _), _ = seen
    heads = ["classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    n, m = one.num_examples, two.num_examples
    for head in heads:
        assert not torch.equal(one.dense[head], two.dense[head])
        mean = (n * one.dense[head] + m * two.dense[head]) / (n + m)
        torch.testing.assert_close(second.dense[head], mean, rtol=1e-5, atol=1e-7)


def test_galore_projects_in_a_whole_run(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GaLore that is never active, because no parameter carries its rank (fedftg's public code)."""
    seen = watched(monkeypatch)
    method = {"galore_rank": 2}
    sections = {"local": {"steps": 5, "clip_norm": None}, "adapter": {"target_modules": ["query", "dense"]}}
    run(tiny.config(bases["bert"], texts, "fedftg", method=method, **sections), tmp_path / "run")
    for sent, update in seen:
        for layer in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"):
            moved = (update.dense[f"{layer}.weight"] - sent.dense[f"{layer}.weight"]).double()
            values = torch.linalg.svdvals(moved)
            assert values[1] > 0
            assert values[2] < 1e-4 * values[0]
    # The server's average is of several clients, each with a projector of its own.
    first, second = seen[0][0], seen[2][0]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    values = torch.linalg.svdvals((second.dense[name] - first.dense[name]).double())
    assert values[3] > 1e-3 * values[0]


def test_updates_of_a_round_are_not_carried_into_the_next() -> None:
    """The list of client updates that is never cleared (a Fed-SB fork)."""
    folds: list[tuple[int, list[str], float]] = []
    base = METHODS["glora"]()

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        folds.append((partial.num_clients, [u.client_id for u in partial.collected], partial.weight))
        return base.finish(state, partial)

    method = replace(base, finish=finish)
    people = tiny.clients(2, 2, 2)
    run_state = tiny.run_state(method, 2)
    for cohort in (people, people[:1], people[1:]):
        run_state, _ = tiny.run_round(method, run_state, cohort, tiny.fake_work)
    assert folds == [
        (3, ["client-0", "client-1", "client-2"], 60.0),
        (1, ["client-0"], 10.0),
        (2, ["client-1", "client-2"], 50.0),
    ]


def test_what_the_server_keeps_is_not_what_a_client_trains(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extracted views that alias the live model: nothing that was sent or came back changes afterwards."""
    kept: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    seen = watched(monkeypatch)

    def snapshot(event: Any) -> None:
        if event.kind == "client":
            sent, update = seen[-1]
            tensors = {**tiny.flat(sent.adapter), **sent.dense, **{f"new {n}": t for n, t in update.dense.items()}}
            tensors |= {f"new {n}": t for n, t in tiny.flat({k: update.factors(k) for k in update.modules}).items()}
            kept.append((tensors, {name: t.clone() for name, t in tensors.items()}))

    for name in ("local", "hetlora", "fedavg"):
        run(tiny.config(bases["bert"], texts, name), tmp_path / name, snapshot)
    assert len(kept) == 12
    for tensors, copies in kept:
        tiny.same(tensors, copies)


def test_the_scaling_of_the_factors_is_the_scaling_of_the_model(bases: dict[str, Path]) -> None:
    """A server that ignores α/r: here the scaling that travels is the one that runs, at every rank."""
    model = tiny.load(bases["llama"], "instruction")
    ids = torch.arange(4, 20)[None]
    found = []
    for rank, scaling in ((2, 0.8), (8, 0.2)):
        rng = torch.Generator().manual_seed(0)
        pairs = {
            n: (torch.randn(m, 2, generator=rng), torch.randn(2, k, generator=rng))
            for n, (m, k) in sorted(model.modules().items())
        }
        copies = rank // 2  # the same product, spread over more components, each counted at a smaller scaling
        adapter = {n: Factors(b.repeat(1, copies), a.repeat(copies, 1), scaling) for n, (b, a) in pairs.items()}
        model.load(tiny.broadcast(model, adapter))
        with torch.no_grad():
            found.append(model.model(input_ids=ids).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def split(tmp_path: Path) -> list[str]:
    """Three files of examples, the second with one example only."""
    rows = tiny.words()
    parts = (rows[:20], rows[20:21], rows[21:])
    return [str(tiny.write_jsonl(tmp_path / f"{i}.jsonl", part)) for i, part in enumerate(parts)]


@pytest.mark.parametrize("name", ["local", "hetlora", "flora"])
def test_a_resumed_client_finds_its_own_state_by_its_id(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Resuming that indexes a list by client id (FlexLoRA): with client-1 dropped, client-2 is second in the list."""

    def go(out: str, stop: int | None) -> Result:
        federation = {"partition": "files", "num_clients": 3, "drop_empty": True, "ranks": [1, 2, 3], "rounds": 3}
        sections = {"data": {"train": split(tmp_path), "client_holdout": 0.6}, "federation": federation}
        config = tiny.config(bases["bert"], tmp_path / "0.jsonl", name, **sections)

        def on_event(event: Any) -> None:
            if event.kind == "round" and event.data["record"]["round_num"] == stop:
                raise KeyboardInterrupt

        if stop is None:
            return run(config, tmp_path / out)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / out, on_event)
        return resume(tmp_path / out)

    whole, resumed = go("whole", None), go("resumed", 2)
    assert whole.summary["federated"] == resumed.summary["federated"]
    one, other = (
        checkpoint.read(tmp_path / out / "checkpoint" / "federation.safetensors") for out in ("whole", "resumed")
    )
    assert set(one.seen) == {"0", "2"}  # named after the files
    tiny.same_state(one.state, other.state)
    assert one.client_states.keys() == other.client_states.keys()
    for client, kept in one.client_states.items():
        tiny.same(kept, other.client_states[client])
    if name == "local":
        assert {c: k[next(n for n in k if n.endswith("/a"))].shape[0] for c, k in one.client_states.items()} == {
            "0": 1,
            "2": 3,
        }


def test_a_client_that_raises_ends_the_run_and_one_that_is_wrong_does_not(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither waits for ever, nor goes on in silence: a fault in the code is not a bad update."""
    config = tiny.config(bases["bert"], texts, "fedit", federation={"participation": 1.0})

    def broken(assignment: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        if assignment.client_id == "client-2":
            raise MemoryError("no more")
        return result

    tiny.intercept(monkeypatch, broken)
    with pytest.raises(MemoryError):
        run(config, tmp_path / "raised")
    monkeypatch.undo()
    assert len(resume(tmp_path / "raised").history) == 2


def test_one_bad_client_of_many_does_not_stop_training() -> None:
    """Training that stops when one client fails, or waits for a number of clients that never comes."""

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        result = tiny.fake_work(client, sent, round_num)
        if client.client_id != "client-0":
            return result
        return replace(result, update=replace(result.update, dense={"head": torch.full(tiny.HEAD, torch.nan)}))

    method = METHODS["fedit"]()
    run_state, people = tiny.run_state(method, 2), tiny.clients(2, 2, 2)
    for _ in range(3):
        run_state, record = tiny.run_round(method, run_state, people, work, min_success=2)
        assert record["num_clients"] == 2
    assert run_state.state.round_num == 3
