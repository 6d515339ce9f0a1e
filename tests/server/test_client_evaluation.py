"""Evaluation by the clients: the same figures in one process and between sites, under masks and in the open."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from remote import IDS, Federation, settings
from run_folders import Stop

from fedspan.config import Config
from fedspan.data import load as load_data
from fedspan.data.metric_sums import StatisticsLayout
from fedspan.data.metrics import METRICS
from fedspan.federation.clients import make_clients
from fedspan.federation.held_out import HeldOutTerms
from fedspan.federation.held_out_metrics import left_out_notes
from fedspan.runs.events import Event
from fedspan.runs.execution import resume, run
from fedspan.runs.trained import find_trained
from fedspan.support.errors import FedspanError
from fedspan.wire import protocol

SHARE = {"client_holdout": 0.3}


def judged(base: Path, texts: Path, name: str = "flexlora", /, where: str = "clients", **sections: Any) -> Config:
    """Four clients that judge what they receive on a third of their rows, after each of two rounds."""
    evaluation, data = sections.pop("evaluation", {}), sections.pop("data", {})
    sections["federation"] = {"rounds": 2, **sections.get("federation", {})}
    sections["data"] = {**SHARE, "metrics": ["accuracy", "macro_f1", "auroc"], **data}
    config = settings(base, texts, name, **sections)
    changed = {"where": where, "every": 1, "base": True, **evaluation}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changed)})


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def evaluations(history: list[dict[str, Any]]) -> list[str]:
    """As text, in which NaN equals NaN."""
    return [json.dumps(record["client_evaluation"]) for record in history]


@pytest.mark.parametrize("name", ["flexlora", "fedsa_lora", "flora", "rolora"])
def test_sites_come_to_the_figures_of_one_process(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    """To the bit: patches, alternation, and the personal models of sites that sat rounds out."""
    config = judged(bases["bert"], texts, name, federation={"ranks": 4})
    here = run(config, tmp_path / "here")
    fed = Federation(config, tmp_path)
    there = fed.serve()
    assert evaluations(there) == evaluations(here.history)
    assert [r["eval"] for r in there] == [r["eval"] for r in here.history] != [None, None]
    mine, theirs = (summary_of(folder) for folder in (tmp_path / "here", tmp_path / "run"))
    for key in ("client_evaluation", "federated", "base", "worst_client", "classes", "best"):
        assert mine[key] == theirs[key], key
    assert mine["federated"] is not None
    assert mine["best"]["validation"] == here.history[mine["best"]["round_num"] - 1]["client_evaluation"]["figures"]
    assert mine["client_evaluation"]["clients"] == 4
    assert theirs["clients"][0]["data"] == "own"


def test_the_figures_are_those_of_the_pooled_rows(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Against the evaluation of the final model on all held-out rows at once, as one data set."""
    config = judged(bases["bert"], texts, "flexlora", where="both", federation={"ranks": 4})
    clients = make_clients(load_data(config.data, config.data_seed), config.federation, config.federation_seed, 0.3)
    held = {client.client_id: len(client.holdout) for client in clients}
    result = run(config, tmp_path / "run")
    found = result.summary["client_evaluation"]
    assert found is not None
    assert found["per_client"] is not None
    assert {name: own["rows"] for name, own in found["per_client"].items()} == held
    for name in ("accuracy", "loss"):
        values = [(own["figures"][name], own["rows"]) for own in found["per_client"].values()]
        weighted = sum(x * n for x, n in values) / sum(held.values())
        assert found["figures"][name] == pytest.approx(weighted, rel=1e-12)
        assert found["unweighted"] is not None
        assert found["unweighted"][name] == pytest.approx(sum(x for x, _ in values) / 4, rel=1e-12)
        assert found["spread"] is not None
        assert found["spread"][name] == pytest.approx(float(np.std([x for x, _ in values])), abs=1e-12)
    assert found["worst"] is not None
    assert found["worst"]["value"] == min(own["figures"]["accuracy"] for own in found["per_client"].values())
    # The server's own test data is judged beside it, as ever.
    assert result.summary["server"] is not None
    assert result.summary["metrics"]["own_data"]["accuracy"] == pytest.approx(found["unweighted"]["accuracy"])


@pytest.mark.parametrize("name", ["ffa_lora", "hetlora"])
def test_masked_sums_are_the_open_ones(bases: dict[str, Path], texts: Path, tmp_path: Path, name: str) -> None:
    """To the rounding of the fixed point; the server sees no site's statistics, so that no site is named the worst."""
    clear = judged(bases["bert"], texts, name, federation={"participation": 1.0})
    hidden = judged(bases["bert"], texts, name, federation={"participation": 1.0}, privacy={"secure_sums": True})
    run(hidden, tmp_path / "here")
    fed = Federation(hidden, tmp_path)
    seen: list[dict[str, Any]] = []
    for node, answer in list(fed.transport.handlers.items()):

        def watched(content: bytes, answer: Any = answer) -> bytes:
            reply: bytes = answer(content)
            seen.append(protocol.decode(reply)[0])
            return reply

        fed.transport.handlers[node] = watched
    there = fed.serve()
    mine, theirs = (summary_of(folder)["client_evaluation"] for folder in (tmp_path / "here", tmp_path / "run"))
    assert mine == theirs
    assert not any("statistics" in head for head in seen)
    assert (theirs["worst"], theirs["spread"], theirs["per_client"]) == (None, None, None)
    assert not any(record["rejected"] for record in there)
    fixed = clear.model_copy(update={"privacy": clear.privacy.model_copy(update={"fixed_point": True})})
    run(fixed, tmp_path / "fixed")
    assert summary_of(tmp_path / "fixed")["client_evaluation"] == theirs
    # Of the same models, each client's vector in the open.
    run(clear, tmp_path / "open")
    for name_, value in summary_of(tmp_path / "open")["client_evaluation"]["figures"].items():
        assert theirs["figures"][name_] == pytest.approx(value, abs=1e-3), name_


def test_a_site_that_is_away_is_named_and_the_others_are_judged(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = judged(bases["bert"], texts, "flexlora", evaluation={"base": False}, deployment={"deadline": 2, "wait": 2})
    fed = Federation(config, tmp_path)

    def mishap(node: str, head: dict[str, Any], content: bytes) -> str | None:
        return "" if node == "node-1" and head["kind"] == "evaluate" else None

    fed.transport.mishap = mishap
    found = fed.serve()[0]["client_evaluation"]
    assert found["clients"] == 3
    assert list(found["left_out"]) == ["client-1"]
    assert "did not answer" in found["left_out"]["client-1"]


def test_statistics_that_no_rows_have_are_left_out(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """A site that lies about its counts in the open: more right answers than rows."""
    config = judged(bases["bert"], texts, "flexlora", evaluation={"base": False}, federation={"rounds": 1})
    fed = Federation(config, tmp_path)
    honest = fed.transport.handlers["node-2"]

    def lying(content: bytes) -> bytes:
        reply = honest(content)
        head, tensors = protocol.decode(reply)
        if "statistics" not in head:
            return reply
        vector = tensors[head["statistics"]].numpy().view(np.float64)
        vector[3] = 1e6
        outgoing = protocol.MessageTensors()
        for tensor in tensors:
            outgoing.put(tensor)
        return protocol.encode({k: v for k, v in head.items() if k not in ("schema", "parts")}, outgoing)

    fed.transport.handlers["node-2"] = lying
    (found,) = (record["client_evaluation"] for record in fed.serve())
    assert found["clients"] == 3
    assert "larger than" in found["left_out"]["client-2"]


def test_a_site_answers_no_question_that_its_settings_do_not_know(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """Neither an evaluation where it has agreed to none, nor its own statistics where only sums may be known."""
    asked: list[bytes] = []

    def watch(node: str, head: dict[str, Any], content: bytes) -> None:
        if head["kind"] == "evaluate":
            asked.append(content)

    hidden = judged(bases["bert"], texts, "ffa_lora", privacy={"secure_sums": True}, federation={"rounds": 1})
    fed = Federation(hidden, tmp_path)
    fed.transport.mishap = watch
    fed.serve()
    head, tensors = protocol.decode(asked[-1])
    outgoing = protocol.MessageTensors()
    for tensor in tensors:
        outgoing.put(tensor)
    bare = {k: v for k, v in head.items() if k not in ("schema", "parts", "sum")}
    lines: list[str] = []
    site = fed.sites[IDS[-1]]
    site.notify = lines.append
    assert protocol.decode(site.answer(protocol.encode(bare, outgoing)))[0]["code"] == "own-update"
    # The same message at a site that keeps its rows to itself.
    plain = settings(bases["bert"], texts, "ffa_lora", privacy={"secure_sums": True}, federation={"rounds": 1})
    other = Federation(plain, tmp_path / "other")
    own = {**bare, "terms": other.sites[IDS[0]]._checks._terms}
    answer = other.sites[IDS[0]].answer(protocol.encode(own, outgoing))
    assert protocol.decode(answer)[0]["code"] == "other-settings"


def test_the_clients_rows_find_the_best_round_and_stop_the_run(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = judged(
        bases["bert"], texts, "flexlora", evaluation={"patience": 1, "base": False}, federation={"rounds": 9}
    )
    result = run(config, tmp_path / "run")
    figures = [record["validation"]["accuracy"] for record in result.history]
    assert result.summary["stopped_early"]
    assert figures[-1] <= figures[-2]
    best = result.summary["best"]
    assert best is not None
    assert best["validation"]["accuracy"] == max(figures)
    judged_last = result.summary["client_evaluation"]
    assert judged_last is not None
    assert best["rows"] == judged_last["rows"]
    assert (tmp_path / "run" / "adapter-best").exists()


def test_personal_models_have_a_best_round_and_stop_the_run(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """By the clients' own figures alone: the same round and the same stop in one process and between sites."""
    config = judged(
        bases["bert"], texts, "fedsa_lora", evaluation={"patience": 2, "base": False}, federation={"rounds": 9}
    )
    here = run(config, tmp_path / "here")
    assert here.summary["stopped_early"]
    best = here.summary["best"]
    assert best is not None
    assert best["round_num"] == len(here.history) - 2
    assert best["validation"]["accuracy"] == max(record["validation"]["accuracy"] for record in here.history)
    there = Federation(config, tmp_path).serve()
    assert evaluations(there) == evaluations(here.history)
    theirs = summary_of(tmp_path / "run")
    assert (theirs["best"], theirs["stopped_early"]) == (best, True)
    # Each client's adapter of that round, where it is in this process; nothing that no client has.
    fewer = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": best["round_num"]})})
    run(fewer, tmp_path / "fewer")
    for name in IDS:
        kept, ended, last = (
            (tmp_path / folder / name / "adapter_model.safetensors").read_bytes()
            for folder in ("here/adapters-best", "fewer/adapters", "here/adapters")
        )
        assert kept == ended != last
    assert not list((tmp_path / "run").glob("*-best"))
    assert not (tmp_path / "here" / "adapter-best").exists()


def test_metrics_that_are_no_sums_are_named(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a line before the first round and in the summary; an early stop by one of them is refused."""
    monkeypatch.setitem(METRICS, "math:dist", None)  # or it would stay among them; the run puts the metric here
    config = judged(
        bases["bert"], texts, "flexlora", data={"metrics": ["accuracy", "math:dist"]}, evaluation={"base": False},
        federation={"rounds": 1},
    )  # fmt: skip
    lines: list[str] = []
    result = run(config, tmp_path / "run", lambda event: lines.append(str(event.data.get("line"))))
    (line,) = [line for line in lines if "among the clients' figures" in line]
    assert line.startswith("math:dist is not among the clients' figures: it needs the values of all rows")
    assert line in result.summary["notes"]
    summary: Any = result.summary
    assert list(summary["client_evaluation"]["figures"]) == ["loss", "accuracy"]
    first = judged(
        bases["bert"], texts, "flexlora", where="both", data={"metrics": ["math:dist"]}, evaluation={"patience": 1}
    )
    with pytest.raises(FedspanError, match=r"evaluation.patience = 1: math:dist is not among .* data.metrics one of"):
        run(first, tmp_path / "other")


@pytest.mark.parametrize(
    ("metrics", "num_labels", "dp", "expected"),
    [
        (["accuracy", "macro_f1"], 2, "none", []),
        (["pearson", "spearman"], 1, "none", ["spearman is not among the clients' figures: it needs"]),
        (["exact_match", "bleu"], 0, "example", ["bleu and the loss are not among the clients' figures: they have"]),
        (["accuracy", "m:f", "m:g"], 2, "client", ["m:f and m:g are not among", "the loss is not among"]),
    ],
)
def test_the_reasons_why_metrics_are_left_out(
    bases: dict[str, Path], texts: Path, metrics: list[str], num_labels: int, dp: str, expected: list[str]
) -> None:
    config = judged(bases["bert"], texts)
    config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"dp": dp})})
    layout = StatisticsLayout.of(metrics, num_labels, bounded=dp != "none")
    notes = left_out_notes(config, layout, metrics)
    assert len(notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(notes, expected, strict=True))


def test_a_run_without_held_out_rows_is_refused(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = judged(bases["bert"], texts, "flexlora", data={"client_holdout": 0.0})
    with pytest.raises(FedspanError, match="no client has held-out rows of its own"):
        run(config, tmp_path / "here")
    with pytest.raises(FedspanError, match="has no held-out rows of its own"):
        Federation(config, tmp_path)


def test_a_first_metric_without_sums_is_refused(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """By its name, with those that can: ranks among all values are no sum, and a loss has no bound for noise."""
    config = judged(bases["bert"], texts, "flexlora")
    with pytest.raises(FedspanError, match=r"spearman is not computed from sums; expected .* one of pearson$"):
        HeldOutTerms.of(config, ["spearman"], 1)
    private = config.model_copy(update={"privacy": config.privacy.model_copy(update={"dp": "example"})})
    with pytest.raises(FedspanError, match="perplexity is not computed from sums of bounded terms"):
        HeldOutTerms.of(private, ["perplexity"], 0)


def test_resuming_keeps_the_figures(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = judged(bases["bert"], texts, "fedsa_lora", federation={"ranks": 4})
    whole = run(config, tmp_path / "whole")

    def stop(event: Event) -> None:
        if event.kind == "round":
            raise Stop

    with pytest.raises(Stop):
        run(config, tmp_path / "half", stop)
    again = resume(tmp_path / "half")
    assert evaluations(again.history) == evaluations(whole.history)
    assert again.summary["client_evaluation"] == whole.summary["client_evaluation"]
    assert math.isfinite(whole.summary["federated"] or math.nan)


def test_a_run_that_its_clients_judged_can_be_applied(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Its summary has no figures of the server's state, whose metrics are otherwise those of an evaluation."""
    run(judged(bases["bert"], texts, "flexlora", federation={"rounds": 1}), tmp_path / "run")
    assert "server" not in summary_of(tmp_path / "run")["metrics"]
    assert set(find_trained(tmp_path / "run").metrics) == {"accuracy", "macro_f1", "auroc"}
