"""Runs under client-level privacy that are killed and resumed: their ε is that of everything that was released."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from privacy.dp_runs import DELTA, settings, truth
from run_folders import Stop

pytest.importorskip("dp_accounting")

from fedspan.config import Config
from fedspan.methods.base import ServerState
from fedspan.methods.messages import Diagnostics, Update
from fedspan.privacy.client_dp import _ClientDP
from fedspan.privacy.ledgers import ClientLedger
from fedspan.runs.events import Event
from fedspan.runs.execution import resume, run
from fedspan.support.errors import FedspanError


def shared(base: Path, texts: Path, z: float = 2.0, **privacy: Any) -> Config:
    """Fed-SB over four clients under client-level privacy: three exchanges in the first round, then one."""
    return settings(
        base,
        texts,
        "fed_sb",
        federation={"num_clients": 4, "participation": 0.5, "rounds": 2, "weighting": "equal"},
        privacy={"dp": "client", "clip": 0.5, "noise_multiplier": z, "delta": DELTA, **privacy},
    )


@pytest.mark.parametrize("changed", [True, False], ids=["another answer", "the same answers"])
@pytest.mark.parametrize("crash", [1, 2])
def test_a_crash_between_exchanges_is_charged(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int, changed: bool
) -> None:
    """Fed-SB's first round has three exchanges. The run dies after some were released, and comes back to other answers
    (or the same): ε is at least that of everything that was released, and exactly that of an uninterrupted run where
    nothing else was."""
    config = shared(bases["bert"], texts)
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
    result = resume(tmp_path / "run")
    true = truth((2.0 / math.sqrt(len(held)), 0.5, 1) for held in released.values())
    assert result.history[-1]["epsilon"] == result.summary["epsilon"] == pytest.approx(true, abs=0.01)
    if not changed:
        assert [len(held) for held in released.values()] == [3, 1]


def test_a_lost_or_older_ledger_is_refused(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """A finished round whose sums are not in the ledger would make every later ε too small."""
    run(shared(bases["bert"], texts), tmp_path / "run")
    path = tmp_path / "run" / "privacy" / "ledger.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    first = sorted(whole["samples"])[0]
    for samples in ({}, {first: whole["samples"][first]}):
        path.write_text(json.dumps({**whole, "samples": samples}), encoding="utf-8")
        with pytest.raises(FedspanError, match=r"ledger.json counts 0 sums of round [12], which is finished: expected"):
            resume(tmp_path / "run")


def test_a_limit_holds_for_what_was_really_released(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the first round and no more. It dies after two of its three sums and comes back to other answers: the
    run ends before the sum that would exceed ε, and says so."""
    limit = truth([(2.0 / math.sqrt(3), 0.5, 1)]) * 1.05
    config = shared(bases["bert"], texts, epsilon=limit)
    real, count = _ClientDP.finish, [0]

    def watched(self: _ClientDP, *arguments: Any) -> tuple[ServerState, Diagnostics]:
        outcome = real(self, *arguments)
        count[0] += 1
        if count[0] == 2:
            raise Stop("the power is gone")
        return outcome

    monkeypatch.setattr(_ClientDP, "finish", watched)
    with pytest.raises(Stop):
        run(config, tmp_path / "run")
    encode = _ClientDP.encode

    def shifted(self: _ClientDP, update: Update, *rest: Any) -> Any:
        answer, kept = encode(self, update, *rest)
        return replace(answer, modules={n: p.map(lambda t: t * 0.9) for n, p in answer.modules.items()}), kept

    monkeypatch.setattr(_ClientDP, "encode", shifted)
    events: list[Event] = []
    result = resume(tmp_path / "run", events.append)
    assert result.history == []
    lines = [event.data["line"] for event in events if event.kind == "budget"]
    assert lines[0].startswith("round 1 is given up: the privacy budget is spent: this release would bring epsilon to")
    # The given-up round's sums were seen: the summary says what they cost, where no record does.
    assert result.summary["epsilon"] == ClientLedger(tmp_path / "run", config.privacy, 0.5).spent <= limit
    assert result.summary["epsilon"] > 0


def test_a_first_round_that_draws_nobody_is_a_round_like_any_other(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coins come from a secret of the run, so that any run may begin with an empty round."""
    monkeypatch.setattr("fedspan.privacy.secret_file.secrets.randbits", lambda bits: 1)
    federation = {"num_clients": 4, "participation": 0.01, "rounds": 2, "weighting": "equal", "min_success": 1}
    privacy = {"dp": "client", "clip": 0.5, "noise_multiplier": 2.0, "delta": DELTA}
    for engine in ("auto", "sequential"):
        config = settings(bases["bert"], texts, "ffa_lora", federation=federation, privacy=privacy)
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"name": engine})})
        result = run(config, tmp_path / engine)
        assert result.history[0]["num_clients"] == 0
        assert result.summary["epsilon"] > 0
