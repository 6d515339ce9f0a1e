"""Runs that share a base, its passes and its processes come to what each of them comes to alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from run_folders import check_folder
from safetensors.torch import load_file

from fedspan.client import cohort, length_parts
from fedspan.client.training import Assignment
from fedspan.config import Config
from fedspan.models import packed_rows
from fedspan.runs.events import Event
from fedspan.runs.execution import Result, run
from fedspan.runs.many import run_many
from fedspan.support.errors import FedspanError


def configs(base: Path, texts: Path, *changes: dict[str, Any], method: str = "glora", **sections: Any) -> list[Config]:
    """Full participation and SGD, whose steps do not turn a rounding error into a whole step."""
    found = []
    for change in changes:
        own = {**sections, **change}
        local = {"optimizer": "sgd", "learning_rate": 0.1, **own.pop("local", {})}
        name = own.pop("method", method)
        found.append(tiny.config(base, texts, name, **{"federation": {"ranks": [2, 4, 2, 4]}, "local": local, **own}))
    return found


def results(out: Path) -> dict[str, torch.Tensor]:
    """What the run folder holds for others: products B·A, since equal updates have many factors; and whole weights."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted([*out.rglob("adapter_model.safetensors"), *out.rglob("model.safetensors")]):
        tensors = load_file(path)
        for name, value in tensors.items():
            key = f"{path.parent.relative_to(out)}/{name}"
            if ".lora_A." in name:
                found[key] = tensors[name.replace(".lora_A.", ".lora_B.")] @ value
            elif ".lora_B." not in name:
                found[key] = value
    return found


def close(x: Mapping[str, float] | None, y: Mapping[str, float] | None) -> None:
    assert (x is None) == (y is None)
    assert x is None or y is None or x["loss"] == pytest.approx(y["loss"], rel=1e-4)


def same_to_rounding(together: Result, alone: Result) -> None:
    x, y = results(together.out), results(alone.out)
    assert x.keys() == y.keys()
    for name in y:
        assert (x[name] - y[name]).norm() <= 2e-3 * y[name].norm(), name
    for one, other in zip(together.history, alone.history, strict=True):
        close(one["eval"], other["eval"])
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        for key in ("num_clients", "bytes_up", "bytes_down", "rejected"):
            assert one[key] == other[key]
    for key in ("base", "federated", "server"):
        one, other = together.summary[key], alone.summary[key]
        assert one == (other if other is None else pytest.approx(other, rel=1e-4))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(30) % 3)
    return path


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The seeds of the runs whose clients shared each pass."""
    seen: list[set[int]] = []
    original = cohort.work

    def work(model: Any, data: Any, group: Sequence[Assignment], *args: Any) -> Any:
        seen.append({a.terms.seed for a in group if a.terms is not None})
        return original(model, data, group, *args)

    monkeypatch.setattr(cohort, "work", work)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "bert", "vit"])
def test_runs_at_once_are_the_runs_alone(
    bases: dict[str, Path],
    texts: Path,
    instructions: Path,
    pictures: Path,
    tmp_path: Path,
    base: str,
    passes: list[set[int]],
) -> None:
    """Other seeds (data, clients, heads), rates, batches and ranks: all in the same passes."""
    data = {"llama": instructions, "bert": texts, "vit": pictures}[base]
    chosen = configs(
        bases[base],
        data,
        {"seed": 3},
        {"seed": 4, "local": {"learning_rate": 0.03, "warmup": 0.5}},
        {"seed": 5, "local": {"batch_size": 3, "steps": 3}, "method": "flexlora"},
        engine={"name": "cohort", "cohort_size": 16},
    )
    together = run_many(chosen, [tmp_path / f"run-{k}" for k in range(3)])
    assert {3, 4, 5} in passes
    for k, config in enumerate(chosen):
        alone = run(config, tmp_path / f"alone-{k}")
        same_to_rounding(together[k], alone)
        check_folder(together[k], config)


def test_rows_lie_end_to_end_as_in_the_run_alone_whichever_run_comes_first(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one row are narrow, and those of eight are packed; to the bit, where the runs' passes are apart."""
    monkeypatch.setattr(length_parts, "WIDEST", tiny.SIZE * 48)  # a row of the most tokens
    packed: list[int] = []
    packing = packed_rows.PackedRows.packing

    def noted(self: packed_rows.PackedRows, batch: dict[str, torch.Tensor]) -> Any:
        packed.append(len(batch["labels"]))
        return packing(self, batch)

    monkeypatch.setattr(packed_rows.PackedRows, "packing", noted)
    narrow, wide = configs(
        bases["llama"],
        instructions,
        *({"local": {"batch_size": size}} for size in (1, 8)),
        engine={"name": "sequential", "workers": 1},
        evaluation={"base": False, "local": False, "max_new_tokens": 1},
    )
    alone = [run(config, tmp_path / f"alone-{k}") for k, config in enumerate((narrow, wide))]
    assert 8 in packed
    together = run_many((narrow, wide), [tmp_path / f"run-{k}" for k in range(2)], apart=True)
    for one, other in zip(together, alone, strict=True):
        assert [record["train_loss"] for record in one.history] == [record["train_loss"] for record in other.history]
        tiny.same(results(one.out), results(other.out))


@pytest.mark.slow
def test_every_run_has_its_own_optimizer_and_clipping(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """The clients of each share passes, and the base is read as the first of them asks for it."""
    chosen = configs(
        bases["bert"],
        texts,
        {},
        {"local": {"clip_norm": 0.02}},
        {"local": {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.5}},
        engine={"name": "cohort"},
    )
    together = run_many(chosen, [tmp_path / f"run-{k}" for k in range(3)])
    for k, config in enumerate(chosen):
        same_to_rounding(together[k], run(config, tmp_path / f"alone-{k}"))


@pytest.mark.slow
def test_runs_whose_data_is_encoded_in_other_ways(instructions: Path, tmp_path: Path) -> None:
    """A template, the base's chat template and conversations end and count their answers in ways of their own."""
    base = tiny.save("llama", tmp_path / "base")
    stated = json.loads((base / "tokenizer_config.json").read_text())
    turns = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"
    stated["chat_template"] = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    (base / "tokenizer_config.json").write_text(json.dumps(stated))
    talks = [
        {"messages": [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]}
        for row in tiny.questions()
    ]
    spoken = {"data": {"train": [str(tiny.write_jsonl(tmp_path / "talks.jsonl", talks))]}}
    chat = {"data": {"train": [str(instructions)], "template": "chat"}}
    chosen = configs(base, instructions, {}, chat, spoken, federation={"rounds": 1, "ranks": 2})
    together = run_many(chosen, [tmp_path / f"run-{k}" for k in range(3)])
    for k, config in enumerate(chosen):
        same_to_rounding(together[k], run(config, tmp_path / f"alone-{k}"))


@pytest.mark.slow
def test_methods_and_bases_that_cannot_share(
    bases: dict[str, Path], texts: Path, tmp_path: Path, passes: list[set[int]]
) -> None:
    """Whole weights, a control, personal models, another base: each as alone, in the same call, also in processes."""
    changes = (
        {"method": "fedftg", "local": {"optimizer": "adamw", "learning_rate": 1e-3}},
        {"method": "local"},
        {"method": "fedsa_lora", "federation": {"ranks": 2}},
        {"method": "scaffold", "seed": 9},
        {"method": "flora"},
    )
    chosen = configs(bases["bert"], texts, *changes, engine={"workers": 2})
    together = run_many(chosen, [tmp_path / f"run-{k}" for k in range(5)])
    for k, config in enumerate(chosen):
        same_to_rounding(together[k], run(config, tmp_path / f"alone-{k}"))


def test_a_run_that_was_stopped_goes_on_with_the_others_or_alone(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    chosen = configs(bases["bert"], texts, {"seed": 3}, {"seed": 4}, federation={"rounds": 3, "ranks": 2})
    outs = [tmp_path / "a", tmp_path / "b"]

    def stop(number: int, event: Event) -> None:
        if event.kind == "round" and number == 1 and event.data["record"]["round_num"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_many(chosen, outs, stop)
    done = [len((out / "metrics.jsonl").read_text().splitlines()) for out in outs]
    assert max(done) == 2
    again = run_many(chosen, outs)
    for k, config in enumerate(chosen):
        same_to_rounding(again[k], run(config, tmp_path / f"alone-{k}"))
        assert [json.loads(line)["round_num"] for line in (outs[k] / "metrics.jsonl").open()] == [1, 2, 3]


def test_a_bad_run_is_refused_before_any_of_them_trains(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    good, bad = configs(bases["bert"], texts, {}, {"federation": {"ranks": 99}})
    seen: list[Event] = []
    with pytest.raises(FedspanError, match=r"^run 2 of 3: .*rank"):
        run_many(
            [good, bad, good],
            [tmp_path / "a", tmp_path / "b", tmp_path / "c"],
            lambda number, event: seen.append(event),
        )
    assert not seen
    assert not list(tmp_path.glob("[abc]"))
    with pytest.raises(FedspanError, match="two runs in one folder"):
        run_many([good, good], [tmp_path / "a", tmp_path / "a"])
    with pytest.raises(FedspanError, match="1 folders for 2 runs"):
        run_many([good, good], [tmp_path / "a"])
    run(good, tmp_path / "a")
    other = good.model_copy(update={"seed": 8})
    with pytest.raises(FedspanError, match="holds a run of other settings"):
        run_many([other], [tmp_path / "a"])


def test_a_run_that_fails_does_not_stop_the_others(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rate diverges; the other's result is as alone, and the error names the run."""
    good, bad = configs(bases["bert"], texts, {}, {"local": {"learning_rate": 1e38}}, federation={"rounds": 3})
    with pytest.raises(FedspanError, match=r"^run 2 of 2: "):
        run_many([good, bad], [tmp_path / "a", tmp_path / "b"])
    x, y = results(tmp_path / "a"), results(run(good, tmp_path / "alone").out)
    assert x.keys() == y.keys() != set()
    for name in y:
        assert (x[name] - y[name]).norm() <= 2e-3 * y[name].norm(), name
    assert (tmp_path / "a" / "summary.json").exists()
    assert not (tmp_path / "b" / "summary.json").exists()
