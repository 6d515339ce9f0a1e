"""Whole runs on tiny models and real files: what they leave behind, and that no interruption changes a bit of it."""

from __future__ import annotations

import errno
import os
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from run_folders import (
    NAMES,
    Stop,
    StopAt,
    check_folder,
    clients_of,
    same_outcome,
    strict,
    trains,
)
from safetensors.torch import load_file

from fedspan.client.training import Assignment, LocalResult
from fedspan.config import load as load_config
from fedspan.data import load as load_data
from fedspan.federation.rounds import RoundFailed
from fedspan.methods import create
from fedspan.methods.messages import Factors, Request
from fedspan.runs import checkpoint
from fedspan.runs.context import RunContext
from fedspan.runs.events import Event
from fedspan.runs.execution import new_folder, resume, run
from fedspan.runs.folder_lock import FILES
from fedspan.runs.loop import MethodRun
from fedspan.support.errors import FedspanError

SLOW = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_are_federated_too(bases: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pictures, labels=np.arange(30) % 3)
    sections = {"federation": {"ranks": [1, 2, 4, 8]}, "model": {"dtype": dtype}}
    config = tiny.config(bases["vit"], tmp_path / "images.npz", "glora", **sections)
    check_folder(run(config, tmp_path / "run"), config)


@pytest.mark.parametrize(("name", "base"), [("flora", "bert"), ("fedex_lora", "llama"), ("hetlora", "gpt2")])
def test_a_half_precision_base_carries_adapters_patches_and_heads_in_float32(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str, base: str
) -> None:
    config = tiny.config(bases[base], texts, name, model={"dtype": "bfloat16"})
    result = run(config, tmp_path / "run")
    check_folder(result, config)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["glora", "flora", "fedftg"])
def test_what_other_libraries_load_scores_what_the_summary_says(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    import transformers as t
    from peft import PeftModel

    config = tiny.config(bases["bert"], texts, name, local={"steps": 8}, federation={"rounds": 3})
    result = run(config, tmp_path / "run")
    corpus, tokenizer = load_data(config.data, config.seed), tiny.tokenizer()
    auto = t.AutoModelForSequenceClassification
    if trains(name) == "adapter":
        base = auto.from_pretrained(str(bases["bert"]), num_labels=3)
        model = PeftModel.from_pretrained(base, str(result.adapter)).eval()
    else:
        model = auto.from_pretrained(str(tmp_path / "run" / "model"))
        assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for (text,) in corpus.test.inputs]
    with torch.no_grad():
        found = [int(model(input_ids=row).logits.argmax()) for row in rows]
    right = np.mean(np.array(found) == np.array(corpus.test.targets))
    assert result.summary["server"] == pytest.approx(right)
    assert result.summary["server"] > result.summary["base"]


@pytest.mark.parametrize("name", ["glora", "hetlora", "fedftg"])
def test_the_same_seed_gives_the_same_bits(bases: dict[str, Path], texts: Path, tmp_path: Path, name: str) -> None:
    config = tiny.config(bases["bert"], texts, name, adapter={"dropout": 0.2})
    run(config, tmp_path / "one")
    torch.manual_seed(123)
    np.random.seed(5)
    run(config, tmp_path / "two")
    same_outcome(tmp_path / "one", tmp_path / "two")
    other = run(config.model_copy(update={"seed": 4}), tmp_path / "other")
    first = strict((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[0])
    assert other.history[0]["train_loss"] != first["train_loss"]


@pytest.mark.parametrize("name", ["glora", SLOW("flora"), SLOW("hetlora"), "fedftg", "local"])
def test_interrupted_again_and_again_and_resumed_is_uninterrupted(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    """Stopped at the base, within a round, between rounds, in the local control and at the end: the same bits."""
    config = tiny.config(bases["bert"], texts, name, evaluation={"local": True}, adapter={"dropout": 0.2})
    run(config, tmp_path / "whole")
    out = tmp_path / "stopped"
    with pytest.raises(Stop):
        run(config, out, StopAt(2))
    stopped = []
    for count in (1, 4, 6, 5, 7, 6, 7, 6, 8):
        stop = StopAt(count)
        try:
            resume(out, stop)
        except Stop:
            stopped.append(stop.last)
            continue
        break
    resume(out)
    same_outcome(tmp_path / "whole", out)
    assert set(stopped) >= {"start", "client federation", "round federation", "phase final"}
    assert name == "local" or set(stopped) >= {"client local", "round local"}


def test_a_finished_run_is_resumed_without_training(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = tiny.config(bases["bert"], texts, "fedit")
    run(config, tmp_path / "run")
    before = strict((tmp_path / "run" / "summary.json").read_text())
    kinds: list[str] = []
    result = resume(tmp_path / "run", lambda event: kinds.append(event.kind))
    assert "client" not in kinds
    assert "round" not in kinds
    assert result.summary["federated"] == before["federated"]
    assert len(result.history) == 2


def test_a_full_disk_ends_the_run_and_leaves_what_can_be_resumed(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = tiny.config(bases["bert"], texts, "flora")
    run(config, tmp_path / "whole")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patched:

        def fill_up(event: Event) -> None:
            if event.kind == "client" and event.data["round_num"] == 2:
                patched.setattr(os, "fsync", full)

        with pytest.raises(OSError, match="No space left"):
            run(config, tmp_path / "full", fill_up)
    assert not list((tmp_path / "full").rglob("*.partial"))
    assert checkpoint.read(tmp_path / "full" / "checkpoint" / "federation.safetensors").state.round_num == 1
    resume(tmp_path / "full")
    same_outcome(tmp_path / "whole", tmp_path / "full")


def spoil(*when: tuple[str, int]) -> Any:
    """What puts a NaN into the update of these clients in these rounds."""

    def change(assignment: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        if (assignment.client_id, round_num) not in when:
            return result
        head = {name: t * torch.nan for name, t in result.update.dense.items()}
        return replace(result, update=replace(result.update, dense=head))

    return change


def test_a_broken_client_is_reported_and_the_run_goes_on(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(bases["bert"], texts, "glora", federation={"participation": 1.0})
    tiny.intercept(monkeypatch, spoil(("client-1", 0), ("client-2", 1)))
    result = run(config, tmp_path / "run")
    assert [list(r["rejected"]) for r in result.history] == [["client-1"], ["client-2"]]
    assert [r["num_clients"] for r in result.history] == [3, 3]
    assert result.summary["totals"]["rejected"] == 2
    assert result.adapter is not None
    assert all(bool(t.isfinite().all()) for t in load_file(result.adapter / "adapter_model.safetensors").values())


def test_too_few_valid_updates_end_the_run_and_it_can_be_resumed(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = {"participation": 1.0, "min_success": 3}
    config = tiny.config(bases["bert"], texts, "hetlora", federation=federation)
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        tiny.intercept(patched, spoil(("client-1", 1), ("client-2", 1)))
        with pytest.raises(RoundFailed, match="round 2: 2 valid updates") as caught:
            run(config, tmp_path / "ended")
        assert "\n" not in str(caught.value)
    assert len((tmp_path / "ended" / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "ended" / "summary.json").exists()
    resume(tmp_path / "ended")
    same_outcome(tmp_path / "whole", tmp_path / "ended")


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_without_bounds_ends_cleanly(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    config = tiny.config(bases["bert"], texts, name, local={"learning_rate": 1e30, "steps": 3})
    with pytest.raises(ValueError, match=r"round 1: 0 valid updates.*holds NaN or infinity") as caught:
        run(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="round 1: 0 valid updates"):
        resume(tmp_path / "run")


def test_figures_that_diverge_are_written_as_null(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """One step of 1e30 is finite, and what it leads to is not: the files stay JSON."""
    config = tiny.config(bases["bert"], texts, "local", local={"learning_rate": 1e30, "steps": 1})
    result = run(config, tmp_path / "run")
    assert not np.isfinite(result.history[-1]["eval"]["loss"])
    assert result.summary["metrics"]["clients"]["loss"] is None
    assert strict((tmp_path / "run" / "summary.json").read_text())["metrics"]["clients"]["loss"] is None
    assert strict((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["eval"]["loss"] is None


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, list[int]]]:
    """(client, steps, rank, rows) of every training that the engine asks for."""
    seen: list[tuple[str, int, int, list[int]]] = []

    def look(a: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        ranks = {f.rank for f in a.broadcast.adapter.values()}
        assert result.steps == a.steps
        seen.append((a.client_id, a.steps, max(ranks, default=0), a.rows.tolist()))
        return result

    tiny.intercept(monkeypatch, look)
    return seen


@pytest.mark.parametrize("local", [{"steps": 2}, {"epochs": 1, "steps": None}])
def test_the_centralised_control_trains_on_everything_as_long_as_the_cohort(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: dict[str, Any]
) -> None:
    seen = watch(monkeypatch)
    federation = {"partition": "by_field", "ranks": [1, 2, 8, 4]}
    data = {"field_column": "site", "client_holdout": 0.25}
    sections = {"local": local, "federation": federation, "data": data}
    config = tiny.config(bases["bert"], texts, "centralised", **sections)
    result = run(config, tmp_path / "pooled")
    (client, steps, rank, rows), (_, again, _, _) = seen
    people = clients_of(config)
    assert (client, rank) == ("all", 8)
    assert sorted(rows) == sorted(int(i) for c in people for i in c.indices)
    assert (result.summary["totals"]["bytes_down"], result.history[0]["num_clients"]) == (0, 1)
    seen.clear()
    run(tiny.config(bases["bert"], texts, "glora", **sections), tmp_path / "federated")
    assert [steps, again] == [seen[0][1] + seen[1][1], seen[2][1] + seen[3][1]]
    own = result.summary["metrics"]["own_data"]["loss"]
    context = RunContext.prepare(config, create(**config.method), tmp_path / "none", lambda event: None)
    saved = replace(context, out=result.out)
    main = MethodRun.open(saved, "federation", context.method, context.clients)
    whole = context.method.broadcast(main.saved.state, Request(None))
    found = context.evaluate([context.evaluation_task(whole, split="train", rows=c.holdout) for c in people])
    assert own == pytest.approx(sum(f["loss"] for f in found) / len(found))


def test_nothing_travels_in_the_local_control(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    result = run(tiny.config(bases["bert"], texts, "local"), tmp_path / "run")
    assert (result.summary["totals"]["bytes_up"], result.summary["totals"]["bytes_down"]) == (0, 0)


@pytest.mark.parametrize("name", ["glora", "fedavg"])
def test_the_local_control_of_a_run_is_the_method_local_on_the_same_schedule(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen = watch(monkeypatch)
    result = run(tiny.config(bases["bert"], texts, name, evaluation={"local": True}), tmp_path / "both")
    assert [entry[:2] for entry in seen[:4]] == [entry[:2] for entry in seen[4:]]
    alone = tiny.config(bases["bert"], texts, "local").model_copy(
        update={"method": {"name": "local", "trains": trains(name)}}
    )
    assert run(alone, tmp_path / "alone").summary["federated"] == result.summary["local"]


def test_evaluation_between_rounds_is_as_often_as_asked(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    evaluation = {"every": 2, "max_examples": 3, "base": False, "per_rank": False}
    config = tiny.config(bases["bert"], texts, "fedit", federation={"rounds": 3}, evaluation=evaluation)
    result = run(config, tmp_path / "run")
    assert [r["eval"] is None for r in result.history] == [True, False, False]
    assert result.summary["base"] is None
    assert result.summary["per_rank"] == {}
    assert {r["eval"]["accuracy"] * 3 % 1 for r in result.history if r["eval"]} == {0.0}


def test_a_decoder_without_padding_token_classifies_alike_at_every_batch_size(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    base = tiny.save("gpt2", tmp_path / "base", pad_token_id=None)
    tiny.tokenizer(pad=False).save_pretrained(str(base))
    config = tiny.config(base, texts, "fedit", adapter={"target_modules": ["c_attn"]})
    context = RunContext.prepare(config, create(**config.method), tmp_path / "run", lambda event: None)
    sent = MethodRun.open(context, "federation", context.method, context.clients).initial()
    figures = []
    for size in (1, 16):
        context.executor.context.evaluation = config.evaluation.model_copy(update={"batch_size": size})
        figures += context.evaluate([context.evaluation_task(sent)])
    assert figures[0] == pytest.approx(figures[1], rel=2e-6)


def test_an_output_folder_with_something_in_it_is_refused(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = tiny.config(bases["bert"], texts, "fedit")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    for name, hint in (("used", "expected a new folder"), ("file", "expected a new folder"), ("run", "fedspan resume")):
        with pytest.raises(ValueError, match=hint):
            run(config, tmp_path / name)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    run(config, tmp_path / "empty")


def test_of_two_runs_into_one_folder_one_is_refused(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found the folder free; the first has written its settings since."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("seed = 1\n")
    monkeypatch.setattr("fedspan.runs.execution.new_folder", lambda config, out: folder)
    with pytest.raises(FedspanError, match="run was taken by another run meanwhile: expected a new folder"):
        run(tiny.config(bases["bert"], texts), folder)
    assert {path.name for path in folder.iterdir()} - FILES == {"config.toml"}
    assert (folder / "config.toml").read_text() == "seed = 1\n"


def test_a_folder_without_a_run_is_not_resumed(tmp_path: Path) -> None:
    for path, how in ((tmp_path, "holds no run"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(ValueError, match=how):
            resume(path)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fedit", {"federation": {"ranks": [2, 4, 4, 2]}}, r"one rank for all clients.*\[2, 4\].*glora.*ffa_lora.*hetlora"),
    ("fedex_lora", {"federation": {"ranks": [2, 4, 4, 2]}}, "methods that take mixed ranks"),
    ("glora", {"federation": {"ranks": 33}}, "rank 33 is above"),
    ("glora", {"federation": {"num_clients": 99}}, "99 clients"),
    ("glora", {"federation": {"ranks": [2, 4]}}, "2 ranks for 4 clients"),
    ("glora", {"federation": {"partition": "preset", "num_clients": 3}}, "preset"),
    ("glora", {"federation": {"partition": "by_field"}}, "needs data.field_column"),
    ("glora", {"federation": {"min_success": 3}}, "min_success = 3, but only 2 clients are sampled per round"),
    ("glora", {"federation": {"min_clients": 5}}, "min_clients = 5"),
    ("glora", {"adapter": {"target_modules": ["nope"]}}, "'nope' matches no linear layer.*query"),
    ("fedftg", {"method": {"galore_rank": 33}}, "galore_rank = 33: .* is 32×32, expected at most 32"),
    ("glora", {"model": {"name": "nowhere/at/all"}}, r"model\.name"),
    ("glora", {"data": {"label_column": "lable"}}, "label"),
    ("glora", {"device": "abacus"}, "device = 'abacus'"),
    ("glora", {"device": "meta"}, "device = 'meta' cannot be used here"),
]


@pytest.mark.parametrize(("name", "sections", "message"), REFUSED)
def test_what_cannot_run_is_refused_before_anything_is_written(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str, sections: dict[str, Any], message: str
) -> None:
    events: list[str] = []
    with pytest.raises(ValueError, match=message) as caught:
        run(tiny.config(bases["bert"], texts, name, **sections), tmp_path / "run", lambda e: events.append(e.kind))
    assert "\n" not in str(caught.value)
    assert "phase" not in events
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not (tmp_path / "run").exists()


def test_clients_without_data_are_named_or_dropped(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = tiny.words()
    files = [
        str(tiny.write_jsonl(tmp_path / f"{i}.jsonl", part))
        for i, part in enumerate((rows[:20], rows[20:21], rows[21:]))
    ]
    data = {"train": files, "client_holdout": 0.6}
    federation = {"partition": "files", "num_clients": 3, "participation": 1.0, "ranks": [1, 2, 3]}
    base = bases["bert"]
    config = tiny.config(base, tmp_path / "0.jsonl", "hetlora", data=data, federation=federation)
    with pytest.raises(ValueError, match=r"^1 got no data.*drop_empty"):
        run(config, tmp_path / "run")
    dropped = {**federation, "drop_empty": True}
    result = run(tiny.config(base, tmp_path / "0.jsonl", "hetlora", data=data, federation=dropped), tmp_path / "run")
    assert [(c["client_id"], c["rank"]) for c in result.summary["clients"]] == [("0", 1), ("2", 3)]
    assert [r["num_clients"] for r in result.history] == [2, 2]


def test_events_tell_the_whole_story(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    run(tiny.config(bases["bert"], texts, "fedit", evaluation={"local": True}), tmp_path / "run", events.append)
    story = [(e.kind, e.data.get("phase")) for e in events if e.kind != "client"]
    rounds = [("round", "federation")] * 2
    assert story == [
        ("start", None),
        ("phase", "base"),
        ("phase", "federation"),
        *rounds,
        ("phase", "local"),
        *[("round", "local")] * 2,
        ("phase", "final"),
        ("end", None),
    ]
    clients = [e.data for e in events if e.kind == "client"]
    assert [(c["round_num"], c["done"], c["cohort"]) for c in clients] == [
        (1, 1, 2),
        (1, 2, 2),
        (2, 1, 2),
        (2, 2, 2),
    ] * 2
    start = events[0].data
    assert start["trained_parameters"] < start["base_parameters"]


def test_the_config_of_a_run_is_the_whole_truth(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Every key is written, and reading the file gives the same run."""
    config = tiny.config(bases["bert"], texts, "glora", method={"server_rank": 3, "basis": "energy"})
    run(config, tmp_path / "run")
    tree = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert tree["method"] == {"name": "glora", "server_rank": 3, "basis": "energy"}
    assert tree["local"]["weight_decay"] == 0.0
    run(load_config(tmp_path / "run" / "config.toml"), tmp_path / "again")
    same_outcome(tmp_path / "run", tmp_path / "again")


def test_factors_travel_with_the_scaling_of_their_rank(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """α/r of each client's own rank, α/√r under rsLoRA, in what is trained and in what comes back."""
    found: set[tuple[int, float]] = set()

    def look(a: Assignment, result: LocalResult, round_num: int) -> LocalResult:
        for f in (*a.broadcast.adapter.values(), *result.update.modules.values()):
            assert isinstance(f, Factors)
            found.add((f.rank, f.scaling))
        return result

    tiny.intercept(monkeypatch, look)
    for rslora in (False, True):
        adapter, federation = {"rslora": rslora}, {"ranks": [1, 2, 4, 8], "participation": 1.0, "rounds": 1}
        config = tiny.config(bases["bert"], texts, "flexlora", adapter=adapter, federation=federation)
        run(config, tmp_path / f"run{rslora}")
    assert found == {(r, 8.0 / r) for r in (1, 2, 4, 8)} | {(r, 8.0 / r**0.5) for r in (1, 2, 4, 8)}


class Folder:
    """A path of somebody else's library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_paths_may_be_strings_or_any_path_like_object(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = tiny.config(bases["bert"], texts, "fedit", federation={"rounds": 1})
    for out in (str(tmp_path / "string"), Folder(tmp_path / "object")):
        folder = Path(out)
        assert run(config, out).out == folder == resume(out).out
        assert new_folder(config, f"{folder}-new") == Path(f"{folder}-new")
        with pytest.raises(ValueError, match="exists and is not empty"):
            run(config, out)
        saved = checkpoint.read(folder / "checkpoint" / "federation.safetensors")
        checkpoint.write(str(tmp_path / "copy"), saved)
        assert checkpoint.read(str(tmp_path / "copy")).state.round_num == 1
